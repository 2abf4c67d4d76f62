// Sampling: images drawn from a model, or on the way from one image to another.

import { element, facts, field, fill, showError } from "./elements.js";
import { count } from "./figures.js";
import { modelField, noModel } from "./models.js";
import { all, download, get, picture, post } from "./service.js";
import { imageChoice } from "./sheet.js";
import { asking, ended } from "./waiting.js";

export const title = "Draw samples";

const MOST_STEPS = 64;

export async function show(body, { query, signal }) {
  const [model, datasets] = await Promise.all([modelField("model", query.get("model"), signal), all("/v1/datasets", signal)]);
  if (!model) return fill(body, noModel());
  const number = (id, attributes) => element("input", { id, name: id, type: "number", required: true, ...attributes });
  const draw = element("div", { class: "fields" },
    field("How many", number("num-samples", { min: 1, max: 400, value: 16 })),
    field("Temperature", number("temperature", { min: 0, max: 10, step: 0.05, value: 1 }), "1 is the model; less is smoother"));
  const dataset = element("select", { id: "dataset", name: "dataset", onchange: () => offer() },
    datasets.map((each) => element("option", { value: each.id }, `${each.name ?? each.id}, ${count(each.num_images)} images, ${each.shape[2]} × ${each.shape[1]}`)));
  const from = number("from", { min: 0, value: 0, oninput: () => press() });
  const to = number("to", { min: 0, value: 1, oninput: () => press() });
  const tiles = element("div", { class: "tiles", role: "group", "aria-label": "Some of the dataset's images" });
  let next = from;
  const press = () => {
    for (const tile of tiles.querySelectorAll("button")) tile.setAttribute("aria-pressed", `${[from.value, to.value].includes(tile.dataset.index)}`);
  };
  const take = (index) => {
    next.value = index;
    next = next === from ? to : from;
    press();
  };
  const offer = async () => {
    const chosen = datasets.find(({ id }) => id === dataset.value);
    if (!chosen) return;
    for (const end of [from, to]) end.max = chosen.num_images - 1;
    await imageChoice(chosen, tiles, take, signal);
    press();
  };
  const between = element("div", { hidden: true },
    field("Dataset", dataset),
    element("small", {}, "Choose the first image, then the second; or write their numbers, from 0 on, training images first."),
    tiles,
    element("div", { class: "fields" }, field("From image", from), field("To image", to), field("Steps", number("steps", { min: 2, max: MOST_STEPS, value: 9 }), "both ends included")));
  const way = (value, text, checked) => element("label", {}, element("input", { type: "radio", name: "way", value, checked, onchange: () => choose(value) }), ` ${text}`);
  const choose = (value) => {
    draw.hidden = value !== "draw";
    between.hidden = value === "draw";
    for (const part of [draw, between]) for (const input of part.querySelectorAll("input, select")) input.disabled = part.hidden;
    if (!between.hidden && !tiles.firstChild) offer();
  };
  const begin = element("button", {}, "Draw");
  const progress = element("div");
  const results = element("div");
  const form = element("form", {
    class: "card",
    onsubmit: asking(begin, progress, results, async () => {
      const job = await ended(await post("/v1/sampling-jobs", request(form), { signal, headers: { Prefer: "respond-async" } }), progress, signal);
      await showImages(job, results, signal);
    }),
  },
  model,
  element("fieldset", {}, element("legend", {}, "What to draw"), way("draw", "samples", true), way("between", "the way between two images", false)),
  draw, between,
  element("div", { class: "fields" }, field("Seed", number("seed", { min: 0, value: 0 }), "the same seed draws the same images")),
  element("p", { class: "buttons" }, begin));
  form.querySelector("select").name = "model";
  choose("draw");
  fill(body, form, progress, results);
}

function request(form) {
  const value = (name) => Number(form.elements[name].value);
  const wanted = { model: form.elements.model.value, seed: value("seed") };
  if (form.elements.way.value === "draw") return { ...wanted, num_samples: value("num-samples"), temperature: value("temperature") };
  return { ...wanted, num_samples: value("steps"), between: { dataset: form.elements.dataset.value, images: [value("from"), value("to")] } };
}

async function showImages(job, results, signal) {
  const { between, num_samples: number, temperature, seed } = job.request;
  const { data } = await get(`/v1/jobs/${job.id}/artifacts`, signal);
  const wanted = between ? data.filter((file) => file.name.startsWith("png/")) : data.filter((file) => file.name === "grid.png");
  const alt = (index) => (between ? `Step ${index + 1} of ${number} between the images ${between.images.join(" and ")}` : `${number} samples`);
  const images = await Promise.all(wanted.map((file, index) => picture(file.url, alt(index), signal)));
  for (const image of images) image.className = "pixels";
  const save = (name) => element("button", {
    type: "button", onclick: async () => {
      try { await download(`/v1/jobs/${job.id}/artifacts/${name}`, name); } catch (error) { showError(trouble, error); }
    },
  }, `Download ${name}`);
  const trouble = element("div");
  fill(results, element("section", { class: "card", "aria-label": "Images drawn" },
    element("div", { class: between ? "way" : "grid-frame" }, images),
    facts([["images", `${number}`], between ? ["between", between.images.join(" and ")] : ["temperature", `${temperature}`], ["seed", `${seed}`]]),
    element("p", { class: "buttons" }, save("grid.png"), save("samples.npz")), trouble));
}
