/* Draws every chart of the page. A spec has
   label     description for screen readers
   x, y      {name, unit, log, percent, whole, from, to}
   series    [{name, slot, color, hollow, line, marked,
               points: [{x, y, low, high, name, note, label}]}]
   diagonal  whether to draw the line y = x
   bare      whether the chart has no legend of its own
   small     whether the chart is a part of a card */

const colorOf = ({ slot, color }) => color ?? `var(--series-${slot % COLORS})`;
const patternOf = (slot, patterns) => patterns[(slot + Math.floor(slot / COLORS)) % 4];

function niceStep(least) {
  const power = 10 ** Math.floor(Math.log10(least));
  return power * [1, 2, 5, 10].find((times) => times * power >= least * (1 - 1e-9));
}

function linearTicks(low, high, step) {
  const first = Math.ceil(low / step - 1e-9);
  const count = Math.floor(high / step + 1e-9) - first + 1;
  // rounded: 3 * 0.1 is 0.30000000000000004
  return Array.from({ length: count }, (_, i) => Number(((first + i) * step).toPrecision(12)));
}

function logTicks(low, high, most) {
  const powers = linearTicks(Math.floor(Math.log10(low)), Math.ceil(Math.log10(high)), 1);
  const at = (...steps) => powers
    .flatMap((power) => steps.map((times) => Number(`${times}e${power}`)))
    .filter((tick) => tick >= low && tick <= high);
  if (at(1, 2, 5).length < 3) return linearTicks(low, high, niceStep((high - low) / most));
  const fits = [at(1, 2, 5), at(1, 3)].find((ticks) => ticks.length <= most + 1);
  const stride = Math.ceil(at(1).length / most);
  return fits ?? at(1).filter((_, place) => place % stride === 0);
}

const canShow = (axis, value) => value != null && (!axis.log || value > 0);

/* Maps values to positions between 0 and 1, with about `most` ticks. */
function scale(axis, values, most) {
  const known = values.filter((value) => canShow(axis, value));
  let low = axis.from ?? known.reduce((a, b) => Math.min(a, b), Infinity);
  let high = axis.to ?? known.reduce((a, b) => Math.max(a, b), -Infinity);
  if (low > high) [low, high] = axis.log ? [0.1, 1] : [0, 1];  // no values
  if (axis.log) {
    const margin = low === high ? 0.3 : 0.02 + 0.04 * Math.log10(high / low);
    const [start, end] = [Math.log10(low) - margin, Math.log10(high) + margin];
    const place = (value) => (Math.log10(value) - start) / (end - start);
    return { place, ticks: logTicks(10 ** start, 10 ** end, most) };
  }
  if (low === high) {
    const margin = axis.percent ? 0.02 : Math.abs(low) * 0.1 || 1;
    [low, high] = [low - margin, high + margin];
    if (axis.percent) [low, high] = [Math.max(low, 0), Math.min(high, 1)];
  }
  const step = Math.max(niceStep((high - low) / most), axis.whole ? 1 : 0);
  low = step * Math.floor(low / step + 1e-9);
  high = step * Math.ceil(high / step - 1e-9);
  return { place: (value) => (value - low) / (high - low), ticks: linearTicks(low, high, step) };
}

function titleOf({ name, unit, percent: isPercent }) {
  const shown = isPercent ? "%" : unit;
  return shown ? `${name} in ${shown}` : name;
}

function valueOf(axis, value) {
  const unit = axis.percent ? "%" : axis.unit;
  const text = axis.percent ? percent(value) : number(value, 4);
  return `${axis.name} ${text}${unit ? `\u00a0${unit}` : ""}`;
}

function symbol(series, x, y) {
  const fill = series.hollow ? "var(--paper)" : colorOf(series);
  return svg("path", {
    class: "point", d: patternOf(series.slot, SYMBOLS), transform: `translate(${x},${y})`,
    style: `stroke: ${colorOf(series)}; fill: ${fill}`,
  });
}

function line(series, d) {
  const dashes = { "stroke-dasharray": patternOf(series.slot, DASHES) };
  return svg("path", { class: "line", d, style: `stroke: ${colorOf(series)}`, ...dashes });
}

function legendOf(series) {
  const items = series.filter((one) => one.name).map((one) => {
    const swatch = svg("svg", { viewBox: "0 -6 34 12", "aria-hidden": "true" });
    if (one.line) swatch.append(line(one, "M0,0H34"));
    if (!one.line || one.marked) swatch.append(symbol(one, 17, 0));
    return element("li", {}, swatch, words(one.name));
  });
  return element("ul", { className: "legend", hidden: items.length === 0 }, ...items);
}

function drawSeries(series, spots) {
  const drawn = [];
  if (series.line && spots.length > 1) {
    const places = spots.map(({ x, y }) => `${x.toFixed(1)},${y.toFixed(1)}`);
    drawn.push(line(series, `M${places.join("L")}`));
  }
  for (const { x, y, ends: [low, high] } of spots) {
    if (low !== undefined) {
      const d = `M${x - 3},${low}h6M${x - 3},${high}h6M${x},${low}V${high}`;
      drawn.push(svg("path", { class: "bar", d, style: `stroke: ${colorOf(series)}` }));
    }
    // a long line needs no symbols, but a single point is invisible without one
    if (!series.line || series.marked || spots.length === 1) drawn.push(symbol(series, x, y));
  }
  return drawn;
}

/* Places labels next to their points where there is room. The readout names the other points. */
function drawLabels(spots, width) {
  const bars = spots.map(({ x, ends: [low, high] }) => [x - 4, high, x + 4, low]);
  const taken = spots.map(({ x, y }) => [x - 6, y - 6, x + 6, y + 6]);
  const apart = (a, b) => a[2] < b[0] || a[0] > b[2] || a[3] < b[1] || a[1] > b[3];
  const isFree = (place, others) =>
    place[0] > 0 && place[2] < width && others.every((other) => apart(place, other));
  return spots.filter(({ point }) => point.label).flatMap(({ x, y, point }) => {
    const text = point.label.length > 24 ? `${point.label.slice(0, 23)}…` : point.label;
    const long = 6.8 * text.length;
    const places = [0, 14, -14].flatMap((down) =>
      [x + 9, x - 9 - long, x - long / 2].map((left) =>
        [left, y + down - 6, left + long, y + down + 6]));
    const place = places.find((one) => isFree(one, [...taken, ...bars]));
    if (!place) return [];
    taken.push(place);
    return [svg("text", { x: place[0], y: place[3] - 2, class: "label" }, text)];
  });
}

function chart(spec) {
  const drawing = svg("svg", { tabindex: 0, role: "application", "aria-roledescription": "chart" });
  const reading = element("figcaption", { className: "reading", ariaLive: "polite" });
  const legend = box("");
  const node = element("figure", { className: "chart" }, drawing, legend, reading);
  const ring = svg("circle", { class: "ring", r: 8 });
  let spots = [];  // all points drawn, series by series
  let current = -1;

  function draw(onPaper = false) {
    const paper = spec.small ? PAPER[2] : PAPER[spec.bare ? 0 : 1];
    const width = onPaper ? paper : Math.max(node.clientWidth, 240);
    const height = Math.round(Math.min(400, Math.max(spec.small ? 190 : 260, 0.6 * width)));
    const { x, y, series } = spec;
    const tickText = (axis, tick) => compact(axis.percent ? 100 * tick : tick);
    const points = series.flatMap((one) => one.points);
    const heights = points.flatMap((point) => [point.y, point.low, point.high]);
    const down = scale(y, heights, height / 55);
    const longest = Math.max(...down.ticks.map((tick) => tickText(y, tick).length));
    const [left, right, top, bottom] = [14 + 7 * longest, width - 16, 26, height - 44];
    const across = scale(x, points.map((point) => point.x), (right - left) / 75);
    const toX = (value) => left + across.place(value) * (right - left);
    const toY = (value) => bottom - down.place(value) * (bottom - top);
    const text = (words, attributes) => svg("text", attributes, words);
    const middle = { "text-anchor": "middle" };
    const drawn = [
      ...down.ticks.flatMap((tick) => [
        svg("path", { class: "grid", d: `M${left},${toY(tick)}H${right}` }),
        text(tickText(y, tick),
          { class: "tick-y", x: left - 8, y: toY(tick) + 4, "text-anchor": "end" }),
      ]),
      ...across.ticks.flatMap((tick) => [
        svg("path", { class: "edge", d: `M${toX(tick)},${bottom}v5` }),
        text(tickText(x, tick), { class: "tick-x", x: toX(tick), y: bottom + 19, ...middle }),
      ]),
      svg("path", { class: "edge", d: `M${left},${bottom}H${right}` }),
      text(titleOf(y), { x: 0, y: 12 }),
      text(titleOf(x), { x: (left + right) / 2, y: height - 6, ...middle }),
    ];
    if (spec.diagonal) {
      const d = `M${toX(0)},${toY(0)}L${toX(1)},${toY(1)}`;
      drawn.push(svg("path", { class: "edge", d, "stroke-dasharray": "4 4" }));
    }
    const hasBar = ({ low, high }) => canShow(y, low) && canShow(y, high);
    const spotOf = (one) => (point) => ({
      series: one, point, x: toX(point.x), y: toY(point.y),
      ends: hasBar(point) ? [toY(point.low), toY(point.high)] : [],
    });
    const lists = series.map((one) =>
      one.points.filter((point) => canShow(x, point.x) && canShow(y, point.y)).map(spotOf(one)));
    drawn.push(...lists.flatMap((list, place) => drawSeries(series[place], list)));
    spots = lists.flat();
    drawing.setAttribute("viewBox", `0 0 ${width} ${height}`);
    drawing.setAttribute("aria-label", `${spec.label}; use the arrow keys to read the points`);
    drawing.replaceChildren(...drawn, ...drawLabels(spots, width), ring);
    legend.replaceChildren(...(spec.bare ? [] : [legendOf(series)]));
    choose(-1);
  }

  function choose(index) {
    current = index;
    const spot = spots[index];
    ring.setAttribute("visibility", spot ? "visible" : "hidden");
    reading.textContent = spots.length > 0 ? "" : "There is no data to show.";
    if (!spot) return;
    ring.setAttribute("cx", spot.x);
    ring.setAttribute("cy", spot.y);
    const { series, point } = spot;
    const height = valueOf(spec.y, point.y) + interval(point);
    const texts = [height, valueOf(spec.x, point.x), point.note].filter(Boolean);
    reading.textContent = `${point.name ?? series.name}: ${texts.join(", ")}`;
  }

  function nearest(x, y, among) {
    const distance = (spot) => (spot.x - x) ** 2 + (spot.y - y) ** 2;
    const best = among.reduce((a, b) => (distance(b) < distance(a) ? b : a), among[0]);
    return spots.indexOf(best);
  }

  function next(key) {
    if (current < 0) return 0;
    const { series, x, y } = spots[current];
    if (key === "ArrowRight" || key === "ArrowLeft") {
      const index = current + (key === "ArrowRight" ? 1 : -1);
      return spots[index]?.series === series ? index : current;
    }
    const drawn = [...new Set(spots.map((spot) => spot.series))];
    const other = drawn[drawn.indexOf(series) + (key === "ArrowDown" ? 1 : -1)];
    return other ? nearest(x, y, spots.filter((spot) => spot.series === other)) : current;
  }

  drawing.addEventListener("keydown", (event) => {
    const isArrow = /^Arrow(Left|Right|Up|Down)$/.test(event.key);
    if (!isArrow || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();  // do not scroll the page
    if (spots.length > 0) choose(next(event.key));
  });
  const point = (event) => {
    const place = drawing.getBoundingClientRect();
    const zoom = drawing.viewBox.baseVal.width / place.width;
    choose(nearest((event.clientX - place.left) * zoom, (event.clientY - place.top) * zoom, spots));
  };
  drawing.addEventListener("pointermove", point);
  drawing.addEventListener("pointerdown", point);
  drawing.addEventListener("pointerleave", (event) => {
    if (event.pointerType === "mouse") choose(-1);  // a finger leaves when it is lifted
  });
  drawing.addEventListener("blur", () => choose(-1));
  charts.push(draw);
  const show = (changed) => {
    spec = changed;
    if (node.isConnected) draw();
  };
  return { node, show };
}
