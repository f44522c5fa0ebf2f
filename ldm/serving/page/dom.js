/**
 * Create an element.
 *
 * @param {string} name
 * @param {Record<string, any>} [properties] properties of the element; `dataset`, `aria-*`, `role` and `for` are attributes,
 *   `on` has a listener for each event
 * @param {...(Node | string)} children
 * @returns {any}
 */
export function element(name, properties = {}, ...children) {
  /** @type {any} */
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (key === "on") {
      for (const [event, listener] of Object.entries(value)) made.addEventListener(event, listener);
    } else if (key === "dataset") {
      Object.assign(made.dataset, value);
    } else if (key in made) {
      made[key] = value;
    } else {
      made.setAttribute(key, value);
    }
  }
  made.append(...children);
  return made;
}

/**
 * Return the only element that a selector finds.
 *
 * @param {string} selector
 * @param {ParentNode} [parent]
 * @returns {any}
 */
export function find(selector, parent = document) {
  const found = parent.querySelector(selector);
  if (found === null) throw new Error(`the page has no element ${selector}`);
  return found;
}

/**
 * Show a sentence in the status line, which screen readers read.
 *
 * @param {string} text
 * @param {boolean} [isError]
 */
export function announce(text, isError = false) {
  const line = find("#status");
  line.textContent = text;
  line.classList.toggle("error", isError);
}

/**
 * Create an element of SVG.
 *
 * @param {string} name
 * @param {Record<string, string | number | boolean>} attributes
 * @param {...(Node | string)} children
 */
export function vector(name, attributes, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, String(value));
  made.append(...children);
  return made;
}
