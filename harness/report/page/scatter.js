// The metric against what a method costs, or against epsilon: a point a method, controls as lines, the Pareto front as steps.

const COSTS = {
  peak: { name: "peak memory, MiB", of: (row) => row.peak && row.peak / 1048576 },
  step_s: { name: "time of a step, s", of: (row) => row.step_s },
  epsilon: { name: "budget ε", of: (row) => row.epsilon },
};
const MANY = 12; // points, from which on only those of the front and the baseline are named
const NEAR = 40; // pixels
const FAR = 4; // of the spread of methods: beyond, a control is named and not drawn
const LETTER = 6.6; // pixels
const picked = { row: null, points: [] };

function setUpScatter() {
  const sizes = index.groups.map((_, i) => index.rows.filter((row) => row.kept && row.rank !== null && row.groups.includes(i)).length);
  byId("scatter-group").append(...index.groups.map((group, i) => make("option", { value: group.title, text: `${group.title} (${sizes[i]})` })));
  const tuning = index.groups.map((_, i) => index.rows.some((row) => row.split === "tune" && row.groups.includes(i))); // settings are chosen there
  const judged = sizes.map((size, i) => (tuning[i] ? -1 : size));
  const usual = index.groups[judged.lastIndexOf(Math.max(...judged))]?.title ?? "";
  byId("scatter-group").value = usual;
  byId("scatter-box").hidden = index.groups.length === 0;
  byId("scatter-group-label").hidden = index.groups.length < 2;
  byId("scatter-x").querySelector("[value=epsilon]").disabled = index.settings.every((setting) => setting.groups.length < 2);
  selectChoice("setting", "scatter-group", usual, drawScatter);
  selectChoice("cost", "scatter-x", "peak", drawScatter);
  const box = byId("scatter");
  new ResizeObserver(drawScatter).observe(box);
  for (const kind of ["pointermove", "pointerdown"]) box.addEventListener(kind, (event) => pick(nearest(event)));
  box.addEventListener("click", (event) => { const point = nearest(event); if (point) openRow(point.row); });
  box.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (by) { next(by); event.preventDefault(); }
    if (event.key === "Enter" && picked.row) { openRow(picked.row); event.preventDefault(); } // or it presses what has the focus then
  });
}

// {rows, controls, front: of rows, groups} of what is chosen.
function scattered() {
  const number = index.groups.findIndex((group) => group.title === byId("scatter-group").value);
  const cost = byId("scatter-x").value;
  const setting = index.settings.find((one) => one.groups.includes(number));
  const groups = cost === "epsilon" ? setting.groups : [number];
  const all = index.rows.filter((row) => row.kept && row.final !== null && row.groups.some((group) => groups.includes(group)));
  const front = cost === "epsilon" ? setting.front : index.groups[number].fronts[cost];
  return {
    cost, number, front: front === null ? null : front.map((i) => index.rows[i]),
    rows: all.filter((row) => !row.control && COSTS[cost].of(row) !== null), controls: all.filter((row) => row.control),
  };
}

function drawScatter() {
  const box = byId("scatter");
  box.replaceChildren();
  byId("scatter-values").textContent = "Point at a method to read it here; a click opens its runs.";
  Object.assign(picked, { points: [] });
  if (index.groups.length === 0) return;
  const { cost, number, front, rows, controls } = scattered();
  const group = index.groups[number], of = COSTS[cost].of, notes = [];
  if (front === null) notes.push("No front: step times are from several machines, or unknown.");
  if (rows.length === 0) { byId("scatter-note").textContent = "No method here has such a cost."; return; }
  const costs = rows.map(of).sort((a, b) => a - b), most = costs.at(-1);
  const log = cost === "epsilon" ? costs[0] !== most : most > 2.5 * costs[costs.length >> 1];
  const [lo, hi] = range(rows.map((row) => row.final));
  const near = controls.filter((row) => row.final > lo - FAR * (hi - lo) && row.final < hi + FAR * (hi - lo));
  const far = controls.filter((row) => !near.includes(row));
  if (far.length) notes.push(`Off the scale: ${far.map((row) => `${row.label} ${significant(row.final, 3)}`).join(", ")}.`);
  const inner = sizeOf(box)[0] - EDGES.left - EDGES.right; // right of the last point there is room for names
  const room = Math.min(0.4 * inner, 20 + LETTER * Math.max(...rows.map((row) => row.label.length)));
  const wider = inner / (inner - room), low = log ? costs[0] / 1.15 : 0;
  const xs = log ? [low, low * (most / low) ** wider] : [0, most * wider];
  const { root, sx, sy } = frame(box, xs, padded(range([lo, hi, ...near.map((row) => row.final)]), 0.1), {
    log, at: cost === "epsilon" ? [...new Set(costs)] : null, xName: `${COSTS[cost].name}${log ? ", logarithmic" : ""}`,
    yName: `final ${group.metric}, ${group.higher_is_better ? "more" : "less"} is better`,
  });
  picked.points = rows.map((row) => ({ row, x: sx(of(row)), y: sy(row.final), front: Boolean(front?.includes(row)) })).sort((a, b) => a.x - b.x || b.y - a.y);
  root.append(...lines(near, sy, sx(xs[1])), ...(cost === "epsilon" ? strands(picked.points) : []));
  root.append(steps(picked.points.filter((point) => point.front)));
  root.append(...picked.points.map((point) => svg("circle", { class: point.front ? "spot on-front" : "spot", cx: point.x, cy: point.y, r: point.front ? 5 : 3.5 })));
  root.append(...names(cost, sx(xs[1])));
  box.replaceChildren(root);
  byId("scatter-note").textContent = notes.join(" ");
  if (picked.points.some((point) => point.row === picked.row)) mark();
}

function lines(controls, sy, end) {
  return controls.flatMap((row) => [
    svg("line", { class: "control", x1: EDGES.left, x2: end, y1: sy(row.final), y2: sy(row.final) }),
    svg("text", { class: "control", x: end, y: sy(row.final) - 5, "text-anchor": "end" }, `${row.label} ${significant(row.final, 3)}`),
  ]);
}

// The Pareto front: at a cost the best that at most this much gives.
function steps(front) {
  const path = front.map((point, i) => (i ? `H${point.x.toFixed(1)}V${point.y.toFixed(1)}` : `M${point.x.toFixed(1)},${point.y.toFixed(1)}`));
  return svg("path", { class: "front", d: path.join("") });
}

// A method at several budgets.
function strands(points) {
  const by = new Map();
  for (const point of points) by.set(point.row.label, [...(by.get(point.row.label) ?? []), point]);
  return [...by.values()].map((found) => svg("path", { class: "strand", d: found.map((p, i) => `${i ? "L" : "M"}${p.x.toFixed(1)},${p.y.toFixed(1)}`).join("") }));
}

// Names to the right of their points, moved up or down where they would lie on another name.
function names(cost, end) {
  const last = Math.max(...picked.points.map((point) => point.x));
  const few = picked.points.length <= MANY && byId("scatter").clientWidth >= 500;
  const wanted = picked.points.filter((point) => (cost === "epsilon" ? point.x === last : few || point.front || point.row.verdict === "the baseline"));
  const placed = [], found = [];
  for (const point of wanted.sort((a, b) => b.front - a.front || a.y - b.y)) {
    const width = LETTER * point.row.label.length, left = point.x + 9 + width > end;
    const x = left ? point.x - 9 - width : point.x + 9;
    const free = (y) => y > 14 && !placed.some((other) => Math.abs(other.y - y) < 13 && x < other.x + other.width && other.x < x + width);
    const by = [0, -7, 7, -14, 14, -21, 21, -28, 28, -35, 35].find((move) => free(point.y + move));
    if (by === undefined) continue;
    placed.push({ x, y: point.y + by, width });
    if (by) found.push(svg("line", { class: "grid", x1: point.x, y1: point.y, x2: left ? x + width : x, y2: point.y + by }));
    found.push(svg("text", { class: "name", x: left ? x + width : x, y: point.y + by + 4, "text-anchor": left ? "end" : "start" }, point.row.label));
  }
  return found;
}

function nearest(event) {
  const { left, top } = byId("scatter").getBoundingClientRect();
  const far = (point) => Math.hypot(point.x - (event.clientX - left), point.y - (event.clientY - top));
  const best = picked.points.reduce((a, b) => (a === null || far(b) < far(a) ? b : a), null);
  return best && far(best) < NEAR ? best : null;
}

function next(by) {
  const at = picked.points.findIndex((point) => point.row === picked.row);
  pick(picked.points[Math.max(0, Math.min(picked.points.length - 1, at < 0 ? (by > 0 ? 0 : picked.points.length - 1) : at + by))] ?? null);
}

function pick(point) {
  if (point === null || point.row === picked.row) return;
  picked.row = point.row;
  mark();
}

function mark() {
  const { row } = picked, { x, y } = picked.points.find((point) => point.row === row), root = byId("scatter").firstChild;
  root.querySelectorAll(".picked").forEach((element) => element.remove());
  root.append(svg("circle", { class: "picked", cx: x, cy: y, r: 8 }));
  const seeds = row.seed_of.map((seed, i) => `seed ${seed}: ${significant(row.finals[i])}`).join(", ");
  byId("scatter-values").replaceChildren(
    make("strong", { text: row.label }),
    `: ${row.metric} ${row.final_text}${row.epsilon === null ? "" : ` at ε ≤ ${BUDGET(row.epsilon)}`}; ${megabytes(row.peak)}; ${row.step_s === null ? "step not timed" : `${significant(row.step_s, 3)} s a step`}; ${seeds}. ${row.verdict}`);
}
