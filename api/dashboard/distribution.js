// Where bits/dim lie among those of a model's validation images, of which the quantiles are known.

import { element, svg } from "./elements.js";
import { decimal } from "./figures.js";

const WIDTH = 640;
const HEIGHT = 130;
const BASE = HEIGHT - 24;
const BINS = 40;

/** The part of validation images, from 0 to 1, that take fewer bits/dim; `quantiles` rise. */
export function share(quantiles, bits) {
  if (bits <= quantiles[0]) return 0;
  const above = quantiles.findIndex((quantile) => quantile > bits);
  if (above < 0) return 1;
  const width = quantiles[above] - quantiles[above - 1];
  return (above - 1 + (bits - quantiles[above - 1]) / width) / (quantiles.length - 1);
}

/** The same in words. */
export function place(quantiles, bits) {
  const part = share(quantiles, bits);
  if (part === 0) return "fewer bits than any validation image";
  if (part === 1) return "more bits than any validation image";
  return `percentile ${Math.round(100 * part)}: more bits than ${Math.round(100 * part)} % of the validation images`;
}

/** A histogram of the validation images with a mark for each of `scored`, bits/dim. */
export function plot(quantiles, scored) {
  const least = Math.min(quantiles[0], ...scored);
  const most = Math.max(quantiles.at(-1), ...scored);
  const spread = most - least || 1;
  const x = (bits) => 10 + ((bits - least) / spread) * (WIDTH - 20);
  const edges = Array.from({ length: BINS + 1 }, (_, i) => least + (i / BINS) * spread);
  const parts = edges.slice(1).map((edge, i) => share(quantiles, edge) - share(quantiles, edges[i]));
  const tallest = Math.max(...parts, 1e-9);
  const bars = parts.map((part, i) => {
    const height = (part / tallest) * (BASE - 14);
    return svg("rect", { class: "bar", x: x(edges[i]) + 0.5, y: BASE - height, width: Math.max(1, (WIDTH - 20) / BINS - 1), height });
  });
  const marks = scored.map((bits, i) => svg("g", { class: "mark" },
    svg("line", { x1: x(bits), x2: x(bits), y1: 12, y2: BASE }),
    scored.length <= 12 ? svg("text", { x: x(bits), y: 10, "text-anchor": "middle" }, `${i + 1}`) : null));
  const ends = [[10, "start", least], [WIDTH - 10, "end", most]].map(([at, anchor, bits]) =>
    svg("text", { class: "end", x: at, y: HEIGHT - 6, "text-anchor": anchor }, `${decimal(bits, 2)} bits/dim`));
  const label = `Histogram of the validation images' bits/dim, from ${decimal(quantiles[0], 2)} to ${decimal(quantiles.at(-1), 2)}, median ${decimal(quantiles[50], 2)}, with a mark for each scored image`;
  return element("figure", { class: "distribution" },
    svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": label }, bars, svg("line", { class: "base", x1: 10, x2: WIDTH - 10, y1: BASE, y2: BASE }), marks, ends),
    element("figcaption", {}, "Bars: the model's validation images. Lines: the images scored here, by number."));
}
