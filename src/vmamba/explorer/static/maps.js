// A map as a picture and in words.

// Viridis at steps of an eighth: it rises evenly in brightness, also for who is colour-blind.
const COLOURS = [
  [68, 1, 84], [71, 44, 122], [59, 82, 139], [44, 113, 142], [33, 145, 140],
  [39, 173, 129], [94, 201, 98], [170, 220, 50], [253, 231, 37],
];

function colour(share) {
  const place = Math.min(Math.max(share, 0), 1) * (COLOURS.length - 1);
  const index = Math.min(Math.floor(place), COLOURS.length - 2);
  const [low, high] = [COLOURS[index], COLOURS[index + 1]];
  return low.map((value, channel) => value + (place - index) * (high[channel] - value));
}

/** The sum of maps, with 0 where a map has no value. */
export function sum(maps) {
  return maps[0].map((_, index) => maps.reduce((total, map) => total + (map[index] || 0), 0));
}

/** The lowest and the highest value, and how many there are; null without any. */
export function range(values) {
  let [low, high, count] = [Infinity, -Infinity, 0];
  for (const value of values) {
    if (Number.isFinite(value)) {
      low = Math.min(low, value);
      high = Math.max(high, value);
      count += 1;
    }
  }
  return count ? { low, high, count } : null;
}

/**
 * Draw a map on a canvas, a pixel for each value, scaled to its own range. What is not a number stays empty.
 * The canvas keeps the values.
 */
export function draw(canvas, values, height, width, transfer = (share) => share) {
  Object.assign(canvas, { values, width, height });
  const pixels = new ImageData(width, height);
  const { low, high } = range(values) ?? { low: 0, high: 0 };
  values.forEach((value, index) => {
    if (Number.isFinite(value)) {
      pixels.data.set([...colour(transfer(high > low ? (value - low) / (high - low) : 0)), 255], 4 * index);
    }
  });
  canvas.getContext("2d").putImageData(pixels, 0, 0);
}

/** The largest values: [{row, column, value}], rows and columns from 1. */
export function largest(values, width, number) {
  const indices = Array.from(values.keys()).filter((index) => Number.isFinite(values[index]));
  indices.sort((one, other) => values[other] - values[one]);
  return indices.slice(0, number).map((index) => ({
    row: Math.floor(index / width) + 1,
    column: (index % width) + 1,
    value: values[index],
  }));
}

/** A number with three digits. */
export const short = (value) => String(Number(value.toPrecision(3)));

/** What a map of one patch shows, in words. */
export function describeRow(values, width) {
  const extent = range(values);
  if (extent === null) {
    return "nothing";
  }
  const [top] = largest(values, width, 1);
  const visited = extent.count < values.length ? `has visited ${extent.count} of ${values.length} patches; ` : "";
  return `${visited}from ${short(extent.low)} to ${short(extent.high)}, most from row ${top.row}, column ${top.column}`;
}

/** What a receptive field shows, in words. */
export function describeField(values, width) {
  const extent = range(values);
  if (extent === null || extent.high === 0) {
    return "no pixel contributes";
  }
  const sorted = Array.from(values).sort((one, other) => other - one);
  const total = sorted.reduce((one, other) => one + other, 0);
  let [share, number] = [0, 0];
  while (share < total / 2) {
    share += sorted[number];
    number += 1;
  }
  const [top] = largest(values, width, 1);
  const percent = short((100 * number) / values.length);
  return `half of the contribution comes from ${percent} % of the pixels; most from row ${top.row}, column ${top.column}`;
}
