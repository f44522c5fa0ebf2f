/** The image that a job starts from, and what it does with it: change, repaint, extend or enlarge. */

import { request } from "./api.js";
import { slider, tabs, textField } from "./controls.js";
import { announce, element } from "./dom.js";
import { MaskEditor } from "./mask.js";

const TASKS = [
  { value: "change", text: "Change" },
  { value: "repaint", text: "Repaint" },
  { value: "extend", text: "Extend" },
  { value: "enlarge", text: "Enlarge" },
];

const SIDES = ["left", "top", "right", "bottom"];

/** Share of the steps of each task, at first. */
const STRENGTHS = { change: 0.6, repaint: 1, extend: 1, enlarge: 0.3 };

export class Source {
  /**
   * @param {HTMLDetailsElement} root
   * @param {() => any} modelOptions returns what the server tells about the chosen model
   */
  constructor(root, modelOptions) {
    this.root = root;
    this.modelOptions = modelOptions;
    /** @type {ImageBitmap | null} */
    this.bitmap = null;
    /** @type {string | null} name in the gallery */
    this.name = null;
    this.file = element("input", {
      type: "file",
      accept: "image/png,image/jpeg,image/webp",
      className: "visually-hidden",
    });
    this.file.addEventListener("change", () => this.#openFile(this.file.files[0]));
    this.drop = element(
      "label",
      { className: "drop" },
      this.file,
      element("span", {}, "Drop an image here, or "),
      element("span", { className: "link" }, "choose a file"),
    );
    this.size = element("p", { className: "muted" });
    this.editor = new MaskEditor();
    this.task = tabs("task", "What to do with the image", TASKS, (task) => {
      this.strength.write(STRENGTHS[/** @type {keyof typeof STRENGTHS} */ (task)]);
      this.refresh();
    });
    this.strength = slider("strength", { min: 0, max: 1, step: 0.05, value: STRENGTHS.change });
    this.blur = slider("blur", { label: "Soft edge", min: 0, max: 16, step: 0.5, value: 0, limit: 100 });
    this.margins = SIDES.map((side) => textField(side, { type: "number", min: 0, value: 0 }));
    this.factor = slider("enlarge", { label: "Factor", min: 2, max: 4, step: 1, value: 2, limit: 8 });
    this.sides = element("div", { className: "columns" }, ...this.margins.map(({ root }) => root));
    this.body = element(
      "div",
      { className: "stack", hidden: true },
      this.task.root,
      this.editor.root,
      this.size,
      this.sides,
      this.factor.root,
      this.strength.root,
      this.blur.root,
      element(
        "div",
        { className: "row" },
        element("button", { type: "button", on: { click: () => this.clear() } }, "Remove the image"),
      ),
    );
    root.append(element("div", { className: "stack" }, this.drop, this.body));
    this.drop.addEventListener("dragover", (/** @type {DragEvent} */ event) => event.preventDefault());
    this.drop.addEventListener("drop", (/** @type {DragEvent} */ event) => {
      event.preventDefault();
      event.stopPropagation();
      this.#openFile(event.dataTransfer?.files[0]);
    });
  }

  /**
   * Take an image.
   *
   * @param {Blob} content
   * @param {string | null} [name] its name in the gallery
   * @param {string} [task]
   */
  async open(content, name = null, task = "change") {
    this.bitmap = await createImageBitmap(content);
    this.name = name;
    this.editor.clear();
    this.root.open = true;
    this.drop.hidden = true;
    this.body.hidden = false;
    this.task.write(task);
  }

  /**
   * Take an image of the server.
   *
   * @param {string} name
   * @param {string} [task]
   */
  async openNamed(name, task) {
    await this.open(await fileOf(name), name, task);
  }

  /** @param {File | undefined} file */
  async #openFile(file) {
    if (!file) return;
    try {
      await this.open(file);
    } catch {
      announce(`${file.name} cannot be read; choose a PNG, JPEG or WebP.`, true);
    }
  }

  /** Start from noise again. */
  clear() {
    this.bitmap = null;
    this.name = null;
    this.file.value = "";
    this.drop.hidden = false;
    this.body.hidden = true;
  }

  /** Return the size of the result, or null without an image. */
  resultSize() {
    if (this.bitmap === null) return null;
    const { width, height } = this.#targetSize();
    const { enlarge = 1, outpaint = {} } = this.task.read() === "repaint" ? {} : this.#taskFields();
    const { left = 0, top = 0, right = 0, bottom = 0 } = outpaint;
    return { width: enlarge * (width + left + right), height: enlarge * (height + top + bottom) };
  }

  /** Return the fields of the job that are about the image, none without an image. */
  read() {
    if (this.bitmap === null) return {};
    const { width, height } = this.#targetSize();
    const isUnchanged = width === this.bitmap.width && height === this.bitmap.height;
    const image = this.name !== null && isUnchanged ? this.name : encoded(drawn(this.bitmap, width, height));
    const strength = this.strength.root.hidden ? {} : { strength: this.strength.read() };
    const blur = this.blur.root.hidden ? {} : { blur: this.blur.read() };
    return { image, ...strength, ...blur, ...this.#taskFields() };
  }

  #taskFields() {
    const task = this.task.read();
    if (task === "repaint") return { mask: this.editor.mask() };
    if (task === "enlarge") return { enlarge: this.factor.read() };
    if (task === "extend") {
      return { outpaint: Object.fromEntries(this.margins.map(({ name, read }) => [name, read() ?? 0])) };
    }
    return {};
  }

  /**
   * Show the fields of a job that are about an image.
   *
   * @param {any} fields
   */
  async write({ image, mask, strength, blur, outpaint, enlarge }) {
    if (image === undefined) {
      this.clear();
      return;
    }
    await this.openNamed(image, enlarge ? "enlarge" : outpaint ? "extend" : mask ? "repaint" : "change");
    this.strength.write(strength ?? this.strength.read());
    this.blur.write(blur ?? 0);
    this.factor.write(enlarge ?? this.factor.read());
    for (const { name, write } of this.margins) write(outpaint?.[name] ?? 0);
    if (mask) this.editor.setMask(await createImageBitmap(await fileOf(mask)));
  }

  /** Show what the chosen task and model need. */
  refresh() {
    if (this.bitmap === null) return;
    const task = this.task.read();
    const { width, height } = this.#targetSize();
    const isResized = width !== this.bitmap.width || height !== this.bitmap.height;
    this.size.textContent = isResized
      ? `${width} × ${height} pixels, of ${this.bitmap.width} × ${this.bitmap.height}`
      : `${width} × ${height} pixels`;
    this.editor.setImage(drawn(this.bitmap, width, height), task === "repaint");
    this.sides.hidden = task !== "extend";
    for (const { root } of this.margins) {
      /** @type {HTMLInputElement} */ (root.querySelector("input")).step = String(this.#divisor());
    }
    this.factor.root.hidden = task !== "enlarge";
    if (this.#isTrainedToEnlarge()) this.factor.write(this.modelOptions().enlarge);
    this.blur.root.hidden = task === "change" || task === "enlarge";
    this.strength.root.hidden = task === "enlarge" && this.#isTrainedToEnlarge();
  }

  #isTrainedToEnlarge() {
    return this.modelOptions().enlarge > 0;
  }

  #divisor() {
    return this.modelOptions().divisor ?? 8;
  }

  /** Return the size at which the image is sent: its own if the model can make it, else about that of the training images. */
  #targetSize() {
    const { width, height } = /** @type {ImageBitmap} */ (this.bitmap);
    const { defaults } = this.modelOptions();
    const divisor = this.#divisor();
    const keepsSize = this.name !== null || this.task.read() === "enlarge" || defaults === null;
    const scale = keepsSize ? 1 : Math.min(1, Math.sqrt((defaults.width * defaults.height) / (width * height)));
    const rounded = (/** @type {number} */ side) => Math.max(1, Math.round((side * scale) / divisor)) * divisor;
    return { width: rounded(width), height: rounded(height) };
  }
}

/**
 * Return an image of the server.
 *
 * @param {string} name
 */
export async function fileOf(name) {
  return (await request(`/files/${name}`)).blob();
}

/**
 * Draw an image on a canvas of some size, cut to its proportions.
 *
 * @param {ImageBitmap} bitmap
 * @param {number} width
 * @param {number} height
 * @returns {HTMLCanvasElement}
 */
export function drawn(bitmap, width, height) {
  const canvas = element("canvas", { width, height });
  const scale = Math.max(width / bitmap.width, height / bitmap.height);
  const [w, h] = [bitmap.width * scale, bitmap.height * scale];
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, (width - w) / 2, (height - h) / 2, w, h);
  return canvas;
}

/**
 * Return a canvas as PNG in base64.
 *
 * @param {HTMLCanvasElement} canvas
 */
export function encoded(canvas) {
  return canvas.toDataURL("image/png").split(",")[1];
}
