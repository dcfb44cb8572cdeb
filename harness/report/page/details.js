// One row's runs, one at a time: result, certificate, ledger, cost, settings, provenance, and why it failed.

let shownRun = ""; // its id, while the dialog is open
let opened = 0; // counts openings, so that a slow block never overwrites a later choice

function openRow(row, at = 0) {
  byId("details-title").textContent = `${row.name}, ${row.task}`;
  byId("seeds").replaceChildren(...row.positions.map((position, i) =>
    make("button", { type: "button", text: `seed ${row.seed_of[i]}`, "aria-pressed": String(i === at), onclick: () => showRun(row, i) })));
  byId("details-body").replaceChildren(make("p", { class: "quiet", text: "Unpacking …" }));
  if (!byId("details").open) byId("details").showModal();
  byId("close").focus();
  return showRun(row, Math.max(0, at));
}

async function showRun(row, i) {
  const mine = (opened += 1);
  shownRun = row.ids[i];
  chosen();
  [...byId("seeds").children].forEach((button, j) => button.setAttribute("aria-pressed", String(i === j)));
  const run = await runAt(row.positions[i]);
  if (mine !== opened) return;
  byId("details-body").replaceChildren(...sections(run));
  byId("details").scrollTo(0, 0);
}

function setUpDetails() {
  byId("close").addEventListener("click", () => byId("details").close()); // Escape closes a dialog by itself
  byId("details").addEventListener("click", (event) => { if (event.target === byId("details")) byId("details").close(); });
  byId("details").addEventListener("close", () => { shownRun = ""; chosen(); });
  choice("run", () => shownRun, (text) => {
    const row = text ? rowOf(text) : undefined;
    if (row) openRow(row, row.ids.indexOf(text));
    else byId("details").close();
  });
}

function sections(run) {
  const found = [make("p", { class: "quiet", text: `Run ${run.run_id}: ${run.status}` })];
  if (run.error) found.push(make("p", { class: "warning", text: run.error }));
  found.push(...certificate(run.privacy));
  const { samples, ...result } = run.result || {};
  found.push(...part("Result", result), ...texts(samples));
  found.push(...part("Settings", run.spec), ...part("Cost", run.cost));
  if (run.diagnostics) found.push(...part("Diagnostics (not private)", run.diagnostics));
  found.push(...part("Provenance", run.provenance));
  return found;
}

function drawnBy(event) { // how a batch was drawn, where that is not Poisson sampling
  const { kind, ...numbers } = event.sampling || {};
  return kind ? ` (${[kind, ...Object.entries(numbers).map(([name, value]) => `${name.replaceAll("_", " ")} ${value}`)].join(", ")})` : "";
}

function certificate(privacy) {
  if (!privacy) return [make("h3", { text: "Privacy" }), make("p", { text: "This run is not private: it has no ledger." })];
  const { ledger, epsilon, cross_checks: checks, ...rest } = privacy;
  const head = epsilon ? `ε ≤ ${epsilon[2].toFixed(4)} at δ = ${significant(privacy.delta, 3)}` : "ε is not certified";
  const rows = kindsOf(ledger).map(([steps, event]) => make("tr", {},
    ...[steps, significant(event.sampling_probability, 6) + drawnBy(event), event.mechanism, significant(event.noise_multiplier, 6), released(event)]
      .map((text, i) => make("td", { text, class: i === 1 || i === 3 ? "number" : "" }))));
  const heads = ["Steps", "Sampling probability", "Mechanism", "Noise multiplier", "Releases in each step"];
  return [
    make("h3", { text: "Certificate" }),
    make("p", { class: "big", text: head }),
    make("dl", {}, ...pairs({
      "lower, estimate, upper": epsilon ? epsilon.map((value) => value.toFixed(4)).join(", ") : "none",
      "cross-checks": Object.entries(checks).map(([name, value]) => `${name} ${value === null ? "not available" : value.toFixed(4)}`).join(", "),
      ...flat(rest),
    })),
    make("h3", { text: "Ledger" }),
    make("div", { class: "box", tabindex: "0", role: "region", "aria-label": "Ledger" },
      make("table", { class: "ledger" }, make("thead", {}, make("tr", {}, ...heads.map((text) => make("th", { scope: "col", class: "plain", text })))), make("tbody", {}, ...rows))),
  ];
}

// [its steps, event] of every event; of a long ledger one row a kind of step, with how many there are
function kindsOf(ledger) {
  if (ledger.length <= 24) return ledger.map((event) => [`${event.step_from}–${event.step_to}`, event]);
  const kinds = new Map();
  for (const { step_from: from, step_to: to, ...event } of ledger) {
    const key = JSON.stringify(event);
    kinds.set(key, [(kinds.has(key) ? kinds.get(key)[0] : 0) + to - from, event]);
  }
  return [...kinds.values()].map(([steps, event]) => [`${steps.toLocaleString("en")} steps`, event]);
}

// the releases of a step by name; several with what each has of the budget and its own noise multiplier
function released(event) {
  const several = event.releases.length > 1;
  return event.releases.map((release) => {
    const share = several ? `${significant(100 * (event.noise_multiplier / release.noise_multiplier) ** 2)}% of the budget, noise multiplier ${significant(release.noise_multiplier, 6)}, ` : "";
    return `${release.name} (${share}sensitivity × ${significant(release.sensitivity_ratio)})`;
  }).join(", ");
}

function texts(samples) {
  if (!samples || !samples.after || !samples.after.length) return [];
  const before = new Map((samples.before || []).map((sample) => [sample.prompt, sample.output]));
  return [make("h3", { text: "Texts" }), ...samples.after.map(({ prompt, reference, output }) => make("dl", {},
    ...pairs({ prompt, "a reference": reference, "before training": before.get(prompt) ?? "not kept", "after training": output || "(nothing)" })))];
}

function part(title, values) {
  return values && Object.keys(values).length ? [make("h3", { text: title }), make("dl", {}, ...pairs(flat(values)))] : [];
}

function pairs(values) {
  return Object.entries(values).flatMap(([key, value]) => [make("dt", { text: key.replaceAll("_", " ") }), make("dd", { text: shown(value) })]);
}

function flat(values, prefix = "") {
  const found = {};
  for (const [key, value] of Object.entries(values)) {
    if (value !== null && typeof value === "object" && !Array.isArray(value)) Object.assign(found, flat(value, `${prefix}${key} · `));
    else found[prefix + key] = value;
  }
  return found;
}

function shown(value) {
  if (value === null || value === undefined) return "–";
  if (typeof value === "number") return Number.isInteger(value) ? value.toLocaleString("en") : significant(value, 6);
  if (typeof value === "boolean") return value ? "yes" : "no";
  return Array.isArray(value) ? value.map(shown).join(", ") : String(value);
}
