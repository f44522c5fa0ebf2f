/** The page on which images are generated: its parts, and how they work together. */

import { fetchJson } from "./api.js";
import { Comparison } from "./compare.js";
import { ControlNets } from "./controlnets.js";
import { announce, find } from "./dom.js";
import { SettingsForm } from "./form.js";
import { Gallery } from "./gallery.js";
import { JobView } from "./job.js";
import { readDroppedImages } from "./metadata.js";
import { Source } from "./source.js";
import { Viewer } from "./viewer.js";

/** Where the id of the job that runs is kept, so that the page shows it again after a reload. */
const RUNNING = "ldm-running-job";

if (matchMedia("(max-width: 860px)").matches) find("#settings").open = false;

const options = await fetchJson("/v1/options");
find("#runs-link").hidden = !options.runs;
const form = new SettingsForm(find("#form"), options);
const source = new Source(find("#source"), () => form.modelOptions);
const controlnets = new ControlNets(find("#controlnets"), () => form.modelOptions.controlnets ?? options.controlnets);
const viewer = new Viewer({
  use: (image) => report(async () => use(image)),
  again: (image) => generate({ ...image.request, model: image.model ?? form.model.read() }),
  edit: (image, task) => report(async () => edit(image, task)),
  neighbour: (image, offset) => gallery.neighbour(image, offset),
});
const gallery = new Gallery(find("#gallery"), (image) => viewer.show(image));
const job = new JobView(find("#results"), openResult);
const comparison = new Comparison(find("#comparison"), openResult);

/** Show errors of an action in the status line. */
async function report(/** @type {() => Promise<void>} */ action) {
  try {
    await action();
  } catch (error) {
    announce(/** @type {Error} */ (error).message, true);
  }
}

/** Run something that generates images: with Cancel enabled, and then the gallery refreshed. */
async function busy(/** @type {() => Promise<any[]>} */ run) {
  if (find("#generate").disabled) {
    announce("A job runs already; wait for its end, or cancel it.", true);
    return;
  }
  find("#generate").disabled = true;
  find("#cancel").disabled = false;
  announce("Generating …");
  await report(async () => {
    const states = await run();
    const failed = states.find(({ error }) => error);
    const status = states.some((state) => state.status === "cancelled") ? "Cancelled." : "Done.";
    await gallery.refresh();
    form.update(await fetchJson("/v1/options"));
    controlnets.refresh();
    announce(failed ? failed.error : status, Boolean(failed));
  });
  sessionStorage.removeItem(RUNNING);
  find("#generate").disabled = false;
  find("#cancel").disabled = true;
}

/** Generate the images of a job, which take the place of a comparison. */
function generate(/** @type {any} */ fields) {
  return busy(async () => {
    const state = await fetchJson("/v1/jobs", { method: "POST", json: fields });
    sessionStorage.setItem(RUNNING, state.id);
    comparison.close();
    find("#results").scrollIntoView({ block: "nearest" });
    return [await job.follow(state)];
  });
}

/** Return the fields of the job that the page shows. */
function fields() {
  const read = form.read();
  const edited = source.read();
  const size = source.resultSize() ?? { ...form.modelOptions.defaults, ...defined(read) };
  if ("image" in edited) {
    delete read.width;
    delete read.height;
  }
  return { ...read, ...edited, ...controlnets.read(size) };
}

/**
 * Return the width and height of fields that have them.
 *
 * @param {any} fields
 */
function defined(fields) {
  return Object.fromEntries(["width", "height"].filter((side) => side in fields).map((side) => [side, fields[side]]));
}

function openResult(/** @type {{name: string}} */ { name }) {
  const image = gallery.find(name);
  if (image) viewer.show(image);
}

async function use(/** @type {any} */ image) {
  form.write(image.request, image.model);
  await source.write(image.request);
  await controlnets.write(image.request.controlnets);
  announce("The settings of the image are in the form.");
  find("#form textarea").focus();
}

async function edit(/** @type {any} */ image, /** @type {string} */ task) {
  if (image.file) await source.open(image.file, null, task);
  else await source.openNamed(image.name, task);
  find("#source").scrollIntoView({ block: "nearest" });
}

find("#form").addEventListener("submit", (/** @type {Event} */ event) => {
  event.preventDefault();
  report(async () => {
    const given = fields();
    await (comparison.isOpen ? busy(() => comparison.run(given)) : generate(given));
  });
});
form.model.root.addEventListener("change", () => {
  source.refresh();
  controlnets.refresh();
});
find("#form").addEventListener("keydown", (/** @type {KeyboardEvent} */ event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) find("#generate").click();
});
find("#cancel").addEventListener("click", () => report(() => Promise.all([job.cancel(), comparison.cancel()]).then()));
find("#compare").addEventListener("click", () => report(async () => comparison.keep(fields())));
readDroppedImages(find("#read-file"), (image) => viewer.show(image));

await report(() => gallery.refresh());
announce("");
const running = sessionStorage.getItem(RUNNING);
if (running) busy(async () => [await job.follow(await fetchJson(`/v1/jobs/${running}`))]);
