// Elements and numbers. Text is only ever set as text: what comes from prompts is never markup.

export const byId = (id) => document.getElementById(id);

/** element("td", {class: "n"}, "text", child): attributes are set as attributes, strings become text nodes. */
export function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value === true) made.setAttribute(key, "");
    else if (value !== false && value !== null && value !== undefined) made.setAttribute(key, String(value));
  }
  made.append(...children.filter((child) => child !== null && child !== undefined && child !== false));
  return made;
}

/**
 * A table: heads are [title, class]; cells are strings or elements. On a phone rows are shown as blocks with the
 * title before each cell (page.css); the roles keep it a table for those who hear it.
 */
export function fillTable(table, heads, rows) {
  table.setAttribute("role", "table");
  const head = heads.map(([title, kind]) => element("th", { class: kind, scope: "col", role: "columnheader" }, title));
  const body = rows.map((cells) => element("tr", { role: "row" }, ...cells.map((cell, place) =>
    element("td", { class: heads[place][1], role: "cell", "data-title": heads[place][0] }, cell))));
  table.replaceChildren(
    element("thead", { role: "rowgroup" }, element("tr", { role: "row" }, ...head)),
    element("tbody", { role: "rowgroup" }, ...body));
  table.parentElement.hidden = rows.length === 0;
}

export function fillFacts(list, facts) {
  list.replaceChildren(
    ...facts.map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, value))));
}

export async function ask(address) {
  const answer = await fetch(address, { credentials: "same-origin" }).catch(() => {
    throw new Lost();
  });
  if (answer.status === 401) throw new Refused();
  if (!answer.ok) throw new Error(`${address}: ${answer.status}`);
  return answer.json();
}

/** The token of the page is another one now. */
export class Refused extends Error {}

/** Nobody answers. */
export class Lost extends Error {}

const minus = (text) => text.replace("-", "−");

export const fixed = (value, digits = 3) =>
  value === null || value === undefined ? "-" : minus(value.toFixed(digits));

export const signed = (value, digits = 2) => (value > 0 ? "+" : "") + fixed(value, digits);

export const count = (value) => value.toLocaleString("en-US");

/** A number as short as it can be told from its neighbours. */
export function short(value) {
  if (value === null || value === undefined) return "-";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e6)) return minus(value.toExponential(2).replace(/\.?0+e/, "e").replace("e+", "e"));
  return minus(String(Number(value.toPrecision(4))));
}

export function duration(seconds) {
  const whole = Math.max(0, Math.round(seconds));
  const [hours, minutes, rest] = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60, whole % 60];
  const two = (part) => String(part).padStart(2, "0");
  return hours ? `${hours}:${two(minutes)}:${two(rest)}` : `${minutes}:${two(rest)}`;
}

export function bytes(value) {
  for (const unit of ["B", "kB", "MB"]) {
    if (value < 999.5) return `${value.toFixed(unit === "MB" ? 1 : 0)} ${unit}`;
    value /= 1000;
  }
  return `${value.toFixed(2)} GB`;
}

export const plural = (number, one, many = `${one}s`) => `${count(number)} ${number === 1 ? one : many}`;
