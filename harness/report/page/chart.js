// Curves of chosen rows: the mean over seeds bold, each seed thin. Colour, dash and marker tell them apart.

const SLOTS = 8;
const DASHES = ["", "7 3", "2 3", "9 3 2 3", "", "7 3", "2 3", "9 3 2 3"];
const LABELS = { metric: "validation metric", loss: "training loss", alignment_noisy: "alignment of the release", alignment_decoded: "alignment of the update", clipped_fraction: "clipped share" };
const plotted = []; // {row, slot, seeds: [{column: values}]}
const cursor = { at: null };
const SVG = "http://www.w3.org/2000/svg";

function isPlotted(row) {
  return plotted.some((series) => series.row === row);
}

// Returns whether the row is shown now. Its curves arrive later.
function plot(row, wanted) {
  const at = plotted.findIndex((series) => series.row === row);
  if (!wanted && at >= 0) plotted.splice(at, 1);
  if (wanted && at < 0) {
    if (plotted.length === SLOTS) {
      byId("chart-note").textContent = `At most ${SLOTS} rows at once; remove one first.`;
      return false;
    }
    const slot = [...Array(SLOTS).keys()].find((i) => !plotted.some((series) => series.slot === i));
    const series = { row, slot, seeds: [] };
    plotted.push(series);
    Promise.all(row.positions.map(runAt)).then((runs) => {
      series.seeds = runs.map((run) => run.curve).filter(Boolean);
      draw();
    });
  }
  showPage();
  draw();
  return wanted;
}

function setUpChart() {
  byId("chart-y").append(...index.columns.map((key) => make("option", { value: key, text: LABELS[key] })));
  for (const id of ["chart-x", "chart-y"]) byId(id).addEventListener("change", () => { cursor.at = null; draw(); });
  byId("chart-clear").addEventListener("click", () => { plotted.length = 0; showPage(); draw(); });
  new ResizeObserver(draw).observe(byId("chart"));
  byId("chart").addEventListener("pointermove", (event) => point(event.clientX - byId("chart").getBoundingClientRect().left));
  byId("chart").addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (by) { step(by); event.preventDefault(); }
  });
  const candidates = index.groups.map((_, i) => index.rows.filter((row) => row.groups.includes(i) && row.kept && row.curve));
  const largest = candidates.reduce((a, b) => (b.length > a.length ? b : a), []);
  const first = largest.sort((a, b) => a.order - b.order).slice(0, 5);
  first.forEach((row) => plot(row, true));
  draw();
}

// [{x, y, ys}] of one series, by step; x is the step or the epsilon spent by then.
function points(series) {
  const [xKey, yKey] = [byId("chart-x").value, byId("chart-y").value];
  const found = new Map();
  for (const curve of series.seeds) {
    curve.step.forEach((step, i) => {
      const [x, y] = [curve[xKey]?.[i], curve[yKey]?.[i]];
      if (x === null || x === undefined || y === null || y === undefined) return;
      if (!found.has(step)) found.set(step, { x, ys: [] });
      found.get(step).ys.push(y);
    });
  }
  return [...found.entries()].sort((a, b) => a[0] - b[0]).map(([, p]) => ({ ...p, y: p.ys.reduce((a, b) => a + b, 0) / p.ys.length }));
}

function ticks(low, high, count) {
  const raw = (high - low) / count, power = 10 ** Math.floor(Math.log10(raw));
  const size = [1, 2, 5, 10].find((m) => m * power >= raw) * power;
  const found = [];
  for (let i = Math.ceil(low / size); i * size <= high + 1e-9 * size; i += 1) found.push(Number((i * size).toPrecision(12)));
  return found;
}

function svg(tag, attributes, text) {
  const element = document.createElementNS(SVG, tag);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  return element;
}

let scales = null;

function draw() {
  const box = byId("chart"), width = Math.max(240, box.clientWidth), height = Math.max(180, box.clientHeight);
  const lines = plotted.map((series) => ({ series, points: points(series) }));
  const all = lines.flatMap((line) => line.points);
  legend(lines);
  byId("chart-note").textContent = plotted.length ? "" : "Tick rows in the table to see their curves.";
  byId("chart-values").textContent = "";
  scales = null;
  if (all.length === 0) { box.replaceChildren(); return; }
  const [left, right, top, bottom] = [58, 14, 26, 42];
  const range = (values) => { const [a, b] = [Math.min(...values), Math.max(...values)]; return a === b ? [a - 0.5, b + 0.5] : [a, b]; };
  const [x0, x1] = range(all.map((p) => p.x)), [lo, hi] = range(all.flatMap((p) => p.ys));
  const [y0, y1] = [lo - 0.04 * (hi - lo), hi + 0.04 * (hi - lo)];
  const sx = (x) => left + ((x - x0) / (x1 - x0)) * (width - left - right);
  const sy = (y) => height - bottom - ((y - y0) / (y1 - y0)) * (height - top - bottom);
  scales = { sx, lines, xs: [...new Set(all.map((p) => p.x))].sort((a, b) => a - b) };
  const root = svg("svg", { viewBox: `0 0 ${width} ${height}` });
  for (const y of ticks(y0, y1, 5)) {
    root.append(svg("line", { class: "grid", x1: left, x2: width - right, y1: sy(y), y2: sy(y) }), svg("text", { x: left - 6, y: sy(y) + 4, "text-anchor": "end" }, significant(y)));
  }
  for (const x of ticks(x0, x1, width < 500 ? 4 : 8)) root.append(svg("text", { x: sx(x), y: height - bottom + 18, "text-anchor": "middle" }, significant(x)));
  const metrics = [...new Set(plotted.map((series) => series.row.metric))].filter(Boolean).join(" / ");
  const measuredOn = [...new Set(plotted.map((series) => series.row.examples))].join(" or ");
  const yName = byId("chart-y").value === "metric" ? `${metrics || LABELS.metric} on ${measuredOn}` : LABELS[byId("chart-y").value];
  root.append(svg("text", { x: (left + width - right) / 2, y: height - 7, "text-anchor": "middle" }, byId("chart-x").value === "step" ? "step" : "ε spent"), svg("text", { x: 8, y: 16 }, yName));
  for (const line of lines) root.append(...drawn(line, sx, sy));
  if (cursor.at !== null && scales.xs.includes(cursor.at)) root.append(svg("line", { class: "cursor", x1: sx(cursor.at), x2: sx(cursor.at), y1: top, y2: height - bottom }));
  box.replaceChildren(root);
}

function drawn({ series, points: means }, sx, sy) {
  const found = [], path = (list) => list.map((p, i) => `${i ? "L" : "M"}${sx(p.x).toFixed(1)},${sy(p.y).toFixed(1)}`).join("");
  if (series.seeds.length > 1) {
    for (const seed of series.seeds) found.push(svg("path", { class: `seed c${series.slot}`, d: path(points({ seeds: [seed] })) }));
  }
  found.push(svg("path", { class: `mean c${series.slot}`, d: path(means), "stroke-dasharray": DASHES[series.slot] }));
  if (means.length <= 40) for (const p of means) found.push(marker(series.slot, sx(p.x), sy(p.y)));
  return found;
}

function marker(slot, x, y) {
  const shapes = ["M-3.5,0A3.5,3.5 0 1 0 3.5,0A3.5,3.5 0 1 0 -3.5,0Z", "M-3.2,-3.2H3.2V3.2H-3.2Z", "M0,-4.3L4,3H-4Z", "M0,-4.5L4.5,0L0,4.5L-4.5,0Z"];
  return svg("path", { class: `dot c${slot}`, d: shapes[slot % 4], transform: `translate(${x.toFixed(1)},${y.toFixed(1)})` });
}

function point(px) {
  if (scales === null) return;
  show(scales.xs.reduce((a, b) => (Math.abs(scales.sx(b) - px) < Math.abs(scales.sx(a) - px) ? b : a)));
}

function step(by) {
  if (scales === null) return;
  const at = cursor.at === null ? (by > 0 ? -1 : scales.xs.length) : scales.xs.indexOf(cursor.at);
  show(scales.xs[Math.max(0, Math.min(scales.xs.length - 1, at + by))]);
}

function show(x) {
  if (x === cursor.at && byId("chart-values").textContent) return;
  cursor.at = x;
  draw();
  const values = scales.lines.map(({ series, points: means }) => [series.row.name, means.find((p) => p.x === x)]).filter(([, p]) => p);
  const name = byId("chart-x").value === "step" ? "Step" : "ε";
  byId("chart-values").textContent = `${name} ${significant(x)}: ` + values.map(([label, p]) => `${label} ${significant(p.y)}`).join("; ");
}

function legend(lines) {
  byId("legend").replaceChildren(...lines.map(({ series, points: means }) => {
    const key = svg("svg", { width: 34, height: 12, "aria-hidden": "true" });
    key.append(svg("path", { class: `mean c${series.slot}`, d: "M0,6H34", "stroke-dasharray": DASHES[series.slot] }), marker(series.slot, 17, 6));
    const missing = series.seeds.length && !means.length ? " (has no such values)" : "";
    const { row } = series;
    const on = new Set(plotted.map((other) => other.row.examples)).size > 1 ? `, on ${row.examples}` : "";
    return make("li", {}, key, make("span", { text: `${row.name}, ${row.task}${row.epsilon === null ? "" : `, ε ≤ ${BUDGET(row.epsilon)}`}${on}${missing}` }),
      make("button", { type: "button", text: "✕", "aria-label": `Remove ${row.name}`, onclick: () => plot(row, false) }));
  }));
}
