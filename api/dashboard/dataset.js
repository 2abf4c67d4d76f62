// One dataset: its contact sheet, and the start of a training on it.

import { describe } from "./datasets.js";
import { choice, element, facts, field, fill, showError } from "./elements.js";
import { bytes, moment } from "./figures.js";
import { get, post } from "./service.js";
import { contactSheet } from "./sheet.js";

export const title = "Dataset";

// What of a recipe can be changed here; the API takes more.
const FIELDS = [
  ["steps", "Steps", { min: 1, step: 1 }],
  ["batch_size", "Batch size", { min: 1, step: 1 }],
  ["learning_rate", "Learning rate", { min: 0, step: "any" }],
  ["evaluation_every", "Validate every", { min: 1, step: 1 }],
  ["sample_every", "Draw samples every", { min: 1, step: 1 }],
  ["checkpoint_every", "Checkpoint every", { min: 1, step: 1 }],
  ["seed", "Seed", { min: 0, step: 1 }],
];

export async function show(body, { id, signal }) {
  const [dataset, presets] = await Promise.all([get(`/v1/datasets/${id}`, signal), get("/v1/presets", signal)]);
  const sheet = element("div", { class: "sheet large" });
  fill(body, element("section", { class: "card", "aria-label": "Images" }, element("h2", {}, dataset.name ?? dataset.id), element("p", {}, describe(dataset)), sheet,
    facts([["id", element("code", {}, dataset.id)], ["size", bytes(dataset.bytes)], ["uploaded", moment(dataset.created_at)]])), training(dataset, presets.data, signal));
  await contactSheet(id, sheet, signal);
}

function training(dataset, presets, signal) {
  const about = element("p", {});
  const trouble = element("div");
  const describePreset = () => {
    const chosen = presets.find((each) => each.id === preset.value);
    about.textContent = chosen.description;
    for (const [name] of FIELDS) form.elements[name].placeholder = chosen.training[name];
  };
  const preset = choice("preset", presets.map((each) => [each.id, each.id]), "small", { name: "preset", onchange: describePreset });
  const inputs = FIELDS.map(([name, label, bounds]) => field(label, element("input", { id: `train-${name}`, name, type: "number", ...bounds })));
  const begin = element("button", {}, "Start training");
  const form = element("form", {
    class: "card",
    "aria-labelledby": "train-title",
    onsubmit: async (event) => {
      event.preventDefault();
      begin.disabled = true;
      const changed = FIELDS.map(([name]) => [name, form.elements[name].value]).filter(([, value]) => value !== "");
      const wanted = { dataset: dataset.id, model: { preset: preset.value }, training: Object.fromEntries(changed.map(([name, value]) => [name, Number(value)])) };
      try {
        const job = await post("/v1/training-jobs", wanted, { signal });
        location.hash = `#/jobs/${job.id}`;
      } catch (error) {
        showError(trouble, error);
        begin.disabled = false;
      }
    },
  }, element("h2", { id: "train-title" }, "Train a model on it"), field("Preset", preset), about,
  element("div", { class: "fields" }, inputs), element("small", {}, "What is left empty is as the preset has it."), element("p", { class: "buttons" }, begin), trouble);
  describePreset();
  return form;
}
