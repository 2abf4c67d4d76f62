// One job: its state, its curves and samples as they come, its events, log and files.

import { CURVES, Curve, Rows } from "./curves.js";
import { announce, element, facts, fill, showError } from "./elements.js";
import { follow, isTerminal } from "./events.js";
import { bytes, clock, decimal, duration, moment } from "./figures.js";
import { badge, progressBar, summary } from "./jobs.js";
import { Samples } from "./samples.js";
import { download, every, get, picture, post } from "./service.js";

export const title = "Job";

const LOOK_SECONDS = 2;
const MOST_LINES = 500;
const DRAW_SECONDS = 0.25;

export async function show(body, { id, signal }) {
  const page = new Page(body, id, signal);
  await page.look();
  await Promise.all([
    every(LOOK_SECONDS, () => page.refresh(), signal),
    page.listen(),
  ]);
}

class Page {
  constructor(body, id, signal) {
    Object.assign(this, { body, id, signal, job: null, shown: "", files: "" });
    this.head = element("section", { class: "card", "aria-label": "State" });
    this.trouble = element("div"); // of what was asked for
    this.outage = element("div"); // of what is read every so often
    this.connection = element("p", { class: "connection" });
    this.curves = [];
    this.samples = null;
    this.artifacts = element("ul", { class: "list files" });
    this.events = element("ol", { class: "events" });
    this.log = element("pre", { class: "log", tabindex: 0, role: "region", "aria-label": "Log" });
  }

  /** Reads the job for the first time, and lays the page out by its type. */
  async look() {
    this.job = await get(`/v1/jobs/${this.id}`, this.signal);
    const isTraining = this.job.type === "training";
    const parts = [this.head, this.trouble, this.outage];
    if (isTraining) {
      this.curves = CURVES.map((curve) => new Curve(curve, this.signal));
      this.samples = new Samples(this.id, this.signal);
      parts.push(this.connection, element("section", { class: "curves", "aria-label": "Curves" }, this.curves.map((curve) => curve.figure)), this.samples.section);
    } else {
      this.pictures = element("div", { class: "pictures" });
      parts.push(this.pictures);
    }
    const details = (name, content, open) => element("details", { class: "card", open }, element("summary", {}, name), content);
    parts.push(details("Files", this.artifacts, !isTraining), details("Events", this.events, !isTraining), details("Log", this.log, false));
    fill(this.body, parts);
    this.state();
    await this.listFiles();
  }

  async refresh() {
    if (this.job && isTerminal(this.job.status) && this.isSettled) return;
    try {
      const ended = this.job && isTerminal(this.job.status);
      this.job = await get(`/v1/jobs/${this.id}`, this.signal);
      this.state();
      await this.listFiles();
      this.outage.replaceChildren();
      this.isSettled = ended; // its files were read once more after its end
    } catch (error) {
      if (error.status === 401) throw error; // nobody asks on without a key
      showError(this.outage, error);
    }
  }

  state() {
    const { job } = this;
    if (JSON.stringify(job) === this.shown) return;
    const before = this.shown && JSON.parse(this.shown).status;
    this.shown = JSON.stringify(job);
    if (before && before !== job.status) announce(`The job is ${job.status}.`);
    const end = job.finished_at && job.started_at ? duration(job.finished_at - job.started_at) : null;
    const { result } = job;
    const link = (kind, value) => value && element("a", { id: `fact-${value}`, href: `#/${kind}/${value}` }, element("code", {}, value));
    fill(this.head,
      element("p", { class: "headline" }, badge(job.status), element("span", {}, `${job.type} · ${summary(job)}`)),
      job.progress ? progressBar(job) : null,
      job.error ? element("p", { class: "error", role: "alert" }, `${job.error.message} (${job.error.code})`) : null,
      element("p", { class: "buttons" }, this.buttons()),
      facts([
        ["id", element("code", {}, job.id)],
        ["dataset", link("datasets", job.request.dataset)],
        ["asked for", moment(job.created_at)],
        ["began", job.started_at && moment(job.started_at)],
        ["took", end],
        ["attempt", job.attempt > 1 ? `${job.attempt}` : null],
        ["bits/dim", result?.bits_per_dim !== undefined ? `${decimal(result.bits_per_dim)}${result.standard_error ? ` ± ${decimal(result.standard_error)}` : ""}` : null],
        ["best validation", Number.isFinite(result?.validation_bits_per_dim) ? `${decimal(result.validation_bits_per_dim)} bits/dim` : null],
        ["deleted", job.expires_at && moment(job.expires_at)],
        ...Object.entries(job.metadata),
      ]));
  }

  buttons() {
    const { type, status, result } = this.job;
    const can = {
      pause: type === "training" && ["queued", "running"].includes(status),
      resume: status === "paused",
      cancel: ["queued", "running", "pausing", "paused"].includes(status),
    };
    const action = (name) => element("button", { type: "button", id: `job-${name}`, class: name === "cancel" ? "danger" : "", onclick: (event) => this.act(name, event.target) },
      name[0].toUpperCase() + name.slice(1));
    const model = result?.best_checkpoint || result?.last_checkpoint ? this.id : null;
    return [
      ...Object.keys(can).filter((name) => can[name]).map(action),
      model ? element("a", { class: "button", id: "job-score", href: `#/score?model=${model}` }, "Score images with it") : null,
      model ? element("a", { class: "button", id: "job-sample", href: `#/sample?model=${model}` }, "Draw samples from it") : null,
    ];
  }

  async act(name, button) {
    button.disabled = true;
    try {
      this.job = await post(`/v1/jobs/${this.id}/${name}`, undefined, { signal: this.signal });
      this.trouble.replaceChildren();
    } catch (error) {
      showError(this.trouble, error);
    }
    button.disabled = false;
    this.isSettled = false;
    this.state();
    if (!document.activeElement || document.activeElement === document.body) this.body.querySelector(".buttons button, .buttons a")?.focus();
  }

  async listFiles() {
    const { data } = await get(`/v1/jobs/${this.id}/artifacts`, this.signal);
    const known = JSON.stringify(data);
    if (known === this.files) return;
    this.files = known;
    this.samples?.update(data);
    const singles = data.filter((file) => !file.name.startsWith("png/"));
    fill(this.artifacts, singles.map((file) => element("li", { class: "row" },
      element("span", { class: "what" }, file.name), element("small", {}, bytes(file.bytes)),
      element("button", { type: "button", class: "quiet", id: `file-${file.name}`, "aria-label": `Download ${file.name}`, onclick: () => this.save(file) }, "Download"))));
    if (!singles.length) fill(this.artifacts, element("li", { class: "empty" }, "No files yet."));
    if (this.pictures) {
      const shown = data.filter((file) => /^(grid|bits_map|likelihood)\.png$/.test(file.name));
      const images = await Promise.all(shown.map((file) => picture(file.url, file.name, this.signal)));
      images.forEach((image) => image.classList.add(image.alt === "grid.png" ? "pixels" : "plot"));
      fill(this.pictures, images);
    }
  }

  async save(file) {
    try {
      await download(file.url, file.name.replaceAll("/", "-"), file.bytes);
    } catch (error) {
      showError(this.trouble, error);
    }
  }

  /** Follows the events; the curves show the metrics read at first until the events have come as far. */
  async listen() {
    const rows = new Rows();
    let first = { step: [] };
    if (this.curves.length) {
      first = (await get(`/v1/jobs/${this.id}/metrics`, this.signal)).columns;
      first.step ||= [];
      this.draw(first);
    }
    let drawing = null;
    const redraw = () => { drawing = null; if (!this.signal.aborted && rows.rows.length >= first.step.length) this.draw(rows.columns); };
    for await (const event of follow(this.id, (state) => this.connected(state), this.signal)) {
      if (event.type === "metrics") {
        rows.add(event.data);
        drawing ??= setTimeout(redraw, DRAW_SECONDS * 1000);
      } else {
        this.tell(event);
      }
      if (event.type === "status" && this.shown) this.refreshSoon();
    }
    this.connected("");
  }

  connected(state) {
    this.connection.textContent = state;
    this.connection.classList.toggle("live", state === "live");
  }

  refreshSoon() {
    this.soon ??= setTimeout(() => { this.soon = null; if (!this.signal.aborted) this.refresh().catch((error) => showError(this.outage, error)); }, 200);
  }

  draw(columns) {
    for (const curve of this.curves) curve.draw(columns);
  }

  tell({ type, data, created_at: at }) {
    if (type === "log") {
      const isAtEnd = this.log.scrollHeight - this.log.scrollTop - this.log.clientHeight < 30;
      this.log.append(`${data.line}\n`);
      while (this.log.childNodes.length > MOST_LINES) this.log.firstChild.remove();
      if (isAtEnd) this.log.scrollTop = this.log.scrollHeight;
      return;
    }
    const bits = data.metrics?.validation_bits_per_dim;
    const words = {
      status: () => `${data.status}${data.attempt ? `, attempt ${data.attempt}` : ""}${data.message ? `: ${data.message}` : ""}`,
      checkpoint: () => `checkpoint ${data.id} of step ${data.step}${bits ? `, ${decimal(bits)} bits/dim` : ""}`,
      warning: () => `warning: ${data.message}`,
    };
    this.events.append(element("li", { class: type }, element("time", {}, clock(at)), ` ${words[type]?.() ?? type}`));
    while (this.events.childNodes.length > MOST_LINES) this.events.firstChild.remove();
  }
}
