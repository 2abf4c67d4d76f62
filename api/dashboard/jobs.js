// The list of jobs.

import { choice, element, fill, showError } from "./elements.js";
import { count, decimal, finish, moment, short } from "./figures.js";
import { every, get } from "./service.js";

export const title = "Jobs";

const TYPES = ["training", "likelihood", "sampling"];
const STATUSES = ["queued", "running", "pausing", "paused", "cancelling", "succeeded", "failed", "cancelled"];
const LOOK_SECONDS = 2;

export async function show(body, { query, signal }) {
  const chosen = { type: query.get("type") || "", status: query.get("status") || "" };
  const after = query.get("after");
  const go = () => {
    const wanted = Object.entries({ type: type.value, status: status.value }).filter(([, value]) => value);
    location.hash = `#/jobs?${new URLSearchParams(wanted)}`;
  };
  const type = choice("type", [["", "all types"], ...TYPES.map((name) => [name, name])], chosen.type, { onchange: go });
  const status = choice("status", [["", "all states"], ...STATUSES.map((name) => [name, name])], chosen.status, { onchange: go });
  const filters = element("div", { class: "filters", role: "group", "aria-label": "Filters" },
    element("label", { for: "type" }, "Type"), type, element("label", { for: "status" }, "State"), status);
  const list = element("ul", { class: "list" });
  const paging = element("nav", { class: "paging", "aria-label": "Pages of jobs" });
  const trouble = element("div");
  fill(body, filters, trouble, list, paging);

  const filter = Object.entries(chosen).filter(([, value]) => value);
  const asked = new URLSearchParams([...filter, ["limit", "20"], ...(after ? [["after", after]] : [])]);
  let shown = "";
  await every(LOOK_SECONDS, async () => {
    try {
      const page = await get(`/v1/jobs?${asked}`, signal);
      trouble.replaceChildren();
      if (JSON.stringify(page) === shown) return;
      shown = JSON.stringify(page);
      fill(list, page.data.map(row));
      if (!page.data.length) fill(list, element("li", { class: "empty" }, "No jobs here. ", element("a", { href: "#/datasets" }, "Upload images and train a model"), "."));
      fill(paging,
        after ? element("a", { id: "newest", href: `#/jobs?${new URLSearchParams(filter)}` }, "Newest") : null,
        page.has_more ? element("a", { id: "older", href: `#/jobs?${new URLSearchParams([...filter, ["after", page.last_id]])}` }, "Older") : null);
    } catch (error) {
      if (error.status === 401) throw error; // nobody asks on without a key
      showError(trouble, error);
    }
  }, signal);
}

function row(job) {
  const { progress } = job;
  return element("li", { class: "row job-row" },
    element("div", { class: "what" },
      element("a", { id: `open-${job.id}`, href: `#/jobs/${job.id}` }, `${job.type} ${short(job.id)}`),
      element("small", {}, summary(job))),
    badge(job.status),
    progress ? progressBar(job) : element("div"),
    element("small", { class: "when" }, moment(job.created_at)));
}

/** What a job is about, in a few words. */
export function summary(job) {
  const { request, result } = job;
  const parts = [request.model.preset || short(request.model)];
  const bits = result?.validation_bits_per_dim ?? result?.bits_per_dim;
  if (Number.isFinite(bits)) parts.push(`${decimal(bits)} bits/dim`);
  if (job.type === "sampling") parts.push(request.between ? "interpolation" : `${request.num_samples} samples`);
  if (job.error) parts.push(job.error.code);
  return parts.join(" · ");
}

export function badge(status) {
  return element("span", { class: `badge ${status}` }, status);
}

export function progressBar(job) {
  const { percent_done: percent, step, total_steps: total } = job.progress;
  return element("div", { class: "progress" },
    element("progress", { max: 100, value: percent, "aria-label": `Progress of ${job.type} job ${short(job.id)}` }),
    element("small", {}, [`${Math.floor(percent)} % (${count(step)} of ${count(total)})`, finish(job), job.queue_position ? `${job.queue_position} before it` : ""].filter(Boolean).join(", ")));
}
