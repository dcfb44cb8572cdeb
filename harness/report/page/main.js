// Start: unpack the index, fill the page.

async function start() {
  index = await unpack(byId("index"));
  index.rows.forEach((row) => {
    row.text = [row.name, row.method, row.task, row.model, row.status, row.error, row.settings, ...row.ids].join(" ").toLowerCase();
  });
  byId("summary").textContent = index.summary;
  setUpDetails();
  setUpTable();
  setUpMatrix();
  setUpChart();
  document.documentElement.dataset.ready = "yes";
}

start().catch((error) => {
  byId("problem").hidden = false;
  byId("problem").textContent = typeof DecompressionStream === "undefined"
    ? "This browser is too old for this page: it needs DecompressionStream (browsers since 2023)."
    : `The page could not be shown: ${error}`;
});
