// A dataset's contact sheet: some of its images in one.

import { element, fill, showError } from "./elements.js";
import { Problem, picture } from "./service.js";

/** Fills `place` with the sheet of a dataset, or says why there is none. */
export async function contactSheet(datasetId, place, signal) {
  try {
    const image = await picture(`/v1/datasets/${datasetId}/contact-sheet`, "Contact sheet: some of the dataset's images", signal);
    image.className = "pixels";
    fill(place, image);
  } catch (error) {
    if (error instanceof Problem && error.status === 404) fill(place, element("p", { class: "empty" }, "This service makes no contact sheet of it."));
    else showError(place, error);
  }
}
