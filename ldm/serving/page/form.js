/** The settings of an image, whose controls are made of what the server offers. */

import { choice, slider, textArea, textField } from "./controls.js";
import { element, find } from "./dom.js";
import { labelOf, textOf } from "./labels.js";
import { LoraList } from "./loras.js";

/** Settings that change to the defaults of a model when it is chosen. */
const OF_THE_MODEL = ["sampler", "num_inference_steps", "guidance_scale", "width", "height"];

/** @typedef {import("./controls.js").Control} Control */

export class SettingsForm {
  /**
   * @param {HTMLFormElement} root
   * @param {any} options the response of /v1/options
   */
  constructor(root, options) {
    this.options = options;
    /** @type {Record<string, any>} fields of a job that have no control */
    this.others = {};
    this.othersList = element("div", { className: "stack" });
    const models = options.models.map((/** @type {any} */ { name }) => ({ value: name, text: name }));
    this.model = choice("model", models);
    this.random = element("input", { type: "checkbox", checked: true });
    const prompt = textArea("prompt", "red apple");
    const prompts = [prompt, textArea("negative_prompt")];
    const { seed, sizes, sampling } = controlsOf(options);
    this.seed = seed;
    const own = [...prompts, ...sampling, ...sizes, seed];
    const names = own.map(({ name }) => name);
    const more = options.settings.filter((/** @type {any} */ { name }) => !names.includes(name)).map(generic);
    /** @type {Control[]} */
    this.controls = [...own, ...more];

    this.prompts = find("#prompts", root);
    this.prompts.append(...roots(prompts));
    const body = [
      this.model.root,
      ...roots(sampling),
      element("div", { className: "columns" }, ...roots(sizes)),
      element("div", { className: "seed" }, seed.root, element("label", { className: "row" }, this.random, "Random")),
      element(
        "details",
        {},
        element("summary", {}, "More settings"),
        element("div", { className: "stack" }, ...roots(more)),
      ),
      this.othersList,
    ];
    find("#settings", root).append(element("div", { className: "stack" }, ...body));
    this.loras = new LoraList(find("#loras", root), options.loras, prompt);
    seed.root.addEventListener("change", () => {
      this.random.checked = false;
    });
    this.model.root.addEventListener("change", () => this.#useDefaults());
    this.#useDefaults();
  }

  /** Return what the server tells about the chosen model; `defaults` are null until the model is loaded. */
  get modelOptions() {
    return this.options.models.find((/** @type {any} */ { name }) => name === this.model.read());
  }

  /** Return the fields of the job. With a random seed, draw the next one. */
  read() {
    if (this.random.checked) this.seed.write(crypto.getRandomValues(new Uint32Array(1))[0]);
    const entries = this.controls.map(({ name, read }) => [name, read()]).filter(([, value]) => value !== undefined);
    const fields = { ...this.others, ...Object.fromEntries(entries), model: this.model.read() };
    if (this.#takesPrompts()) {
      fields.prompt ??= "";
    } else {
      delete fields.prompt;
      delete fields.negative_prompt;
    }
    if (this.loras.areNamedIn(fields.prompt)) fields.prompt_syntax ??= "weighted";
    return fields;
  }

  /**
   * Show the fields of a job. Those that have no control are kept, and listed.
   *
   * @param {any} fields
   * @param {string | null} model
   */
  write(fields, model) {
    if (model !== null) this.model.write(model);
    this.prompts.hidden = !this.#takesPrompts();
    const given = { num_images_per_prompt: 1, ...fields };
    for (const { name, write } of this.controls) write(given[name]);
    this.random.checked = fields.seed === undefined;
    const shown = new Set([...this.controls.map(({ name }) => name), "model", ...EDITS]);
    this.others = Object.fromEntries(Object.entries(fields).filter(([name]) => !shown.has(name)));
    this.#listOthers();
  }

  /** Take new options, of which the defaults of a model that was loaded meanwhile are used. */
  update(/** @type {any} */ options) {
    const before = this.modelOptions;
    this.options = options;
    if (before.defaults === null) this.#useDefaults();
  }

  #takesPrompts() {
    return this.modelOptions.conditions?.includes("text") ?? true;
  }

  #useDefaults() {
    const { defaults } = this.modelOptions;
    this.prompts.hidden = !this.#takesPrompts();
    for (const { name, write } of this.controls) {
      if (OF_THE_MODEL.includes(name)) write(defaults?.[name]);
    }
  }

  #listOthers() {
    const lines = Object.entries(this.others).map(([name, value]) =>
      element(
        "p",
        { className: "row apart" },
        element("span", {}, `${labelOf(name)}: ${textOf(value)}`),
        element(
          "button",
          {
            type: "button",
            on: {
              click: () => {
                delete this.others[name];
                this.#listOthers();
              },
            },
          },
          "Remove",
        ),
      ),
    );
    this.othersList.replaceChildren(...lines);
  }
}

/** Fields of the image that is edited and of ControlNets, which have controls elsewhere. */
export const EDITS = ["image", "mask", "blur", "strength", "outpaint", "enlarge", "controlnets"];

/**
 * Return the controls of the settings that every image has.
 *
 * @param {any} options
 */
function controlsOf({ samplers, limits }) {
  const steps = { min: 1, max: Math.min(60, limits.max_steps), step: 1, limit: limits.max_steps };
  return {
    seed: textField("seed", { type: "number", min: 0, max: Number.MAX_SAFE_INTEGER, step: 1 }),
    sizes: [
      textField("width", { type: "number", min: 1, step: 1 }),
      textField("height", { type: "number", min: 1, step: 1 }),
    ],
    sampling: [
      choice("sampler", [DEFAULT, ...samplers.map(describedSampler)]),
      slider("num_inference_steps", steps),
      slider("guidance_scale", { min: 1, max: 15, step: 0.5, limit: 1000 }),
      slider("num_images_per_prompt", { min: 1, max: limits.max_n, step: 1, value: 1 }),
    ],
  };
}

/** @param {Control[]} controls */
function roots(controls) {
  return controls.map(({ root }) => root);
}

const DEFAULT = { value: "", text: "default" };

/** @param {any} sampler */
function describedSampler({ name, evaluations }) {
  return { value: name, text: evaluations === 1 ? name : `${name} (${evaluations} evaluations a step)` };
}

/**
 * Return the control of a setting that the page knows nothing about.
 *
 * @param {any} setting
 */
function generic({ name, type, help, choices }) {
  if (choices) {
    return choice(name, [DEFAULT, ...choices.map((/** @type {string} */ value) => ({ value, text: value }))], help);
  }
  const properties = type === "text" ? { type } : { type: "number", step: type === "integer" ? 1 : "any" };
  return textField(name, { ...properties, help });
}
