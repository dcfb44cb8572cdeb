// The answers: sentences of Python, in which ** marks what is bold.

const UNFOLDED = 6; // settings; more are folded away

function setUpAnswers() {
  const all = index.answers.map(({ title, lines }) => make("article", { class: "answer" }, make("h3", { text: title }), ...answered(lines)));
  const box = byId("answers");
  box.append(...all.slice(0, UNFOLDED));
  if (all.length > UNFOLDED) box.append(make("details", {}, make("summary", { text: `${all.length - UNFOLDED} more settings` }), ...all.slice(UNFOLDED)));
  if (all.length === 0) box.append(make("p", { text: "Nothing can be told yet: no run has finished." }));
  byId("foot").append(...index.foot.map((text) => make("p", { class: "quiet", text })));
}

// What is the same at every budget is said once.
function answered(lines) {
  const [cannot, evidence] = ["cannot", "evidence"].map((key) => (lines.every((line) => line[key] === lines[0][key]) ? lines[0][key] : null));
  const each = lines.flatMap((line) => [
    make("p", {}, line.budget ? make("span", { class: "budget", text: line.budget }) : null, ...worded([line.cannot === cannot ? "" : line.cannot, line.text].join(" "))),
    line.evidence && line.evidence !== evidence ? make("p", { class: "quiet", text: line.evidence }) : null,
  ]);
  return [cannot ? make("p", { text: cannot }) : null, ...each, evidence ? make("p", { class: "quiet", text: evidence }) : null].filter(Boolean);
}

function worded(text) {
  return text.split("**").map((part, i) => (i % 2 ? make("strong", { text: part }) : part));
}
