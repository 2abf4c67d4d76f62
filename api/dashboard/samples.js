// Grids of samples that a training job draws on its way, with a slider over its steps.

import { element, fill, showError } from "./elements.js";
import { count } from "./figures.js";
import { picture } from "./service.js";

const NAME = /^samples\/step-(\d+)\.png$/;

export class Samples {
  constructor(jobId, signal) {
    Object.assign(this, { jobId, signal, grids: [], images: new Map() });
    this.slider = element("input", { id: "sample-step", type: "range", min: 0, max: 0, value: 0, step: 1, oninput: () => this.show() });
    this.step = element("output", { for: "sample-step" });
    this.frame = element("div", { class: "grid-frame" });
    this.controls = element("div", { class: "slider", hidden: true }, element("label", { for: "sample-step" }, "Samples at step"), this.slider, this.step);
    this.section = element("section", { class: "card samples", "aria-label": "Samples" }, element("h2", {}, "Samples"), this.controls, this.frame);
    this.frame.append(element("p", { class: "empty" }, "None yet; they come with the checkpoints."));
  }

  /** Takes the job's artifacts; one who looks at the newest grid is shown the next one. */
  update(artifacts) {
    const wasLast = Number(this.slider.value) >= this.grids.length - 1;
    this.grids = artifacts.filter(({ name }) => NAME.test(name)).map((file) => ({ ...file, step: Number(NAME.exec(file.name)[1]) }));
    if (!this.grids.length) return;
    this.grids.sort((a, b) => a.step - b.step);
    this.controls.hidden = false;
    this.slider.max = this.grids.length - 1;
    if (wasLast) this.slider.value = this.grids.length - 1;
    this.show();
  }

  async show() {
    const grid = this.grids[Number(this.slider.value)];
    const words = `${count(grid.step)} (${Number(this.slider.value) + 1} of ${this.grids.length})`;
    this.step.textContent = words;
    this.slider.setAttribute("aria-valuetext", `step ${words}`);
    try {
      if (!this.images.has(grid.sha256)) {
        this.images.set(grid.sha256, await picture(grid.url, "", this.signal));
      }
      if (grid !== this.grids[Number(this.slider.value)]) return; // the slider has moved on
      const image = this.images.get(grid.sha256);
      image.alt = `Samples at step ${grid.step}`;
      image.className = "pixels";
      if (this.frame.firstChild !== image) fill(this.frame, image);
    } catch (error) {
      showError(this.frame, error);
    }
  }
}
