// The datasets: a list, and the upload of another one.

import { announce, element, fileDrop, fill, showError } from "./elements.js";
import { bytes, count, moment } from "./figures.js";
import { get, upload } from "./service.js";
import { contactSheet } from "./sheet.js";

export const title = "Datasets";

export async function show(body, { query, signal }) {
  const progress = element("div");
  const drop = fileDrop("files", "Upload a dataset", "Drop or choose a .zip or .tar(.gz) of images, an .npy or .npz, or several image files.", "", async (files) => {
    const form = new FormData();
    for (const file of files) form.append("file", file, file.name);
    const bar = element("progress", { max: 1, value: 0, "aria-label": "Upload" });
    const line = element("small", {}, "sending");
    fill(progress, element("div", { class: "progress" }, bar, line));
    try {
      const dataset = await upload("/v1/datasets", form, (part) => {
        bar.value = part;
        line.textContent = part < 1 ? `${Math.floor(100 * part)} % sent` : "sent; the service decodes and checks the images";
      }, signal);
      fill(progress, element("p", { class: "done" }, `Uploaded ${count(dataset.num_images)} images, ${count(dataset.num_validation)} of them for validation${dataset.num_test ? `, ${count(dataset.num_test)} for test` : ""}.`));
      announce(`Uploaded ${dataset.num_images} images.`);
      await list();
    } catch (error) {
      showError(progress, error);
    }
  });
  const items = element("ul", { class: "list cards" });
  const paging = element("nav", { class: "paging", "aria-label": "Pages of datasets" });
  const list = async () => {
    const after = query.get("after");
    const page = await get(`/v1/datasets?${new URLSearchParams({ limit: "20", ...(after && { after }) })}`, signal);
    fill(items, page.data.map((dataset) => item(dataset, signal)));
    if (!page.data.length) fill(items, element("li", { class: "empty" }, "No datasets yet."));
    fill(paging, after ? element("a", { href: "#/datasets" }, "Newest") : null,
      page.has_more ? element("a", { href: `#/datasets?after=${page.last_id}` }, "Older") : null);
  };
  fill(body, element("section", { class: "card", "aria-label": "Upload" }, drop, progress), items, paging);
  await list();
}

function item(dataset, signal) {
  const sheet = element("div", { class: "sheet" });
  contactSheet(dataset.id, sheet, signal);
  return element("li", { class: "card" },
    element("h2", {}, element("a", { id: `open-${dataset.id}`, href: `#/datasets/${dataset.id}` }, dataset.name ?? dataset.id)),
    element("p", {}, describe(dataset)), element("small", {}, `${bytes(dataset.bytes)}, ${moment(dataset.created_at)}`), sheet);
}

/** A dataset's images in words. */
export function describe({ num_images: images, num_validation: validation, num_test: test, shape: [channels, height, width] }) {
  return `${count(images)} images, ${count(validation)} for validation, ${test ? `${count(test)} for test, ` : ""}${width} × ${height}, ${channels === 1 ? "grey" : "RGB"}`;
}
