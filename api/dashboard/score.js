// Scoring of images: bits/dim of each, its place among the validation images, and where its bits are spent.

import * as distribution from "./distribution.js";
import { element, facts, fileDrop, fill } from "./elements.js";
import { decimal } from "./figures.js";
import { legend, mapCanvas, pixelMaps } from "./heat.js";
import { modelField, noModel } from "./models.js";
import { arrays } from "./npz.js";
import { get, post, send } from "./service.js";
import { asking, ended } from "./waiting.js";

export const title = "Score images";

const ACCEPTED = "image/png,image/jpeg,image/webp,image/bmp,image/tiff";

export async function show(body, { query, signal }) {
  const model = await modelField("model", query.get("model"), signal);
  if (!model) return fill(body, noModel());
  let files = [];
  const chosen = element("ul", { class: "thumbnails", "aria-label": "Chosen images" });
  const begin = element("button", { disabled: true }, "Score");
  const progress = element("div");
  const results = element("div");
  const choose = (added) => {
    files = [...files, ...added];
    begin.disabled = !files.length;
    begin.textContent = files.length > 1 ? `Score ${files.length} images` : "Score";
    fill(chosen, files.map((file, index) => element("li", {}, thumbnail(file), element("small", {}, file.name),
      element("button", { type: "button", class: "quiet", id: `drop-${index}`, "aria-label": `Leave out ${file.name}`, onclick: () => { files.splice(index, 1); choose([]); } }, "×"))));
  };
  const form = element("form", {
    class: "card",
    onsubmit: asking(begin, progress, results, () => score(form.elements.model.value, files, progress, results, signal), () => files.length > 0),
  }, model, fileDrop("images", "Images", "Drop images here, or choose them. They must be of the size that the model takes.", ACCEPTED, choose), chosen, element("p", { class: "buttons" }, begin));
  form.querySelector("select").name = "model";
  fill(body, form, progress, results);
}

async function score(model, files, progress, results, signal) {
  const form = new FormData();
  form.append("model", model);
  form.append("bits_map", "true");
  for (const file of files) form.append("files", file, file.name);
  const job = await ended(await post("/v1/likelihood-jobs", form, { signal, headers: { Prefer: "respond-async" } }), progress, signal);
  const [checkpoint, stored] = await Promise.all([
    get(`/v1/checkpoints/${job.result.checkpoint}`, signal),
    send(`/v1/jobs/${job.id}/artifacts/bits_map.npz`, { signal }).then((response) => response.arrayBuffer()).then(arrays),
  ]);
  const maps = pixelMaps(stored.bits);
  const dimensions = maps.height * maps.width * maps.channels;
  // With one importance sample, as here, an image's map adds up to its bits.
  const bits = maps.maps.map((map) => map.reduce((sum, each) => sum + each, 0) / dimensions);
  const quantiles = checkpoint.validation_quantiles;
  fill(results,
    element("section", { class: "card", "aria-label": "All images" }, element("h2", {}, "Bits/dim"),
      facts([["mean", `${decimal(job.result.bits_per_dim)}${job.result.standard_error ? ` ± ${decimal(job.result.standard_error)}` : ""}`], ["images", `${bits.length}`], ["checkpoint", element("code", {}, checkpoint.id)]]),
      quantiles ? distribution.plot(quantiles, bits)
        : element("p", { class: "empty" }, "This checkpoint holds no distribution of its validation images, so where these lie in it cannot be said.")),
    element("section", { class: "card", "aria-label": "Image for image" }, element("h2", {}, "Where the bits are spent"), legend(maps),
      element("ol", { class: "scored" }, bits.map((each, index) => scored(files[index], each, maps, index, quantiles)))));
}

function scored(file, bits, maps, index, quantiles) {
  return element("li", {}, element("div", { class: "pair" }, thumbnail(file), mapCanvas(maps.maps[index], maps, `Bits of each pixel of ${file.name}`)),
    element("p", {}, element("span", { class: "number", "aria-hidden": "true" }, `${index + 1}`), element("b", {}, `${decimal(bits)} bits/dim`)), element("small", {}, file.name),
    quantiles ? element("small", {}, distribution.place(quantiles, bits)) : null);
}

function thumbnail(file) {
  const image = new Image();
  const address = URL.createObjectURL(file);
  image.className = "pixels";
  image.alt = file.name;
  image.onload = () => URL.revokeObjectURL(address);
  image.onerror = () => { image.replaceWith(element("span", { class: "unseen-image" }, "no preview")); URL.revokeObjectURL(address); };
  image.src = address;
  return image;
}
