/* Look: what a token attends to, the logit lens, one number traced. */

let lookPicker = null;

function startLook() {
  const label = "Image patches. Arrow keys move, Enter shows what the patch attends to.";
  lookPicker = new PatchPicker(byId("look-map"), label, {
    pick: (patch) => choose({ query: patch === state.query ? POOLED : patch }),
    point: showPointed,
  });
  byId("pooled").textContent = POOLED_NAME;
  byId("pooled").addEventListener("click", () => choose({ query: POOLED }));
  for (const view of ["heat", "lines"]) {
    byId(`view-${view}`).addEventListener("click", () => choose({ view }));
  }
  byId("rollout").addEventListener("click", () => choose({ rollout: !state.rollout }));
  buildHeads();
}

/* Changes what is shown, without another forward pass. */
function choose(changes) {
  Object.assign(state, changes);
  showLook();
  showBreakMaps();
  showFilm();
}

function buildHeads() {
  const names = ["mean", ...Array.from({ length: HEADS }, (_, i) => `${i + 1}`)];
  const cells = names.map((name) => element("th", { scope: "col" }, name));
  byId("heads").append(element("thead", {}, element("tr", {}, element("td"), ...cells)));
  const body = element("tbody");
  for (let block = 0; block < DEPTH; block++) {
    const row = element("tr", {}, element("th", { scope: "row" }, `block ${block + 1}`));
    for (let head = MEAN; head < HEADS; head++) {
      const canvas = element("canvas", { width: SIDE, height: SIDE });
      const aria = { label: `Block ${block + 1}, ${headName(head)}` };
      const button = element("button", { type: "button", aria }, canvas);
      button.addEventListener("click", () => choose({ block, head, rollout: false }));
      button.addEventListener("keydown", (event) => moveHead(event, block, head));
      row.append(element("td", {}, button));
    }
    body.append(row);
  }
  byId("heads").append(body);
  byId("heads").style.setProperty("--columns", HEADS + 1);
}

function headButton(block, head) {
  return byId("heads").tBodies[0].rows[block].cells[head + 2].firstChild;
}

function moveHead(event, block, head) {
  const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
  if (!steps[event.key]) return;
  event.preventDefault();
  const [down, across] = steps[event.key];
  const next = {
    block: Math.min(DEPTH - 1, Math.max(0, block + down)),
    head: Math.min(HEADS - 1, Math.max(MEAN, head + across)),
  };
  choose({ ...next, rollout: false });
  headButton(next.block, next.head).focus();
}

function showLook() {
  if (!current) return;
  press(byId("pooled"), state.query === POOLED);
  byId("query-text").textContent = state.query === POOLED ? "or click a patch"
    : `now the patch in ${patchName(state.query)}`;
  press(byId("view-heat"), state.view === "heat");
  press(byId("view-lines"), state.view === "lines");
  press(byId("rollout"), state.rollout);
  for (let block = 0; block < DEPTH; block++) {
    for (let head = MEAN; head < HEADS; head++) {
      const button = headButton(block, head), context = clearCanvas(button.firstChild, SIDE);
      const isChosen = block === state.block && head === state.head;
      paintMap(context, SIDE, attentionMap(current, block, head, state.query), palette.attention);
      press(button, isChosen && !state.rollout);
      button.tabIndex = isChosen ? 0 : -1;
    }
  }
  showPointed(lookPicker.cursor);
  showLens();
  showTrace();
}

/* The large map, with the pointed patch outlined and its value in words. */
function showPointed(patch) {
  if (!current) return;
  const values = shownMap(current), context = clearCanvas(byId("look-map"), STAGE);
  if (state.view === "heat") drawHeat(context, STAGE, values, palette.attention);
  else drawLines(context, values);
  if (state.query !== POOLED) outlinePatch(context, STAGE, state.query, palette.ink, STAGE / 110);
  if (patch !== null) outlinePatch(context, STAGE, patch, palette.attention, STAGE / 90);
  const best = argmax(values), from = state.query === POOLED ? `The ${POOLED_NAME}` : "This patch";
  byId("look-shown").textContent = `${shownName()}. `;
  const whole = state.rollout ? "of the rollout" : "of its attention";
  byId("look-value").textContent = patch === null
    ? `${from} attends most to ${patchName(best)}: ${percent(values[best])} ${whole}.` +
      (state.view === "lines" && state.query === POOLED ? " Its lines start at the top." : "")
    : `${capital(patchName(patch))}: ${percent(values[patch])} ${whole}.`;
}

/* Lines from the query to the patches, as wide as the attention is large. */
function drawLines(context, values) {
  const cell = STAGE / SIDE, high = Math.max(...values);
  const center = (patch) =>
    [((patch % SIDE) + 0.5) * cell, (Math.floor(patch / SIDE) + 0.5) * cell];
  const start = state.query === POOLED ? [STAGE / 2, cell * 0.18] : center(state.query);
  context.globalAlpha = C === 1 ? 0.35 : 1;
  drawImage(context, STAGE);
  context.globalAlpha = 1;
  context.strokeStyle = context.fillStyle = palette.attention;
  context.lineCap = "round";
  values.forEach((value, patch) => {
    const share = high > 0 ? value / high : 0, [x, y] = center(patch);
    if (share < 0.04) return;
    context.globalAlpha = 0.25 + 0.7 * share;
    context.lineWidth = Math.max(1, (share * cell) / 5);
    context.beginPath();
    context.moveTo(...start);
    context.lineTo(x, y);
    context.stroke();
    context.globalAlpha = 1;
    context.beginPath();
    context.arc(x, y, Math.max(2, share * cell * 0.22), 0, 7);
    context.fill();
  });
  context.beginPath();
  context.arc(...start, cell * 0.16, 0, 7);
  context.fillStyle = palette.ink;
  context.fill();
}

/* The logit lens: a row per block, a column per class. */
function showLens() {
  const table = byId("lens"), shown = shownClasses(current.probabilities, 8);
  const names = shown.map((i) => element("th", { scope: "col", title: classes[i] }, classes[i]));
  const head = element("tr", {}, element("td"), ...names);
  const rows = current.lens.map((logits, block) => {
    const probabilities = softmax(logits.slice()), best = argmax(probabilities);
    const name = block === 0 ? "input" : block === DEPTH ? "output" : `block ${block}`;
    const cells = shown.map((i) => {
      const cell = element("td", { title: `${classes[i]}: ${percent(probabilities[i])}` });
      const weight = probabilities[i];
      cell.style.setProperty("--share", `${(50 * weight).toFixed(1)}%`);
      cell.classList.toggle("strong", weight > 0.2);
      cell.classList.toggle("best", i === best);
      cell.textContent = weight >= 0.005 ? Math.round(100 * weight) : "·";
      return cell;
    });
    return element("tr", {}, element("th", { scope: "row" }, name), ...cells);
  });
  table.replaceChildren(element("caption", {}, "probability in percent"),
    element("thead", {}, head), element("tbody", {}, ...rows));
}

/* One number: a pixel, its patch's token, the token's key, a softmax, the logit. */
function showTrace() {
  const { block } = state, result = current, model = modelAt(state.snapshot);
  const D = config.embed_dim, N = result.tokens.length / D, prefix = N - PATCHES, V = C * P * P;
  const patch = argmax(attentionMap(result, block, state.head, state.query));
  const weightIn = (_, h) => attentionMap(result, block, h, state.query)[patch];
  const head = state.head !== MEAN ? state.head : argmax(Array.from({ length: HEADS }, weightIn));
  const isPooled = state.query === POOLED, isMean = isPooled && config.global_pool === "avg";
  const j = prefix + patch, i = isMean ? j : isPooled ? 0 : prefix + state.query;
  const asker = isMean ? "the patch itself" : isPooled ? "the class token" : "the clicked patch";
  const { scores, weights } = result.blocks[block], at = (head * N + i) * N;
  const score = scores[at + j], scale = model.blocks[block].attn.scale, weight = weights[at + j];

  const pixel = brightestPixel(patch), fraction = pixel / 255;
  const [mean, std] = [preprocess.mean[0], preprocess.std[0]];
  const token = result.tokens.subarray(j * D, (j + 1) * D), channel = argmax(token.map(Math.abs));
  const position = config.no_embed_class ? patch : j;
  const added = model.positions[position * D + channel], best = argmax(result.probabilities);
  const rest = DEPTH - block - 1;
  const after = rest ? `After ${rest} more block${rest > 1 ? "s" : ""}` : "After this block";
  const steps = [
    ["Pixel", number((fraction - mean) / std),
      `The brightest of the ${V / C} ${C > 1 ? "red " : ""}values in the patch in ` +
      `${patchName(patch)} is ` +
      `${Math.round(pixel)} of 255. Normalized: ` +
      `(${number(fraction)} − ${number(mean)}) / ${number(std)}.`],
    ["Token", number(token[channel]),
      `A weighted sum of all ${V} values gives ${number(token[channel] - added)} in channel ` +
      `${channel + 1} of ${D}. The position embedding adds ${number(added)}, which makes it the ` +
      "largest channel."],
    ["q · k", number(score),
      `In block ${block + 1}, head ${head + 1}, ${asker} compares its query with this token's ` +
      `key: ${D / HEADS} products add up to ${number(score)}.`],
    ["Softmax", percent(weight),
      `× 1/√${D / HEADS} = ${number(score * scale)}. Its exponential, divided by the sum of the ` +
      `exponentials of all ${N} tokens, is the weight of this patch.`],
    ["Logit", number(result.logits[best]),
      `${after}, norm and head give this logit for “${classes[best]}”. Softmax over ` +
      `${classes.length} classes: ${percent(result.probabilities[best])}.`],
  ];
  byId("trace").replaceChildren(...steps.map(([name, value, text]) => element("li", {},
    element("h4", {}, name), element("strong", {}, value), element("p", {}, text))));
}

function brightestPixel(patch) {  // of the first channel, 0 to 255
  const left = (patch % SIDE) * P, top = Math.floor(patch / SIDE) * P;
  let brightest = 0;
  for (let y = top; y < top + P; y++) {
    for (let x = left; x < left + P; x++) brightest = Math.max(brightest, state.image[y * S + x]);
  }
  return brightest;
}
