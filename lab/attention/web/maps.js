const OVERLAY_SIDE = 672;  // approximate, in pixels: sharp on high-density screens
const SMALL_PICTURE = 64;  // in pixels; smaller images are not smoothed
const BLOCKS = "attention of one block";

const colors = bytes(data.colors);  // red, green and blue of 256 steps
const pictures = data.images.map((image) => Object.assign(new Image(), { src: image.picture }));
const methods = listMethods();
/* Opens at the last block. Head 0 is the mean of all. */
const state = { image: 0, method: methods[0], block: Infinity, head: 0 };

/* Available maps. A method is null (BLOCKS) or the name of another map. */

function listMethods() {
  const names = new Set(data.images.flatMap((image) => Object.keys(image.others)));
  const anyBlocks = data.images.some((image) => image.blocks.length > 0);
  return anyBlocks ? [null, ...names] : [...names];
}

function hasMethod(image, method) {
  return method === null ? image.blocks.length > 0 : Object.hasOwn(image.others, method);
}

/* One map of a stack. Values run from 0 for `low` to 255 for `high`. */
function mapFrom(stack, index) {
  stack.bytes ??= bytes(stack.values);
  const size = stack.rows * stack.columns;
  return {
    rows: stack.rows,
    columns: stack.columns,
    low: stack.low[index],
    high: stack.high[index],
    values: stack.bytes.subarray(index * size, (index + 1) * size),
  };
}

function currentMap() {
  const image = data.images[state.image];
  return state.method === null
    ? mapFrom(image.blocks[state.block], state.head)
    : mapFrom(image.others[state.method], 0);
}

function headCount(image, block) {
  return image.blocks[block].low.length - 1;  // the mean comes first and does not count
}

/* Drawing */

/* For each of `side` pixels: the two values it lies between, and the weight of the second. */
function neighbours(side, count, smooth) {
  return Array.from({ length: side }, (_, pixel) => {
    const place = ((pixel + 0.5) * count) / side;  // in squares
    if (!smooth) return [Math.floor(place), Math.floor(place), 0];
    const inside = Math.min(Math.max(place - 0.5, 0), count - 1);
    const first = Math.floor(inside);
    return [first, Math.min(first + 1, count - 1), inside - first];
  });
}

/* Interpolates values, not colors, because a mix of two colors may not be in the color map. */
function colorize(map, width, height, smooth) {
  const drawn = new ImageData(width, height);
  const across = neighbours(width, map.columns, smooth);
  const down = neighbours(height, map.rows, smooth);
  let at = 0;
  for (const [top, bottom, lower] of down) {
    for (const [left, right, share] of across) {
      const value = (row) =>
        map.values[row * map.columns + left] * (1 - share) +
        map.values[row * map.columns + right] * share;
      const step = 3 * Math.round(value(top) * (1 - lower) + value(bottom) * lower);
      drawn.data[at] = colors[step];
      drawn.data[at + 1] = colors[step + 1];
      drawn.data[at + 2] = colors[step + 2];
      drawn.data[at + 3] = 255;
      at += 4;
    }
  }
  return drawn;
}

function drawOverlay() {
  const picture = pictures[state.image];
  const canvas = byId("overlay");
  const side = picture.naturalWidth * Math.max(1, Math.round(OVERLAY_SIDE / picture.naturalWidth));
  if (canvas.width !== side) canvas.width = canvas.height = side;
  const context = canvas.getContext("2d");
  context.globalAlpha = 1;
  context.imageSmoothingEnabled = picture.naturalWidth >= SMALL_PICTURE;
  context.drawImage(picture, 0, 0, side, side);
  context.globalAlpha = byId("opacity").value / 100;
  // Fade the image to gray as the map becomes opaque, so that all color comes from the map
  context.globalCompositeOperation = "saturation";
  context.fillStyle = "gray";
  context.fillRect(0, 0, side, side);
  context.globalCompositeOperation = "source-over";
  const layer = element("canvas", { width: side, height: side });
  const drawn = colorize(currentMap(), side, side, byId("smooth").checked);
  layer.getContext("2d").putImageData(drawn, 0, 0);
  context.drawImage(layer, 0, 0);
}

function drawBar() {
  const bar = { rows: 1, columns: 256, values: Uint8Array.from({ length: 256 }, (_, i) => i) };
  byId("bar").getContext("2d").putImageData(colorize(bar, 256, 1, false), 0, 0);
}

/* The page around the map */

function markOf(image) {
  if (image.correct === null) return "";
  return image.correct ? "✓ correct" : "✗ wrong";
}

function markElement(image) {
  return element("span", { className: image.correct ? "correct" : "wrong" }, markOf(image));
}

function buildThumbnails() {
  data.images.forEach((image, index) => {
    const picture = element("img", { src: image.picture, alt: "" });
    if (pictures[index].naturalWidth < SMALL_PICTURE) picture.className = "pixels";
    const name = markOf(image) ? `${image.title}, ${markOf(image).slice(2)}` : image.title;
    const properties = { type: "button", title: name, aria: { label: name } };
    const button = element("button", properties, picture, markElement(image));
    button.addEventListener("click", () => chooseImage(index));
    byId("thumbnails").append(button);
  });
}

function buildMethods() {
  for (const method of methods) {
    const radio = element("input", { type: "radio", name: "method", autocomplete: "off" });
    radio.addEventListener("change", () => choose({ method }));
    const name = element("span", {}, method ?? BLOCKS);
    byId("methods").append(element("label", { className: "option" }, radio, name));
  }
}

function buildOverview() {
  const image = data.images[state.image];
  const heads = Math.max(0, ...image.blocks.map((_, block) => headCount(image, block)));
  const names = ["", "mean", ...Array.from({ length: heads }, (_, head) => `${head + 1}`)];
  const top = element("tr", {}, ...names.map((name) => element("th", { scope: "col" }, name)));
  top.firstChild.replaceWith(element("td"));
  const rows = image.blocks.map((stack, block) => {
    const name = element("th", { scope: "row" }, `block ${block + 1}`);
    const cells = stack.low.map((_, head) => element("td", {}, overviewCell(stack, block, head)));
    return element("tr", {}, name, ...cells);
  });
  byId("cells").style.setProperty("--columns", heads + 1);
  byId("cells").replaceChildren(element("thead", {}, top), element("tbody", {}, ...rows));
}

function overviewCell(stack, block, head) {
  const canvas = element("canvas", { width: stack.columns, height: stack.rows });
  const drawn = colorize(mapFrom(stack, head), stack.columns, stack.rows, false);
  canvas.getContext("2d").putImageData(drawn, 0, 0);
  const label = `block ${block + 1}, ${head === 0 ? "mean of all heads" : `head ${head}`}`;
  const button = element("button", { type: "button", aria: { label } }, canvas);
  button.dataset.cell = `${block} ${head}`;
  button.addEventListener("click", () => choose({ method: null, block, head }));
  return button;
}

function moveInOverview(event) {
  const steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
  const step = steps[event.key];
  if (!step || event.altKey || event.ctrlKey || event.metaKey) return;
  event.preventDefault();  // do not scroll the page
  const last = data.images[state.image].blocks.length - 1;
  const block = Math.min(Math.max(state.block + step[0], 0), last);
  choose({ method: null, block, head: Math.max(state.head + step[1], 0) });
  byId("cells").querySelector("[aria-pressed=true]").focus();
}

function nameOfHead() {
  const count = headCount(data.images[state.image], state.block);
  return state.head === 0 ? "mean of all heads" : `head ${state.head} of ${count}`;
}

function nameOfMap() {
  if (state.method !== null) return state.method;
  const blocks = data.images[state.image].blocks.length;
  return `block ${state.block + 1} of ${blocks}, ${nameOfHead()}`;
}

function number(value) {
  if (value !== 0 && Math.abs(value) < 1e-4) return value.toExponential(1);
  return value.toLocaleString("en", { maximumSignificantDigits: 3 });
}

/* Attention of a block is a fraction of the whole, shown in percent. Other methods have no unit. */
function amount(value) {
  return state.method === null ? `${number(100 * value)}\u00a0%` : number(value);
}

function showRange() {
  const map = currentMap();
  const unit = state.method === null ? " of the attention" : "";
  byId("lowest").textContent = amount(map.low);
  byId("highest").textContent = amount(map.high);
  byId("range").textContent =
    `${map.rows} × ${map.columns} values, minimum ${amount(map.low)}, ` +
    `maximum ${amount(map.high)}${unit}. Each map has its own color scale.`;
}

function showSlider(id, value, words) {
  byId(id).value = value;
  byId(id).setAttribute("aria-valuetext", words);
  byId(`${id}-label`).textContent = words;
}

function showChoices() {
  const image = data.images[state.image];
  const byBlock = state.method === null;
  byId("methods").querySelectorAll("input").forEach((radio, index) => {
    radio.checked = methods[index] === state.method;
    radio.disabled = !hasMethod(image, methods[index]);
  });
  byId("layer").hidden = byId("overview").hidden = image.blocks.length === 0;
  byId("layer").disabled = !byBlock;
  if (image.blocks.length === 0) return;
  byId("block").max = image.blocks.length;
  byId("head").max = headCount(image, state.block);
  showSlider("block", state.block + 1, `block ${state.block + 1} of ${image.blocks.length}`);
  showSlider("head", state.head, nameOfHead());
  const chosen = `${state.block} ${state.head}`;
  for (const button of byId("cells").querySelectorAll("button")) {
    const isChosen = button.dataset.cell === chosen;
    button.setAttribute("aria-pressed", isChosen && byBlock);
    button.tabIndex = isChosen ? 0 : -1;  // one tab stop; arrow keys move inside
  }
}

function show() {
  const image = data.images[state.image];
  showChoices();
  showRange();
  showSlider("opacity", byId("opacity").value, `${byId("opacity").value}\u00a0%`);
  byId("shown").textContent = nameOfMap();
  const words = `${image.title}, with the map over it: ${nameOfMap()}`;
  byId("overlay").setAttribute("aria-label", words);
  drawOverlay();
}

/* Choosing */

function choose(change) {
  Object.assign(state, change);
  const image = data.images[state.image];
  if (!hasMethod(image, state.method)) {
    state.method = methods.find((method) => hasMethod(image, method));
  }
  // Images may differ in blocks, and blocks in heads
  if (image.blocks.length > 0) {
    state.block = Math.min(state.block, image.blocks.length - 1);
    state.head = Math.min(state.head, headCount(image, state.block));
  }
  show();
}

function chooseImage(index) {
  const image = data.images[index];
  state.image = index;
  [...byId("thumbnails").children].forEach((button, place) => {
    button.setAttribute("aria-pressed", place === index);
  });
  byId("title").replaceChildren(image.title, " ", markElement(image));
  byId("picture").src = image.picture;
  byId("picture").alt = `${image.title}: the original image`;
  byId("picture").className = pictures[index].naturalWidth < SMALL_PICTURE ? "pixels" : "";
  buildOverview();
  choose({});
}

async function start() {
  await Promise.all(pictures.map((picture) => picture.decode()));
  buildThumbnails();
  buildMethods();
  drawBar();
  byId("block").addEventListener("input", (event) => choose({ block: event.target.value - 1 }));
  byId("head").addEventListener("input", (event) => choose({ head: Number(event.target.value) }));
  byId("opacity").addEventListener("input", show);
  byId("smooth").addEventListener("change", show);
  byId("cells").addEventListener("keydown", moveInOverview);
  chooseImage(0);
}

start();
