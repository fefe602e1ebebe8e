/* The confusion matrix of a run, and its most frequent errors */

function confusionSection() {
  const candidates = finished().filter((run) => run.confusion?.length > 0 && run.test_set != null);
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
      "Correct predictions are blue, errors are orange; the stronger the color, the larger the ",
      "fraction of the true class."),
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
        const share = 12 + (48 * count) / totals[truth];  // so that a single image is visible
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
