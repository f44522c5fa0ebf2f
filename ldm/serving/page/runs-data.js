/** What the server tells of training runs. Of metrics only the rows are fetched that were appended since the last time. */

import { fetchJson } from "./api.js";

/** @typedef {import("./series.js").Points} Points */
/**
 * @typedef {object} StageSummary
 * @property {string} name
 * @property {string} title
 * @property {string} status
 * @property {number} step
 * @property {number | null} max_steps
 * @property {string} monitor
 * @property {[number, number] | null} best
 * @property {number | null} samples_per_second
 * @property {number | null} seconds_left
 */
/** @typedef {{name: string, title: string, status: string, updated: number, error: string | null, stages: StageSummary[]}} RunSummary */
/** @typedef {{title: string, files: [number, string][]}} Previews */
/** @typedef {{name: string, title: string, images: Previews[], animations: string[], resumed: number[]}} Stage */
/** @typedef {{name: string, config: Record<string, string>, stages: Stage[]}} Description */
/** @typedef {{metric: string, label: string, smooth: boolean, marks: boolean}} Curve */
/** @typedef {import("./chart.js").Description & {curves: Curve[]}} ChartDescription */

/**
 * Return the path of a run in the API.
 *
 * @param {string} run
 * @param {...string} rest
 */
export function pathOf(run, ...rest) {
  return ["/v1/runs", ...[run, ...rest].map(encodeURIComponent)].join("/");
}

/** The metrics of a stage, which grow while it is trained. */
class Metrics {
  /** @param {string} path */
  constructor(path) {
    this.path = path;
    this.cursor = "";
    /** @type {ChartDescription[]} */
    this.charts = [];
    /** @type {Map<string, Points>} */
    this.curves = new Map();
  }

  async update() {
    for (;;) {
      const found = await fetchJson(`${this.path}?after=${encodeURIComponent(this.cursor)}`);
      if (found.restarted) {
        this.charts = found.charts;
        this.curves = new Map(found.columns.map((/** @type {string} */ name) => [name, { x: [], y: [] }]));
      }
      const columns = found.columns.map((/** @type {string} */ name) => this.curves.get(name));
      for (const [step, values] of found.rows) {
        for (const [i, value] of values.entries()) {
          if (value === null) continue;
          columns[i].x.push(step);
          columns[i].y.push(value);
        }
      }
      this.cursor = found.cursor;
      if (!found.more) return;
    }
  }
}

/** A run that is shown. */
export class Run {
  /** @param {string} name */
  constructor(name) {
    this.name = name;
    /** @type {string} of the summary at the last update */
    this.seen = "";
    /** @type {Description} */
    this.description = { name, config: {}, stages: [] };
    /** @type {Map<string, Metrics>} by the name of the stage */
    this.metrics = new Map();
    this.updated = Promise.resolve();
  }

  /**
   * Fetch what is new, after the updates that are under way.
   *
   * @param {RunSummary} summary
   */
  update(summary) {
    this.updated = this.updated.catch(() => {}).then(() => this.fetchNew(summary));
    return this.updated;
  }

  /** @param {RunSummary} summary */
  async fetchNew(summary) {
    const seen = JSON.stringify(summary);
    if (seen === this.seen) return;
    if (summary.error === null) {
      this.description = await fetchJson(pathOf(this.name));
      for (const { name } of this.description.stages) {
        const metrics = this.metrics.get(name) ?? new Metrics(pathOf(this.name, "stages", name, "metrics"));
        this.metrics.set(name, metrics);
        await metrics.update();
      }
    }
    this.seen = seen;
  }
}
