// Curves of chosen rows: the mean over seeds bold, each seed thin. Colour, dash and marker tell them apart.

const SLOTS = 8;
const DASHES = ["", "7 3", "2 3", "9 3 2 3", "", "7 3", "2 3", "9 3 2 3"];
const LABELS = {
  metric: "validation metric",
  loss: "training loss, mean of the batch (not covered by ε)",
  alignment_noisy: "cosine of the release to the clean gradient (not covered by ε)",
  alignment_decoded: "cosine of the update to the clean gradient (not covered by ε)",
  clipped_fraction: "share of the examples that were clipped (not covered by ε)",
};
const ABSCISSAE = { step: "step", epsilon: "ε spent by then, at the δ of the run" };
const plotted = []; // {row, slot, seeds: [{column: values}]}
const cursor = { at: null };

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
  chosen();
  return wanted;
}

function setUpChart() {
  byId("chart-y").append(...index.columns.map((key) => make("option", { value: key, text: LABELS[key] })));
  selectChoice("y", "chart-y", index.columns[0], () => { cursor.at = null; draw(); });
  selectChoice("x", "chart-x", "step", () => { cursor.at = null; draw(); });
  byId("chart-clear").addEventListener("click", () => { plotted.length = 0; showPage(); draw(); chosen(); });
  new ResizeObserver(draw).observe(byId("chart"));
  byId("chart").addEventListener("pointermove", (event) => point(event.clientX - byId("chart").getBoundingClientRect().left));
  byId("chart").addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (by) { step(by); event.preventDefault(); }
  });
  const candidates = index.groups.map((_, i) => index.rows.filter((row) => row.groups.includes(i) && row.kept && row.curve));
  const largest = candidates.reduce((a, b) => (b.length > a.length ? b : a), []);
  const first = largest.sort((a, b) => a.order - b.order).slice(0, 5);
  const usual = idsOf(first), shown = () => idsOf(plotted.map((series) => series.row));
  choice("curves", () => (shown() === usual ? "" : shown() || "none"), (text) => {
    const wanted = text === "none" ? [] : text ? rowsOf(text) : first;
    if (idsOf(wanted) === shown()) return;
    plotted.length = 0;
    wanted.slice(0, SLOTS).forEach((row) => plot(row, true));
    if (wanted.length === 0) { showPage(); draw(); }
  });
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

let scales = null;

function draw() {
  const box = byId("chart");
  const lines = plotted.map((series) => ({ series, points: points(series) }));
  const all = lines.flatMap((line) => line.points);
  legend(lines);
  byId("chart-note").textContent = plotted.length ? "" : "Tick rows in the table to see their curves.";
  byId("chart-values").textContent = "";
  scales = null;
  if (all.length === 0) { box.replaceChildren(); return; }
  const metrics = [...new Set(plotted.map((series) => series.row.metric))].filter(Boolean).join(" / ");
  const measuredOn = [...new Set(plotted.map((series) => series.row.examples))].join(" or ");
  const yName = byId("chart-y").value === "metric" ? `${metrics || LABELS.metric} on ${measuredOn}` : LABELS[byId("chart-y").value];
  const { root, sx, sy } = frame(box, range(all.map((p) => p.x)), padded(range(all.flatMap((p) => p.ys)), 0.04), { xName: ABSCISSAE[byId("chart-x").value], yName });
  scales = { sx, lines, xs: [...new Set(all.map((p) => p.x))].sort((a, b) => a - b) };
  for (const line of lines) root.append(...drawn(line, sx, sy));
  if (cursor.at !== null && scales.xs.includes(cursor.at)) root.append(svg("line", { class: "cursor", x1: sx(cursor.at), x2: sx(cursor.at), y1: EDGES.top, y2: sizeOf(box)[1] - EDGES.bottom }));
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
  const values = scales.lines.map(({ series, points: means }) => [series.row.label, means.find((p) => p.x === x)]).filter(([, p]) => p);
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
    return make("li", {}, key, make("span", { text: `${row.kept ? row.label : row.name}, ${row.task}${row.epsilon === null ? "" : `, ε ≤ ${BUDGET(row.epsilon)}`}${on}${missing}` }),
      make("button", { type: "button", text: "✕", "aria-label": `Remove ${row.name}`, onclick: () => plot(row, false) }));
  }));
}
