"use strict";
/* Elements, numbers and tables. Text from records becomes text nodes and is never read as markup. */

const SVG = "http://www.w3.org/2000/svg";
const NOTHING = "–";

const html = (tag, attributes, ...children) =>
  fill(document.createElement(tag), attributes, children);
const svg = (tag, attributes, ...children) =>
  fill(document.createElementNS(SVG, tag), attributes, children);

/* A function is added as a listener; null and false are left out. */
function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (typeof value === "function") node.addEventListener(name, value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value);
  }
  node.append(...children.flat(2).filter((child) => (child ?? false) !== false));
  return node;
}

const percent = (value) => value.toFixed(1);
const whole = (value) => value.toLocaleString("en");
const look = (column) => [column.number && "number", column.head && "head"].filter(Boolean).join(" ");
const plural = (count, word) => `${whole(count)} ${word}${count === 1 ? "" : "s"}`;

/* A figure is [value, low, high] in percent. */
function asText(figure) {
  if (!Array.isArray(figure)) return figure ?? NOTHING;
  return `${percent(figure[0])} [${percent(figure[1])}, ${percent(figure[2])}]`;
}

function asCell(figure) {
  if (!Array.isArray(figure)) return figure ?? NOTHING;
  const interval = `[${percent(figure[1])}, ${percent(figure[2])}]`;
  return [`${percent(figure[0])} `, html("span", {class: "interval"}, interval)];
}

const modelPath = (name) => `#/model/${encodeURIComponent(name)}`;
const suitePath = (id) => `#/suite/${encodeURIComponent(id)}`;

/* Only an https address becomes a link; a card holds no others. */
function outside(text) {
  if (!/^https:\/\//.test(text)) return text;
  return html("a", {href: text, rel: "noopener noreferrer"}, text);
}

/* The order of two values of a column; unknown values come last in both directions. */
function compare(a, b, down) {
  if (a === null || b === null) return (a === null) - (b === null);
  const order = typeof a === "number" ? a - b : a.localeCompare(b, "en", {numeric: true});
  return down ? -order : order;
}

/* A table in a box that scrolls. A column has a title and a cell(row); a value(row) makes it sortable.
   `down` says that more is better, `head` that the column names the row. */
function makeTable(label, columns, rows = []) {
  let by = null, down = false;
  const heads = columns.map((column, place) => html(
    "th", {scope: "col", class: look(column)},
    column.value
      ? html("button", {type: "button", click: () => sort(place)}, column.title)
      : column.title,
  ));
  const body = html("tbody");
  const table = html("table", {}, html("thead", {}, html("tr", {}, heads)), body);
  function sort(place) {
    down = by === place ? !down : Boolean(columns[place].down);
    by = place;
    heads.forEach((head) => head.removeAttribute("aria-sort"));
    heads[place].setAttribute("aria-sort", down ? "descending" : "ascending");
    show(rows);
  }
  function show(shown) {
    rows = shown;
    const value = by === null ? null : columns[by].value;
    const order = value ? [...rows].sort((a, b) => compare(value(a), value(b), down)) : rows;
    body.replaceChildren(...order.map((row) => html("tr", {}, columns.map((column) => html(
      column.head ? "th" : "td",
      {scope: column.head && "row", class: look(column)},
      column.cell(row),
    )))));
  }
  show(rows);
  const node = html(
    "div", {class: "scroll", role: "region", tabindex: "0", "aria-label": label}, table);
  return {node, show};
}

/* A table of texts; columns that hold only numbers are sorted as numbers. */
function textTable(label, headers, rows) {
  const columns = headers.map((title, place) => {
    const number = rows.every((row) => !Number.isNaN(Number(row[place]))) && rows.some((row) => row[place]);
    const value = (row) => (row[place] && number ? Number(row[place]) : row[place] || null);
    return {title, number, value, down: number, head: place === 0, cell: (row) => row[place] || NOTHING};
  });
  return makeTable(label, columns, rows).node;
}
