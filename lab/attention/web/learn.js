/* Watch it learn: the same image and maps with the weights of each snapshot. */

const reducedMotion = matchMedia("(prefers-reduced-motion: reduce)");
const replayed = { results: [], of: null };  // probabilities and maps of the image at each snapshot
let timer = 0;

function startLearn() {
  const { states, history } = data, hasStates = states.length > 1;
  byId("player").hidden = byId("film").hidden = byId("replay-figure").hidden = !hasStates;
  byId("history-figure").hidden = !history.length;
  byId("learn-text").textContent = hasStates
    ? `The run stored its weights ${data.num_snapshots} times. The slider loads them into the ` +
      "whole page: maps and answers for your image are those of the model at that time. If a " +
      "map has one color everywhere, attention is uniform."
    : "This page has no snapshots from training. train.py stores about ten if you set SNAPSHOTS " +
      "to 10; that is the default for models below 0.5M parameters.";
  const slider = byId("epoch");
  slider.max = states.length - 1;
  slider.value = FINAL;
  slider.addEventListener("input", () => { stop(); goTo(Number(slider.value)); });
  byId("play").addEventListener("click", () => (timer ? stop() : play()));
  byId("epoch-reset").addEventListener("click", () => { stop(); goTo(FINAL); });
  states.forEach((one, index) => {
    const parts = [element("canvas"), element("b"), element("span")];
    const button = element("button", { type: "button", aria: { label: stateName(one) } }, ...parts);
    button.addEventListener("click", () => { stop(); goTo(index); });
    byId("film").append(button);
  });
}

function goTo(snapshot) {
  state.snapshot = snapshot;
  byId("epoch").value = snapshot;
  requestUpdate();
}

function play() {
  const last = data.states.length - 1;
  let next = state.snapshot >= FINAL ? 0 : state.snapshot + 1;
  byId("play").textContent = "Pause";
  const step = () => {
    goTo(next);
    if (next++ >= Math.min(FINAL, last)) stop();
  };
  timer = setInterval(step, reducedMotion.matches ? 2000 : 700);
  step();  // may already be the last one, and then stops the timer
}

function stop() {
  clearInterval(timer);
  timer = 0;
  byId("play").textContent = "Play";
}

function stateName({ epoch }) {
  return epoch === 0 ? "random weights" : `epoch ${epoch}`;
}

function showLearn() {
  const shown = data.states[state.snapshot], { epoch, val_accuracy: accuracy } = shown;
  const score = accuracy === null ? "" : `, validation accuracy ${percent(accuracy)}`;
  const isFinal = state.snapshot === FINAL;
  const words = `${stateName(shown)}${score}${isFinal ? " (the final model)" : ""}`;
  byId("epoch-value").textContent = words;
  byId("epoch").setAttribute("aria-valuetext", words);
  [...byId("film").children].forEach((button, i) => press(button, i === state.snapshot));
  showHistory(epoch);
  showReplay(epoch);
}

/* The image with the weights of every snapshot: one forward pass each. */
function* replayTraining() {
  if (replayed.of === state.image || data.states.length < 2) return;
  const image = state.image, results = [];
  for (let i = 0; i < data.states.length; i++) {
    results.push(infer(image, i));
    yield;
  }
  Object.assign(replayed, { results, of: image });
  showFilm();
  showReplay(data.states[state.snapshot].epoch);
}

function showFilm() {
  replayed.results.forEach((result, i) => {
    const button = byId("film").children[i], [canvas, answer, caption] = button.children;
    const side = S * Math.max(1, Math.round(112 / S)), best = argmax(result.probabilities);
    drawHeat(clearCanvas(canvas, side), side, shownMap(result), palette.attention);
    answer.textContent = classes[best];
    const name = stateName(data.states[i]);
    caption.textContent = name.replace(" weights", "");
    button.setAttribute("aria-label",
      `${name}: ${classes[best]}, ${percent(result.probabilities[best])}`);
  });
}

function showHistory(epoch) {
  const { history } = data;
  if (!history.length) return;
  byId("history-title").textContent = "Accuracy on the dataset";
  const series = [["val_accuracy", "validation", "validation"],
    ["train_accuracy", "training", "train"]];
  lineChart(byId("history"), series.map(([key, name, kind]) =>
    ({ name, kind, points: history.map((row) => [row.epoch, row[key]]) })), epoch);
}

function showReplay(epoch) {
  const { results } = replayed;
  if (!results.length) return;
  byId("replay-title").textContent = "Probability for this image";
  const answer = argmax(results[FINAL].probabilities), trained = results.slice(1);
  const highest = (i) =>
    i === answer ? 2 : Math.max(...trained.map(({ probabilities }) => probabilities[i]));
  const top = classes.map((_, i) => i).sort((a, b) => highest(b) - highest(a)).slice(0, 4);
  lineChart(byId("replay"), top.map((index, i) => ({
    name: classes[index], kind: i ? "second" : "predict",
    points: results.map(({ probabilities }, at) => [data.states[at].epoch, probabilities[index]]),
  })), epoch);
}

/* Line chart of fractions from 0 to 1 by epoch, each labeled at its end; one epoch is marked. */
function lineChart(chart, series, epoch) {
  const [width, left, right, top, bottom] = [420, 44, 330, 12, 186];
  const last = Math.max(1, ...series.flatMap(({ points: all }) => all.map(([x]) => x)));
  const x = (value) => left + (value / last) * (right - left);
  const y = (value) => bottom - value * (bottom - top);
  const parts = [0, 0.5, 1].flatMap((value) => [
    svg("path", { class: "grid", d: `M${left} ${y(value)}H${right}` }),
    svg("text", { x: left - 6, y: y(value) + 4, "text-anchor": "end" }, percent(value)),
  ]);
  parts.push(svg("text", { x: left, y: bottom + 18, "text-anchor": "middle" }, "0"),
    svg("text", { x: right, y: bottom + 18, "text-anchor": "middle" }, `${last}`),
    svg("text", { x: (left + right) / 2, y: bottom + 18, "text-anchor": "middle" }, "epoch"),
    svg("path", { class: "marker", d: `M${x(epoch)} ${top}V${bottom}` }));
  const labels = series.map((one) => ({ ...one, at: y(one.points.at(-1)[1]) }))
    .sort((a, b) => a.at - b.at);
  for (let i = labels.length - 1, low = bottom; i >= 0; i--) {  // labels must not cover each other
    labels[i].at = Math.min(labels[i].at, low);
    low = labels[i].at - 15;
  }
  for (const { name, kind, points: all, at } of labels) {
    const places = all.map(([px, py]) => `${x(px).toFixed(1)} ${y(py).toFixed(1)}`);
    parts.push(svg("path", { class: `line ${kind}`, d: `M${places.join("L")}` }),
      svg("text", { class: `end ${kind}`, x: right + 8, y: at + 4 }, name.slice(0, 12)));
    for (const [px, py] of all) {
      if (px === epoch) parts.push(svg("circle", { class: kind, cx: x(px), cy: y(py), r: 4 }));
    }
  }
  chart.replaceChildren(...parts);
  chart.setAttribute("aria-label", series.map(({ name, points: all }) =>
    `${name}: ${percent(all.at(-1)[1])} after epoch ${all.at(-1)[0]}`).join("; "));
}

/* The current answer stays in view on small screens. */
const inView = new IntersectionObserver(([entry]) => {
  byId("peek").hidden = entry.isIntersecting;
});
inView.observe(byId("pad"));

document.documentElement.style.setProperty("--depth", DEPTH);  // for the size of the print
startLook();
startBreak();
startLearn();
startDraw();
if (!data.examples.length) readDrawing();
try {
  update();
} finally {  // its warning must appear even if the page does not work
  checkAgainstPyTorch();
}
