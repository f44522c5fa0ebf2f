/** The report of a run and its config, which is compared with those of other runs. */

import { fetchJson, request } from "./api.js";
import { element } from "./dom.js";
import { pathOf } from "./runs-data.js";

/** @typedef {import("./runs-data.js").Run} Run */

export class Report {
  constructor() {
    this.names = "";
    this.root = element("div", { className: "stack" });
  }

  /**
   * Show the reports of runs as they were when they were chosen; a button fetches them again.
   *
   * @param {Run[]} runs
   */
  show(runs) {
    const names = runs.map(({ name }) => name).join("\n");
    if (names === this.names) return;
    this.names = names;
    this.root.replaceChildren(...runs.map((run) => this.reportOf(run.name, runs.length > 1)));
  }

  /**
   * @param {string} run
   * @param {boolean} isNamed
   */
  reportOf(run, isNamed) {
    const refresh = element("button", {}, "Refresh");
    const download = element("button", {}, "Download as HTML");
    const content = element("div", { className: "report" });
    const fill = async () => {
      content.replaceChildren(element("p", { className: "muted" }, "The report is being made."));
      content.replaceChildren(...(await sectionsOf(run)));
    };
    const run_ = (/** @type {() => Promise<void>} */ action) => () =>
      action().catch((error) => content.replaceChildren(element("p", { className: "error" }, error.message)));
    refresh.addEventListener("click", run_(fill));
    download.addEventListener(
      "click",
      run_(() => save(run)),
    );
    run_(fill)();
    const head = element(
      "div",
      { className: "row apart" },
      element("h3", { className: "stage-title" }, isNamed ? run : ""),
      element("div", { className: "row" }, refresh, download),
    );
    return element("section", { "aria-label": run }, head, content);
  }
}

/** @param {string} run */
async function sectionsOf(run) {
  const { sections } = await fetchJson(pathOf(run, "report"));
  return sections.map((/** @type {{title: string, html: string}} */ { title, html }) => {
    const template = document.createElement("template");
    template.innerHTML = html; // the server has escaped all values in it
    for (const each of template.content.querySelectorAll(".scroll")) {
      for (const [name, value] of [
        ["tabindex", "0"],
        ["role", "region"],
        ["aria-label", title],
      ])
        each.setAttribute(name, value);
    }
    return element("section", { className: "panel" }, element("h4", {}, title), template.content);
  });
}

/** @param {string} run */
async function save(run) {
  const url = URL.createObjectURL(await (await request(pathOf(run, "report.html"))).blob());
  element("a", { href: url, download: `${run.replaceAll("/", "_")}.html` }).click();
  URL.revokeObjectURL(url);
}

export class Config {
  constructor() {
    /** @type {Run[]} */
    this.runs = [];
    this.filter = element("input", { type: "search", placeholder: "learning_rate" });
    this.different = element("input", { type: "checkbox", checked: true });
    this.onlyDifferent = element("label", { className: "row" }, this.different, "Only fields that differ");
    this.table = element("div", { className: "panel scroll", tabIndex: 0, role: "region", "aria-label": "Config" });
    const search = element("label", { className: "field" }, element("span", {}, "Field or value"), this.filter);
    this.root = element(
      "div",
      { className: "stack" },
      element("div", { className: "panel controls" }, search, this.onlyDifferent),
      this.table,
    );
    for (const control of [this.filter, this.different]) control.addEventListener("input", () => this.draw());
  }

  /** @param {Run[]} runs */
  show(runs) {
    this.runs = runs;
    this.draw();
  }

  draw() {
    const isComparison = this.runs.length > 1;
    this.onlyDifferent.hidden = !isComparison;
    const configs = this.runs.map(({ description }) => description.config);
    const wanted = this.filter.value.trim().toLowerCase();
    const rows = [...new Set(configs.flatMap((config) => Object.keys(config)))].flatMap((field) => {
      const values = configs.map((config) => config[field] ?? "");
      const isDifferent = new Set(values).size > 1;
      const isFound = [field, ...values].some((text) => text.toLowerCase().includes(wanted));
      if (!isFound || (isComparison && this.different.checked && !isDifferent)) return [];
      const cells = values.map((value) => element("td", {}, element("code", {}, value)));
      return element(
        "tr",
        { className: isDifferent ? "different" : "" },
        element("th", { scope: "row" }, field),
        ...cells,
      );
    });
    const heads = ["field", ...this.runs.map(({ name }) => name)].map((text) => element("th", { scope: "col" }, text));
    const table = element(
      "table",
      {},
      element("thead", {}, element("tr", {}, ...heads)),
      element("tbody", {}, ...rows),
    );
    this.table.replaceChildren(rows.length > 0 ? table : element("p", { className: "muted" }, "No field fits."));
  }
}
