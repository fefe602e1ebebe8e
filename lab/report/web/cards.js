/* The first section: the main results as cards, what the reader learned, and all own runs */

const KINDS = { ViT: 0, CNN: 1, Swin: 2 };  // the order of their symbols
const LEARNED = 1800;  // characters; more would not fit two printed pages

/* The attention page of the first card that has one, or else of the newest run. */
const mainPage = () => {
  const own = data.attention.filter((one) => one.page && !one.reference);
  return data.cards.map((card) => card.page).find(Boolean) ?? own.at(-1) ?? null;
};

const pageLink = ({ page, live }) => element("a", { className: "live", href: page },
  live ? "Open the live page: draw, and watch the model" : "Open the attention maps");

function mineSection() {
  const table = ownTable();
  return [
    box("cards", ...data.cards.map(cardOf)),
    ...sentences(data.significance), learned(), ...(table ? [table] : []),
  ];
}

function cardOf(card) {
  if (card.run === null) {
    return element("article", { className: "card empty" }, element("h3", {}, card.title),
      element("p", { className: "quiet" }, "No finished run yet. Start one with"),
      element("p", {}, element("code", {}, card.command)));
  }
  const run = data.runs[card.run];
  const mark = svg("svg", { viewBox: "-8 -8 16 16", "aria-hidden": "true", class: "mark" });
  mark.append(svg("path", { d: SYMBOLS[KINDS[run.kind]], style: `fill: ${kindColor(run.kind)}` }));
  const spread = card.seeds > 1 ? `mean of ${card.seeds} seeds, ` : "95 % interval ";
  const range = `${percent(card.low, 1)} to ${percent(card.high, 1)} %`;
  const around = card.seeds > 1 ? `± 1 standard deviation: ${range}` : range;
  const pictures = [confusionPicture(run)];
  if (card.attention) {
    const alt = "a test image, and where the model attends";
    const image = element("img", { src: card.attention, alt });
    pictures.push(element("figure", { className: "look" }, image,
      element("figcaption", {}, "One image, and its attention")));
  }
  return element("article", { className: "card" },
    element("h3", {}, mark, card.title),
    element("p", { className: "big" }, `${percent(card.accuracy, 1)}\u00a0%`),
    element("p", { className: "quiet" }, `test accuracy, ${spread}${around}`),
    element("p", {}, words(card.sentence)),
    cardCurves(run), box("pictures", ...pictures),
    element("p", { className: "quiet links" }, ...spaced([
      runLink(run.id, "details"), fileLink("folder", `${run.link}/`),
      ...run.files.map(({ name, link }) => fileLink(name, link)),
      ...(card.page ? [fileLink("attention.html", card.page.page)] : []),
    ])));
}

const spaced = (nodes) => nodes.flatMap((node, place) => (place > 0 ? [" · ", node] : [node]));

function cardCurves(run) {
  const series = [["train_accuracy", "train"], ["val_accuracy", "validation"]].map(
    ([key, name], slot) => ({
      name: name === "train" ? "training" : name, slot, color: `var(--splits-${name})`,
      line: true,
      points: run.curves.epoch.map((epoch, i) => ({ x: epoch, y: run.curves[key]?.[i] })),
    }));
  return chart({
    label: `Accuracy of ${run.name} by epoch`, small: true,
    x: { name: "epoch", whole: true }, y: { name: "accuracy", percent: true }, series,
  }).node;
}

/* The confusion matrix as a small picture; the section on confusion shows its numbers. */
function confusionPicture(run) {
  const classes = data.test_sets[run.test_set]?.classes.length ?? 1;
  const picture = svg("svg", { viewBox: `0 0 ${classes} ${classes}`, role: "img",
    "aria-label": "confusion matrix: true classes in rows, predicted classes in columns" });
  const totals = new Map();
  run.confusion.forEach(([truth, , count]) => totals.set(truth, (totals.get(truth) ?? 0) + count));
  for (const [truth, guess, count] of run.confusion) {
    const opacity = 0.25 + 0.75 * (count / totals.get(truth));
    const color = `var(--answers-${truth === guess ? "correct" : "wrong"})`;
    picture.append(svg("rect", { x: guess + 0.04, y: truth + 0.04, width: 0.92, height: 0.92,
      style: `fill: ${color}; opacity: ${opacity.toFixed(2)}` }));
  }
  return element("figure", { className: "look" }, picture,
    element("figcaption", {}, "Confusion matrix"));
}

let learnedText = remembered("learned") ?? "";  // also if the browser cannot save it

/* A text that the browser keeps and prints. */
function learned() {
  const area = element("textarea", { rows: 7, maxLength: LEARNED,
    placeholder: "Your name, and three things that you learned" });
  area.value = learnedText;
  const printed = box("printed");
  const status = element("output", { className: "quiet screen" });
  const show = (saved) => {
    printed.textContent = area.value;
    const length = `${area.value.length} of ${LEARNED} characters`;
    status.textContent = area.value === "" ? "" : `${saved} ${length}`;
  };
  area.addEventListener("input", () => {
    learnedText = area.value;
    const saved = remember("learned", area.value);
    show(saved ? "Saved in this browser." : "This browser cannot save your text: print the page to keep it.");
  });
  show("Saved in this browser.");
  const label = element("label", { className: "learned" },
    element("h3", {}, "What I learned"), area);
  return box("", label, printed, status);
}

/* Every own run in short, for the printed hand-in view. */
function ownTable() {
  const own = finished().filter((run) => !run.reference);
  if (own.length === 0) return null;
  const shown = own.slice(0, 24);
  const heads = ["run", "dataset", "recipe", "parameters", "test accuracy in % (95 % interval)"];
  const rows = shown.map((run) => element("tr", {},
    element("th", { scope: "row" }, words(run.name)), element("td", {}, words(run.dataset)),
    element("td", {}, words(run.recipe)),
    element("td", { className: "number" }, number(run.parameters)),
    element("td", { className: "number" }, percent(run.accuracy) + interval(run))));
  const rest = own.length - shown.length;
  const cells = heads.map((head) => element("th", { scope: "col" }, head));
  return box("on-paper", element("h3", {}, "All finished runs"),
    plainTable("All finished runs", cells, rows),
    ...(rest > 0 ? [note(`and ${plural(rest, "more run")}`)] : []));
}
