/* The sections of the page: each function returns a list of nodes, or null if there is nothing to
   show */

const RUN_COLUMNS = [
  textColumn("run", (run) => run.name, (run) => runLink(run.id)),
  textColumn("dataset", setName),
  accuracyColumn,
  bestFirst(percentColumn("val. accuracy in %", "val_accuracy")),
  numberColumn("param\u00adeters", "parameters"),
  numberColumn("trained param\u00adeters", "trained_parameters"),
  numberColumn("MACs", "macs", compact),
  numberColumn("epochs", "epochs"),
  numberColumn("training seconds", "seconds"),
  bestFirst(numberColumn("images/s", "images_per_second")),
  numberColumn("peak memory in MB", "memory_mb"),
];

function runsSection() {
  const runs = allRuns();
  if (runs.length === 0) return null;
  const groups = [...grouped(runs, (run) => run.task)].map(([task, members]) => {
    const { node, items } = sortingTable(`Runs: ${task}`, RUN_COLUMNS, members);
    return { node: taskBox(task, members.length, node), items };
  });
  const seeds = data.seeds.filter(({ runs: [id] }) => visible([data.runs[id]]).length > 0);
  const filter = filterField("Filter by name, task, dataset or model", groups);
  return [
    note("Test accuracy uses the weights of the epoch with the best validation accuracy. Its 95 % ",
      "interval (Wilson) covers the choice of test images, but not the choice of the seed. ",
      "Unfinished runs have no test accuracy. MACs are multiply-accumulate operations per image. ",
      "For a sweep, only the trial with the best validation accuracy is listed. Click a column ",
      "heading to sort the table, the best first; click it again to reverse the order."),
    ...(runs.length > MANY ? [filter] : []),
    ...(seeds.length > 0 ? [element("h3", {}, "Repeated runs"), seedsTable(seeds)] : []),
    ...groups.map((group) => group.node),
  ];
}

function seedsTable(rows) {
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
    bestFirst(percentColumn("mean test accuracy in %", "mean")),
    percentColumn("standard deviation (percentage points)", "std"),
    { name: "seeds", value: count, show: count, number: true },
    textColumn("test accuracy per seed in %", count, perSeed),
  ];
  return sortingTable("Repeated runs", columns, rows).node;
}

function curvesSection() {
  const candidates = allRuns().filter((run) => run.curves.epoch?.length > 0);
  if (candidates.length === 0) return null;
  const log = element("input", { type: "checkbox", autocomplete: "off" });
  let quantity = "val_accuracy";
  let relative = false;
  const first = candidates.filter((run) => run.state === "finished" && !isSweep(run));
  const { node, slots } = chooser(candidates, first.slice(0, FIRST_CURVES), () => show());
  const curve = ([run, slot]) => {
    const values = run.curves[quantity] ?? [];
    const last = run.curves.epoch.at(-1);
    const points = run.curves.epoch.map((epoch, place) =>
      ({ x: relative ? epoch / last : epoch, y: values[place] }));
    return { name: plainName(run), slot, line: true, points };
  };
  const spec = () => {
    const isPercent = quantity.endsWith("accuracy");
    log.disabled = isPercent;
    return {
      label: `Learning curves: ${QUANTITIES[quantity]} by ${relative ? "training time" : "epoch"}`,
      x: relative ? { name: "fraction of training completed", percent: true, from: 0 }
        : { name: "epoch", whole: true },
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
  const axes = [option("epoch", "epochs"), option("relative", "fraction of training completed")];
  const axisField = select("Horizontal axis", axes, (key) => {
    relative = key === "relative";
    show();
  });
  const logField = element("label", { className: "screen" }, log, "logarithmic axis (losses only)");
  return [
    note("Hover over a chart to read its values, or focus it and use the arrow keys."),
    box("choices", field, axisField, logField), box("beside", made.node, node),
  ];
}

const ACCURACY = { name: "test accuracy", percent: true };

function costSection() {
  const measured = finished().filter((run) => run.accuracy != null && run.whole);
  if (measured.length === 0) return null;
  // accuracies on different test images cannot be compared, even if the datasets share a name
  const sets = [...grouped(measured, (run) => run.test_set ?? run.dataset).values()];
  const axes = [
    { key: "parameters", name: "parameters", log: true },
    { key: "macs", name: "MACs per image", log: true },
    { key: "seconds", name: "training time", unit: "seconds", log: true },
  ].filter(({ key }) => measured.some((run) => run[key] != null));
  const seriesOf = (members, key) => {
    const groups = grouped(members, ({ kind, reference }) => plainName({ name: kind, reference }));
    const pointOf = (run) => ({
      ...run, x: run[key], y: run.accuracy, name: plainName(run), note: run.recipe,
      label: run.model.split(", ").at(-1),  // for a fine-tuned model, the trained part
    });
    return [...groups].map(([name, group]) => ({
      name, slot: KINDS[group[0].kind], color: kindColor(group[0].kind), hollow: group[0].reference,
      points: group.filter((run) => run[key] != null).map(pointOf),
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
    note("Each point is a run on all training images. Your own runs are filled, reference runs ",
      "are hollow. Bars are 95 % intervals. Training time depends on the hardware, which is ",
      "listed in each run’s details."),
    box("choices", field), box("panels", ...made.map((one) => one.node)), legend,
  ];
}

const BARS = "Bars are 95 % intervals, or ± one standard deviation if there are several seeds.";

function finetuningSection() {
  const columns = [
    textColumn("mode", (row) => row.label, (row) => runLink(row.run, row.label)),
    numberColumn("trained param\u00adeters", "trained"),
    meanColumn, numberColumn("seeds", "seeds"),
    numberColumn("training seconds", "seconds"), numberColumn("peak memory in MB", "memory_mb"),
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
  if (visible(data.finetuning).length === 0) return null;
  return [
    note("How much of a pretrained model needs to be trained? ", BARS),
    ...fileList(data.mode_files), ...visible(data.finetuning).flatMap(part),
  ];
}

function efficiencySection() {
  const columns = [
    textColumn("model", (row) => row.name, (row) => runLink(row.run, row.name)),
    percentColumn("fraction in %", "fraction"), numberColumn("training images", "images"),
    meanColumn, numberColumn("seeds", "seeds"),
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
  if (visible(data.efficiency).length === 0) return null;
  return [
    note("How accuracy depends on the number of training images; the test images stay the same. ",
      BARS),
    ...visible(data.efficiency).flatMap(part),
  ];
}

const setHead = (comparison) => {
  const set = data.test_sets[comparison.test_set];
  return element("h3", {}, words(describeSet(set.name, set)),
    ...(comparison.reference ? [element("span", { className: "badge" }, "reference")] : []));
};

const SELECTION = "Each model is represented by the configuration with the best validation " +
  "accuracy and by its first seed; the test images play no role in this choice.";

/* A link to a run, named after its model and recipe. */
const modelLink = (id) => runLink(id, `${data.runs[id].model} (${data.runs[id].recipe})`);

function pairsSection() {
  const sets = visible(data.comparisons).filter((set) => set.pairs.length > 0);
  if (sets.length === 0) return null;
  const columns = [
    textColumn("model A", (pair) => data.runs[pair.a].name, (pair) => modelLink(pair.a)),
    textColumn("model B", (pair) => data.runs[pair.b].name, (pair) => modelLink(pair.b)),
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
      [setHead(set), sortingTable("Paired comparisons", columns, set.pairs).node]),
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
  const candidates = finished().filter((run) => run.calibration?.length > 0);
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
    percentColumn("expected calibration error (percentage points)", "calibration_error"),
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

const gallery = (plots) => box("plots", ...plots.map(({ source, caption, link }) =>
  element("figure", {},
    element("a", { href: link }, element("img", { src: source, alt: caption })),
    element("figcaption", { ariaHidden: "true" }, words(caption)))));

const fileList = (files) => (visible(files).length === 0 ? []
  : [element("p", { className: "quiet links" }, "Compared in ",
    ...spaced(visible(files).map((one) => fileLink(one.name, one.link))))]);

const linksOf = ({ folder, link, files }) => element("p", { className: "quiet links" },
  ...spaced([fileLink(folder, `${link}/`), ...files.map((one) => fileLink(one.name, one.link))]));

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
    const best = (trial) => {
      const name = `${trial.number}${trial.number === sweep.best ? " (best)" : ""}`;
      return trial.link ? fileLink(name, `${trial.link}/`) : name;
    };
    const columns = [
      { name: "trial", value: (trial) => trial.number, show: best, number: true },
      textColumn("state", (trial) => trial.state), ...values,
      bestFirst(percentColumn("val. accuracy in %", "val_accuracy")),
      numberColumn("epochs", "epochs"),
    ];
    const { node } = sortingTable(`Trials of ${sweep.name}`, columns, sweep.trials);
    const count = sweep.trials.length;
    return [
      element("h3", {}, words(sweep.name)), ...sentences(sweep.summary),
      linksOf(sweep), gallery(sweep.plots),
      count > MANY ? folded([plural(count, "trial")], node) : node,
    ];
  };
  const shown = visible(data.sweeps);
  return shown.length > 0 ? shown.flatMap(part) : null;
}

function attentionSection() {
  const part = (one) => [
    element("h3", {}, words(one.title)), ...sentences(one.summary),
    ...(one.page ? [element("p", {}, pageLink(one))] : []),
    linksOf(one), gallery(one.plots),
  ];
  const shown = visible(data.attention);
  return shown.length > 0 ? [...fileList(data.score_files), ...shown.flatMap(part)] : null;
}

function leftOutSection() {
  if (data.left_out.length === 0) return null;
  const items = data.left_out.map(({ folder, link, reason }) =>
    element("li", {}, fileLink(folder, `${link}/`), ": ", words(reason)));
  return [
    note("Folders that are damaged, unfinished or unrelated, and the reason for each."),
    element("ul", {}, ...items),
  ];
}

function detailsSection() {
  const runs = allRuns();
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
    ["command", run.command],
    ["commit", run.commit && `${run.commit}, ${changes}`], ["started", run.started],
    ["hardware", run.hardware], ["versions", run.versions],
    ["model", `${run.model} (${run.recipe})`],
    ["dataset", setName(run)], ["seed", run.seed], ["best epoch", run.best_epoch],
    ...run.notes.map((text) => ["note", text]),
  ];
  const known = rows.filter(([, value]) => value != null && value !== "");
  const list = known.flatMap(([name, value]) => {
    const shown = words(value);
    const part = name === "command" ? element("code", {}, shown) : shown;
    return [element("dt", {}, name), element("dd", {}, part)];
  });
  const made = folded([runName(run)], linksOf(run), element("dl", {}, ...list));
  made.id = `run-${run.id}`;
  made.classList.toggle("own", !run.reference && !isSweep(run));
  return made;
}
