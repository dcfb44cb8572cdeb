// What both pictures are drawn with.

const SVG = "http://www.w3.org/2000/svg";
const EDGES = { left: 58, right: 14, top: 26, bottom: 42 };

function svg(tag, attributes, text) {
  const element = document.createElementNS(SVG, tag);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  return element;
}

function ticks(low, high, count) {
  const raw = (high - low) / count, power = 10 ** Math.floor(Math.log10(raw));
  const size = [1, 2, 5, 10].find((m) => m * power >= raw) * power;
  const found = [];
  for (let i = Math.ceil(low / size); i * size <= high + 1e-9 * size; i += 1) found.push(Number((i * size).toPrecision(12)));
  return found;
}

// 1, 2, 5, 10, ... or only powers of ten or two, so that about `count` of them are between low and high.
function logTicks(low, high, count) {
  const found = (steps) => {
    const all = [];
    for (let p = Math.floor(Math.log10(low)); 10 ** p <= high; p += 1) all.push(...steps.map((m) => Number((m * 10 ** p).toPrecision(12))));
    return all.filter((x) => x >= low && x <= high);
  };
  const many = [[1, 1.5, 2, 3, 4, 5, 6, 8], [1, 2, 3, 5], [1, 2, 5], [1, 3], [1]].map(found);
  return many.find((all) => all.length <= count) ?? many.at(-1);
}

const range = (values) => {
  const [a, b] = [Math.min(...values), Math.max(...values)];
  return a === b ? [a - 0.5, b + 0.5] : [a, b];
};

const padded = ([low, high], share) => [low - share * (high - low), high + share * (high - low)];

function sizeOf(box) {
  return [Math.max(240, box.clientWidth), Math.max(180, box.clientHeight)];
}

// {root, sx, sy}: an empty picture with its grid, its numbers and the names of its axes.
function frame(box, [x0, x1], [y0, y1], { log = false, at = null, xName, yName }) {
  const [width, height] = sizeOf(box);
  const { left, right, top, bottom } = EDGES, scale = log ? Math.log : (x) => x;
  const sx = (x) => left + ((scale(x) - scale(x0)) / (scale(x1) - scale(x0))) * (width - left - right);
  const sy = (y) => height - bottom - ((y - y0) / (y1 - y0)) * (height - top - bottom);
  const root = svg("svg", { viewBox: `0 0 ${width} ${height}` });
  for (const y of ticks(y0, y1, 5)) {
    root.append(svg("line", { class: "grid", x1: left, x2: width - right, y1: sy(y), y2: sy(y) }), svg("text", { x: left - 6, y: sy(y) + 4, "text-anchor": "end" }, significant(y)));
  }
  const xs = at ?? (log ? logTicks : ticks)(x0, x1, width < 500 ? 4 : 8);
  for (const x of xs) root.append(svg("text", { x: sx(x), y: height - bottom + 18, "text-anchor": "middle" }, x.toLocaleString("en", { maximumSignificantDigits: 4 })));
  root.append(svg("text", { x: (left + width - right) / 2, y: height - 7, "text-anchor": "middle" }, xName), svg("text", { x: 8, y: 16 }, yName));
  return { root, sx, sy };
}
