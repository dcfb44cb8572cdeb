// The rows that the table shows, as a file: every learning rate of them, a line each.

const FIELDS = {
  method: (row) => row.name, settings: (row) => row.settings, task: (row) => row.task, model: (row) => row.model, split: (row) => row.split,
  epsilon: (row) => row.epsilon, certified_epsilon: (row) => row.certified, lr: (row) => row.lr, best_rate: (row) => (row.kept ? "yes" : "no"),
  rank: (row) => row.rank, verdict: (row) => row.verdict, metric: (row) => row.metric, final: (row) => row.final,
  seeds: (row) => row.seed_of.join(" "), finals: (row) => (row.finals ?? []).join(" "), runs: (row) => row.runs, step_s: (row) => row.step_s,
  peak_bytes: (row) => row.peak, trainable: (row) => row.trainable, status: (row) => row.status, error: (row) => row.error, run_ids: (row) => row.ids.join(" "),
};

// A spreadsheet takes a text that begins like a formula for one.
function csvCell(value) {
  if (value === null || value === undefined) return "";
  const text = typeof value === "string" && /^[=+\-@\t\r]/.test(value) && Number.isNaN(Number(value)) ? `'${value}` : String(value);
  return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

function csvOf(rows) {
  return [Object.keys(FIELDS), ...rows.map((row) => Object.values(FIELDS).map((field) => field(row)))]
    .map((line) => line.map(csvCell).join(",")).join("\r\n") + "\r\n";
}

function saveCsv() {
  const rows = view.rows.flatMap((row) => [row, ...ratesOf(row)]);
  const url = URL.createObjectURL(new Blob([csvOf(rows)], { type: "text/csv" }));
  make("a", { href: url, download: "dpft.csv" }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
}
