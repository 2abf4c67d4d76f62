// The checkpoints: a list, to download, score and sample with.

import { element, facts, fill, showError } from "./elements.js";
import { bytes, count, decimal, moment, short } from "./figures.js";
import { download, get } from "./service.js";

export const title = "Checkpoints";

export async function show(body, { query, signal }) {
  const after = query.get("after");
  const trouble = element("div");
  const list = element("ul", { class: "list cards" });
  const paging = element("nav", { class: "paging", "aria-label": "Pages of checkpoints" });
  fill(body, trouble, list, paging);
  const page = await get(`/v1/checkpoints?${new URLSearchParams({ limit: "20", ...(after && { after }) })}`, signal);
  fill(list, page.data.map((checkpoint) => item(checkpoint, trouble)));
  if (!page.data.length) fill(list, element("li", { class: "empty" }, "No checkpoints yet; training jobs write them."));
  fill(paging, after ? element("a", { href: "#/checkpoints" }, "Newest") : null,
    page.has_more ? element("a", { href: `#/checkpoints?after=${page.last_id}` }, "Older") : null);
}

function item(checkpoint, trouble) {
  const { id, metrics, model } = checkpoint;
  const save = async (event) => {
    const button = event.target;
    button.disabled = true;
    try {
      await download(`/v1/checkpoints/${id}/download`, `${id}.zip`, checkpoint.bytes);
    } catch (error) {
      showError(trouble, error);
    }
    button.disabled = false;
    button.focus();
  };
  return element("li", { class: "card" },
    element("h2", {}, `Step ${count(checkpoint.step)}`),
    facts([
      ["id", element("code", {}, id)],
      ["job", checkpoint.job && element("a", { href: `#/jobs/${checkpoint.job}` }, short(checkpoint.job))],
      ["train", Number.isFinite(metrics.train_bits_per_dim) && `${decimal(metrics.train_bits_per_dim)} bits/dim`],
      ["validation", Number.isFinite(metrics.validation_bits_per_dim) && `${decimal(metrics.validation_bits_per_dim)} bits/dim`],
      ["images", `${model.width} × ${model.height}, ${model.channels === 1 ? "grey" : "RGB"}`],
      ["images seen", count(checkpoint.images_seen)],
      ["written", moment(checkpoint.created_at)],
      ["size", bytes(checkpoint.bytes)],
    ]),
    element("p", { class: "buttons" },
      element("button", { type: "button", id: `save-${id}`, "aria-label": `Download the checkpoint of step ${checkpoint.step}, ${short(id)}`, onclick: save }, "Download"),
      element("a", { class: "button", href: `#/score?model=${id}` }, "Score"),
      element("a", { class: "button", href: `#/sample?model=${id}` }, "Sample")));
}
