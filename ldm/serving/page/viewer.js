/** A dialog with one image, its settings, and what can be done with them. */

import { element } from "./dom.js";
import { labelOf, textOf } from "./labels.js";

export class Viewer {
  /**
   * @param {{use: Action, again: Action, edit: (image: any, task: string) => void, neighbour: (image: any, offset: number) => any}} actions
   * @typedef {(image: any) => void} Action
   */
  constructor(actions) {
    this.neighbour = actions.neighbour;
    this.picture = element("img", { className: "picture", alt: "" });
    this.settings = element("dl", { className: "settings" });
    this.note = element("p", { className: "muted" });
    this.download = element("a", { className: "button" }, "Download");
    this.previous = this.#button("Previous", () => this.#step(-1));
    this.next = this.#button("Next", () => this.#step(1));
    this.use = this.#button("Use these settings", () => this.#act(actions.use));
    this.again = this.#button("Make again", () => this.#act(actions.again));
    this.dialog = element(
      "dialog",
      { className: "viewer", "aria-labelledby": "viewer-title" },
      element(
        "div",
        { className: "row apart" },
        element("h2", { id: "viewer-title" }, "Image"),
        element(
          "div",
          { className: "row" },
          this.previous,
          this.next,
          this.#button("Close", () => this.dialog.close()),
        ),
      ),
      element(
        "div",
        { className: "viewer-body" },
        element("div", {}, this.picture),
        element(
          "div",
          { className: "stack" },
          element(
            "div",
            { className: "row" },
            this.use,
            this.again,
            this.#button("Edit", () => this.#act((image) => actions.edit(image, "change"))),
            this.#button("Enlarge", () => this.#act((image) => actions.edit(image, "enlarge"))),
            this.download,
          ),
          this.note,
          this.settings,
        ),
      ),
    );
    this.dialog.addEventListener("keydown", (/** @type {KeyboardEvent} */ event) => {
      if (event.key === "ArrowLeft") this.#step(-1);
      if (event.key === "ArrowRight") this.#step(1);
    });
    document.body.append(this.dialog);
  }

  /**
   * Show an image.
   *
   * @param {{name: string, url: string, width: number, height: number, model: string | null, request: any, complete: boolean}} image
   */
  show(image) {
    this.image = image;
    this.picture.src = image.url;
    this.picture.alt = image.request?.prompt || "Image without a prompt";
    this.download.href = image.url;
    this.download.download = image.name;
    this.use.hidden = image.request === null;
    this.again.hidden = image.request === null || !image.complete;
    this.note.textContent = image.complete ? "" : "It was made from another image, which the server has not kept.";
    this.previous.disabled = !this.neighbour(image, -1);
    this.next.disabled = !this.neighbour(image, 1);
    this.settings.replaceChildren(...described(image));
    if (!this.dialog.open) this.dialog.showModal();
  }

  /** @param {number} offset */
  #step(offset) {
    const image = this.neighbour(this.image, offset);
    if (image) this.show(image);
  }

  /** @param {(image: any) => void} action */
  #act(action) {
    this.dialog.close();
    action(this.image);
  }

  /**
   * @param {string} text
   * @param {() => void} click
   */
  #button(text, click) {
    return element("button", { type: "button", on: { click } }, text);
  }
}

/**
 * Return the terms and values of a description list.
 *
 * @param {any} image
 */
function described({ request, model, width, height }) {
  const values = { ...request, model: model ?? "of another server", size: `${width} × ${height}` };
  for (const name of ["width", "height"]) delete values[name];
  return Object.entries(values)
    .filter(([, value]) => value !== "")
    .flatMap(([name, value]) => [element("dt", {}, labelOf(name)), element("dd", {}, textOf(value))]);
}
