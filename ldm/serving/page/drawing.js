/** What a chart consists of: axes and lines as SVG, and the table of its values. */

import { element, vector } from "./dom.js";
import { format } from "./scales.js";

/** @typedef {import("./series.js").Points} Points */
/** @typedef {(value: number) => number} Scale */
/**
 * @typedef {object} Line
 * @property {string} label
 * @property {number} color
 * @property {number} dash
 * @property {boolean} marks whether to mark the points
 * @property {Points} points
 * @property {Points | null} raw the points before smoothing
 */

/** The box of the lines: its margins at the sides, its coordinates from the top, and the height of the chart. */
export const BOX = { left: 58, right: 12, top: 10, bottom: 192, height: 230 };

const MARKED = 60; // number of points up to which they are marked
const TABLE_ROWS = 50;

/**
 * Return the axes.
 *
 * @param {Scale} x
 * @param {Scale} y
 * @param {number} width
 * @param {{steps: number[], values: number[], resumed: number[], unit: string}} marks
 */
export function drawGrid(x, y, width, { steps, values, resumed, unit }) {
  const right = width - BOX.right;
  const lines = values.map((tick) => vector("line", { x1: BOX.left, x2: right, y1: y(tick), y2: y(tick) }));
  const resumes = resumed.map((step) =>
    vector("line", { class: "resumed", x1: x(step), x2: x(step), y1: BOX.top, y2: BOX.bottom }),
  );
  const texts = [
    ...values.map((tick) => vector("text", { class: "end", x: BOX.left - 8, y: y(tick) + 4 }, format(tick))),
    ...steps.map((tick) => vector("text", { class: "middle", x: x(tick), y: BOX.bottom + 18 }, format(tick))),
    vector("text", { class: "end", x: right, y: BOX.height - 4 }, "step"),
    vector("text", { class: "middle", transform: `translate(11 ${BOX.bottom / 2}) rotate(-90)` }, unit),
  ];
  return vector("g", { class: "grid" }, ...lines, ...resumes, ...texts);
}

/**
 * Return the lines, cut off at the sides of the box.
 *
 * @param {Scale} x
 * @param {Scale} y
 * @param {number} width
 * @param {Line[]} lines
 * @param {boolean} isLog whether to leave out values that are not positive
 */
export function drawLines(x, y, width, lines, isLog) {
  const places = (/** @type {Points} */ points) =>
    points.x.flatMap((step, i) => (isLog && points.y[i] <= 0 ? [] : [[x(step).toFixed(1), y(points.y[i]).toFixed(1)]]));
  const path = (/** @type {string[][]} */ shown) => (shown.length > 0 ? `M${shown.join("L")}` : "");
  const box = [BOX.left - 4, 0, width - BOX.right - BOX.left + 8, BOX.bottom + 4];
  const [left, top, boxWidth, height] = box;
  const inner = vector("svg", { x: left, y: top, width: boxWidth, height, viewBox: box.join(" ") });
  for (const { color, dash, marks, points, raw } of lines) {
    const group = vector("g", { class: `line c${color} d${dash}` });
    const shown = places(points);
    if (raw !== null) group.append(vector("path", { class: "raw", d: path(places(raw)) }));
    group.append(vector("path", { d: path(shown) }));
    if (shown.length === 1 || (marks && shown.length <= MARKED)) {
      group.append(...shown.map(([cx, cy]) => vector("circle", { cx, cy, r: 2.6 })));
    }
    inner.append(group);
  }
  return inner;
}

/**
 * Return the values at some of the steps as a table.
 *
 * @param {string} title
 * @param {number[]} steps
 * @param {Line[]} lines
 */
export function tableOf(title, steps, lines) {
  const every = Math.ceil(steps.length / TABLE_ROWS);
  const shown = steps.filter((_, i) => i % every === 0 || i === steps.length - 1);
  const value = (/** @type {Points} */ { x, y }, /** @type {number} */ step) => {
    const i = x.indexOf(step);
    return i < 0 ? "" : format(y[i]);
  };
  const names = ["step", ...lines.map(({ label }) => label)].map((text) => element("th", { scope: "col" }, text));
  const rows = shown.map((step) => {
    const cells = lines.map(({ points }) => element("td", {}, value(points, step)));
    return element("tr", {}, element("th", { scope: "row" }, step.toLocaleString("en")), ...cells);
  });
  const head = element("thead", {}, element("tr", {}, ...names));
  const table = element("table", {}, head, element("tbody", {}, ...rows));
  return element("div", { className: "scroll", tabIndex: 0, role: "region", "aria-label": `Values: ${title}` }, table);
}
