/** A chart of lines as SVG: zoom by dragging, values under the pointer or by arrow keys, and a table of the values. */

import { element, vector } from "./dom.js";
import { BOX, drawGrid, drawLines, tableOf } from "./drawing.js";
import { axisOf, format, linearTicks, scale } from "./scales.js";
import { nearest, thinned, within } from "./series.js";

/** @typedef {import("./scales.js").Range} Range */
/** @typedef {import("./drawing.js").Line} Line */
/** @typedef {{title: string, y_label: string, log_y: boolean | null, y_range: Range | null, note: string}} Description */

const LOG_RATIO = 30; // of the largest to the smallest value, from which an axis is logarithmic by itself
const NEAR = 16; // pixels between the pointer and a point that it shows
const DRAG = 6; // pixels from which a movement chooses a range

export class Chart {
  /**
   * @param {Description} description
   * @param {(range: Range | null) => void} onZoom called with the steps that were chosen; null for all
   */
  constructor(description, onZoom) {
    this.description = description;
    this.onZoom = onZoom;
    /** @type {Line[]} */
    this.lines = [];
    /** @type {Line[]} what is drawn of the lines */
    this.drawn = [];
    /** @type {Range} */
    this.domain = [0, 1];
    /** @type {boolean | null} */
    this.log = null;
    /** @type {number[]} */
    this.resumed = [];
    /** @type {number | null} */
    this.cursor = null;
    /** @type {Range | null} */
    this.dragged = null;
    this.x = scale([0, 1], [0, 1]);
    this.y = this.x;
    this.legend = element("ul", { className: "legend" });
    this.tip = element("div", { className: "tip", role: "status", hidden: true });
    this.plot = element("div", { className: "plot", tabIndex: 0, role: "img", "aria-describedby": "keys" });
    this.table = element("details", { className: "values" }, element("summary", {}, "Table"));
    this.root = element(
      "figure",
      { className: "panel chart" },
      element(
        "figcaption",
        {},
        element("h4", {}, description.title),
        element("p", { className: "muted" }, description.note),
      ),
      this.legend,
      element("div", { className: "frame" }, this.plot, this.tip),
      this.table,
    );
    this.table.addEventListener("toggle", () => this.fillTable());
    this.listen();
    new ResizeObserver(() => this.draw()).observe(this.plot);
  }

  /**
   * Show other lines.
   *
   * @param {Line[]} lines each with at least one point
   * @param {Range} domain from which step to which
   * @param {boolean | null} log whether the axis of the values is logarithmic; null: as the description and the values suggest
   * @param {number[]} resumed steps at which the training was resumed
   */
  update(lines, domain, log, resumed) {
    this.lines = lines;
    this.domain = domain;
    this.log = log;
    this.resumed = resumed;
    const ends = lines.map(({ points, raw }) => format(/** @type {number} */ ((raw ?? points).y.at(-1))));
    this.legend.replaceChildren(
      ...lines.map(({ label, color, dash }, i) => {
        const stroke = vector("line", { x1: 0, x2: 22, y1: 2, y2: 2 });
        const sample = vector(
          "svg",
          { class: `line c${color} d${dash}`, viewBox: "0 0 22 4", "aria-hidden": true },
          stroke,
        );
        return element("li", {}, sample, label, element("b", {}, ends[i]));
      }),
    );
    const summary = lines.map(({ label }, i) => `${label} ends at ${ends[i]}`).join("; ");
    this.plot.setAttribute("aria-label", `${this.description.title}: ${summary}`);
    this.draw();
    this.fillTable();
  }

  draw() {
    const width = this.plot.clientWidth;
    if (width === 0) return;
    this.drawn = this.lines.map(({ points, raw, ...line }) => ({
      ...line,
      points: thinned(within(points, this.domain), width),
      raw: raw && thinned(within(raw, this.domain), width),
    }));
    const values = this.drawn.flatMap(({ points, raw }) => [...points.y, ...(raw?.y ?? [])]);
    const positive = values.filter((value) => value > 0);
    const isLog = positive.length > 0 && (this.log ?? this.description.log_y ?? spansOrders(values));
    const axis = axisOf(isLog ? positive : [...values, ...(this.description.y_range ?? [])], isLog);
    this.x = scale(this.domain, [BOX.left, width - BOX.right]);
    this.y = scale(axis.range, [BOX.bottom, BOX.top], isLog);
    const [first, last] = this.domain;
    const resumed = this.resumed.filter((step) => step > first && step < last);
    const unit = `${this.description.y_label}${isLog ? " (log)" : ""}`;
    const steps = linearTicks(this.domain, Math.max(2, width / 110));
    this.pointer = vector("g", { class: "pointer" });
    this.plot.replaceChildren(
      vector(
        "svg",
        { viewBox: `0 0 ${width} ${BOX.height}`, height: BOX.height, "aria-hidden": true },
        drawGrid(this.x, this.y, width, { steps, values: axis.ticks, resumed, unit }),
        drawLines(this.x, this.y, width, this.drawn, isLog),
        this.pointer,
      ),
    );
    this.showCursor();
  }

  /** Show the values at the step of the cursor, and the range that is being chosen. */
  showCursor() {
    this.pointer?.replaceChildren();
    this.tip.hidden = this.cursor === null;
    if (this.cursor === null) return;
    const x = this.x(this.cursor);
    if (this.dragged !== null) {
      const [first, last] = this.dragged.map(this.x).sort((a, b) => a - b);
      this.pointer?.append(vector("rect", { x: first, y: BOX.top, width: last - first, height: BOX.bottom - BOX.top }));
    }
    this.pointer?.append(vector("line", { x1: x, x2: x, y1: BOX.top, y2: BOX.bottom }));
    const rows = [element("div", {}, `step ${Math.round(this.cursor).toLocaleString("en")}`)];
    for (const { label, color, points } of this.drawn) {
      const i = nearest(points, this.cursor);
      if (Math.abs(this.x(points.x[i]) - x) > NEAR) continue;
      const place = { cx: this.x(points.x[i]), cy: this.y(points.y[i]), r: 4 };
      if (Number.isFinite(place.cy)) this.pointer?.append(vector("circle", { class: `c${color}`, ...place }));
      rows.push(
        element(
          "div",
          {},
          element("i", { className: `c${color}` }),
          `${label} `,
          element("b", {}, format(points.y[i])),
        ),
      );
    }
    this.tip.replaceChildren(...rows);
    const isRight = x > this.plot.clientWidth / 2;
    this.tip.style.left = isRight ? "" : `${x + 12}px`;
    this.tip.style.right = isRight ? `${this.plot.clientWidth - x + 12}px` : "";
  }

  /** @param {number | null} step */
  moveCursor(step) {
    this.cursor = step;
    this.showCursor();
  }

  listen() {
    /** @type {number | null} */
    let start = null;
    const step = (/** @type {PointerEvent} */ event) => {
      const x = event.clientX - this.plot.getBoundingClientRect().left;
      const inverse = scale([this.x(this.domain[0]), this.x(this.domain[1])], this.domain);
      return Math.min(Math.max(inverse(x), this.domain[0]), this.domain[1]);
    };
    this.plot.addEventListener("pointerdown", (/** @type {PointerEvent} */ event) => {
      if (event.button === 0) start = step(event);
      this.moveCursor(this.snapped(step(event)));
    });
    this.plot.addEventListener("pointermove", (/** @type {PointerEvent} */ event) => {
      const at = step(event);
      const isDrag = start !== null && Math.abs(this.x(at) - this.x(start)) > DRAG;
      if (isDrag) this.plot.setPointerCapture(event.pointerId);
      this.dragged = isDrag && start !== null ? [start, at] : null;
      this.moveCursor(this.snapped(at));
    });
    const end = () => {
      start = null;
      this.dragged = null;
    };
    this.plot.addEventListener("pointerup", () => {
      const chosen = this.dragged?.toSorted((a, b) => a - b);
      end();
      this.showCursor();
      if (chosen) this.onZoom(/** @type {Range} */ (chosen));
    });
    this.plot.addEventListener("pointercancel", end);
    this.plot.addEventListener("pointerleave", (/** @type {PointerEvent} */ event) => {
      if (event.pointerType !== "touch") this.moveCursor(null); // after a touch the values stay
    });
    this.plot.addEventListener("blur", () => this.moveCursor(null));
    this.plot.addEventListener("dblclick", () => this.onZoom(null));
    this.plot.addEventListener("keydown", (/** @type {KeyboardEvent} */ event) => {
      if (!event.ctrlKey && !event.metaKey && !event.altKey && this.handleKey(event.key, event.shiftKey))
        event.preventDefault();
    });
  }

  /**
   * Return whether the key does something: arrows move the cursor, plus and minus zoom, Escape shows all steps.
   *
   * @param {string} key
   * @param {boolean} isShift
   */
  handleKey(key, isShift) {
    const [low, high] = this.domain;
    const stops = this.stops();
    const at = this.cursor === null ? -1 : nearest({ x: stops, y: stops }, this.cursor);
    const move = {
      ArrowLeft: at < 0 ? stops.length - 1 : at - (isShift ? 10 : 1),
      ArrowRight: at + (isShift ? 10 : 1),
      Home: 0,
      End: Infinity,
    }[key];
    if (move !== undefined) {
      this.moveCursor(stops[Math.min(Math.max(move, 0), stops.length - 1)] ?? null);
    } else if (key === "+" || key === "=" || key === "-") {
      const width = (high - low) * (key === "-" ? 2 : 0.5);
      const middle = this.cursor ?? (low + high) / 2;
      this.onZoom([middle - width / 2, middle + width / 2]);
    } else if (key === "Escape") {
      this.onZoom(null);
    } else {
      return false;
    }
    return true;
  }

  /** Return the steps in view that have values. */
  stops() {
    const [low, high] = this.domain;
    const steps = new Set(this.drawn.flatMap(({ points }) => points.x));
    return [...steps].filter((step) => step >= low && step <= high).sort((a, b) => a - b);
  }

  /** @param {number} step */
  snapped(step) {
    const stops = this.stops();
    return stops.length > 0 ? stops[nearest({ x: stops, y: stops }, step)] : step;
  }

  fillTable() {
    if (this.table.open)
      this.table.replaceChildren(
        this.table.firstElementChild,
        tableOf(this.description.title, this.stops(), this.drawn),
      );
  }
}

/** @param {number[]} values */
function spansOrders(values) {
  const [low, high] = [Math.min(...values), Math.max(...values)];
  return low > 0 && high / low > LOG_RATIO;
}
