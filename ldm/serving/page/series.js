/** Values over steps: the points of a curve. */

/** @typedef {{x: number[], y: number[]}} Points in increasing order of x */

/**
 * Return an exponential moving average, without the bias of its beginning.
 *
 * @param {Points} points
 * @param {number} weight of what was before each point, in [0, 1)
 * @returns {Points}
 */
export function smoothed({ x, y }, weight) {
  let average = 0;
  let sum = 0;
  const smooth = y.map((value) => {
    average = weight * average + (1 - weight) * value;
    sum = weight * sum + (1 - weight);
    return average / sum;
  });
  return { x, y: smooth };
}

/**
 * Return the points of a range, with one more on each side so that lines go on to its ends.
 *
 * @param {Points} points
 * @param {[number, number]} range
 * @returns {Points}
 */
export function within({ x, y }, [low, high]) {
  const first = Math.max(0, before(x, low) - 1);
  const last = before(x, high) + 2;
  return { x: x.slice(first, last), y: y.slice(first, last) };
}

/**
 * Return at most about `count` points: of each group of neighbours the lowest and the highest, so that no peak is lost.
 *
 * @param {Points} points
 * @param {number} count
 * @returns {Points}
 */
export function thinned(points, count) {
  const size = Math.ceil((2 * points.x.length) / count);
  if (size <= 2) return points;
  /** @type {Points} */
  const kept = { x: [], y: [] };
  for (let start = 0; start < points.x.length; start += size) {
    let low = start;
    let high = start;
    for (let i = start; i < Math.min(start + size, points.x.length); i += 1) {
      if (points.y[i] < points.y[low]) low = i;
      if (points.y[i] > points.y[high]) high = i;
    }
    for (const i of new Set([Math.min(low, high), Math.max(low, high)])) {
      kept.x.push(points.x[i]);
      kept.y.push(points.y[i]);
    }
  }
  return kept;
}

/**
 * Return the index of the point nearest to a step.
 *
 * @param {Points} points
 * @param {number} step
 */
export function nearest({ x }, step) {
  const i = before(x, step);
  return i + 1 < x.length && x[i + 1] - step < step - x[i] ? i + 1 : i;
}

/**
 * Return the index of the last number that is not above a value, or 0.
 *
 * @param {number[]} sorted
 * @param {number} value
 */
export function before(sorted, value) {
  let low = 0;
  let high = sorted.length;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (sorted[middle] > value) high = middle;
    else low = middle;
  }
  return low;
}
