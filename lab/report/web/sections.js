/* The sections of the page: each function returns a list of nodes, or null if there is nothing to
   show */

const RUN_COLUMNS = [
  textColumn("run", (run) => run.name, (run) => runLink(run.id)),
  textColumn("dataset", (run) => run.dataset),
  accuracyColumn,
  percentColumn("val. accuracy in %", "val_accuracy"),
  numberColumn("param\u00adeters", "parameters"),
  numberColumn("trained param\u00adeters", "trained_parameters"),
  numberColumn("MACs", "macs", compact),
  numberColumn("epochs", "epochs"),
  numberColumn("training seconds", "seconds"),
  numberColumn("images/s", "images_per_second"),
  numberColumn("peak memory in MB", "memory_mb"),
];

function runsSection() {
  if (runs.length === 0) return null;
  const groups = [...grouped(runs, (run) => run.task)].map(([task, members]) => {
    const { node, items } = sortingTable(`Runs: ${task}`, RUN_COLUMNS, members);
    return { node: taskBox(task, members.length, node), items };
  });
  const filter = filterField("Filter by name, task, dataset or model", groups);
  return [
    note("Test accuracy uses the weights of the epoch with the best validation accuracy. Its 95 % ",
      "interval (Wilson) covers the choice of test images, but not the choice of the seed. ",
      "Unfinished runs have no test accuracy. MACs are multiply-accumulate operations per image. ",
      "Click a column heading to sort the table; click it again to reverse the order."),
    ...(runs.length > MANY ? [filter] : []),
    ...(data.seeds.length > 0 ? [element("h3", {}, "Repeated runs"), seedsTable()] : []),
    ...groups.map((group) => group.node),
  ];
}

function seedsTable() {
  const name = (row) => plainName({
    name: row.name, reference: row.runs.every((id) => data.runs[id].reference),
  });
  const perSeed = (row) => element("span", {}, ...row.runs.flatMap((id, place) =>
    [place > 0 ? ", " : "", runLink(id, percent(data.runs[id].accuracy))]));
  const count = (row) => row.runs.length;
  const columns = [
    textColumn("configuration", name),
    textColumn("task", (row) => row.task),
    textColumn("dataset", (row) => row.dataset),
    percentColumn("mean test accuracy in %", "mean"),
    percentColumn("standard deviation in points", "std"),
    { name: "seeds", value: count, show: count, number: true },
    textColumn("test accuracy per seed in %", count, perSeed),
  ];
  return sortingTable("Repeated runs", columns, data.seeds).node;
}

function curvesSection() {
  const candidates = runs.filter((run) => run.curves.epoch?.length > 0);
  if (candidates.length === 0) return null;
  const log = element("input", { type: "checkbox", autocomplete: "off" });
  let quantity = "val_accuracy";
  const first = candidates.filter((run) => run.state === "finished" && !isSweep(run));
  const { node, slots } = chooser(candidates, first.slice(0, FIRST_CURVES), () => show());
  const curve = ([run, slot]) => {
    const values = run.curves[quantity] ?? [];
    const points = run.curves.epoch.map((epoch, place) => ({ x: epoch, y: values[place] }));
    return { name: plainName(run), slot, line: true, points };
  };
  const spec = () => {
    const isPercent = quantity.endsWith("accuracy");
    log.disabled = isPercent;
    return {
      label: `Learning curves: ${QUANTITIES[quantity]} by epoch`,
      x: { name: "epoch", whole: true },
      y: { name: QUANTITIES[quantity], percent: isPercent, log: !isPercent && log.checked },
      series: [...slots].map(curve),
    };
  };
  const made = chart(spec());
  const show = () => made.show(spec());
  log.addEventListener("change", show);
  const options = Object.entries(QUANTITIES).map(([key, name]) => option(key, name));
  const field = select("Quantity", options, (key) => {
    quantity = key;
    show();
  });
  const logField = element("label", { className: "screen" }, log, "logarithmic axis (losses only)");
  return [
    note("Hover over a chart to read its values, or focus it and use the arrow keys."),
    box("choices", field, logField), box("beside", made.node, node),
  ];
}

const ACCURACY = { name: "test accuracy", percent: true };

function costSection() {
  const measured = finished.filter((run) => run.accuracy != null);
  if (measured.length === 0) return null;
  // accuracies on different test images cannot be compared, even if the datasets share a name
  const sets = [...grouped(measured, (run) => run.test_set ?? run.dataset).values()];
  const tasks = [...new Set(measured.map((run) => run.task))];
  const axes = [
    { key: "parameters", name: "parameters", log: true },
    { key: "macs", name: "MACs per image", log: true },
    { key: "seconds", name: "training time", unit: "seconds", log: true },
  ];
  const seriesOf = (members, key) => {
    const groups = grouped(members, ({ task, reference }) => plainName({ name: task, reference }));
    const pointOf = (run) => ({ ...run, x: run[key], y: run.accuracy, name: plainName(run) });
    return [...groups].map(([name, group]) => ({
      name, slot: tasks.indexOf(group[0].task), hollow: group[0].reference,
      points: group.map(pointOf),
    }));
  };
  const specOf = (members, axis) => ({
    label: `Test accuracy against ${axis.name}, ${setName(members[0])}`, bare: true,
    x: axis, y: ACCURACY, series: seriesOf(members, axis.key),
  });
  const made = axes.map((axis) => chart(specOf(sets[0], axis)));
  const legend = box("");
  const show = (members) => {
    made.forEach((one, place) => one.show(specOf(members, axes[place])));
    legend.replaceChildren(legendOf(seriesOf(members, "parameters")));
  };
  show(sets[0]);
  const options = sets.map((members, place) => option(place, setName(members[0])));
  const field = select("Test images", options, (place) => show(sets[place]));
  return [
    note("Each point is a run. Your own runs are filled, reference runs are hollow. Bars are 95 % ",
      "intervals. Training time depends on the hardware, which is listed in each run’s details."),
    box("choices", field), box("panels", ...made.map((one) => one.node)), legend,
  ];
}

function finetuningSection() {
  const columns = [
    textColumn("mode", (row) => row.label, (row) => runLink(row.run, row.label)),
    numberColumn("trained param\u00adeters", "trained"),
    accuracyColumn, numberColumn("training seconds", "seconds"),
    numberColumn("peak memory in MB", "memory_mb"),
  ];
  const part = ({ title, points }) => {
    const pointOf = (one) => ({ ...one, x: one.trained, y: one.accuracy, name: one.label });
    const made = chart({
      label: `Test accuracy against trained parameters: ${title}`,
      x: { name: "trained parameters", log: true }, y: ACCURACY,
      series: [{ slot: 0, points: points.map(pointOf) }],
    });
    const numbers = sortingTable(`Fine-tuning: ${title}`, columns, points);
    return [element("h3", {}, words(title)), box("beside", made.node, numbers.node)];
  };
  if (data.finetuning.length === 0) return null;
  return [
    note("How much of a pretrained model needs to be trained? Bars are 95 % intervals."),
    ...data.finetuning.flatMap(part),
  ];
}

function efficiencySection() {
  const columns = [
    textColumn("model", (row) => row.name, (row) => runLink(row.run, row.name)),
    percentColumn("fraction in %", "fraction"), numberColumn("training images", "images"),
    accuracyColumn, numberColumn("seeds", "seeds"),
  ];
  const part = ({ title, series, summary }) => {
    const pointOf = (one) => ({
      ...one, x: one.fraction, y: one.accuracy,
      note: `${plural(one.images, "training image")}, ${plural(one.seeds, "seed")}`,
    });
    const lines = series.map(({ label, points }, slot) =>
      ({ name: label, slot, line: true, marked: true, points: points.map(pointOf) }));
    const made = chart({
      label: `Test accuracy against the fraction of training images: ${title}`,
      x: { name: "fraction of the training images", log: true, percent: true }, y: ACCURACY,
      series: lines,
    });
    const rows = series.flatMap(({ label, points }) =>
      points.map((one) => ({ ...one, name: label })));
    const numbers = sortingTable(`Data efficiency: ${title}`, columns, rows);
    return [
      element("h3", {}, words(title)), ...sentences(summary),
      box("beside", made.node, numbers.node),
    ];
  };
  if (data.efficiency.length === 0) return null;
  return [
    note("How accuracy depends on the number of training images; the test images stay the same. ",
      "Bars are 95 % intervals, or the standard deviation if there are several seeds."),
    ...data.efficiency.flatMap(part),
  ];
}

function confusionSection() {
  const candidates = finished.filter((run) => run.confusion?.length > 0 && run.test_set != null);
  if (candidates.length === 0) return null;
  const groups = [...grouped(candidates, (run) => run.task)];
  const options = groups.map(([task, members]) => {
    const names = members.map((run) => option(run.id, plainName(run)));
    return element("optgroup", { label: task }, ...names);
  });
  const matrix = box("matrix");
  Object.assign(matrix, { tabIndex: 0, role: "region", ariaLabel: "Confusion matrix" });
  const reading = element("p", { className: "reading quiet", ariaLive: "polite" });
  const errors = element("ol");
  const show = (run) => {
    const { classes } = data.test_sets[run.test_set];
    const counts = classes.map(() => classes.map(() => 0));
    run.confusion.forEach(([truth, guess, count]) => { counts[truth][guess] += count; });
    const totals = counts.map((row) => row.reduce((a, b) => a + b, 0));
    const describe = (truth, guess) => {
      const count = counts[truth][guess];
      const fraction = count > 0 ? ` (${percent(count / totals[truth], 1)}\u00a0%)` : "";
      return `true ${classes[truth]}, predicted ${classes[guess]}: ` +
        `${number(count)} of ${number(totals[truth])}${fraction}`;
    };
    matrix.replaceChildren(matrixTable(classes, counts, totals, (...cell) => {
      reading.textContent = describe(...cell);
    }));
    reading.textContent = "";
    const wrong = counts.flatMap((row, truth) => row.map((count, guess) => [truth, guess, count]))
      .filter(([truth, guess, count]) => truth !== guess && count > 0)
      .sort((a, b) => b[2] - a[2]).slice(0, 5);
    const items = wrong.map(([truth, guess]) => element("li", {}, words(describe(truth, guess))));
    errors.replaceChildren(...(items.length > 0 ? items : [element("li", {}, "none")]));
  };
  show(groups[0][1][0]);  // the first option of the field
  return [
    note("Rows are true classes, columns are predicted classes, and cells count test images. ",
      "Correct predictions are blue, errors are orange; a darker cell holds a larger fraction of ",
      "the true class."),
    box("choices", select("Run", options, (id) => show(data.runs[id]))),
    box("abreast", box("", matrix, reading),
      box("", element("h3", {}, "Most frequent errors"), errors)),
  ];
}

function matrixTable(classes, counts, totals, pointed) {
  const head = (name, scope, className) =>
    element("th", { scope, title: name }, element("span", { className }, element("bdi", {}, name)));
  const upright = classes.some((name) => name.length > 3) ? "upright" : "";
  const rows = counts.map((row, truth) => {
    const cells = row.map((count, guess) => {
      const cell = element("td", {}, count || "");
      if (count > 0) {
        cell.className = guess === truth ? "hit" : "miss";
        const share = 12 + (88 * count) / totals[truth];  // so that a single image is visible
        cell.style.setProperty("--share", `${share.toFixed(1)}%`);
      }
      return cell;
    });
    return element("tr", {}, head(classes[truth], "row", ""), ...cells);
  });
  const heads = ["true \\ predicted", ...classes].map((name, place) =>
    head(name, "col", place > 0 ? upright : ""));
  const top = element("thead", {}, element("tr", {}, ...heads));
  const body = element("tbody", {}, ...rows);
  body.addEventListener("pointerover", (event) => {
    const cell = event.target.closest("td");
    if (cell) pointed(cell.parentNode.rowIndex - 1, cell.cellIndex - 1);
  });
  const made = element("table", {}, top, body);
  made.style.setProperty("--classes", classes.length);
  return made;
}

const setHead = (set) =>
  element("h3", {}, words(set.name), ` (${plural(set.images, "test image")})`);

const SELECTION = "Each model is represented by the configuration with the best validation " +
  "accuracy and by its first seed; the test images play no role in this choice.";

function hardestSection() {
  const sets = data.test_sets.filter((set) => set.hardest.length > 0);
  if (sets.length === 0) return null;
  return [
    note("The test images that most runs misclassify, with each run’s prediction and its ",
      "confidence. Some of these images are ambiguous, and some labels may be wrong. ", SELECTION),
    ...sets.flatMap((set) => {
      const rest = set.hardest.slice(FIRST_HARDEST);
      return [
        setHead(set), hardestTable(set, set.hardest.slice(0, FIRST_HARDEST)),
        ...(rest.length > 0 ? [folded([`${rest.length} more`], hardestTable(set, rest))] : []),
      ];
    }),
  ];
}

/* A row is an image, a column a run. */
function hardestTable(set, images) {
  const ids = [...new Set(images.flatMap((one) => one.answers.map(({ run }) => run)))];
  const answerOf = (one, id) => {
    const answer = one.answers.find(({ run }) => run === id);
    if (!answer) return element("td", {}, DASH);
    const className = answer.correct ? "right" : "wrong";
    const mark = answer.correct ? "✓\u00a0" : "✗\u00a0";
    return element("td", {}, element("div", { className }, mark, words(answer.prediction)),
      box("quiet", `${percent(answer.confidence, 0)}\u00a0%`));
  };
  const rows = images.map((one) => {
    const head = element("th", { scope: "row", className: "with-thumbnail" }, thumbnailOf(one),
      element("strong", {}, words(one.label)), box("quiet", `${one.wrong} of ${one.of} wrong`));
    return element("tr", {}, head, ...ids.map((id) => answerOf(one, id)));
  });
  const heads = ["image and true label", ...ids.map((id) => runLink(id))];
  const made = plainTable(`Hardest images of ${set.name}`,
    heads.map((head) => element("th", { scope: "col" }, head)), rows);
  made.classList.add("hardest");
  return made;
}

function thumbnailOf({ image, label, thumbnail }) {
  if (thumbnail === null) return box("quiet", words(image));
  const alt = `test image ${image}, true class ${label}`;
  const made = element("img", { alt, title: image, src: thumbnail });
  made.addEventListener("load", () => {
    made.classList.toggle("pixels", made.naturalWidth < SMALL_IMAGE);
  });
  return made;
}

function pairsSection() {
  const sets = data.test_sets.filter((set) => set.pairs.length > 0);
  if (sets.length === 0) return null;
  const columns = [
    textColumn("run A", (pair) => data.runs[pair.a].name, (pair) => runLink(pair.a)),
    textColumn("run B", (pair) => data.runs[pair.b].name, (pair) => runLink(pair.b)),
    numberColumn("only A correct", "only_a"), numberColumn("only B correct", "only_b"),
    numberColumn("p", "p", probability), numberColumn("p (Holm)", "p_holm", probability),
    textColumn("result", (pair) => pair.summary),
  ];
  return [
    note("Two models are compared on the images on which exactly one of them is correct. If both ",
      "were equally good, each would win about half of these images; p is the probability of a ",
      "split at least as uneven (McNemar’s exact test). Holm’s correction accounts for the number ",
      "of pairs. A difference is significant if the corrected p is below 0.05. ", SELECTION),
    ...sets.flatMap((set) =>
      [setHead(set), sortingTable(`Pairs on ${set.name}`, columns, set.pairs).node]),
  ];
}

/* The 95 % interval of a fraction (Wilson 1927). */
function wilson(fraction, count) {
  const z = 1.959964;
  const center = fraction + (z * z) / (2 * count);
  const half = z * Math.sqrt((fraction * (1 - fraction)) / count + (z * z) / (4 * count * count));
  const whole = 1 + (z * z) / count;
  return { low: Math.max(0, (center - half) / whole), high: Math.min(1, (center + half) / whole) };
}

function calibrationSection() {
  const candidates = finished.filter((run) => run.calibration?.length > 0);
  if (candidates.length === 0) return null;
  const first = candidates.filter((run) => !isSweep(run)).slice(0, FIRST_CALIBRATED);
  const { node, slots } = chooser(candidates, first, () => show());
  const seriesOf = (pointOf) => [...slots].map(([run, slot]) => {
    const total = run.calibration.reduce((sum, [, , images]) => sum + images, 0);
    const points = run.calibration.map(([confidence, accuracy, images]) => ({
      x: confidence, note: plural(images, "image"), ...pointOf(accuracy, images, total),
    }));
    return { name: plainName(run), slot, line: true, marked: true, points };
  });
  const confidence = { name: "mean confidence", percent: true, from: 0, to: 1 };
  const specs = () => [{
    label: "Reliability diagram: accuracy against confidence", bare: true, diagonal: true,
    x: confidence, y: { name: "accuracy", percent: true, from: 0, to: 1 },
    series: seriesOf((accuracy, images) => ({ y: accuracy, ...wilson(accuracy, images) })),
  }, {
    label: "Distribution of the confidence", bare: true,
    x: confidence, y: { name: "fraction of test images", percent: true, from: 0 },
    series: seriesOf((_, images, total) => ({ y: images / total })),
  }];
  const columns = [
    textColumn("run", (run) => run.name, (run) => runLink(run.id)),
    percentColumn("expected calibration error in points", "calibration_error"),
    numberColumn("test images", "test_images"),
  ];
  const made = specs().map(chart);
  const [legend, errors] = [box(""), box("")];
  const show = () => {
    specs().forEach((spec, place) => made[place].show(spec));
    legend.replaceChildren(legendOf(specs()[0].series));
    const numbers = sortingTable("Expected calibration errors", columns, [...slots.keys()]);
    errors.replaceChildren(numbers.node);
  };
  show();
  return [
    note("A model is well calibrated if predictions with a confidence of 80 % are correct in 80 % ",
      "of the cases: its points then lie on the dashed line. Points below the line mean that the ",
      "model is overconfident. Bars are 95 % intervals; they are long for bins with few images. ",
      "The expected calibration error is the mean distance from the line, weighted by images."),
    box("panels", ...made.map((one) => one.node)), legend, box("beside", errors, node),
  ];
}

const gallery = (plots) => box("plots", ...plots.map(({ source, caption }) =>
  element("figure", {}, element("img", { src: source, alt: caption }),
    element("figcaption", { ariaHidden: "true" }, words(caption)))));

function sweepsSection() {
  const part = (sweep) => {
    const values = sweep.columns.map((name, place) => {
      const value = (trial) => trial.values[place];
      const known = sweep.trials.map(value).filter((one) => one != null);
      if (known.every((one) => typeof one === "number")) {
        return { name, value, show: (trial) => number(value(trial)), number: true };
      }
      return textColumn(name, value);
    });
    const best = (trial) => `${trial.number}${trial.number === sweep.best ? " (best)" : ""}`;
    const columns = [
      { name: "trial", value: (trial) => trial.number, show: best, number: true },
      textColumn("state", (trial) => trial.state), ...values,
      percentColumn("val. accuracy in %", "val_accuracy"), numberColumn("epochs", "epochs"),
    ];
    const { node } = sortingTable(`Trials of ${sweep.name}`, columns, sweep.trials);
    const count = sweep.trials.length;
    return [
      element("h3", {}, words(sweep.name)), ...sentences(sweep.summary),
      note(words(sweep.folder)), gallery(sweep.plots),
      count > MANY ? folded([plural(count, "trial")], node) : node,
    ];
  };
  return data.sweeps.length > 0 ? data.sweeps.flatMap(part) : null;
}

function attentionSection() {
  const part = ({ title, folder, summary, plots }) => [
    element("h3", {}, words(title)), ...sentences(summary),
    note(words(folder)), gallery(plots),
  ];
  return data.attention.length > 0 ? data.attention.flatMap(part) : null;
}

function leftOutSection() {
  if (data.left_out.length === 0) return null;
  const items = data.left_out.map(({ folder, reason }) =>
    element("li", {}, element("code", {}, words(folder)), ": ", words(reason)));
  return [
    note("Folders that are damaged, unfinished or unrelated, and the reason for each."),
    element("ul", {}, ...items),
  ];
}

function detailsSection() {
  if (runs.length === 0) return null;
  const items = runs.map((row) => ({ node: runDetails(row), row }));
  const node = box("", ...items.map((item) => item.node));
  return [
    note("How each run was made, and the command that repeats it."),
    ...(runs.length > MANY ? [filterField("Filter", [{ node, items }])] : []), node,
  ];
}

function runDetails(run) {
  const changes = run.uncommitted_changes ? "with uncommitted changes" : "no uncommitted changes";
  const rows = [
    ["folder", run.folder], ["command", run.command],
    ["commit", run.commit && `${run.commit}, ${changes}`], ["started", run.started],
    ["hardware", run.hardware], ["versions", run.versions], ["model", run.model],
    ["dataset", setName(run)], ["seed", run.seed], ["best epoch", run.best_epoch],
    ...run.notes.map((text) => ["note", text]),
  ];
  const known = rows.filter(([, value]) => value != null && value !== "");
  const list = known.flatMap(([name, value]) => {
    const shown = words(value);
    const part = name === "command" ? element("code", {}, shown) : shown;
    return [element("dt", {}, name), element("dd", {}, part)];
  });
  const made = folded([runName(run)], element("dl", {}, ...list));
  made.id = `run-${run.id}`;
  made.classList.toggle("own", !run.reference && !isSweep(run));
  return made;
}

/* The page */

const SECTIONS = [  // id, title, short title in the navigation, function
  ["runs", "Runs", "Runs", runsSection],
  ["curves", "Learning curves", "Curves", curvesSection],
  ["cost", "Accuracy against cost", "Cost", costSection],
  ["finetuning", "Fine-tuning", "Fine-tuning", finetuningSection],
  ["efficiency", "Data efficiency", "Data efficiency", efficiencySection],
  ["confusion", "Confusion matrix", "Confusion", confusionSection],
  ["hardest", "Hardest test images", "Hardest images", hardestSection],
  ["pairs", "Paired comparisons", "Pairs", pairsSection],
  ["calibration", "Calibration", "Calibration", calibrationSection],
  ["sweeps", "Sweeps", "Sweeps", sweepsSection],
  ["attention", "Attention", "Attention", attentionSection],
  ["left-out", "Folders with problems", "Problems", leftOutSection],
  ["details", "Details of each run", "Details", detailsSection],
];

function build() {
  for (const [id, title, short, make] of SECTIONS) {
    const nodes = make();
    if (nodes === null) continue;
    const heading = element("h2", { id: `${id}-title` }, title);
    const section = element("section", { id }, heading, ...nodes);
    section.setAttribute("aria-labelledby", heading.id);
    byId("content").append(section);
    byId("sections").append(element("a", { href: `#${id}` }, short));
  }
  byId("sections").hidden = byId("sections").children.length === 0;
  if (runs.length === 0) {
    const advice = "There are no runs yet. Train a model first, for example with python train.py.";
    byId("content").prepend(element("p", {}, advice));
  }
}

/* Opens the details of a run when a link points to them. */
function openTarget() {
  const target = byId(location.hash.slice(1));
  if (target?.localName === "details") target.open = true;
}

function lightOrDark() {
  const system = matchMedia("(prefers-color-scheme: dark)");
  const { style } = document.documentElement;
  const isDark = () => (style.colorScheme ? style.colorScheme === "dark" : system.matches);
  const show = () => { byId("scheme").textContent = isDark() ? "Light page" : "Dark page"; };
  byId("scheme").addEventListener("click", () => {
    style.colorScheme = isDark() ? "light" : "dark";
    show();
  });
  system.addEventListener("change", show);
  byId("scheme").hidden = false;
  show();
}

/* The printed page includes the details of the user's own runs. */
function printing() {
  let opened = [];
  addEventListener("beforeprint", () => {
    charts.forEach((draw) => draw(true));
    opened = [...document.querySelectorAll("details.own:not([open])")];
    opened.forEach((one) => { one.open = true; });
  });
  addEventListener("afterprint", () => {
    charts.forEach((draw) => draw());
    opened.forEach((one) => { one.open = false; });
  });
}

build();
charts.forEach((draw) => draw());
lightOrDark();
printing();
openTarget();
addEventListener("hashchange", openTarget);
let waiting = 0;
addEventListener("resize", () => {
  cancelAnimationFrame(waiting);
  waiting = requestAnimationFrame(() => charts.forEach((draw) => draw()));
});
