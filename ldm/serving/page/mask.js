/** An editor of masks: the image, and over it what is painted with a brush by mouse, touch or keyboard. */

import { slider } from "./controls.js";
import { element } from "./dom.js";

/** Colour of the mask on the page; masks are sent in white. */
const COLOUR = [79, 70, 229, 255];
const CLEAR = [0, 0, 0, 0];

const MOVES = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

export class MaskEditor {
  constructor() {
    this.picture = element("canvas");
    this.layer = element("canvas", {
      className: "layer",
      tabIndex: 0,
      role: "application",
      "aria-label": "Mask. Arrow keys move the brush, Space paints, Shift with arrow keys paints a line.",
    });
    this.brush = element("div", { className: "brush", hidden: true });
    this.size = slider("brush", { min: 1, max: 32, step: 1, value: 8 });
    this.eraser = this.#toggle("Erase");
    this.position = { x: 0, y: 0 };
    this.isPainting = false;
    const button = (/** @type {string} */ text, /** @type {() => void} */ click) =>
      element("button", { type: "button", on: { click } }, text);
    this.tools = element(
      "div",
      { className: "stack" },
      this.size.root,
      element(
        "div",
        { className: "row" },
        this.eraser,
        button("Clear", () => this.clear()),
        button("Fill", () => this.#eachPixel((pixel) => pixel.set(COLOUR))),
        button("Invert", () => this.#invert()),
      ),
    );
    this.root = element(
      "div",
      { className: "stack" },
      element("div", { className: "canvases" }, this.picture, this.layer, this.brush),
      this.tools,
    );
    this.layer.addEventListener("pointerdown", (/** @type {PointerEvent} */ event) => this.#start(event));
    this.layer.addEventListener("pointermove", (/** @type {PointerEvent} */ event) => this.#move(event));
    for (const name of ["pointerup", "pointercancel"]) {
      this.layer.addEventListener(name, () => {
        this.isPainting = false;
      });
    }
    this.layer.addEventListener("pointerleave", () => {
      this.brush.hidden = true;
    });
    this.layer.addEventListener("focus", () => this.#showBrush());
    this.layer.addEventListener("blur", () => {
      this.brush.hidden = true;
    });
    this.layer.addEventListener("keydown", (/** @type {KeyboardEvent} */ event) => this.#key(event));
    this.size.root.addEventListener("input", () => this.#showBrush());
  }

  /**
   * Show an image. Its mask is kept if the size is the same.
   *
   * @param {HTMLCanvasElement} image
   * @param {boolean} isMasked whether a mask can be painted
   */
  setImage(image, isMasked) {
    this.picture.width = image.width;
    this.picture.height = image.height;
    this.picture.getContext("2d").drawImage(image, 0, 0);
    if (this.layer.width !== image.width || this.layer.height !== image.height) {
      this.layer.width = image.width;
      this.layer.height = image.height;
      this.position = { x: image.width / 2, y: image.height / 2 };
      this.size.write(Math.max(2, Math.round(Math.min(image.width, image.height) / 8)));
    }
    this.layer.hidden = this.tools.hidden = !isMasked;
  }

  /** Remove what is painted. */
  clear() {
    this.#eachPixel((pixel) => pixel.set(CLEAR));
  }

  /**
   * Show a mask, white where it is painted.
   *
   * @param {ImageBitmap} mask
   */
  setMask(mask) {
    const context = this.#context();
    context.globalCompositeOperation = "source-over";
    context.drawImage(mask, 0, 0, this.layer.width, this.layer.height);
    this.#eachPixel((pixel) => pixel.set(pixel[0] > 127 ? COLOUR : CLEAR));
  }

  /** Return the mask as PNG in base64, white where it is painted; throw an error if nothing is. */
  mask() {
    const canvas = element("canvas", { width: this.layer.width, height: this.layer.height });
    const context = canvas.getContext("2d");
    const pixels = this.#context().getImageData(0, 0, canvas.width, canvas.height);
    for (let index = 0; index < pixels.data.length; index += 4) {
      pixels.data.fill(pixels.data[index + 3] > 127 ? 255 : 0, index, index + 3);
      pixels.data[index + 3] = 255;
    }
    if (pixels.data.every((value, index) => value === 0 || index % 4 === 3)) {
      throw new Error("Paint the part of the image that is to be repainted.");
    }
    context.putImageData(pixels, 0, 0);
    return canvas.toDataURL("image/png").split(",")[1];
  }

  /** @returns {CanvasRenderingContext2D} */
  #context() {
    return this.layer.getContext("2d", { willReadFrequently: true });
  }

  /** @param {PointerEvent} event */
  #start(event) {
    event.preventDefault();
    this.layer.focus();
    this.layer.setPointerCapture(event.pointerId);
    this.isPainting = true;
    this.position = this.#place(event);
    this.#paintTo(this.position);
  }

  /** @param {PointerEvent} event */
  #move(event) {
    const place = this.#place(event);
    if (this.isPainting) this.#paintTo(place);
    this.position = place;
    this.#showBrush();
  }

  /** @param {KeyboardEvent} event */
  #key(event) {
    const move = MOVES[/** @type {keyof typeof MOVES} */ (event.key)];
    if (move) {
      const step = Math.max(1, (this.size.read() ?? 2) / 2);
      const place = {
        x: Math.min(this.layer.width, Math.max(0, this.position.x + step * move[0])),
        y: Math.min(this.layer.height, Math.max(0, this.position.y + step * move[1])),
      };
      if (event.shiftKey) this.#paintTo(place);
      this.position = place;
    } else if (event.key === " ") {
      this.#paintTo(this.position);
    } else {
      return;
    }
    event.preventDefault();
    this.#showBrush();
  }

  /**
   * Return the pixel under the pointer.
   *
   * @param {PointerEvent} event
   */
  #place(event) {
    const box = this.layer.getBoundingClientRect();
    return {
      x: ((event.clientX - box.left) / box.width) * this.layer.width,
      y: ((event.clientY - box.top) / box.height) * this.layer.height,
    };
  }

  /**
   * Paint, or erase, a line from the last position.
   *
   * @param {{x: number, y: number}} place
   */
  #paintTo(place) {
    const context = this.#context();
    const isErasing = this.eraser.getAttribute("aria-pressed") === "true";
    context.globalCompositeOperation = isErasing ? "destination-out" : "source-over";
    context.strokeStyle = `rgb(${COLOUR.slice(0, 3)})`;
    context.lineCap = "round";
    context.lineWidth = this.size.read() ?? 1;
    context.beginPath();
    context.moveTo(this.position.x, this.position.y);
    context.lineTo(place.x + 0.001, place.y);
    context.stroke();
  }

  #showBrush() {
    const scale = this.layer.clientWidth / this.layer.width;
    const diameter = (this.size.read() ?? 1) * scale;
    this.brush.hidden = this.layer.hidden;
    this.brush.style.width = this.brush.style.height = `${diameter}px`;
    this.brush.style.left = `${this.position.x * scale - diameter / 2}px`;
    this.brush.style.top = `${this.position.y * scale - diameter / 2}px`;
  }

  #invert() {
    this.#eachPixel((pixel) => pixel.set(pixel[3] > 127 ? CLEAR : COLOUR));
  }

  /** @param {(pixel: Uint8ClampedArray) => void} change */
  #eachPixel(change) {
    const pixels = this.#context().getImageData(0, 0, this.layer.width, this.layer.height);
    for (let index = 0; index < pixels.data.length; index += 4) change(pixels.data.subarray(index, index + 4));
    this.#context().putImageData(pixels, 0, 0);
  }

  /** @param {string} text */
  #toggle(text) {
    const button = element("button", { type: "button", "aria-pressed": "false" }, text);
    button.addEventListener("click", () => {
      button.setAttribute("aria-pressed", String(button.getAttribute("aria-pressed") === "false"));
    });
    return button;
  }
}
