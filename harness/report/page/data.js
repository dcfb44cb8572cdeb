// What Python embedded: an index of all rows, and blocks of runs (record and curve) that are unpacked when they are asked for.

async function unpack(element) {
  const bytes = Uint8Array.from(atob(element.textContent.trim()), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

const blocks = new Map(); // block number -> promise of its runs
let index = null;

function runAt(position) {
  const number = Math.floor(position / index.block);
  if (!blocks.has(number)) blocks.set(number, unpack(document.getElementById(`block-${number}`)));
  return blocks.get(number).then((runs) => runs[position % index.block]);
}

// Every text of a record reaches the page through textContent: nothing in a record is ever parsed as HTML.
function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [key, value] of Object.entries(properties)) {
    if (key === "class") element.className = value;
    else if (key === "text") element.textContent = value;
    else if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (value === true) element.setAttribute(key, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(key, value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

function significant(value, digits = 4) {
  return value === null || value === undefined ? "–" : String(Number(value.toPrecision(digits)));
}

function megabytes(value) {
  return value === null ? "–" : `${(value / 1048576).toLocaleString("en", { maximumFractionDigits: 0 })} MiB`;
}

const byId = (id) => document.getElementById(id);
