/** The ControlNets that act on a job: each with its image, its scale, and the share of the steps. */

import { choice, slider } from "./controls.js";
import { announce, element, find } from "./dom.js";
import { drawn, encoded, fileOf } from "./source.js";

/** Side in pixels of the small images in the panel. */
const THUMBNAIL = 96;

/** @typedef {{width?: number, height?: number}} Size */

export class ControlNets {
  /**
   * @param {HTMLDetailsElement} root
   * @param {() => string[]} names returns those that can act in the chosen model
   */
  constructor(root, names) {
    this.root = root;
    this.names = names;
    /** @type {Unit[]} */
    this.units = [];
    this.choice = choice("controlnet", []);
    this.file = element("input", {
      type: "file",
      accept: "image/png,image/jpeg,image/webp",
      className: "visually-hidden",
    });
    this.file.addEventListener("change", () => {
      this.#openFile(this.file.files[0]);
      this.file.value = "";
    });
    const drop = element(
      "label",
      { className: "drop" },
      this.file,
      element("span", {}, "Drop an image for it here, or "),
      element("span", { className: "link" }, "choose a file"),
    );
    drop.addEventListener("dragover", (/** @type {DragEvent} */ event) => event.preventDefault());
    drop.addEventListener("drop", (/** @type {DragEvent} */ event) => {
      event.preventDefault();
      event.stopPropagation();
      this.#openFile(event.dataTransfer?.files[0]);
    });
    this.list = element("div", { className: "stack" });
    root.append(element("div", { className: "stack" }, this.choice.root, drop, this.list));
    this.refresh();
  }

  /** Offer the ControlNets of the model that is chosen now, and remove the others. */
  refresh() {
    const names = this.names();
    const before = this.choice.read();
    this.root.hidden = names.length === 0;
    find("select", this.choice.root).replaceChildren(...names.map((value) => element("option", { value }, value)));
    if (names.includes(before)) this.choice.write(before);
    this.#show(this.units.filter(({ name }) => names.includes(name)));
  }

  /** @param {Unit[]} units */
  #show(units) {
    this.units = units;
    this.list.replaceChildren(...units.map(({ root }) => root));
  }

  /** @param {File | undefined} file */
  async #openFile(file) {
    if (!file) return;
    try {
      this.#add(new Unit(this.choice.read(), await createImageBitmap(file), null, (unit) => this.#remove(unit)));
    } catch {
      announce(`${file.name} cannot be read; choose a PNG, JPEG or WebP.`, true);
    }
  }

  /** @param {Unit} unit replaces that of the same ControlNet */
  #add(unit) {
    this.#show([...this.units.filter(({ name }) => name !== unit.name), unit]);
  }

  /** @param {Unit} removed */
  #remove(removed) {
    this.#show(this.units.filter((unit) => unit !== removed));
    this.file.focus();
  }

  /**
   * Return the fields of the job that are about ControlNets, none without an image.
   *
   * @param {Size} size of the generated image, to whose proportions the images are cut; empty if it is not known
   */
  read(size) {
    return this.units.length === 0 ? {} : { controlnets: this.units.map((unit) => unit.read(size)) };
  }

  /**
   * Show the ControlNets of a job.
   *
   * @param {any[]} [fields]
   */
  async write(fields = []) {
    this.#show([]);
    this.refresh();
    for (const { name, image, ...values } of fields) {
      const unit = new Unit(name, await createImageBitmap(await fileOf(image)), image, (each) => this.#remove(each));
      unit.write(values);
      this.#add(unit);
    }
    if (this.units.length > 0) this.root.open = true;
  }
}

/** A ControlNet with its image. */
class Unit {
  /**
   * @param {string} name
   * @param {ImageBitmap} bitmap
   * @param {string | null} file name of the image in the gallery
   * @param {(unit: Unit) => void} remove
   */
  constructor(name, bitmap, file, remove) {
    this.name = name;
    this.bitmap = bitmap;
    this.file = file;
    this.scale = slider("scale", { label: `Scale of ${name}`, min: 0, max: 2, step: 0.05, value: 1, limit: 10 });
    const share = { min: 0, max: 1, step: 0.05 };
    this.start = slider("start", { label: `Start of ${name}, share of the steps`, ...share, value: 0 });
    this.end = slider("end", { label: `End of ${name}, share of the steps`, ...share, value: 1 });
    const scale = Math.min(1, THUMBNAIL / Math.max(bitmap.width, bitmap.height));
    const small = drawn(bitmap, Math.ceil(scale * bitmap.width), Math.ceil(scale * bitmap.height));
    small.setAttribute("role", "img");
    small.setAttribute("aria-label", `Image of ${name}`);
    this.root = element(
      "section",
      { className: "stack", "aria-label": `ControlNet ${name}` },
      element(
        "div",
        { className: "row apart" },
        element("h3", {}, name),
        element(
          "button",
          { type: "button", "aria-label": `Remove ${name}`, on: { click: () => remove(this) } },
          "Remove",
        ),
      ),
      small,
      this.scale.root,
      this.start.root,
      this.end.root,
    );
  }

  /** @param {Size} size */
  read({ width, height }) {
    const numbers = { scale: this.scale.read() ?? 1, start: this.start.read() ?? 0, end: this.end.read() ?? 1 };
    const { bitmap } = this;
    const fits = !width || !height || width * bitmap.height === height * bitmap.width;
    const isKept = fits && this.file !== null;
    const image = isKept ? this.file : encoded(drawn(bitmap, width || bitmap.width, height || bitmap.height));
    return { name: this.name, image, ...numbers };
  }

  /** @param {{scale?: number, start?: number, end?: number}} values */
  write({ scale = 1, start = 0, end = 1 }) {
    this.scale.write(scale);
    this.start.write(start);
    this.end.write(end);
  }
}
