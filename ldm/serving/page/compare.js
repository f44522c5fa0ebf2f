/** Two settings side by side, with the same seed: A, which was kept, and B, those of the form. */

import { element } from "./dom.js";
import { JobView } from "./job.js";
import { labelOf, textOf } from "./labels.js";

/** Fields that hold images. */
const IMAGES = ["image", "mask", "controlnets"];

export class Comparison {
  /**
   * @param {HTMLElement} root
   * @param {(image: any) => void} open called with an image that was clicked
   */
  constructor(root, open) {
    this.root = root;
    /** @type {any} */
    this.kept = null;
    this.hint = element("p", { className: "muted" });
    this.columns = ["A", "B"].map((name) => {
      const images = element("div", { className: "results" });
      const settings = element("dl", { className: "settings" });
      const column = element(
        "section",
        { className: "stack", "aria-label": name },
        element("h3", {}, name),
        images,
        settings,
      );
      return { column, settings, view: new JobView(images, open) };
    });
    root.append(
      element(
        "div",
        { className: "row apart" },
        element("h2", {}, "Compare"),
        element("button", { type: "button", on: { click: () => this.close() } }, "End the comparison"),
      ),
      this.hint,
      element("div", { className: "side-by-side" }, ...this.columns.map(({ column }) => column)),
    );
  }

  get isOpen() {
    return this.kept !== null;
  }

  /**
   * Keep the settings A.
   *
   * @param {any} fields
   */
  keep(fields) {
    this.kept = fields;
    this.root.hidden = false;
    this.hint.textContent = "These settings are kept as A. Change some of them for B, then generate both.";
    for (const { settings, view } of this.columns) {
      settings.replaceChildren();
      view.root.replaceChildren();
    }
  }

  /**
   * Generate both.
   *
   * @param {any} fields the settings B, whose seed both get
   * @returns {Promise<any[]>} the last states of both jobs
   */
  async run(fields) {
    const both = [{ ...this.kept, seed: fields.seed }, fields];
    const names = new Set(both.flatMap((each) => Object.keys(each)));
    const changed = [...names].filter((name) => JSON.stringify(both[0][name]) !== JSON.stringify(both[1][name]));
    this.hint.textContent = changed.length ? `Both have the seed ${fields.seed}.` : "A and B are the same settings.";
    return Promise.all(
      this.columns.map(({ settings, view }, index) => {
        settings.replaceChildren(...changed.flatMap((name) => described(name, both[index][name])));
        return view.run(both[index]);
      }),
    );
  }

  async cancel() {
    await Promise.all(this.columns.map(({ view }) => view.cancel()));
  }

  close() {
    this.kept = null;
    this.root.hidden = true;
  }
}

/**
 * @param {string} name
 * @param {any} value
 */
function described(name, value) {
  const shown = IMAGES.includes(name) && value !== undefined ? "another" : textOf(value);
  return [element("dt", {}, labelOf(name)), element("dd", {}, shown)];
}
