/* State of the page, the forward pass after each change, and what the sections share. */

const { config, preprocess, classes } = data;
const { img_size: S, patch_size: P, in_chans: C, num_heads: HEADS, depth: DEPTH } = config;
const SIDE = S / P, PATCHES = SIDE * SIDE;
const MEAN = -1;  // as a head: the mean of all heads
const POOLED = -1;  // as a query: what the head of the model reads, the class token or the mean
const POOLED_NAME = config.global_pool === "token" ? "class token" : "mean of all patches";
const SMALL = 64;  // pixels: smaller images are not smoothed
const SLOW = 50;  // ms: a slower model predicts when the pen is lifted
const FINAL = data.opening;  // the snapshot with which the page opens: the best epoch

const models = [];
const state = {
  image: new Float32Array(C * S * S),  // (C, S, S), 0 to 255
  isEmpty: true,
  snapshot: FINAL,
  block: DEPTH - 1, head: MEAN, rollout: false,
  query: POOLED, view: "heat",
  removed: new Set(), order: null, noPositions: false, noScale: false, silent: new Set(),
  broken: null,  // the probabilities with these changes
  milliseconds: Infinity,  // of the fastest forward pass so far
};
let current = null;  // the result of the forward pass of `state`

function modelAt(snapshot) {
  const { weights } = data.states[snapshot];
  return (models[snapshot] ??= new VisionTransformer(config, readWeights(weights, data.layout)));
}

/* Logits, probabilities and recorded values for an image (C, S, S) with pixels from 0 to 255. */
function infer(image, snapshot = FINAL, changes = NO_CHANGES) {
  const model = modelAt(snapshot), start = performance.now(), record = {};
  const logits = model.forward(normalize(image, preprocess), changes, record);
  state.milliseconds = Math.min(state.milliseconds, performance.now() - start);
  return { logits, probabilities: softmax(logits.slice()), ...record };
}

let scheduled = 0;
function requestUpdate() {
  scheduled ||= requestAnimationFrame(() => { scheduled = 0; update(); });
}

function update() {
  if (reading) readInk();
  current = infer(state.image, state.snapshot);
  showPrediction();
  showLook();
  showBreak();
  showLearn();
  afterwards();
}

/* Work of many forward passes runs once the image has not changed for a moment. */
let pending = 0, generation = 0;
function afterwards() {
  clearTimeout(pending);
  const mine = ++generation;
  pending = setTimeout(async () => {
    for (const work of [replayTraining, measurePatches]) {
      for (const _ of work()) {
        await new Promise((resolve) => setTimeout(resolve));
        if (mine !== generation) return;
      }
    }
  }, 250);
}

/* Attention */

/* (PATCHES,): the share of attention that a query gives to each patch. */
function attentionMap(result, block, head, query) {
  const row = attentionRow(result, block, head, query);
  return row.subarray(row.length - PATCHES);
}

function attentionRow({ blocks }, block, head, query) {  // over all N tokens
  const { weights } = blocks[block], N = Math.sqrt(weights.length / HEADS), prefix = N - PATCHES;
  const heads = head === MEAN ? Array.from({ length: HEADS }, (_, i) => i) : [head];
  const isMean = query === POOLED && config.global_pool === "avg";
  const rows = isMean ? Array.from({ length: PATCHES }, (_, i) => prefix + i)
    : [query === POOLED ? 0 : prefix + query];
  const sum = new Float32Array(N), share = 1 / heads.length / rows.length;
  for (const h of heads)
    for (const i of rows)
      for (let j = 0; j < N; j++) sum[j] += weights[(h * N + i) * N + j] * share;
  return sum;
}

/* Attention rollout as in saliency.py: the row of the query in the product of (I + A) / 2. */
function rolloutMap(result, query) {
  const N = Math.sqrt(result.blocks[0].weights.length / HEADS), prefix = N - PATCHES;
  let row = new Float32Array(N);
  if (query !== POOLED) row[prefix + query] = 1;
  else if (config.global_pool === "token") row[0] = 1;
  else row.fill(1 / PATCHES, prefix);
  for (let block = DEPTH - 1; block >= 0; block--) {
    const { weights } = result.blocks[block], next = new Float32Array(N);
    for (let h = 0; h < HEADS; h++)
      for (let i = 0; i < N; i++)
        for (let j = 0; j < N; j++) next[j] += (row[i] * weights[(h * N + i) * N + j]) / HEADS;
    row = row.map((value, i) => (value + next[i]) / 2);
  }
  return row.subarray(prefix);
}

function shownMap(result, query = state.query) {
  return state.rollout ? rolloutMap(result, query)
    : attentionMap(result, state.block, state.head, query);
}

function shownName() {
  if (state.rollout) return "Rollout through all blocks";
  return `Block ${state.block + 1}, ${headName(state.head)}`;
}

function headName(head) {
  return head === MEAN ? "mean of all heads" : `head ${head + 1}`;
}

/* Words and numbers */

function percent(value) {
  const digits = value >= 0.9995 || value < 0.0005 ? 0 : value >= 0.0995 ? 0 : 1;
  return `${(100 * value).toFixed(digits)}\u00a0%`;
}

function number(value, digits = 2) {
  return value.toFixed(digits).replace("-", "\u2212");
}

function patchName(patch) {
  return `row ${Math.floor(patch / SIDE) + 1}, column ${(patch % SIDE) + 1}`;
}

function capital(text) {
  return text[0].toUpperCase() + text.slice(1);
}

function argmax(values) {
  let best = 0;
  values.forEach((value, i) => { if (value > values[best]) best = i; });
  return best;
}

/* The classes that fit on the page: all, or the most probable ones. */
function shownClasses(probabilities, most = 10) {
  const all = classes.map((_, i) => i);
  if (classes.length <= 12) return all;
  return all.sort((a, b) => probabilities[b] - probabilities[a]).slice(0, most);
}

/* Elements */

function press(button, isPressed) {
  button.setAttribute("aria-pressed", isPressed);
}

/* A list of classes with bars, updated in place. `before` marks earlier values with a line. */
function showBars(list, probabilities, before = null) {
  const shown = shownClasses(probabilities), best = argmax(probabilities);
  while (list.children.length < shown.length) {
    list.append(element("li", {}, element("span", { className: "name" }),
      element("span", { className: "bar" }, element("i"), element("b")),
      element("span", { className: "value" })));
  }
  shown.forEach((index, i) => {
    const item = list.children[i], [name, bar, value] = item.children;
    item.classList.toggle("best", index === best);
    name.textContent = name.title = classes[index];
    bar.firstChild.style.width = `${100 * probabilities[index]}%`;
    bar.lastChild.hidden = !before;
    if (before) bar.lastChild.style.left = `${100 * before[index]}%`;
    value.textContent = percent(probabilities[index]);
  });
}

/* Colors follow the theme of the system; paper is light. */
const dark = matchMedia("(prefers-color-scheme: dark)");
let palette = readPalette();
function readPalette() {
  const style = getComputedStyle(document.documentElement);
  const names = ["attention", "broken", "predict", "learn", "ink", "quiet", "paper"];
  const colorOf = (name) => style.getPropertyValue(`--${name}`).trim();
  return Object.fromEntries(names.map((name) => [name, colorOf(name)]));
}
dark.addEventListener("change", recolor);
for (const name of ["beforeprint", "afterprint"]) {
  addEventListener(name, () => {
    document.documentElement.classList.toggle("paper", name === "beforeprint");
    recolor();
  });
}
function recolor() {
  palette = readPalette();
  showLook();
  showBreak();
  showFilm();
}

/* Maps */

const imageCanvas = element("canvas", { width: S, height: S });

function drawImage(context, side) {
  context.imageSmoothingEnabled = S > SMALL;
  context.drawImage(imageCanvas, 0, 0, side, side);
}

/* One color whose opacity follows the values, so that the map fits a light and a dark page. */
function paintMap(context, side, values, color, high = Math.max(...values)) {
  const cell = side / SIDE;
  context.fillStyle = color;
  values.forEach((value, patch) => {
    context.globalAlpha = high > 0 ? Math.max(0, value / high) : 0;
    context.fillRect((patch % SIDE) * cell, Math.floor(patch / SIDE) * cell, cell, cell);
  });
  context.globalAlpha = 1;
}

/* Darkens the patches with low values and leaves the colors of the image as they are. */
function paintVeil(context, side, values) {
  const high = Math.max(...values), cell = side / SIDE;
  context.fillStyle = "black";
  values.forEach((value, patch) => {
    context.globalAlpha = 0.88 * (1 - Math.sqrt(Math.max(0, value / (high || 1))));
    context.fillRect((patch % SIDE) * cell, Math.floor(patch / SIDE) * cell, cell, cell);
  });
  context.globalAlpha = 1;
}

/* The outline of the drawing: the edges between pixels that are more and less than half ink. */
function drawOutline(context, side) {
  const unit = side / S, isInk = (x, y) =>
    x >= 0 && y >= 0 && x < S && y < S && (state.image[y * S + x] > 127) === data.ink_is_bright;
  const edge = (x, y, toX, toY) => {
    context.moveTo(x * unit, y * unit);
    context.lineTo(toX * unit, toY * unit);
  };
  context.beginPath();
  for (let y = 0; y <= S; y++) {
    for (let x = 0; x <= S; x++) {
      if (isInk(x, y) !== isInk(x - 1, y)) edge(x, y, x, y + 1);
      if (isInk(x, y) !== isInk(x, y - 1)) edge(x, y, x + 1, y);
    }
  }
  context.strokeStyle = palette.ink;
  context.lineWidth = Math.max(1.5, side / 280);
  context.stroke();
}

function drawHeat(context, side, values, color, high) {
  if (C === 1) {
    paintMap(context, side, values, color, high);
    drawOutline(context, side);
  } else {
    drawImage(context, side);
    paintVeil(context, side, values);
  }
}

function outlinePatch(context, side, patch, color, width) {
  const cell = side / SIDE;
  context.strokeStyle = color;
  context.lineWidth = width;
  context.strokeRect((patch % SIDE) * cell + width / 2, Math.floor(patch / SIDE) * cell + width / 2,
    cell - width, cell - width);
}

function clearCanvas(canvas, side) {
  if (canvas.width !== side) canvas.width = canvas.height = side;
  const context = canvas.getContext("2d");
  context.clearRect(0, 0, side, side);
  return context;
}

const STAGE = S * Math.max(1, Math.round(560 / S));  // side of the large maps: whole pixels

/* A canvas whose patches are picked with the pointer, by touch, or with arrow keys and Enter. */
class PatchPicker {
  constructor(canvas, label, { pick, point, paints = false }) {
    Object.assign(this, { canvas, pick, point, cursor: null });
    canvas.setAttribute("role", "application");
    canvas.setAttribute("aria-label", label);
    let last = null, kind = "";
    canvas.addEventListener("pointerdown", (event) => {
      kind = event.pointerType;
      last = this.patchAt(event);
      if (kind === "mouse") this.pick(last, true);
    });
    canvas.addEventListener("click", (event) => {  // not after a finger has scrolled the page
      if (kind !== "mouse") this.pick(this.patchAt(event), true);
    });
    canvas.addEventListener("pointermove", (event) => {
      const patch = this.patchAt(event);
      this.point(patch);
      if (paints && event.buttons && event.pointerType === "mouse" && patch !== last) {
        last = patch;
        this.pick(patch, false);
      }
    });
    canvas.addEventListener("pointerleave", () => this.point(null));
    canvas.addEventListener("keydown", (event) => this.onKey(event));
    canvas.addEventListener("blur", () => { this.cursor = null; this.point(null); });
  }
  patchAt(event) {
    const box = this.canvas.getBoundingClientRect();
    const [x, y] = [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height]
      .map((place) => Math.min(SIDE - 1, Math.max(0, Math.floor(place * SIDE))));
    return y * SIDE + x;
  }
  onKey(event) {
    const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      this.pick(this.cursor ??= 0, true);
    } else if (steps[event.key]) {
      event.preventDefault();
      const [dx, dy] = this.cursor === null ? [0, 0] : steps[event.key];
      const x = Math.min(SIDE - 1, Math.max(0, ((this.cursor ?? 0) % SIDE) + dx));
      const y = Math.min(SIDE - 1, Math.max(0, Math.floor((this.cursor ?? 0) / SIDE) + dy));
      this.cursor = y * SIDE + x;
    } else return;
    this.point(this.cursor);
  }
}

/* Starting the page */

const CHECKS = 6;  // images

/* Compares the forward pass with the logits that PyTorch computed from the fp32 weights. */
function checkAgainstPyTorch() {
  let largest = 0, scale = 1;
  for (const example of data.examples.slice(0, CHECKS)) {
    const { logits } = infer(example.image);
    example.logits.forEach((value, i) => {
      largest = Math.max(largest, Math.abs(value - logits[i]));
      scale = Math.max(scale, Math.abs(value));
    });
  }
  const count = Math.min(data.examples.length, CHECKS);
  const isEqual = largest <= 0.02 * scale;
  byId("check").className = isEqual ? "" : "warning";
  if (!isEqual) document.querySelector("header.top").append(byId("check"));
  byId("check").textContent = isEqual
    ? `Checked while loading: on ${count} images, this page and PyTorch agree; the largest ` +
      `difference of a logit is ${number(largest, 4)} (weights are stored as fp16). One forward ` +
      `pass took ${number(state.milliseconds, 1)} ms.`
    : `Do not trust this page: its logits differ from PyTorch's by up to ${number(largest)}. It ` +
      "computes model.py as it was published. Have you changed the forward pass?";
}
for (const example of data.examples) {
  example.image = Float32Array.from(bytes(example.pixels));
}
