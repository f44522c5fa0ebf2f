/** The API key: asked for in a dialog when the server needs one, and kept until the tab is closed. */

import { element } from "./dom.js";

const KEY = "ldm-api-key";

/** Return the key that was given, or null. */
export function storedKey() {
  return sessionStorage.getItem(KEY);
}

/** @type {Promise<void> | null} */
let asking = null;

/**
 * Ask for the key, once for all requests that wait for it.
 *
 * @param {boolean} wasWrong whether the last one was wrong
 */
export function askForKey(wasWrong) {
  asking ??= ask(wasWrong).finally(() => {
    asking = null;
  });
  return asking;
}

/**
 * @param {boolean} wasWrong
 * @returns {Promise<void>}
 */
function ask(wasWrong) {
  const input = element("input", { type: "password", id: "api-key", required: true, autocomplete: "current-password" });
  const form = element(
    "form",
    { method: "dialog", className: "stack" },
    element("h2", { id: "key-title" }, "API key"),
    element("p", {}, "This server needs a key. It is kept until you close this tab."),
    element("label", { className: "field" }, element("span", {}, "Key"), input),
    element("p", { className: "error", role: "alert" }, wasWrong ? "The server does not know this key." : ""),
    element("button", { className: "primary" }, "Continue"),
  );
  const dialog = element("dialog", { className: "small", "aria-labelledby": "key-title" }, form);
  document.body.append(dialog);
  dialog.addEventListener("cancel", (/** @type {Event} */ event) => event.preventDefault());
  dialog.showModal();
  return new Promise((resolve) => {
    form.addEventListener("submit", () => {
      sessionStorage.setItem(KEY, input.value.trim());
      dialog.remove();
      resolve();
    });
  });
}
