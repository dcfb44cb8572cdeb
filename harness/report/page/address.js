// What a reader has chosen is in the address: a link shows the same view, and so does the page when it loads itself again.

const choices = []; // {key, read: () => text, "" where nothing was chosen, apply: (text) => void}
let writing = null, applied = false;

function choice(key, read, apply) {
  choices.push({ key, read, apply });
}

// To be called after every change.
function chosen() {
  if (!applied) return;
  clearTimeout(writing);
  writing = setTimeout(writeAddress, 100);
}

function address() {
  const said = new URLSearchParams();
  for (const { key, read } of choices) if (read()) said.set(key, read());
  return String(said);
}

function writeAddress(state = history.state) {
  history.replaceState(state, "", `#${address()}`);
}

function applyAddress() {
  const said = new URLSearchParams(location.hash.slice(1));
  applied = false;
  for (const { key, apply } of choices) apply(said.get(key) ?? "");
  applied = true;
}

function setUpAddress() {
  applyAddress();
  addEventListener("hashchange", () => { if (location.hash.slice(1) !== address()) applyAddress(); });
}

// A choice of one of the options of a select; what is no option is none.
function selectChoice(key, id, usual, changed) {
  const select = byId(id);
  choice(key, () => (select.value === usual ? "" : select.value), (text) => {
    const wanted = text || usual;
    if (select.value === wanted) return;
    if ([...select.options].some((option) => option.value === wanted)) { select.value = wanted; changed(); }
  });
  select.addEventListener("change", () => { changed(); chosen(); });
}

// Rows by the run id of their first seed, which stays when runs are added.
const rowOf = (id) => index.rows.find((row) => row.ids.includes(id));
const idsOf = (rows) => [...rows].map((row) => row.ids[0]).join(",");
const rowsOf = (text) => text.split(",").filter(Boolean).map(rowOf).filter(Boolean);

// A page whose file is being rewritten loads itself again, unless someone is at it.
function follow(opening) {
  if (document.documentElement.dataset.follow !== "yes") return;
  let touched = -Infinity;
  for (const kind of ["pointerdown", "pointermove", "keydown", "wheel", "touchmove"]) {
    addEventListener(kind, () => { touched = performance.now(); }, { passive: true });
  }
  history.scrollRestoration = "manual";
  if (history.state?.at) scrollTo(0, history.state.at);
  setInterval(() => {
    if (document.hidden || byId("details").open || performance.now() - touched < 3000) return;
    clearTimeout(writing);
    writeAddress({ at: scrollY });
    location.reload();
  }, Math.max(5000, 20 * opening));
}
