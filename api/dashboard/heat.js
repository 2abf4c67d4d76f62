// Maps of bits: colours of numbers, and canvases of them.

import { element } from "./elements.js";

// Points of the colour map "magma" of matplotlib, dark to light.
const STOPS = [[0, 0, 4], [28, 16, 68], [79, 18, 123], [129, 37, 129], [181, 54, 122], [229, 80, 100], [251, 135, 97], [254, 194, 135], [252, 253, 191]];

function colour(part) {
  const place = Math.min(1, Math.max(0, part)) * (STOPS.length - 1);
  const below = Math.min(STOPS.length - 2, Math.floor(place));
  return STOPS[below].map((value, i) => Math.round(value + (place - below) * (STOPS[below + 1][i] - value)));
}

/** Bits a pixel of each image, of bits [N, H, W, C]: {height, width, maps, least, most}. */
export function pixelMaps({ shape: [images, height, width, channels], data }) {
  const maps = [];
  let least = Infinity;
  let most = -Infinity;
  for (let image = 0; image < images; image += 1) {
    const map = new Float32Array(height * width);
    for (let pixel = 0; pixel < map.length; pixel += 1) {
      for (let c = 0; c < channels; c += 1) map[pixel] += data[(image * map.length + pixel) * channels + c];
      least = Math.min(least, map[pixel]);
      most = Math.max(most, map[pixel]);
    }
    maps.push(map);
  }
  return { height, width, channels, maps, least, most };
}

/** A canvas of one map, in the colours from `least` to `most`. */
export function mapCanvas(map, { height, width, least, most }, label) {
  const canvas = element("canvas", { width, height, role: "img", "aria-label": label, class: "pixels" });
  const context = canvas.getContext("2d");
  const image = context.createImageData(width, height);
  map.forEach((bits, pixel) => {
    image.data.set([...colour((bits - least) / (most - least || 1)), 255], pixel * 4);
  });
  context.putImageData(image, 0, 0);
  return canvas;
}

/** The scale of the colours, with its ends. */
export function legend({ least, most }) {
  const width = 128;
  const ramp = Float32Array.from({ length: width }, (_, i) => i);
  const canvas = mapCanvas(ramp, { height: 1, width, least: 0, most: width - 1 }, "Colours from few bits to many");
  return element("p", { class: "scale" }, least.toFixed(1), canvas, `${most.toFixed(1)} bits a pixel`);
}
