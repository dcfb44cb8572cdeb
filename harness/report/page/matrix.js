// Methods by settings, where there are several.

function setUpMatrix() {
  byId("matrix-box").closest("section").hidden = index.groups.length < 2;
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
