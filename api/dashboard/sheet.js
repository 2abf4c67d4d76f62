// A dataset's contact sheet: some of its images in one.

import { element, fill, showError } from "./elements.js";
import { Problem, picture } from "./service.js";

const MOST = 64; // images on a sheet, evenly spread over the dataset, row by row, each in a frame of one pixel
const FRAME = 1;

const read = (datasetId, signal) => picture(`/v1/datasets/${datasetId}/contact-sheet`, "Contact sheet: some of the dataset's images", signal);

/** Fills `place` with the sheet of a dataset, or says why there is none. */
export async function contactSheet(datasetId, place, signal) {
  try {
    const image = await read(datasetId, signal);
    image.className = "pixels";
    fill(place, image);
  } catch (error) {
    refuse(place, error);
  }
}

/** Fills `place` with a button for each image on the sheet; `onchoose` is called with the image's index. */
export async function imageChoice({ id, num_images: count, shape: [, height, width] }, place, onchoose, signal) {
  try {
    const sheet = await read(id, signal);
    const shown = Math.min(MOST, count);
    const columns = Math.ceil(Math.sqrt(shown));
    const tile = (_, place) => {
      const canvas = element("canvas", { width, height, class: "pixels", "aria-hidden": "true" });
      const left = (place % columns) * (width + 2 * FRAME) + FRAME;
      const top = Math.floor(place / columns) * (height + 2 * FRAME) + FRAME;
      canvas.getContext("2d").drawImage(sheet, left, top, width, height, 0, 0, width, height);
      const index = Math.floor((place * count) / shown);
      return element("button", { type: "button", "data-index": index, "aria-label": `Image ${index}`, "aria-pressed": "false", onclick: () => onchoose(index) }, canvas);
    };
    fill(place, Array.from({ length: shown }, tile));
  } catch (error) {
    refuse(place, error);
  }
}

function refuse(place, error) {
  if (error instanceof Problem && error.status === 404) fill(place, element("p", { class: "empty" }, "This service makes no contact sheet of it."));
  else showError(place, error);
}
