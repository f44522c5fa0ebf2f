/** Form controls with one interface: a name, `read()` for the value or undefined, and `write(value)`. */

import { element } from "./dom.js";
import { labelOf } from "./labels.js";

/**
 * @typedef {{name: string, root: HTMLElement, read: () => any, write: (value: any) => void}} Control
 */

let ids = 0;

/**
 * Return a control of one input element with its label.
 *
 * @param {string} name
 * @param {HTMLInputElement | HTMLSelectElement | HTMLTextAreaElement} input
 * @param {string} [help] sentence under the input
 * @returns {Control}
 */
function labelled(name, input, help) {
  const root = element("label", { className: "field" }, element("span", {}, labelOf(name)), input);
  if (help) {
    const sentence = element("small", { id: `help-${++ids}`, className: "muted" }, help);
    input.setAttribute("aria-describedby", sentence.id);
    root.append(sentence);
  }
  const isNumber = input instanceof HTMLInputElement && input.type === "number";
  return {
    name,
    root,
    read: () => (input.value === "" ? undefined : isNumber ? Number(input.value) : input.value),
    write: (value) => {
      input.value = value ?? "";
      input.dispatchEvent(new Event("input", { bubbles: true }));
    },
  };
}

/**
 * @param {string} name
 * @param {string} [placeholder]
 */
export function textArea(name, placeholder = "") {
  return labelled(name, element("textarea", { name, placeholder, rows: 1 }));
}

/**
 * Return a control of a text or of a number.
 *
 * @param {string} name
 * @param {{help?: string} & Record<string, any>} properties of the input element; `type` is `text` or `number`
 */
export function textField(name, { help, ...properties }) {
  return labelled(name, element("input", { name, ...properties }), help);
}

/**
 * Return a control that chooses a value; the empty one stands for the default.
 *
 * @param {string} name
 * @param {{value: string, text: string}[]} choices
 * @param {string} [help]
 */
export function choice(name, choices, help) {
  const options = choices.map(({ value, text }) => element("option", { value }, text));
  return labelled(name, element("select", { name }, ...options), help);
}

/**
 * Return a control of a number with a slider.
 *
 * @param {string} name
 * @param {{min: number, max: number, step: number, value?: number, limit?: number, label?: string}} range `limit` is the
 *   largest number that can be typed, if it is larger than that of the slider
 * @returns {Control}
 */
export function slider(name, { min, max, step, value, limit = max, label = labelOf(name) }) {
  const id = `slider-${++ids}`;
  const number = element("input", { id, name, type: "number", min, max: limit, step: "any", value: value ?? "" });
  const range = element("input", { type: "range", min, max, step, "aria-label": `${label}, slider` });
  const follow = () => {
    range.value = number.value === "" ? String((min + max) / 2) : number.value;
  };
  number.addEventListener("input", follow);
  range.addEventListener("input", () => {
    number.value = range.value;
  });
  follow();
  const root = element(
    "div",
    { className: "field slider" },
    element("label", { className: "label", htmlFor: id }, label),
    range,
    number,
  );
  return {
    name,
    root,
    read: () => (number.value === "" ? undefined : Number(number.value)),
    write: (given) => {
      number.value = given ?? "";
      follow();
    },
  };
}

/**
 * Return a group of buttons of which one is pressed.
 *
 * @param {string} name
 * @param {string} label
 * @param {{value: string, text: string}[]} choices the first is pressed at first
 * @param {(value: string) => void} changed
 * @returns {Control}
 */
export function tabs(name, label, choices, changed) {
  const inputs = choices.map(({ value }, index) =>
    element("input", { type: "radio", name, value, checked: index === 0, className: "visually-hidden" }),
  );
  const labels = choices.map(({ text }, index) => element("label", {}, inputs[index], element("span", {}, text)));
  const root = element(
    "fieldset",
    { className: "tabs" },
    element("legend", { className: "visually-hidden" }, label),
    ...labels,
  );
  const read = () => inputs.find((input) => input.checked)?.value;
  root.addEventListener("change", () => changed(read()));
  return {
    name,
    root,
    read,
    write: (value) => {
      for (const input of inputs) input.checked = input.value === value;
      changed(value);
    },
  };
}
