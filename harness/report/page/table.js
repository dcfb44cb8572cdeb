// The leaderboard: filter, sort, page.

const PAGE = 100;
const BUDGET = (value) => (value === null ? "∞" : significant(value, 6));
const COLUMNS = [
  { key: "rank", title: "#", number: true },
  { key: "name", title: "Method" },
  { key: "verdict", title: "Verdict" },
  { key: "final", title: "Final, whole split", number: true, falls: true, show: (row) => (row.final === null ? "–" : `${row.metric} ${row.final_text}`) },
  { key: "task", title: "Task" },
  { key: "model", title: "Model" },
  { key: "epsilon", title: "Budget ε", number: true, show: (row) => BUDGET(row.epsilon) },
  { key: "status", title: "Status" },
  { key: "certified", title: "ε certified", number: true, show: (row) => row.certified_text },
  { key: "lr", title: "lr", number: true, show: (row) => significant(row.lr) },
  { key: "tried", title: "Rates tried", number: true, show: (row) => row.tried ?? "–" },
  { key: "runs", title: "Runs", number: true },
  { key: "step_s", title: "Step time", number: true, show: (row) => (row.step_s === null ? "–" : `${significant(row.step_s, 3)} s`) },
  { key: "peak", title: "Peak memory", number: true, show: (row) => megabytes(row.peak) },
  { key: "trainable", title: "Trainable", number: true, show: (row) => (row.trainable === null ? "–" : row.trainable.toLocaleString("en")) },
];
const FILTERS = ["task", "model", "method", "epsilon", "status"];
const view = { sort: null, falling: false, page: 0, lines: [] };

function setUpTable() {
  const heads = COLUMNS.map((column) =>
    make("th", { scope: "col", "aria-sort": "none", class: column.number ? "number" : "" },
      make("button", { type: "button", onclick: () => sortBy(column) , text: column.title })));
  byId("table").tHead.append(make("tr", {}, make("th", { scope: "col", class: "plain", text: "Curve" }), ...heads));
  for (const key of FILTERS) {
    const values = [...new Set(index.rows.flatMap((row) => row[`in_${key}`] ?? [row[key]]))];
    values.sort((a, b) => (typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b))));
    byId(`filter-${key}`).append(
      make("option", { value: "", text: "all" }),
      ...values.map((value) => make("option", { value: JSON.stringify(value), text: key === "epsilon" ? BUDGET(value) : String(value) })));
    byId(`filter-${key}`).addEventListener("change", refilter);
  }
  byId("rates-label").hidden = index.rows.every((row) => row.kept);
  byId("rates").addEventListener("change", refilter);
  let waiting;
  byId("search").addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(refilter, 120); });
  byId("filters").addEventListener("submit", (event) => event.preventDefault());
  byId("filters").addEventListener("reset", () => setTimeout(refilter));
  byId("previous").addEventListener("click", () => turn(-1));
  byId("next").addEventListener("click", () => turn(1));
  byId("regroup").addEventListener("click", () => { view.sort = null; refilter(); byId("table-box").focus(); });
  byId("table").tBodies[0].addEventListener("keydown", walk);
  refilter();
}

function sortBy(column) {
  if (view.sort === column) view.falling = !view.falling;
  else Object.assign(view, { sort: column, falling: Boolean(column.falls) });
  refilter();
}

function matches() {
  const words = byId("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  const wanted = FILTERS.map((key) => [key, byId(`filter-${key}`).value]).filter(([, value]) => value !== "")
    .map(([key, value]) => [key, JSON.parse(value)]);
  const rates = byId("rates").checked;
  return (row) => (rates || row.kept) &&
    wanted.every(([key, value]) => (row[`in_${key}`] ?? [row[key]]).includes(value)) &&
    words.every((word) => row.text.includes(word));
}

function refilter() {
  const rows = index.rows.filter(matches());
  view.lines = view.sort === null ? grouped(rows) : sorted(rows).map((row) => ({ row }));
  view.page = 0;
  const total = index.rows.filter((row) => row.kept || byId("rates").checked).length;
  byId("count").textContent = `${rows.length.toLocaleString("en")} of ${total.toLocaleString("en")} rows` +
    (view.sort === null ? ", by group and rank" : `, by ${view.sort.title}, ${view.falling ? "largest" : "smallest"} first`);
  byId("regroup").hidden = view.sort === null;
  [...byId("table").tHead.rows[0].cells].slice(1).forEach((cell, i) => {
    const state = COLUMNS[i] !== view.sort ? "none" : view.falling ? "descending" : "ascending";
    cell.setAttribute("aria-sort", state);
    cell.firstChild.textContent = COLUMNS[i].title + { none: "", ascending: " ▲", descending: " ▼" }[state];
  });
  showPage();
}

// Rows in the order of the markdown report: group after group, best first, controls last, what is not done at the end.
function grouped(rows) {
  const places = index.groups.map(() => []);
  const failed = [];
  for (const row of rows) {
    if (row.groups.length === 0) failed.push(row);
    for (const group of row.groups) places[group].push(row);
  }
  const lines = [];
  places.forEach((members, i) => {
    const wanted = byId("filter-epsilon").value;
    if (members.length === 0 || (wanted !== "" && JSON.parse(wanted) !== null && JSON.parse(wanted) !== index.groups[i].epsilon)) return;
    lines.push({ group: index.groups[i] });
    members.sort((a, b) => a.order - b.order).forEach((row) => lines.push({ row }));
  });
  if (failed.length) lines.push({ group: { title: "Runs in no table", reason: null, note: "Failed, skipped or there twice; each with its reason." } });
  return lines.concat(failed.map((row) => ({ row })));
}

function sorted(rows) {
  const { key } = view.sort, sign = view.falling ? -1 : 1;
  const empty = (value) => value === null || value === undefined || value === "";
  return [...rows].sort((a, b) => {
    if (empty(a[key]) || empty(b[key])) return empty(a[key]) - empty(b[key]); // what has no value comes last either way
    return sign * (typeof a[key] === "number" ? a[key] - b[key] : String(a[key]).localeCompare(String(b[key]))) || a.order - b.order;
  });
}

function turn(by) {
  view.page += by;
  showPage();
  byId("table-box").scrollTo(0, 0);
  byId("table-box").scrollIntoView({ block: "start" });
}

function showPage() {
  const pages = Math.max(1, Math.ceil(view.lines.length / PAGE));
  const lines = view.lines.slice(view.page * PAGE, (view.page + 1) * PAGE);
  byId("table").tBodies[0].replaceChildren(...lines.map((line) => (line.group ? groupLine(line.group) : rowLine(line.row))));
  if (lines.length === 0) {
    byId("table").tBodies[0].append(make("tr", {}, make("td", { colspan: COLUMNS.length + 1, text: "No row fits; clear the filters." })));
  }
  byId("page-number").textContent = `Page ${view.page + 1} of ${pages}`;
  byId("previous").disabled = view.page === 0;
  byId("next").disabled = view.page + 1 >= pages;
}

function groupLine(group) {
  return make("tr", { class: "group" },
    make("th", { scope: "colgroup", colspan: COLUMNS.length + 1 },
      make("div", { class: "inner" },
        make("span", { text: group.title }),
        group.reason ? make("span", { class: "reason quiet", text: `Not ranked: ${group.reason}` }) : null,
        group.note ? make("span", { class: "quiet", text: group.note }) : null)));
}

function rowLine(row) {
  const box = make("input", { type: "checkbox", "aria-label": `Show the curve of ${row.name}, ${row.task}`, checked: isPlotted(row), disabled: !row.curve });
  box.addEventListener("change", () => { if (!plot(row, box.checked)) box.checked = false; });
  const cells = COLUMNS.map((column) => {
    const cell = make("td", { class: column.number ? "number" : "" });
    if (column.key === "name") {
      cell.append(make("button", { type: "button", class: "open", text: row.name, onclick: () => openRow(row) }));
      if (row.error) cell.append(make("div", { class: "reason", text: row.error }));
    } else if (column.key === "status") {
      cell.append(make("span", { class: `status${row.status === "done" ? "" : " bad"}`, text: row.status }));
    } else if (column.key === "verdict") {
      cell.append(make("div", { class: "verdict", text: row.verdict }));
    } else cell.textContent = column.show ? column.show(row) : row[column.key] ?? "";
    return cell;
  });
  const line = make("tr", { class: `row${isPlotted(row) ? " plotted" : ""}` }, make("td", {}, box), ...cells);
  line.addEventListener("click", (event) => {
    if (!event.target.closest("button, input") && !String(getSelection())) openRow(row);
  });
  return line;
}

// Arrow up and down go from row to row.
function walk(event) {
  if ((event.key !== "ArrowDown" && event.key !== "ArrowUp") || !event.target.matches(".open")) return;
  const all = [...byId("table").querySelectorAll(".open")];
  const next = all[all.indexOf(event.target) + (event.key === "ArrowDown" ? 1 : -1)];
  if (next) { next.focus(); event.preventDefault(); }
}

function setUpMatrix() {
  const methods = [...new Set(index.rows.filter((row) => row.groups.length).map((row) => row.method))].sort();
  const best = methods.map((method) => index.groups.map((_, i) =>
    index.rows.filter((row) => row.kept && row.method === method && row.groups.includes(i)).sort((a, b) => a.order - b.order)[0] ?? null));
  const head = index.groups.map((group) => make("th", { scope: "col", class: "number" }, make("span", { text: group.title }),
    group.reason ? make("div", { class: "reason", text: "not ranked" }) : null));
  const lines = methods.map((method, m) => make("tr", {}, make("th", { scope: "row", text: method }),
    ...index.groups.map((group, g) => matrixCell(best[m][g], group, g, best))));
  byId("matrix").append(make("thead", {}, make("tr", {}, make("td"), ...head)), make("tbody", {}, ...lines));
}

function matrixCell(row, group, g, best) {
  if (row === null) return make("td", { class: "number quiet", text: "–" });
  const rank = row.rank === null ? "" : `${row.rank}. `;
  const cell = make("td", { class: `number${row.rank === 1 ? " best" : ""}` },
    make("button", { type: "button", text: `${rank}${row.final.toFixed(3)}`, "aria-label": `${row.method}, ${group.title}: ${row.final.toFixed(3)}`, onclick: () => openRow(row) }));
  const all = best.map((line) => line[g]).filter(Boolean).map((other) => other.final);
  const top = group.higher_is_better ? Math.max(...all) : Math.min(...all);
  const sign = group.higher_is_better ? 1 : -1;
  const share = sign * (top - group.chance) <= 0 ? 0 : Math.max(0, Math.min(1, (row.final - group.chance) / (top - group.chance)));
  cell.style.background = `rgba(var(--shade), ${(0.38 * share).toFixed(3)})`;
  return cell;
}
