/** The gallery: pages of the images in the folder of the server, the newest first. */

import { fetchJson } from "./api.js";
import { element } from "./dom.js";

const PAGE = 24;

export class Gallery {
  /**
   * @param {HTMLElement} root
   * @param {(image: any) => void} open called with an image that was clicked
   */
  constructor(root, open) {
    this.open = open;
    /** @type {any[]} */
    this.images = [];
    this.list = element("ul", { className: "gallery" });
    this.empty = element("p", { className: "muted" }, "Images that you generate are kept here.");
    this.more = element(
      "button",
      { type: "button", hidden: true, on: { click: () => this.#load() } },
      "Show older images",
    );
    root.append(this.empty, this.list, element("div", { className: "row" }, this.more));
  }

  /** Show the newest images. */
  async refresh() {
    const { images, more } = await fetchJson(`/v1/gallery?limit=${PAGE}`);
    const known = new Set(this.images.map(({ name }) => name));
    const fresh = images.filter((/** @type {any} */ { name }) => !known.has(name));
    if (this.images.length === 0) this.more.hidden = !more;
    this.images.unshift(...fresh);
    this.list.prepend(...fresh.map((/** @type {any} */ image) => this.#tile(image)));
    this.empty.hidden = this.images.length > 0;
  }

  /**
   * Return an image of the gallery that has been shown.
   *
   * @param {string} name
   */
  find(name) {
    return this.images.find((image) => image.name === name);
  }

  /**
   * Return the image that stands `offset` places after another; undefined at the ends.
   *
   * @param {any} image
   * @param {number} offset
   */
  neighbour(image, offset) {
    const index = this.images.findIndex(({ name }) => name === image.name);
    return index < 0 ? undefined : this.images[index + offset];
  }

  async #load() {
    const before = this.images.at(-1).name;
    const { images, more } = await fetchJson(`/v1/gallery?limit=${PAGE}&before=${before}`);
    this.images.push(...images);
    const tiles = images.map((/** @type {any} */ image) => this.#tile(image));
    this.list.append(...tiles);
    this.more.hidden = !more;
    tiles[0]?.querySelector("button").focus();
  }

  /** @param {any} image */
  #tile(image) {
    const src = new URL(image.url).pathname;
    const alt = image.request?.prompt || "Image without a prompt";
    const picture = element("img", { src, alt, loading: "lazy", width: image.width, height: image.height });
    const button = element("button", { type: "button", className: "tile", title: alt }, picture);
    button.addEventListener("click", () => this.open(image));
    return element("li", {}, button);
  }
}
