/** The list of runs, in which some are chosen. */

import { element, find } from "./dom.js";
import { format } from "./scales.js";

/** @typedef {import("./runs-data.js").RunSummary} RunSummary */
/** @typedef {import("./runs-data.js").StageSummary} StageSummary */

const FILTERED = 8; // number of runs from which there is a filter

/**
 * Show the list.
 *
 * @param {RunSummary[]} runs
 * @param {string[]} chosen
 * @param {(chosen: string[]) => void} choose
 */
export function showList(runs, chosen, choose) {
  const list = find("#runs .list");
  const filter = find("#filter");
  const focused = document.activeElement?.getAttribute("data-focus");
  filter.hidden = runs.length < FILTERED;
  filter.oninput = () => showList(runs, chosen, choose);
  const shown = runs.filter(
    ({ name }) => filter.hidden || name.toLowerCase().includes(filter.value.trim().toLowerCase()),
  );
  list.replaceChildren(...shown.map((run) => item(run, chosen, choose)));
  if (runs.length === 0) list.append(element("li", { className: "muted" }, "There are no runs in this folder yet."));
  if (focused) list.querySelector(`[data-focus="${CSS.escape(focused)}"]`)?.focus();
}

/**
 * @param {RunSummary} run
 * @param {string[]} chosen
 * @param {(chosen: string[]) => void} choose
 */
function item(run, chosen, choose) {
  const place = chosen.indexOf(run.name);
  const box = element("input", {
    type: "checkbox",
    checked: place >= 0,
    disabled: run.error !== null,
    "aria-label": `Compare ${run.name}`,
    dataset: { focus: `box ${run.name}` },
    on: { change: () => choose(place < 0 ? [...chosen, run.name] : chosen.filter((name) => name !== run.name)) },
  });
  const name = element(
    "button",
    {
      className: "name",
      disabled: run.error !== null,
      "aria-current": place >= 0 ? "true" : "false",
      dataset: { focus: run.name },
      on: { click: () => choose([run.name]) },
    },
    run.name,
  );
  const head = element(
    "div",
    { className: "head" },
    box,
    name,
    element("span", { className: `state ${run.status}` }, run.status),
  );
  const made = element(
    "li",
    { className: `run ${place >= 0 ? `chosen c${place % 6}` : ""}` },
    head,
    ...run.stages.map(stageLine),
  );
  if (run.error !== null) made.append(element("p", { className: "muted" }, run.error));
  made.append(element("p", { className: "muted" }, `changed ${ago(run.updated)}`));
  return made;
}

/** @param {StageSummary} stage */
function stageLine(stage) {
  const { title, step, max_steps, monitor, best, samples_per_second: speed, seconds_left: left } = stage;
  const steps = `${step.toLocaleString("en")}${max_steps ? ` / ${max_steps.toLocaleString("en")}` : ""}`;
  const facts = [
    best && `${monitor} ${format(best[1], 3)}`,
    stage.status === "training" && speed && `${format(speed, 3)} samples/s`,
    left !== null && `${duration(left)} left`,
  ].filter(Boolean);
  const line = element(
    "div",
    { className: "stage" },
    element("span", {}, title),
    element("span", { className: "muted" }, steps),
  );
  const bar = element("progress", {
    max: max_steps ?? 1,
    value: Math.min(step, max_steps ?? 0),
    "aria-label": `${title}: ${steps} steps`,
  });
  return element("div", {}, line, max_steps ? bar : "", element("p", { className: "muted" }, facts.join(" · ")));
}

/** @param {number} seconds */
export function duration(seconds) {
  if (seconds < 90) return `${Math.round(seconds)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  if (seconds < 172800) return `${format(seconds / 3600, 2)} h`;
  return `${Math.round(seconds / 86400)} days`;
}

/** @param {number} time in seconds since 1970 */
function ago(time) {
  const seconds = Date.now() / 1000 - time;
  return seconds < 10 ? "just now" : `${duration(seconds)} ago`;
}
