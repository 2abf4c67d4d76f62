// Waiting for a likelihood or sampling job, and saying so.

import { announce, element, showError } from "./elements.js";
import { isTerminal } from "./events.js";
import { get, rest } from "./service.js";

const LOOK_SECONDS = 0.5;

/** The job when it has ended well; `place` shows how far it is. Throws `Error` with its reason where it has not. */
export async function ended(job, place, signal) {
  const bar = element("progress", { max: 100, "aria-label": "Progress" });
  const line = element("small", {});
  const link = element("a", { href: `#/jobs/${job.id}` }, "its page");
  place.replaceChildren(element("div", { class: "progress" }, bar, line, " ", link));
  announce("The job has begun.");
  while (!isTerminal(job.status)) {
    line.textContent = job.queue_position ? `${job.status}, ${job.queue_position} before it` : job.status;
    if (job.progress?.percent_done) bar.value = job.progress.percent_done;
    await rest(LOOK_SECONDS, signal);
    signal.throwIfAborted();
    job = await get(`/v1/jobs/${job.id}`, signal);
  }
  if (job.status !== "succeeded") throw new Error(job.error ? `${job.error.message} (${job.error.code})` : `the job was ${job.status}`);
  place.replaceChildren(element("p", { class: "done" }, "Done: ", element("a", { href: `#/jobs/${job.id}` }, `${job.type} job`), "."));
  announce("Done.");
  return job;
}

/** What a form does when it is sent: `work`, its button off until it is done and `ready`; errors are shown in `progress`. */
export function asking(begin, progress, results, work, ready = () => true) {
  return async (event) => {
    event.preventDefault();
    begin.disabled = true;
    results.replaceChildren();
    try {
      await work();
    } catch (error) {
      showError(progress, error);
    } finally {
      begin.disabled = !ready();
    }
  };
}
