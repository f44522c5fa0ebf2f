/** The curves of the chosen runs, stage by stage. */

import { Chart } from "./chart.js";
import { element } from "./dom.js";
import { smoothed } from "./series.js";

/** @typedef {import("./runs-data.js").Run} Run */
/** @typedef {import("./runs-data.js").ChartDescription} ChartDescription */
/** @typedef {import("./drawing.js").Line} Line */
/** @typedef {import("./scales.js").Range} Range */
/** @typedef {{root: HTMLElement, legend: HTMLElement, reset: HTMLElement, charts: Map<string, Chart>, zoom: Range | null}} StageView */

const KEYS = "Arrow keys move along the values, plus and minus zoom, Escape shows all steps.";

export class Curves {
  constructor() {
    /** @type {Run[]} */
    this.runs = [];
    /** @type {Map<string, StageView>} by the name of the stage */
    this.stages = new Map();
    this.smoothing = element("input", { type: "range", min: 0, max: 0.99, step: 0.01, value: 0.6 });
    const weight = element("span", {}, "0.60");
    this.axis = element(
      "select",
      {},
      ...[
        ["auto", "automatic"],
        ["log", "logarithmic"],
        ["linear", "linear"],
      ].map(([value, text]) => element("option", { value }, text)),
    );
    this.filter = element("input", { type: "search", placeholder: "loss, psnr, ..." });
    const field = (/** @type {string} */ text, /** @type {Node[]} */ ...nodes) =>
      element("label", { className: "field" }, element("span", {}, text, ...nodes.slice(1)), nodes[0]);
    this.sections = element("div", { className: "stack" });
    this.root = element(
      "div",
      { className: "stack" },
      element(
        "div",
        { className: "panel controls" },
        field("Smoothing ", this.smoothing, weight),
        field("Values", this.axis),
        field("Charts", this.filter),
      ),
      element(
        "p",
        { id: "keys", className: "muted hint" },
        `Drag over steps to zoom; a double click shows all. ${KEYS}`,
      ),
      this.sections,
    );
    this.smoothing.addEventListener("input", () => {
      weight.textContent = Number(this.smoothing.value).toFixed(2);
      this.draw();
    });
    for (const control of [this.axis, this.filter]) control.addEventListener("input", () => this.draw());
  }

  /** @param {Run[]} runs */
  show(runs) {
    this.runs = runs;
    this.draw();
  }

  draw() {
    const names = new Map(
      this.runs.flatMap(({ description }) => description.stages.map(({ name, title }) => [name, title])),
    );
    for (const [name, view] of this.stages) {
      if (!names.has(name)) {
        view.root.remove();
        this.stages.delete(name);
      }
    }
    for (const [name, title] of names) {
      const view = this.stages.get(name) ?? this.addStage(name, title);
      this.drawStage(name, view);
    }
  }

  /**
   * @param {string} name
   * @param {string} title
   */
  addStage(name, title) {
    const legend = element("p", { className: "muted hint" }, "Dotted lines: the training was resumed.");
    const reset = element("button", {}, "Show all steps");
    const root = element(
      "section",
      { "aria-label": title },
      element("div", { className: "row apart" }, element("h3", { className: "stage-title" }, title), legend, reset),
      element("div", { className: "charts" }),
    );
    /** @type {StageView} */
    const view = { root, legend, reset, charts: new Map(), zoom: null };
    reset.addEventListener("click", () => this.zoom(name, view, null));
    this.stages.set(name, view);
    this.sections.append(root);
    return view;
  }

  /**
   * @param {string} name
   * @param {StageView} view
   * @param {Range | null} range
   */
  zoom(name, view, range) {
    const all = this.domain(name);
    const cut = range && /** @type {Range} */ ([Math.max(range[0], all[0]), Math.min(range[1], all[1])]);
    const isWhole = cut === null || (cut[0] === all[0] && cut[1] === all[1]);
    if (cut !== null && cut[1] - cut[0] < 2) return;
    view.zoom = isWhole ? null : cut;
    this.drawStage(name, view);
  }

  /**
   * Return the first and the last step of a stage, in all runs.
   *
   * @param {string} stage
   * @returns {Range}
   */
  domain(stage) {
    const ends = this.runs.flatMap(({ metrics }) =>
      [...(metrics.get(stage)?.curves.values() ?? [])].map(({ x }) => x.at(-1) ?? 0),
    );
    return [0, Math.max(1, ...ends)];
  }

  /**
   * @param {string} name
   * @param {StageView} view
   */
  drawStage(name, view) {
    const described = new Map(
      this.runs.flatMap(({ metrics }) => (metrics.get(name)?.charts ?? []).map((chart) => [chart.title, chart])),
    );
    const grid = /** @type {HTMLElement} */ (view.root.lastElementChild);
    view.reset.hidden = view.zoom === null;
    const wanted = this.filter.value.trim().toLowerCase();
    const log = { auto: null, log: true, linear: false }[/** @type {string} */ (this.axis.value)] ?? null;
    const stages = this.runs.flatMap(({ description }) => description.stages.filter((stage) => stage.name === name));
    const resumed = stages.flatMap((stage) => stage.resumed);
    view.legend.hidden = resumed.length === 0;
    for (const [title, description] of described) {
      const lines = this.runs.flatMap((run, i) => this.linesOf(run, i, name, description.title));
      let chart = view.charts.get(title);
      if (lines.length > 0 && !chart) {
        chart = new Chart(description, (range) => this.zoom(name, view, range));
        view.charts.set(title, chart);
        grid.append(chart.root);
      }
      if (!chart) continue;
      const names = description.curves.map(({ metric }) => metric);
      chart.root.hidden = lines.length === 0 || ![title, ...names].some((each) => each.toLowerCase().includes(wanted));
      if (!chart.root.hidden) chart.update(lines, view.zoom ?? this.domain(name), log, resumed);
    }
    for (const [title, chart] of view.charts) {
      if (!described.has(title)) {
        chart.root.remove();
        view.charts.delete(title);
      }
    }
  }

  /**
   * Return the lines of a run in a chart. Colours distinguish runs if there are several, else metrics.
   *
   * @param {Run} run
   * @param {number} place of the run
   * @param {string} stage
   * @param {string} title of the chart
   * @returns {Line[]}
   */
  linesOf(run, place, stage, title) {
    const metrics = run.metrics.get(stage);
    const curves = metrics?.charts.find((chart) => chart.title === title)?.curves ?? [];
    const isOne = this.runs.length === 1;
    const weight = Number(this.smoothing.value);
    return curves.flatMap(({ metric, label, smooth, marks }, i) => {
      const points = metrics?.curves.get(metric);
      if (!points || points.x.length === 0) return [];
      const isSmooth = smooth && weight > 0 && points.x.length > 2;
      return {
        label: isOne ? label : curves.length > 1 ? `${run.name}, ${label}` : run.name,
        color: (isOne ? i : place) % 6,
        dash: isOne ? 0 : i % 4,
        marks,
        points: isSmooth ? smoothed(points, weight) : points,
        raw: isSmooth ? points : null,
      };
    });
  }
}
