/** Axes of charts: scales from values to coordinates, ticks, and numbers as text. */

/** @typedef {[number, number]} Range */

/**
 * Return the function from values to coordinates.
 *
 * @param {Range} range values at the two ends
 * @param {Range} ends coordinates of the two ends
 * @param {boolean} [log]
 * @returns {(value: number) => number}
 */
export function scale([low, high], [start, end], log = false) {
  const shape = log ? Math.log : Number;
  return (value) => start + ((shape(value) - shape(low)) / (shape(high) - shape(low))) * (end - start);
}

/**
 * Return about `count` multiples of 1, 2 or 5 times a power of 10.
 *
 * @param {Range} range
 * @param {number} count
 */
export function linearTicks([low, high], count) {
  const raw = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = power * /** @type {number} */ ([1, 2, 5, 10].find((factor) => factor * power >= raw * 0.999));
  const first = Math.ceil(low / step - 1e-9);
  const length = Math.floor(high / step + 1e-9) - first + 1;
  return Array.from({ length }, (_, i) => Number(((first + i) * step).toPrecision(12)));
}

/**
 * Return powers of 10, with 2 and 5 times them if there are few.
 *
 * @param {Range} range
 * @param {number} count
 */
export function logTicks([low, high], count) {
  const first = Math.floor(Math.log10(low));
  const powers = Array.from({ length: Math.ceil(Math.log10(high)) - first + 1 }, (_, i) => 10 ** (first + i));
  const inside = (/** @type {number} */ value) => value >= low * 0.999 && value <= high * 1.001;
  const whole = powers.filter(inside);
  if (whole.length >= 3) return whole.filter((_, i) => i % Math.ceil(whole.length / (count + 1)) === 0);
  const ticks = powers.flatMap((power) => [power, 2 * power, 5 * power]).filter(inside);
  return ticks.length > 1 ? ticks : [low, high];
}

/**
 * Return the range of an axis that contains the values, and its ticks; a linear one ends at ticks.
 *
 * @param {number[]} values
 * @param {boolean} isLog
 * @returns {{range: Range, ticks: number[]}}
 */
export function axisOf(values, isLog) {
  let low = Math.min(...values);
  let high = Math.max(...values);
  if (high - low <= 1e-9 * Math.abs(high)) {
    // equal up to rounding
    const margin = Math.abs(low) / 10 || 1;
    [low, high] = isLog ? [low / 2, high * 2] : [low - margin, high + margin];
  }
  if (isLog) return { range: [low, high], ticks: logTicks([low, high], 4) };
  const [first, second] = linearTicks([low, high], 4);
  const step = second - first;
  const start = Math.floor(low / step + 1e-9);
  const length = Math.ceil(high / step - 1e-9) - start + 1;
  const ticks = Array.from({ length }, (_, i) => Number(((start + i) * step).toPrecision(12)));
  return { range: [ticks[0], ticks[length - 1]], ticks };
}

/**
 * Return a number as text with a few significant digits; thousands and millions as k and M.
 *
 * @param {number} value
 * @param {number} [digits]
 */
export function format(value, digits = 4) {
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e12))
    return value.toExponential(Math.min(2, digits - 1)).replace("e+", "e");
  for (const [limit, suffix] of /** @type {[number, string][]} */ ([
    [1e9, "G"],
    [1e6, "M"],
    [1e4, "k"],
  ])) {
    if (size >= limit) return `${Number((value / (suffix === "k" ? 1e3 : limit)).toPrecision(digits))}${suffix}`;
  }
  return String(Number(value.toPrecision(digits)));
}
