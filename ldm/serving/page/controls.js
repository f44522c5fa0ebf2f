/** Form controls with one interface: a name, `read()` for the value or undefined, and `write(value)`. */

import { element } from "./dom.js";

/**
 * @typedef {{name: string, root: HTMLElement, read: () => any, write: (value: any) => void}} Control
 */

let ids = 0;

/**
 * Return a control of one input element with its label.
 *
 * @param {string} name
 * @param {string} label
 * @param {HTMLInputElement | HTMLSelectElement | HTMLTextAreaElement} input
 * @param {string} [help] sentence under the input
 * @returns {Control}
 */
function labelled(name, label, input, help) {
  const root = element("label", { className: "field" }, element("span", {}, label), input);
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
 * @param {string} label
 * @param {string} placeholder
 */
export function textArea(name, label, placeholder = "") {
  return labelled(name, label, element("textarea", { name, placeholder, rows: 2 }));
}

/**
 * Return a control of a text or of a number.
 *
 * @param {string} name
 * @param {string} label
 * @param {{help?: string} & Record<string, any>} properties of the input element; `type` is `text` or `number`
 */
export function textField(name, label, { help, ...properties }) {
  return labelled(name, label, element("input", { name, ...properties }), help);
}

/**
 * Return a control that chooses a value; the empty one stands for the default.
 *
 * @param {string} name
 * @param {string} label
 * @param {{value: string, text: string}[]} choices
 * @param {string} [help]
 */
export function choice(name, label, choices, help) {
  const options = choices.map(({ value, text }) => element("option", { value }, text));
  return labelled(name, label, element("select", { name }, ...options), help);
}

/**
 * Return a control of a number with a slider beside it.
 *
 * @param {string} name
 * @param {string} label
 * @param {{min: number, max: number, step: number, value?: number, limit?: number}} range `limit` is the largest number that
 *   can be typed, if it is larger than that of the slider
 * @returns {Control}
 */
export function slider(name, label, { min, max, step, value, limit = max }) {
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
