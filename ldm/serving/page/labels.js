/** The words for settings, in the form, at images and in comparisons. */

/** @type {Record<string, string>} */
const SHORT = {
  num_inference_steps: "Steps",
  guidance_scale: "Guidance",
  num_images_per_prompt: "Images",
  controlnet: "ControlNet",
  controlnets: "ControlNets",
};

/**
 * Return the label of a setting.
 *
 * @param {string} name
 */
export function labelOf(name) {
  return SHORT[name] ?? `${name[0].toUpperCase()}${name.slice(1).replaceAll("_", " ")}`;
}

/**
 * Return the value of a setting as text.
 *
 * @param {any} value
 */
export function textOf(value) {
  if (value === undefined) return "default";
  if (value === "") return "none";
  return typeof value === "string" ? value : JSON.stringify(value);
}
