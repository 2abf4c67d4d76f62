// The choice of a model: a training job, meaning its best checkpoint, or a checkpoint.

import { element, field } from "./elements.js";
import { count, decimal, moment, short } from "./figures.js";
import { all } from "./service.js";

/** A field that chooses among the models there are; none where there are none. `chosen` is an id. */
export async function modelField(id, chosen, signal) {
  const [jobs, checkpoints] = await Promise.all([all("/v1/jobs?type=training", signal), all("/v1/checkpoints", signal)]);
  const trained = jobs.filter((job) => job.result?.best_checkpoint || job.result?.last_checkpoint);
  const presets = new Map(jobs.map((job) => [job.id, job.request.model.preset]));
  if (!trained.length && !checkpoints.length) return null;
  const option = (value, text) => element("option", { value, selected: value === chosen }, text);
  const bits = (value) => (Number.isFinite(value) ? `, ${decimal(value)} bits/dim` : "");
  const groups = [
    ["Training jobs (the best checkpoint of each)", trained.map((job) =>
      option(job.id, `${job.request.model.preset}${bits(job.result.validation_bits_per_dim)}, ${moment(job.created_at)}, ${short(job.id)}`))],
    ["Checkpoints", checkpoints.map((checkpoint) =>
      option(checkpoint.id, `${presets.get(checkpoint.job) ?? "imported"}, step ${count(checkpoint.step)}${bits(checkpoint.metrics.validation_bits_per_dim)}, ${short(checkpoint.id)}`))],
  ];
  const select = element("select", { id, required: true }, groups.filter(([, options]) => options.length).map(([label, options]) => element("optgroup", { label }, options)));
  return field("Model", select);
}

/** What to do where there is no model. */
export function noModel() {
  return element("p", { class: "empty" }, "There is no trained model yet. ", element("a", { href: "#/datasets" }, "Upload images and train one"), ".");
}
