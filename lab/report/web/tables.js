/* Text, numbers, tables and form fields, used by every section */
const MANY = 30;  // longer tables are folded, and longer lists get a filter
const FIRST_CURVES = 6;  // shown at first
const FIRST_CALIBRATED = 3;
const SMALL_IMAGE = 64;  // pixels; smaller images are enlarged without smoothing
const PAPER = [400, 600, 260];  // pixels: width of a printed chart: side by side, single, in a card
const DASH = "–";  // for missing values
const COLORS = 6;
const DASHES = ["none", "7 3", "2 3", "10 3 2 3"];
const SYMBOLS = [  // centered on the origin
  "M-4,0a4,4 0 1 0 8,0a4,4 0 1 0 -8,0z", "M-3.6,-3.6h7.2v7.2h-7.2z",
  "M0,-5.2l5.2,5.2l-5.2,5.2l-5.2,-5.2z", "M0,-5l4.8,8.4h-9.6z",
];
const QUANTITIES = {
  val_accuracy: "validation accuracy", train_accuracy: "training accuracy",
  val_loss: "validation loss", train_loss: "training loss",
};

const hasOwn = data.runs.some((run) => !run.reference);
const hasReferences = data.runs.some((run) => run.reference);
const showing = { references: !hasOwn };  // whether the sections include reference runs
const visible = (items) => items.filter((one) => showing.references || !one.reference);
const allRuns = () => visible(data.runs).sort((a, b) => a.reference - b.reference);  // own first
const finished = () => allRuns().filter((run) => run.state === "finished");
const isSweep = (run) => run.task.startsWith("Sweep ");
const kindColor = (kind) => `var(--models-${kind.toLowerCase()})`;
const charts = [];  // functions that draw the charts, called when the page has its width

const box = (className, ...children) => element("div", { className }, ...children);
const note = (...children) => element("p", { className: "quiet" }, ...children);
const fileLink = (name, href) => element("a", { href }, words(name));
const folded = (summary, ...children) =>
  element("details", {}, element("summary", {}, ...summary), ...children);

/* Text from a record, isolated so that right-to-left text does not affect its surroundings. Names
   of runs and files may break after "_" and "/", but "p = 0.02" and "97 %" stay on one line. */
function words(text) {
  const made = element("bdi");
  const unbroken = String(text ?? DASH).replace(/ (?=[%=<])|(?<=[=<]) /g, "\u00a0");
  unbroken.split(/(?<=[_/])/).forEach((part, place) => {
    made.append(...(place > 0 ? [element("wbr"), part] : [part]));
  });
  return made;
}

const sentences = (text) => (text ? [element("p", {}, words(text))] : []);

function grouped(items, keyOf) {
  const groups = new Map();
  for (const item of items) {
    const key = keyOf(item);
    if (!groups.has(key)) groups.set(key, []);
    groups.get(key).push(item);
  }
  return groups;
}

/* Formatting numbers */

function number(value, digits = 3) {
  if (value == null) return DASH;
  if (value !== 0 && Math.abs(value) < 1e-3) return String(Number(value.toPrecision(digits)));
  if (Math.abs(value) >= 1000) return value.toLocaleString("en", { maximumFractionDigits: 0 });
  return value.toLocaleString("en", { maximumSignificantDigits: digits });
}

function compact(value) {
  if (value == null) return DASH;
  return value.toLocaleString("en", { maximumSignificantDigits: 3, notation: "compact" });
}

function percent(fraction, digits = 2) {
  if (fraction == null) return DASH;
  const exactly = { minimumFractionDigits: digits, maximumFractionDigits: digits };
  return (100 * fraction).toLocaleString("en", exactly);
}

const plural = (count, noun, ending = "s") =>
  `${number(count)} ${noun}${count === 1 ? "" : ending}`;
const probability = (p) => (p !== 0 && p < 1e-3 ? p.toExponential(1) : number(p, 2));
const interval = ({ low, high }) =>
  low == null ? "" : ` (${percent(low, 1)} to ${percent(high, 1)})`;

/* Names of runs */

const plainName = (run) => (run.reference ? `${run.name} (reference)` : run.name);
const describeSet = (name, set) => (set == null ? name :
  `${name} (${plural(set.classes.length, "class", "es")}, ${plural(set.images, "test image")})`);
const setName = (run) => describeSet(run.dataset, data.test_sets[run.test_set]);

function badges(run) {
  const texts = [run.reference && "reference", run.state !== "finished" && run.state];
  return texts.filter(Boolean).map((text) => element("span", { className: "badge" }, text));
}

const runName = (run) => element("span", {}, words(run.name), ...badges(run));

function runLink(id, name) {
  const link = element("a", { href: `#run-${id}` }, words(name ?? data.runs[id].name));
  return element("span", {}, link, ...(name === undefined ? badges(data.runs[id]) : []));
}

/* What the browser keeps for this page; some browsers keep nothing for local files. */
const storageKey = (name) => `vit-lab ${name}${name === "theme" ? "" : ` ${location.pathname}`}`;

function remembered(name) {
  try { return localStorage.getItem(storageKey(name)); } catch { return null; }
}

function remember(name, value) {
  try { localStorage.setItem(storageKey(name), value); } catch { return false; }
  return true;
}

/* Sortable tables. A column has a name, value(row) to sort by, show(row) to display, number:
   whether its values are numbers, and descending: whether the first click puts the largest value
   on top. */

const textColumn = (name, value, show = (row) => words(value(row))) => ({ name, value, show });
const numberColumn = (name, key, format = (value) => number(value)) =>
  ({ name, value: (row) => row[key], show: (row) => format(row[key]), number: true });
const percentColumn = (name, key) => numberColumn(name, key, (fraction) => percent(fraction));
const bestFirst = (column) => ({ ...column, descending: true });
const accuracyColumn = {
  ...bestFirst(percentColumn("test accuracy in % (95 % interval)", "accuracy")),
  show: (row) => (row.accuracy == null ? DASH : percent(row.accuracy) + interval(row)),
};
const meanColumn = { ...accuracyColumn, name: "test accuracy in % (interval or ± std)" };
const collator = new Intl.Collator("en", { numeric: true });

/* Compares a with b; missing values sort last in both directions. */
function compare(a, b, direction) {
  if (a == null || b == null) return (a == null) - (b == null);
  const numbers = typeof a === "number" && typeof b === "number";
  return direction * (numbers ? a - b : collator.compare(String(a), String(b)));
}

function plainTable(label, heads, rows) {
  const head = element("thead", {}, element("tr", {}, ...heads));
  const table = element("table", { ariaLabel: label }, head, element("tbody", {}, ...rows));
  return box("scroller", table);
}

function sortingTable(label, columns, rows) {
  const items = rows.map((row) => {
    const cells = columns.map((column, place) => {
      const className = column.number ? "number" : place === 0 ? "name" : "";
      const cell = element(place === 0 ? "th" : "td", { className }, column.show(row));
      if (place === 0) cell.scope = "row";
      return cell;
    });
    return { node: element("tr", {}, ...cells), row };
  });
  const heads = columns.map((column) => {
    const button = element("button", { type: "button" }, column.name);
    const className = column.number ? "number" : "";
    const head = element("th", { scope: "col", className }, button);
    button.addEventListener("click", () => {
      const now = head.ariaSort;
      const direction = (now ? now === "descending" : !column.descending) ? 1 : -1;
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", direction === 1 ? "ascending" : "descending");
      const key = (item) => column.value(item.row);
      const sorted = [...items].sort((a, b) => compare(key(a), key(b), direction));
      sorted.forEach((item) => items[0].node.parentNode.append(item.node));
    });
    return head;
  });
  return { node: plainTable(label, heads, items.map((item) => item.node)), items };
}

/* A field that hides the runs that lack one of the words typed.
   groups: [{node, items: [{node, row}]}] */
function filterField(label, groups) {
  const field = element("input", { type: "search", autocomplete: "off" });
  const status = element("output", { className: "quiet" });
  const all = groups.flatMap((group) => group.items);
  const texts = new Map(all.map((item) => {
    const { name, task, dataset, model } = item.row;
    return [item, [name, task, dataset, model].join(" ").toLowerCase()];
  }));
  field.addEventListener("input", () => {
    const wanted = field.value.toLowerCase().split(/\s+/).filter(Boolean);
    for (const { node, items } of groups) {
      for (const item of items) {
        item.node.hidden = !wanted.every((word) => texts.get(item).includes(word));
      }
      node.hidden = items.every((item) => item.node.hidden);
      if (wanted.length > 0 && node.localName === "details") node.open = true;
    }
    const left = all.filter((item) => !item.node.hidden).length;
    status.textContent = wanted.length > 0 ? `${number(left)} of ${plural(all.length, "run")}` : "";
  });
  return element("p", { className: "choices screen" }, element("label", {}, label, field), status);
}

/* The runs of a task under a heading; many runs are folded. */
function taskBox(task, count, ...children) {
  const heading = element("h3", {}, words(task));
  if (count <= MANY) return box("", heading, ...children);
  const size = element("span", { className: "quiet" }, ` ${plural(count, "run")}`);
  return folded([heading, size], ...children);
}

/* Form fields */

const option = (value, name) => element("option", { value }, name);

function select(label, options, changed) {
  const made = element("select", { autocomplete: "off" }, ...options);
  made.addEventListener("change", () => changed(made.value));
  return element("label", {}, label, made);
}

/* Checkboxes for runs. A run keeps its slot, and so its color, as long as it is checked. */
function chooser(candidates, first, changed) {
  const slots = new Map();
  const take = (run) => {
    const used = new Set(slots.values());
    let slot = 0;
    while (used.has(slot)) slot += 1;
    slots.set(run, slot);
  };
  first.forEach(take);
  const checkbox = (run) => {
    const checked = slots.has(run);
    const made = element("input", { type: "checkbox", autocomplete: "off", checked });
    made.addEventListener("change", () => {
      if (made.checked) take(run);
      else slots.delete(run);
      changed();
    });
    return made;
  };
  const groups = [...grouped(candidates, (run) => run.task)].map(([task, members]) => {
    const items = members.map((row) =>
      ({ node: element("label", {}, checkbox(row), runName(row)), row }));
    const node = taskBox(task, members.length, ...items.map((item) => item.node));
    if (node.localName === "details") node.open = members.some((run) => slots.has(run));
    return { node, items };
  });
  const none = element("button", { type: "button", className: "plain" }, "Uncheck all");
  const list = box("runs-to-choose", ...groups.map((group) => group.node));
  none.addEventListener("click", () => {
    list.querySelectorAll("input").forEach((input) => { input.checked = false; });
    slots.clear();
    changed();
  });
  const node = element("fieldset", { className: "screen" }, element("legend", {}, "Runs"));
  if (candidates.length > MANY) node.append(filterField("Filter", groups));
  node.append(list, none);
  return { node, slots };
}
