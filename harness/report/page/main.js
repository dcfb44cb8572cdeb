// Start: unpack the index, fill the page.

async function start() {
  const before = performance.now();
  index = await unpack(byId("index"));
  const following = document.documentElement.dataset.follow === "yes";
  byId("summary").textContent = index.summary + (following ? "; this page loads itself again while runs are made" : "");
  for (const setUp of [setUpAnswers, setUpScatter, setUpDetails, setUpTable, setUpMatrix, setUpChart, setUpAddress]) setUp();
  document.documentElement.dataset.ready = "yes";
  follow(performance.now() - before);
}

start().catch((error) => {
  byId("problem").hidden = false;
  byId("problem").textContent = typeof DecompressionStream === "undefined"
    ? "This browser is too old for this page: it needs DecompressionStream (browsers since 2023)."
    : `The page could not be shown: ${error}`;
});
