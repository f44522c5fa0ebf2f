/** Requests to the server: JSON, images and streams of events, with the API key where the server needs one. */

import { askForKey, storedKey } from "./key.js";

/** The server refused a request; the message is its sentence. */
export class ApiError extends Error {
  /**
   * @param {string} message
   * @param {number} status
   */
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

/**
 * Send a request, and ask for the API key as often as the server says that it is missing or wrong.
 *
 * @param {string} path
 * @param {{method?: string, json?: unknown, body?: BodyInit, signal?: AbortSignal}} [options]
 * @returns {Promise<Response>}
 */
export async function request(path, { method = "GET", json, body, signal } = {}) {
  for (;;) {
    const key = storedKey();
    const headers = new Headers(key === null ? {} : { Authorization: `Bearer ${key}` });
    if (json !== undefined) headers.set("Content-Type", "application/json");
    const response = await fetch(path, {
      method,
      headers,
      signal,
      body: json === undefined ? body : JSON.stringify(json),
    });
    if (response.ok) return response;
    if (response.status !== 401) throw new ApiError(await sentence(response), response.status);
    await askForKey(key !== null);
  }
}

/**
 * Send a request and return the JSON of the response.
 *
 * @param {string} path
 * @param {Parameters<typeof request>[1]} [options]
 * @returns {Promise<any>}
 */
export async function fetchJson(path, options) {
  return (await request(path, options)).json();
}

/**
 * Yield the server-sent events of a path. Unlike EventSource this sends the key.
 *
 * @param {string} path
 * @param {AbortSignal} [signal]
 * @returns {AsyncGenerator<{event: string, data: any}>}
 */
export async function* events(path, signal) {
  const response = await request(path, { signal });
  const reader = /** @type {ReadableStream<Uint8Array>} */ (response.body).getReader();
  const decoder = new TextDecoder();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    text += decoder.decode(value, { stream: true });
    const blocks = text.split("\n\n");
    text = /** @type {string} */ (blocks.pop());
    for (const block of blocks) {
      const fields = Object.fromEntries(block.split("\n").map((line) => line.split(/: (.*)/s, 2)));
      if (fields.data !== undefined) yield { event: fields.event, data: JSON.parse(fields.data) };
    }
  }
}

/**
 * Return the sentence of an error response.
 *
 * @param {Response} response
 */
async function sentence(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `the server answers with status ${response.status}.`;
  }
}
