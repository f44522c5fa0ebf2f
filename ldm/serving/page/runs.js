/** The page of training runs: which are chosen, in which view, kept up to date while they train. */

import { fetchJson } from "./api.js";
import { announce, element, find } from "./dom.js";
import { Curves } from "./runs-curves.js";
import { Run } from "./runs-data.js";
import { Images } from "./runs-images.js";
import { showList } from "./runs-list.js";
import { Config, Report } from "./runs-report.js";

/** @typedef {import("./runs-data.js").RunSummary} RunSummary */

const LIVE = 2000; // milliseconds between two looks while a run trains
const IDLE = 10_000;

/** @type {Record<string, {title: string, view: {root: HTMLElement, show: (runs: Run[]) => void}}>} */
const VIEWS = {
  curves: { title: "Curves", view: new Curves() },
  images: { title: "Images", view: new Images() },
  report: { title: "Report", view: new Report() },
  config: { title: "Config", view: new Config() },
};

/** @type {Map<string, Run>} */
const runs = new Map();
/** @type {RunSummary[]} */
let summaries = [];
/** @type {string[]} */
let chosen = [];
let view = "curves";
let shown = ""; // what the view shows: its name, the runs, and their states

/** Read which runs are chosen, and the view, from the address. */
function readAddress() {
  const address = new URLSearchParams(location.hash.slice(1));
  chosen = address.getAll("run");
  view = Object.hasOwn(VIEWS, address.get("view") ?? "") ? /** @type {string} */ (address.get("view")) : "curves";
}

/**
 * @param {string[]} names
 * @param {string} shown
 */
function goTo(names, shown) {
  const address = new URLSearchParams([...names.map((name) => ["run", name]), ["view", shown]]);
  history.replaceState(null, "", `#${address}`);
  readAddress();
  showAll().catch(report);
}

/** Return the runs that are chosen; without a choice, the last changed one. */
function current() {
  const known = summaries.filter(({ error }) => error === null).map(({ name }) => name);
  const names = chosen.filter((name) => known.includes(name));
  return names.length > 0 ? names : known.slice(0, 1);
}

/** Show list, tabs and view, where they have changed; fetch what is missing of the chosen runs. */
async function showAll() {
  const names = current();
  const list = find("#runs");
  if (!list.matches(":active")) showList(summaries, names, (each) => goTo(each, view)); // a click would be lost
  if (find("#panel").getAttribute("aria-labelledby") !== `tab-${view}`) showTabs();
  find("#title").textContent = names.join(" · ") || "No run";
  const chosenView = VIEWS[view].view;
  if (!chosenView.root.isConnected) find("#panel").replaceChildren(chosenView.root);
  const all = names.map((name) => runs.get(name) ?? new Run(name));
  for (const run of all) runs.set(run.name, run);
  await Promise.all(
    all.map((run) => run.update(/** @type {RunSummary} */ (summaries.find(({ name }) => name === run.name)))),
  );
  const state = JSON.stringify([view, ...all.map(({ name, seen }) => [name, seen])]);
  const isCurrent = chosenView === VIEWS[view].view && names.join("\n") === current().join("\n");
  if (state === shown || !isCurrent) return;
  shown = state;
  chosenView.show(all);
}

function showTabs() {
  const tabs = find("#tabs");
  const hasFocus = tabs.contains(document.activeElement);
  const names = Object.keys(VIEWS);
  const made = names.map((name) =>
    element(
      "button",
      {
        id: `tab-${name}`,
        role: "tab",
        "aria-selected": String(name === view),
        "aria-controls": "panel",
        tabIndex: name === view ? 0 : -1,
        on: { click: () => goTo(current(), name) },
      },
      VIEWS[name].title,
    ),
  );
  tabs.replaceChildren(...made);
  tabs.onkeydown = (/** @type {KeyboardEvent} */ event) => {
    const move = { ArrowRight: 1, ArrowLeft: names.length - 1 }[event.key];
    if (move) goTo(current(), names[(names.indexOf(view) + move) % names.length]);
  };
  find("#panel").setAttribute("aria-labelledby", `tab-${view}`);
  if (hasFocus) made[names.indexOf(view)].focus();
}

/** @param {unknown} error */
function report(error) {
  const isOffline = error instanceof TypeError; // which fetch throws
  announce(isOffline ? "The server does not answer; it is asked again." : /** @type {Error} */ (error).message, true);
}

/** Ask for what has changed, again and again. */
async function watch() {
  let wait = IDLE;
  try {
    if (!document.hidden) {
      summaries = (await fetchJson("/v1/runs")).runs;
      await showAll();
      const training = summaries.filter(({ status }) => status === "training").length;
      const text = training === 0 ? "" : `${training} ${training === 1 ? "run is" : "runs are"} training`;
      if (find("#status").textContent !== text) announce(text);
      if (training > 0) wait = LIVE;
    }
  } catch (error) {
    report(error);
  }
  setTimeout(watch, wait);
}

const wide = matchMedia("(min-width: 900px)");
const fold = () => {
  find("#runs details").open = wide.matches;
};
wide.addEventListener("change", fold);
fold();
addEventListener("hashchange", () => {
  readAddress();
  showAll().catch(report);
});
readAddress();
watch();
find(".top a").hidden = (await fetchJson("/v1/models")).data.length === 0;
