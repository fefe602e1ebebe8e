/* Draw: the drawing area, examples, photographs, and the prediction. */

const PAD = 280;  // side of the drawing area in its own pixels
const PEN = 0.078 * PAD, ERASER = 0.14 * PAD;
const pad = byId("pad"), padContext = pad.getContext("2d", { willReadFrequently: true });
const canDraw = C === 1;
const paperAndInk = data.ink_is_bright ? ["black", "white"] : ["white", "black"];
const pen = { tool: "pen", last: null, isTouched: false, x: PAD / 2, y: PAD / 2, isDown: false };

function startDraw() {
  pad.width = pad.height = canDraw ? PAD : STAGE;
  byId("pad-frame").classList.toggle("bright", !data.ink_is_bright);
  byId("tools").hidden = !canDraw;
  pad.classList.toggle("drawable", canDraw);
  byId("file-label").hidden = canDraw;
  byId("fit").hidden = !canDraw;
  const first = data.examples.find((example) => example.correct) ?? data.examples[0];
  buildExamples();
  if (canDraw) {
    byId("draw-title").textContent = "Draw";
    byId("fit-on").disabled = byId("fit-on").hidden = !data.drawing;
    byId("fit-text").textContent = fitSentence();
    byId("fit-on").addEventListener("change", () => { if (pen.isTouched) readDrawing(); });
    listenToPen();
  } else {
    byId("draw-title").textContent = "Show it an image";
    pad.setAttribute("role", "img");
    pad.setAttribute("aria-label", "The image. Drop a file here to replace it.");
    byId("hint").textContent = first ? "" : "drop an image here";
    listenToFiles();
  }
  if (first) showExample(first);
}

function fitSentence() {
  const rule = data.drawing;
  if (!rule) return `Your drawing is scaled to ${S} × ${S} pixels; its size and position do not change.`;
  const isMass = rule.center === "mass";
  return `${isMass ? "As in MNIST" : `As in ${data.dataset}`}: your ` +
    `drawing is scaled into a box of ${rule.box} × ${rule.box} pixels, and ` +
    `${isMass ? "its center of mass is moved to" : "it is centered in"} the middle of ` +
    `${S} × ${S}. Uncheck to see how much that matters.`;
}

/* Examples */

function buildExamples() {
  for (const example of data.examples) {
    const canvas = element("canvas", { width: S, height: S, className: S > SMALL ? "" : "pixels" });
    canvas.getContext("2d").putImageData(toImageData(example.image, S, C), 0, 0);
    const button = element("button", { type: "button", title: example.title,
      aria: { label: `Example: ${example.title}`, pressed: "false" } }, canvas);
    button.addEventListener("click", () => showExample(example));
    example.button = button;
    byId(example.correct === false ? "mistake-examples" : "examples").append(button);
  }
  byId("mistakes").hidden = !byId("mistake-examples").children.length;
}

function showExample(example) {
  pen.isTouched = false;
  padContext.clearRect(0, 0, pad.width, pad.height);
  setImage(example.image, example);
  requestUpdate();
  padContext.imageSmoothingEnabled = S > SMALL;
  if (canDraw) {  // as ink, so that the user can keep drawing
    const ink = new ImageData(S, S), layer = element("canvas", { width: S, height: S });
    example.image.forEach((value, i) => {
      const alpha = data.ink_is_bright ? value : 255 - value, shade = data.ink_is_bright ? 255 : 0;
      ink.data.set([shade, shade, shade, alpha], 4 * i);
    });
    layer.getContext("2d").putImageData(ink, 0, 0);
    padContext.drawImage(layer, 0, 0, PAD, PAD);
  } else {
    padContext.drawImage(imageCanvas, 0, 0, pad.width, pad.height);
  }
}

function setImage(image, example = null) {
  state.image = image;
  state.isEmpty = false;
  byId("hint").textContent = "";
  imageCanvas.getContext("2d").putImageData(toImageData(image, S, C), 0, 0);
  for (const other of data.examples) press(other.button, other === example);
}

/* The pen */

function listenToPen() {
  pad.setAttribute("role", "application");
  pad.setAttribute("aria-label",
    "Drawing area. Arrow keys move the pen, space lowers and lifts it.");
  pad.addEventListener("pointerdown", (event) => {
    event.preventDefault();
    pad.focus({ preventScroll: true });
    pad.setPointerCapture(event.pointerId);
    if (!pen.isTouched && state.query !== POOLED) choose({ query: POOLED });
    pen.last = null;
    stroke([placeOf(event)]);
  });
  pad.addEventListener("pointermove", (event) => {
    if (!pen.last || !event.buttons) return;
    const events = event.getCoalescedEvents?.() ?? [];
    stroke((events.length ? events : [event]).map(placeOf));
  });
  for (const name of ["pointerup", "pointercancel"]) {
    pad.addEventListener(name, () => { pen.last = null; if (pen.isTouched) readDrawing(); });
  }
  pad.addEventListener("keydown", onPadKey);
  pad.addEventListener("blur", () => { byId("cursor").hidden = true; pen.isDown = false; });
  for (const tool of ["pen", "eraser"]) {
    byId(tool).addEventListener("click", () => {
      pen.tool = tool;
      for (const name of ["pen", "eraser"]) press(byId(name), name === tool);
    });
  }
  byId("clear").addEventListener("click", () => {
    padContext.clearRect(0, 0, PAD, PAD);
    pen.isTouched = true;
    readDrawing();
  });
}

function placeOf(event) {
  const box = pad.getBoundingClientRect();
  const [x, y] = [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
  return [x * PAD, y * PAD];
}

function stroke(points) {
  padContext.globalCompositeOperation = pen.tool === "pen" ? "source-over" : "destination-out";
  padContext.strokeStyle = paperAndInk[1];
  padContext.lineWidth = pen.tool === "pen" ? PEN : ERASER;
  padContext.lineCap = padContext.lineJoin = "round";
  padContext.beginPath();
  padContext.moveTo(...(pen.last ?? points[0]));
  for (const point of points) padContext.lineTo(...point);
  padContext.stroke();
  padContext.globalCompositeOperation = "source-over";
  pen.last = points.at(-1);
  pen.isTouched = true;
  if (state.milliseconds < SLOW) readDrawing();
}

function onPadKey(event) {
  const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  if (event.key === " ") pen.isDown = !pen.isDown;
  else if (steps[event.key]) {
    const before = [pen.x, pen.y];
    [pen.x, pen.y] = steps[event.key].map((step, i) =>
      Math.min(PAD, Math.max(0, before[i] + (step * PAD) / 28)));
    if (pen.isDown) {
      pen.last = before;
      stroke([[pen.x, pen.y]]);
      pen.last = null;
      if (state.milliseconds >= SLOW) readDrawing();  // no pointer will be lifted
    }
  } else return;
  event.preventDefault();
  const cursor = byId("cursor");
  cursor.hidden = false;
  cursor.classList.toggle("down", pen.isDown);
  cursor.style.left = `${(100 * pen.x) / PAD}%`;
  cursor.style.top = `${(100 * pen.y) / PAD}%`;
}

/* Reads the drawing in the next frame: a pen reports its place more often than that. */
let reading = false;
function readDrawing() {
  reading = true;
  requestUpdate();
}

function readInk() {
  reading = false;
  const rgba = padContext.getImageData(0, 0, PAD, PAD).data, ink = new Float32Array(PAD * PAD);
  for (let i = 0; i < ink.length; i++) ink[i] = rgba[4 * i + 3];
  const image = fitDrawing(ink, PAD, S, byId("fit-on").checked ? data.drawing : null);
  setImage(image.map((value) => Math.round(data.ink_is_bright ? value : 255 - value)));
  state.isEmpty = !ink.some((value) => value > 127);
  byId("hint").textContent = state.isEmpty ? "draw here" : "";
}

/* Photographs */

function listenToFiles() {
  byId("file").addEventListener("change", (event) => readFile(event.target.files[0]));
  addEventListener("dragover", (event) => event.preventDefault());
  addEventListener("drop", (event) => {
    event.preventDefault();
    readFile(event.dataTransfer.files[0]);
  });
}

async function readFile(file) {
  if (!file) return;
  try {
    const bitmap = await createImageBitmap(file, { colorSpaceConversion: "none" });
    setImage(cropPhotograph(bitmap, preprocess, C));
    requestUpdate();
    padContext.imageSmoothingEnabled = S > SMALL;
    padContext.drawImage(imageCanvas, 0, 0, pad.width, pad.height);
  } catch {
    byId("hint").textContent = `The browser cannot read ${file.name} as an image.`;
  }
}

/* The prediction */

function showPrediction() {
  const { probabilities } = current, best = argmax(probabilities);
  const sees = byId("sees");
  if (sees.width !== S) sees.width = sees.height = S;
  sees.classList.toggle("pixels", S <= SMALL);
  sees.getContext("2d").drawImage(imageCanvas, 0, 0);
  byId("answer-class").textContent = state.isEmpty ? "–" : classes[best];
  byId("answer-class").classList.toggle("long", classes[best].length > 2);
  byId("answer-text").textContent = state.isEmpty ? "an empty page" : percent(probabilities[best]);
  showBars(byId("bars"), probabilities);
  byId("epoch-badge").hidden = state.snapshot === FINAL;
  byId("epoch-text").textContent = `Weights of epoch ${data.states[state.snapshot].epoch}.`;
  const peek = byId("peek-image");
  if (peek.width !== S) peek.width = peek.height = S;
  peek.getContext("2d").drawImage(imageCanvas, 0, 0);
  byId("peek-text").textContent = `${classes[best]} · ${percent(probabilities[best])}`;
}
