/* Break it: patches removed, parts turned off, the cost of each patch compared with attention. */

let breakPicker = null;
const costs = { values: null, of: null };  // the drop in probability for each removed patch

function startBreak() {
  const label = "Image patches. Arrow keys move, Enter removes or restores a patch.";
  breakPicker = new PatchPicker(byId("break-map"), label, {
    paints: true,
    pick: (patch, isFirst) => {
      const { removed } = state;
      if (isFirst) breakPicker.isRemoving = !removed.has(patch);
      if (!breakPicker.isRemoving) removed.delete(patch);
      else if (removed.size < PATCHES - 1) removed.add(patch);
      showBreak();
    },
    point: showBreakImage,
  });
  for (const [id, set] of Object.entries({
    "no-pos": (on) => { state.noPositions = on; },
    "no-scale": (on) => { state.noScale = on; },
    shuffle: (on) => { state.order = on ? shuffled() : null; },
  })) {
    byId(id).addEventListener("change", (event) => { set(event.target.checked); showBreak(); });
  }
  byId("repair").addEventListener("click", repair);
  buildSilence();
}

function shuffled() {
  const order = Array.from({ length: PATCHES }, (_, i) => i);
  for (let i = PATCHES - 1; i > 0; i--) {
    const j = Math.floor(Math.random() * (i + 1));
    [order[i], order[j]] = [order[j], order[i]];
  }
  return order;
}

function buildSilence() {
  for (let block = 0; block < DEPTH; block++) {
    const row = element("tr");
    for (let head = -1; head < HEADS; head++) {
      const part = head < 0 ? `${block}` : `${block}.${head}`;
      const words = head < 0 ? `block ${block + 1}` : `block ${block + 1}, head ${head + 1}`;
      const aria = { pressed: "false", label: `Turn off ${words}` };
      const button = element("button", { type: "button", aria }, head < 0 ? words : `${head + 1}`);
      button.dataset.part = part;
      button.addEventListener("click", () => {
        if (!state.silent.delete(part)) state.silent.add(part);
        showBreak();
      });
      row.append(element(head < 0 ? "th" : "td", {}, button));
    }
    byId("silence").append(row);
  }
}

function repair() {
  state.removed.clear();
  state.silent.clear();
  Object.assign(state, { order: null, noPositions: false, noScale: false });
  for (const id of ["no-pos", "no-scale", "shuffle"]) byId(id).checked = false;
  showBreak();
}

function brokenParts() {
  const parts = [], plural = (n, name, ending = "s") => `${n} ${name}${n > 1 ? ending : ""}`;
  if (state.removed.size) parts.push(`without ${plural(state.removed.size, "patch", "es")}`);
  if (state.noPositions) parts.push("without position embeddings");
  if (state.order) parts.push("shuffled");
  if (state.noScale) parts.push("without 1/√d");
  const blocks = [...state.silent].filter((part) => !part.includes(".")).length;
  const heads = state.silent.size - blocks;
  if (blocks) parts.push(`${plural(blocks, "block")} turned off`);
  if (heads) parts.push(`${plural(heads, "head")} turned off`);
  return parts;
}

function keptPatches(removed) {
  return Array.from({ length: PATCHES }, (_, i) => i).filter((patch) => !removed.has(patch));
}

function showBreak() {
  if (!current) return;
  const parts = brokenParts(), changes = {
    keep: state.removed.size ? keptPatches(state.removed) : null, order: state.order,
    no_pos_embed: state.noPositions, no_scale: state.noScale, silent: state.silent,
  };
  const intact = current.probabilities;
  const broken = parts.length ? infer(state.image, state.snapshot, changes).probabilities : intact;
  const words = (probabilities) =>
    `${classes[argmax(probabilities)]} · ${percent(Math.max(...probabilities))}`;
  byId("intact").textContent = words(intact);
  byId("broken").textContent = words(broken);
  byId("broken-label").textContent = parts.join(", ");
  state.broken = broken;
  byId("compare").classList.toggle("broken", parts.length > 0);
  byId("compare").classList.toggle("changed", argmax(broken) !== argmax(intact));
  byId("repair").disabled = !parts.length;
  showBars(byId("broken-bars"), broken, intact);
  for (const button of byId("silence").querySelectorAll("button")) {
    press(button, state.silent.has(button.dataset.part));
  }
  showBreakImage(breakPicker.cursor);
  showBreakMaps();
}

/* The image as the modified model sees it. */
function showBreakImage(patch) {
  const context = clearCanvas(byId("break-map"), STAGE), cell = STAGE / SIDE;
  drawImage(context, STAGE);
  if (state.order) {
    const source = S / SIDE;
    state.order.forEach((from, to) => context.drawImage(imageCanvas,
      (from % SIDE) * source, Math.floor(from / SIDE) * source, source, source,
      (to % SIDE) * cell, Math.floor(to / SIDE) * cell, cell, cell));
  }
  context.lineWidth = 1;
  context.strokeStyle = "rgb(128 128 128 / 45%)";
  for (let i = 1; i < SIDE; i++) {
    context.strokeRect(i * cell, -1, 0, STAGE + 2);
    context.strokeRect(-1, i * cell, STAGE + 2, 0);
  }
  for (const gone of state.removed) {
    const x = (gone % SIDE) * cell, y = Math.floor(gone / SIDE) * cell;
    context.fillStyle = palette.paper;
    context.fillRect(x, y, cell, cell);
    context.strokeStyle = palette.broken;
    context.lineWidth = Math.max(2, cell / 24);
    context.beginPath();
    context.moveTo(x + cell * 0.3, y + cell * 0.3);
    context.lineTo(x + cell * 0.7, y + cell * 0.7);
    context.moveTo(x + cell * 0.7, y + cell * 0.3);
    context.lineTo(x + cell * 0.3, y + cell * 0.7);
    context.stroke();
  }
  if (patch !== null) outlinePatch(context, STAGE, patch, palette.broken, STAGE / 110);
  const known = patch !== null && costs.of === current;
  byId("break-sum").textContent = state.removed.size ? removalSentence() : "";
  byId("break-value").textContent = patch === null ? "Click patches to remove their tokens."
    : `${capital(patchName(patch))}: ` +
      (state.removed.has(patch) ? "removed" : "click to remove it") +
      (known ? `; alone it costs ${points(costs.values[patch])}.` : ".");
}

/* What attention suggested about the removed patches, and what happened. */
function removalSentence() {
  const attention = shownMap(current, POOLED), best = argmax(current.probabilities);
  const share = [...state.removed].reduce((sum, patch) => sum + attention[patch], 0);
  const drop = current.probabilities[best] - state.broken[best];
  const together = brokenParts().length > 1 ? " with all changes applied" : "";
  return `The removed patches received ${percent(share)} of the attention; the probability of ` +
    `“${classes[best]}” ${drop < 0 ? "rises" : "drops"} by ${points(Math.abs(drop))}${together}.`;
}

function points(drop) {
  return `${number(100 * drop, 1)} percentage points`;
}

/* Removes each patch by itself: PATCHES forward passes, in small portions. */
function* measurePatches() {
  if (costs.of === current || PATCHES < 2) return;
  const result = current, best = argmax(result.probabilities), values = new Float32Array(PATCHES);
  const intact = result.probabilities[best];
  byId("proof-text").textContent = "Removing every patch in turn …";
  let start = performance.now();
  for (let patch = 0; patch < PATCHES; patch++) {
    const changes = { ...NO_CHANGES, keep: keptPatches(new Set([patch])) };
    values[patch] = intact - infer(state.image, state.snapshot, changes).probabilities[best];
    if (performance.now() - start > 12) { yield; start = performance.now(); }
  }
  Object.assign(costs, { values, of: result });
  showBreakMaps();
}

function showBreakMaps() {
  if (!current) return;
  const attention = shownMap(current, POOLED);
  drawHeat(clearCanvas(byId("suggested"), STAGE), STAGE, attention, palette.attention);
  if (costs.of !== current) return;
  const { values } = costs, best = argmax(current.probabilities);
  const costly = argmax(values), bright = argmax(attention), high = Math.max(...values, 1e-6);
  drawHeat(clearCanvas(byId("measured"), STAGE), STAGE, values, palette.broken, high);
  const rho = rankCorrelation(attention, values), name = classes[best];
  const effect = (drop, what) =>
    `${drop < 0 ? "raises" : "lowers"}${what} by ${points(Math.abs(drop))}`;
  byId("proof-text").textContent =
    `Removing the patch with the most attention (${patchName(bright)}; ` +
    `${percent(attention[bright])}) ${effect(values[bright], ` the probability of “${name}”`)}. ` +
    (bright === costly ? "It is also the patch whose removal costs most. "
      : `Removing the patch that matters most (${patchName(costly)}), which received ` +
        `${percent(attention[costly])} of the attention, ${effect(values[costly], " it")}. `) +
    `Rank correlation between attention and drop over all ${PATCHES} patches: ${number(rho)}.`;
  showScatter(attention, values, bright, costly);
}

function rankCorrelation(a, b) {  // Spearman's, with mean ranks for ties
  const [x, y] = [a, b].map(ranks), mean = (PATCHES - 1) / 2;
  let [xy, xx, yy] = [0, 0, 0];
  x.forEach((value, i) => {
    xy += (value - mean) * (y[i] - mean); xx += (value - mean) ** 2; yy += (y[i] - mean) ** 2;
  });
  return xx && yy ? xy / Math.sqrt(xx * yy) : 0;
}

function ranks(values) {
  const sorted = [...values].sort((a, b) => a - b);
  return [...values].map((value) => (sorted.indexOf(value) + sorted.lastIndexOf(value)) / 2);
}

function showScatter(attention, drops, bright, costly) {
  const [width, height, left, bottom, top] = [320, 220, 44, 184, 14];
  const xHigh = Math.max(...attention);
  const yHigh = Math.max(...drops, 0.01), yLow = Math.min(...drops, 0);
  const x = (value) => left + (value / xHigh) * (width - left - 12);
  const y = (value) => bottom - ((value - yLow) / (yHigh - yLow)) * (bottom - top);
  const text = (content, at, anchor = "middle") =>
    svg("text", { x: at[0], y: at[1], "text-anchor": anchor }, content);
  const kind = (i) => (i === costly ? "costly" : i === bright ? "bright" : "dot");
  const dots = [...attention].map((value, i) => svg("circle", {
    cx: x(value).toFixed(1), cy: y(drops[i]).toFixed(1), r: kind(i) === "dot" ? 3.5 : 5.5,
    class: kind(i),
  }, svg("title", {}, `${patchName(i)}: attention ${percent(value)}, drop ${points(drops[i])}`)));
  byId("scatter").replaceChildren(
    svg("path", { class: "axis", d: `M${left} ${top}V${bottom}H${width - 8}` }),
    svg("path", { class: "zero", d: `M${left} ${y(0)}H${width - 8}` }),
    text(number(100 * yHigh, 1), [left - 6, top + 4], "end"),
    text("0", [left - 6, y(0) + 4], "end"),
    text("0", [left, bottom + 16]), text(percent(xHigh), [width - 12, bottom + 16], "end"),
    text("attention", [(left + width) / 2, height - 4]),
    svg("text", { transform: `translate(12 ${(top + bottom) / 2}) rotate(-90)`,
      "text-anchor": "middle" }, "drop (percentage points)"),
    ...dots);
}
