/** A job while it runs: the previews and the progress of its images, then the images. */

import { events, fetchJson } from "./api.js";
import { element } from "./dom.js";

export class JobView {
  /**
   * @param {HTMLElement} root where the images are shown
   * @param {(image: any) => void} open called with an image that was clicked
   */
  constructor(root, open) {
    this.root = root;
    this.open = open;
    /** @type {string | null} */
    this.id = null;
    /** @type {ImageView[]} */
    this.figures = [];
  }

  /**
   * Run a job and show it; return its last state.
   *
   * @param {any} fields
   */
  async run(fields) {
    const state = await fetchJson("/v1/jobs", { method: "POST", json: fields });
    return this.follow(state);
  }

  /**
   * Show a job that was started before; return its last state.
   *
   * @param {any} state
   */
  async follow(state) {
    this.id = state.id;
    this.figures = state.images.map(() => new ImageView(this.open));
    this.root.replaceChildren(...this.figures.map(({ root }) => root));
    this.#show(state);
    for await (const { data } of events(`/v1/jobs/${state.id}/events`)) {
      state = data;
      this.#show(state);
    }
    this.id = null;
    return state;
  }

  /** Cancel the job that runs, if there is one. */
  async cancel() {
    if (this.id !== null) await fetchJson(`/v1/jobs/${this.id}`, { method: "DELETE" });
  }

  /** @param {any} state */
  #show(state) {
    this.root.dataset.status = state.status;
    for (const [index, image] of state.images.entries()) this.figures[index].show(image, state.status);
  }
}

/** One image of a job: a preview with a progress bar, then a button with the image. */
class ImageView {
  /** @param {(image: any) => void} open */
  constructor(open) {
    this.image = element("img", { alt: "", hidden: true });
    this.progress = element("progress", { "aria-label": "Progress" });
    this.caption = element("figcaption", { className: "muted" });
    this.button = element("button", { type: "button", className: "tile", disabled: true }, this.image);
    this.button.addEventListener("click", () => open(this.finished));
    this.root = element("figure", { className: "result" }, this.button, this.progress, this.caption);
  }

  /**
   * @param {any} state of the image
   * @param {string} status of the job
   */
  show(state, status) {
    const source = state.url ? new URL(state.url).pathname : state.preview;
    if (source && this.image.getAttribute("src") !== source) {
      this.image.src = source;
      this.image.hidden = false;
    }
    this.image.dataset.kind = state.url ? "result" : "preview";
    this.image.alt = state.url ? `Image with the seed ${state.seed}` : "Preview";
    this.progress.hidden = Boolean(state.url) || !["queued", "running"].includes(status);
    if (state.total) {
      this.progress.max = state.total;
      this.progress.value = state.done;
    }
    const steps = state.total ? `step ${state.done} of ${state.total}` : status;
    this.caption.textContent = state.url ? `seed ${state.seed}` : status === "running" ? steps : status;
    this.button.disabled = !state.url;
    if (state.url) this.finished = { name: source.split("/").pop(), url: source };
  }
}
