/** Images that were made during the trainings of the chosen runs, over the steps. */

import { request } from "./api.js";
import { element } from "./dom.js";
import { pathOf } from "./runs-data.js";
import { before } from "./series.js";

/** @typedef {import("./runs-data.js").Run} Run */
/** @typedef {import("./runs-data.js").Previews} Previews */

const KEPT = 100; // images that are kept in memory
const FRAME = 350; // milliseconds of an image while all are played

/** @type {Map<string, Promise<string>>} addresses of images by their paths, the last used at the end */
const loaded = new Map();

/**
 * Return the address of an image that is fetched with the API key.
 *
 * @param {string} path
 * @returns {Promise<string>}
 */
function load(path) {
  const known = loaded.get(path) ?? request(path).then(async (response) => URL.createObjectURL(await response.blob()));
  loaded.delete(path);
  loaded.set(path, known);
  known.catch(() => loaded.delete(path));
  for (const [oldest, url] of [...loaded].slice(0, -KEPT)) {
    loaded.delete(oldest);
    url.then(URL.revokeObjectURL);
  }
  return known;
}

export class Images {
  constructor() {
    /** @type {Map<string, Strip>} by stage and title */
    this.strips = new Map();
    this.empty = element("p", { className: "muted" }, "There are no images yet.");
    this.root = element("div", { className: "stack" }, this.empty);
  }

  /** @param {Run[]} runs */
  show(runs) {
    /** @type {Map<string, {title: string, sources: {run: Run, stage: string, files: [number, string][]}[]}>} */
    const groups = new Map();
    for (const run of runs) {
      for (const stage of run.description.stages) {
        const animations = stage.animations.map((name) => ({
          title: `Animation: ${name}`,
          files: /** @type {[number, string][]} */ ([[0, name]]),
        }));
        for (const { title, files } of [...stage.images, ...animations]) {
          const key = `${stage.title}: ${title}`;
          const group = groups.get(key) ?? { title: key, sources: [] };
          group.sources.push({ run, stage: stage.name, files });
          groups.set(key, group);
        }
      }
    }
    for (const [key, strip] of this.strips) {
      if (!groups.has(key)) {
        strip.root.remove();
        this.strips.delete(key);
      }
    }
    for (const [key, { title, sources }] of groups) {
      let strip = this.strips.get(key);
      if (!strip) {
        strip = new Strip(title);
        this.strips.set(key, strip);
        this.root.append(strip.root);
      }
      strip.show(sources, runs.length > 1);
    }
    this.empty.hidden = groups.size > 0;
  }
}

/** Images of one name, of which a slider chooses the step. */
class Strip {
  /** @param {string} title */
  constructor(title) {
    /** @type {{run: Run, stage: string, files: [number, string][]}[]} */
    this.sources = [];
    /** @type {number[]} */
    this.steps = [];
    this.title = title;
    this.slider = element("input", { type: "range", min: 0, "aria-label": `Step of ${title}` });
    this.output = element("output", {});
    this.play = element("button", { "aria-pressed": "false" }, "Play");
    this.controls = element("div", { className: "player" }, this.play, this.slider, this.output);
    this.figures = element("div", { className: "figures" });
    this.root = element("section", { className: "panel strip" }, element("h3", {}, title), this.controls, this.figures);
    this.slider.addEventListener("input", () => this.draw());
    this.play.addEventListener("click", () => this.toggle());
    /** @type {number | undefined} */
    this.timer = undefined;
  }

  /**
   * Show these images; if the newest was shown, the newest is shown again.
   *
   * @param {{run: Run, stage: string, files: [number, string][]}[]} sources
   * @param {boolean} isComparison
   */
  show(sources, isComparison) {
    const wasLast = this.steps.length === 0 || Number(this.slider.value) === this.steps.length - 1;
    const step = this.steps[Number(this.slider.value)];
    this.sources = sources;
    this.steps = [...new Set(sources.flatMap(({ files }) => files.map(([each]) => each)))].sort((a, b) => a - b);
    this.slider.max = this.steps.length - 1;
    this.slider.value = wasLast ? this.steps.length - 1 : before(this.steps, step);
    this.controls.hidden = this.steps.length < 2;
    while (this.figures.children.length > sources.length) this.figures.lastElementChild.remove();
    while (this.figures.children.length < sources.length)
      this.figures.append(element("figure", {}, element("img", {}), element("figcaption", {})));
    for (const [i, { run }] of sources.entries()) {
      const caption = this.figures.children[i].lastElementChild;
      caption.hidden = !isComparison;
      caption.textContent = run.name;
    }
    this.draw();
  }

  async draw() {
    const place = Number(this.slider.value);
    const step = this.steps[place];
    this.output.textContent = `step ${step.toLocaleString("en")}`;
    this.slider.setAttribute("aria-valuetext", this.output.textContent);
    await Promise.all(
      this.sources.map(async ({ run, stage, files }, i) => {
        const [at, name] =
          files[
            before(
              files.map(([each]) => each),
              step,
            )
          ];
        const image = this.figures.children[i].firstElementChild;
        const path = pathOf(run.name, "stages", stage, "images", name);
        image.dataset.path = path;
        const url = await load(path).catch(() => "");
        if (image.dataset.path !== path) return; // the slider has moved on
        image.src = url;
        image.alt = `${this.title}, ${run.name}, step ${at}`;
      }),
    );
  }

  toggle() {
    const isPlaying = this.timer !== undefined;
    clearInterval(this.timer);
    this.timer = isPlaying ? undefined : setInterval(() => this.next(), FRAME);
    this.play.textContent = isPlaying ? "Play" : "Pause";
    this.play.setAttribute("aria-pressed", String(!isPlaying));
  }

  next() {
    this.slider.value = (Number(this.slider.value) + 1) % this.steps.length;
    this.draw();
    if (!this.root.isConnected) this.toggle();
  }
}
