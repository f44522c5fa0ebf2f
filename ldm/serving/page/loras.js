/** The scales of LoRAs, which prompts name as `<lora:name:scale>`: a slider changes the prompt, and the prompt the slider. */

import { slider } from "./controls.js";
import { element } from "./dom.js";

const TAG = /\s*<lora:([^:<>]+)(?::([^<>]*))?>/g;

export class LoraList {
  /**
   * @param {HTMLElement} root
   * @param {string[]} names
   * @param {import("./controls.js").Control} prompt
   */
  constructor(root, names, prompt) {
    this.prompt = prompt;
    root.hidden = names.length === 0;
    this.sliders = names.map((name) => slider(name, { label: name, min: -1, max: 2, step: 0.05, value: 0, limit: 10 }));
    for (const { name, root, read } of this.sliders) {
      root.addEventListener("input", () => this.#setScale(name, read() ?? 0));
    }
    root.append(element("div", { className: "stack scroll" }, ...this.sliders.map(({ root }) => root)));
    prompt.root.addEventListener("input", () => this.#readPrompt());
  }

  /** @param {string | undefined} prompt */
  areNamedIn(prompt = "") {
    return [...prompt.matchAll(TAG)].length > 0;
  }

  /**
   * @param {string} name
   * @param {number} scale
   */
  #setScale(name, scale) {
    const others = (this.prompt.read() ?? "").replace(TAG, (/** @type {string} */ tag, /** @type {string} */ named) =>
      named === name ? "" : tag,
    );
    this.prompt.write(scale === 0 ? others : `${others} <lora:${name}:${scale}>`.trimStart());
  }

  #readPrompt() {
    const scales = Object.fromEntries(
      [...(this.prompt.read() ?? "").matchAll(TAG)].map(([, name, scale]) => [name, Number(scale ?? 1)]),
    );
    for (const { name, read, write } of this.sliders) {
      if ((read() ?? 0) !== (scales[name] ?? 0)) write(scales[name] ?? 0);
    }
  }
}
