// The table: filter, sort, page, unfold. One row a method; its other learning rates unfold below it.

const PAGE = 100;
const BUDGET = (value) => (value === null ? "∞" : significant(value, 6));
const COLUMNS = [
  { key: "rank", title: "#", number: true },
  { key: "label", title: "Method" },
  { key: "verdict", title: "Verdict" },
  { key: "final", title: "Final", number: true, falls: true, show: (row) => (row.final === null ? "–" : `${row.metric} ${row.final_text}`) },
  { key: "peak", title: "Peak memory", number: true, show: (row) => megabytes(row.peak) },
  { key: "step_s", title: "Step time", number: true, show: (row) => (row.step_s === null ? "–" : `${significant(row.step_s, 3)} s`) },
  { key: "epsilon", title: "Budget ε", number: true, show: (row) => BUDGET(row.epsilon) },
  { key: "certified", title: "ε certified", number: true, show: (row) => row.certified_text },
  { key: "lr", title: "lr", number: true, show: (row) => significant(row.lr) },
  { key: "tried", screen: true, title: "Rates tried", number: true },
  { key: "runs", screen: true, title: "Runs", number: true },
  { key: "trainable", screen: true, title: "Trainable", number: true, show: (row) => (row.trainable === null ? "–" : row.trainable.toLocaleString("en")) },
  { key: "task", screen: true, title: "Task" },
  { key: "model", screen: true, title: "Model" },
  { key: "status", screen: true, title: "Status" },
];
const TOLD_ONCE = ["task", "model", "epsilon", "status"]; // have no column where they are the same everywhere
const FILTERS = ["task", "model", "method", "epsilon", "status"];
const view = { sort: null, falling: false, page: 0, lines: [], rows: [], open: new Set(), rates: new Map(), size: PAGE };

const classOf = (column) => `${column.number ? "number" : ""}${column.screen ? " screen" : ""}`;
const ratesOf = (row) => view.rates.get(row.number) ?? [];

function setUpTable() {
  for (const row of index.rows) {
    if (!row.kept) view.rates.set(row.family, [...ratesOf({ number: row.family }), row].sort((a, b) => a.lr - b.lr));
  }
  for (const row of index.rows) { // a method is found by what its other rates say, too
    row.text = [row, ...ratesOf(row)].flatMap((r) => [r.name, r.label, r.method, r.task, r.model, r.status, r.error, r.settings, ...r.ids]).join(" ").toLowerCase();
  }
  for (const key of TOLD_ONCE) {
    if (index.rows.every((row) => row[key] === index.rows[0][key])) COLUMNS.splice(COLUMNS.findIndex((column) => column.key === key), 1);
  }
  const splits = [...new Set(index.rows.map((row) => row.split))];
  COLUMNS.find((column) => column.key === "final").title = splits.length > 1 ? "Final" : `Final, ${splits[0] === "whole" ? "whole split" : `${splits[0]} half`}`;
  const heads = COLUMNS.map((column) =>
    make("th", { scope: "col", "aria-sort": "none", class: classOf(column) },
      make("button", { type: "button", onclick: () => sortBy(column), text: column.title })));
  byId("table").tHead.append(make("tr", {}, make("th", { scope: "col", class: "plain", text: "Curve" }), ...heads));
  for (const key of FILTERS) {
    const values = [...new Set(index.rows.flatMap((row) => row[`in_${key}`] ?? [row[key]]))];
    values.sort((a, b) => (typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b))));
    byId(`filter-${key}`).append(
      make("option", { value: "", text: "all" }),
      ...values.map((value) => make("option", { value: JSON.stringify(value), text: key === "epsilon" ? BUDGET(value) : String(value) })));
    byId(`filter-${key}`).parentElement.hidden = values.length < 2;
    selectChoice(key, `filter-${key}`, "", refilter);
  }
  let waiting;
  byId("search").addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(() => { refilter(); chosen(); }, 120); });
  byId("filters").addEventListener("submit", (event) => event.preventDefault());
  byId("filters").addEventListener("reset", () => setTimeout(() => { refilter(); chosen(); }));
  byId("csv").addEventListener("click", saveCsv);
  byId("previous").addEventListener("click", () => turn(-1));
  byId("next").addEventListener("click", () => turn(1));
  byId("regroup").addEventListener("click", () => { view.sort = null; refilter(); chosen(); byId("table-box").focus(); });
  byId("table").tBodies[0].addEventListener("keydown", walk);
  addEventListener("beforeprint", () => { view.size = Infinity; view.page = 0; showPage(); });
  addEventListener("afterprint", () => { view.size = PAGE; showPage(); });
  choice("q", () => byId("search").value, (text) => { byId("search").value = text; });
  choice("sort", () => (view.sort === null ? "" : (view.falling ? "-" : "") + view.sort.key), (text) => {
    view.sort = COLUMNS.find((column) => column.key === text.replace("-", "")) ?? null;
    view.falling = text.startsWith("-");
  });
  choice("rates", () => idsOf(view.open), (text) => { view.open = new Set(rowsOf(text)); refilter(); });
  choice("page", () => (view.page ? String(view.page + 1) : ""), (text) => { view.page = Math.max(0, (parseInt(text, 10) || 1) - 1); showPage(); });
  refilter();
}

function sortBy(column) {
  if (view.sort === column) view.falling = !view.falling;
  else Object.assign(view, { sort: column, falling: Boolean(column.falls) });
  refilter();
  chosen();
}

function matches() {
  const words = byId("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  const wanted = FILTERS.map((key) => [key, byId(`filter-${key}`).value]).filter(([, value]) => value !== "")
    .map(([key, value]) => [key, JSON.parse(value)]);
  return (row) => row.kept && wanted.every(([key, value]) => (row[`in_${key}`] ?? [row[key]]).includes(value)) &&
    words.every((word) => row.text.includes(word));
}

function refilter() {
  view.rows = index.rows.filter(matches());
  view.lines = view.sort === null ? grouped(view.rows) : sorted(view.rows).map((row) => ({ row }));
  view.page = 0;
  const total = index.rows.filter((row) => row.kept).length;
  byId("count").textContent = `${view.rows.length.toLocaleString("en")} of ${total.toLocaleString("en")} rows` +
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
  chosen();
  byId("table-box").scrollTo(0, 0);
  byId("table-box").scrollIntoView({ block: "start" });
}

function showPage() {
  const pages = Math.max(1, Math.ceil(view.lines.length / view.size));
  view.page = Math.min(view.page, pages - 1);
  const lines = view.size === Infinity ? view.lines : view.lines.slice(view.page * view.size, (view.page + 1) * view.size);
  byId("table").tBodies[0].replaceChildren(...lines.flatMap(({ group, row }) =>
    (group ? [groupLine(group)] : [rowLine(row), ...(view.open.has(row) ? ratesOf(row).map(rowLine) : [])])));
  if (lines.length === 0) {
    byId("table").tBodies[0].append(make("tr", {}, make("td", { colspan: COLUMNS.length + 1, text: "No row fits; clear the filters." })));
  }
  byId("page-number").textContent = `Page ${view.page + 1} of ${pages}`;
  byId("previous").disabled = view.page === 0;
  byId("next").disabled = view.page + 1 >= pages;
  for (const id of ["previous", "next", "page-number"]) byId(id).hidden = pages === 1;
}

// Shows or hides the other learning rates of a method.
function unfold(row) {
  if (!view.open.delete(row)) view.open.add(row);
  const box = byId("table-box"), { scrollLeft, scrollTop } = box;
  showPage();
  chosen();
  box.scrollTo(scrollLeft, scrollTop);
  byId("table").querySelector(`[data-row="${row.number}"]`)?.focus();
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
  const line = make("tr", { class: `row${row.kept ? "" : " rate"}${isPlotted(row) ? " plotted" : ""}` }, make("td", {}, box), ...COLUMNS.map((column) => cellOf(row, column)));
  line.addEventListener("click", (event) => {
    if (!event.target.closest("button, input") && !String(getSelection())) openRow(row);
  });
  return line;
}

function cellOf(row, column) {
  const cell = make("td", { class: classOf(column) });
  if (column.key === "label") {
    cell.append(make("button", { type: "button", class: "open", text: row.label, title: row.name, onclick: () => openRow(row) }));
    if (row.error) cell.append(make("div", { class: "reason", text: row.error }));
  } else if (column.key === "status") {
    cell.append(make("span", { class: `status${row.status === "done" ? "" : " bad"}`, text: row.status }));
  } else if (column.key === "verdict") {
    cell.append(make("div", { class: "verdict", text: row.verdict }));
  } else if (column.key === "tried") {
    cell.append(!row.kept ? "" : ratesOf(row).length === 0 ? String(row.tried ?? "–") : make("button", {
      type: "button", class: "unfold", text: `${row.tried} ${view.open.has(row) ? "▾" : "▸"}`, "data-row": row.number,
      "aria-expanded": String(view.open.has(row)), "aria-label": `Other learning rates of ${row.name}, ${row.task}`, onclick: () => unfold(row) }));
  } else cell.textContent = column.show ? column.show(row) : row[column.key] ?? "";
  return cell;
}

// Arrow up and down go from row to row.
function walk(event) {
  if ((event.key !== "ArrowDown" && event.key !== "ArrowUp") || !event.target.matches(".open")) return;
  const all = [...byId("table").querySelectorAll(".open")];
  const next = all[all.indexOf(event.target) + (event.key === "ArrowDown" ? 1 : -1)];
  if (next) { next.focus(); event.preventDefault(); }
}
