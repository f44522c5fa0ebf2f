/** Images that are dropped on the page, or chosen as a file, to read their settings. */

import { fetchJson } from "./api.js";
import { announce } from "./dom.js";

/**
 * Show the settings of images that are dropped anywhere on the page, or chosen.
 *
 * @param {HTMLInputElement} input
 * @param {(image: any) => void} show
 */
export function readDroppedImages(input, show) {
  const read = async (/** @type {File | undefined} */ file) => {
    if (!file) return;
    try {
      show(await described(file));
    } catch (error) {
      announce(String(/** @type {Error} */ (error).message), true);
    }
  };
  input.addEventListener("change", () => {
    read(input.files?.[0]);
    input.value = "";
  });
  document.addEventListener("dragover", (event) => event.preventDefault());
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    read(event.dataTransfer?.files[0]);
  });
}

/** @param {File} file */
async function described(file) {
  const body = new FormData();
  body.append("image", file);
  const settings = await fetchJson("/v1/gallery/read", { method: "POST", body });
  return { ...settings, name: file.name, url: URL.createObjectURL(file), file };
}
