// Curves of a training job's metrics over its steps.

import { element } from "./elements.js";
import { brief, count } from "./figures.js";
import uPlot from "./vendor/uPlot.esm.js";

const HEIGHT = 220;

/** What is drawn: a title, and the metrics in it. */
export const CURVES = [
  { title: "bits/dim", series: [["train_bits_per_dim", "train", "--first"], ["validation_bits_per_dim", "validation", "--second"]] },
  { title: "throughput, images/s", series: [["images_per_second", "images/s", "--third"]] },
  { title: "gradient norm", series: [["gradient_norm", "norm", "--fourth"]] },
];

/** A figure with one chart; `draw(columns)` shows metrics. Arrow keys move along it. */
export class Curve {
  constructor({ title, series }, signal) {
    this.series = series;
    this.values = series.map(([, label, tint]) =>
      element("span", { class: "value" }, element("i", { class: `swatch ${tint.slice(2)}`, "aria-hidden": "true" }), `${label} `, element("b", {}, "–")));
    this.step = element("span", { class: "value" });
    this.place = element("div", { class: "chart", tabindex: 0, role: "group", "aria-label": `${title} over steps; arrow keys move along`, onkeydown: (event) => this._move(event) });
    this.figure = element("figure", { class: "curve" }, element("figcaption", {}, element("strong", {}, title), this.values, this.step), this.place);
    this.data = [[], ...series.map(() => [])];
    this.plot = null;
    const observer = new ResizeObserver(() => this._fit());
    observer.observe(this.place);
    signal.addEventListener("abort", () => { observer.disconnect(); this.plot?.destroy(); this.plot = null; });
    const dark = matchMedia("(prefers-color-scheme: dark)");
    dark.addEventListener("change", () => this._build(), { signal });
  }

  /** Shows columns by name, `step` among them; null where a step has no value. */
  draw(columns) {
    const steps = columns.step || [];
    this.data = [steps, ...this.series.map(([name]) => columns[name] || steps.map(() => null))];
    if (this.plot) this.plot.setData(this.data);
    else this._build();
    if (this.plot && this.plot.cursor.idx === null) this._tell(null);
  }

  _fit() {
    if (this.plot) this.plot.setSize({ width: this.place.clientWidth, height: HEIGHT });
    else this._build();
  }

  _build() {
    this.plot?.destroy();
    this.plot = null;
    if (!this.place.clientWidth) return; // not on the page yet
    const style = getComputedStyle(document.documentElement);
    const of = (name) => style.getPropertyValue(name).trim();
    const axis = { stroke: of("--soft"), grid: { stroke: of("--line"), width: 1 }, ticks: { stroke: of("--line"), width: 1 } };
    this.plot = new uPlot({
      width: this.place.clientWidth,
      height: HEIGHT,
      legend: { show: false },
      cursor: { y: false, drag: { x: true, y: false } },
      scales: { x: { time: false } },
      axes: [{ ...axis, values: (_, ticks) => ticks.map((tick) => (Number.isInteger(tick) ? count(tick) : "")) }, { ...axis, size: 56, values: (_, ticks) => ticks.map((tick) => Number(tick.toPrecision(6)).toString()) }],
      series: [{}, ...this.series.map(([name, label, tint]) => ({
        label, stroke: of(tint), width: 2, spanGaps: true, points: { show: name.startsWith("validation"), size: 6, fill: of(tint) },
      }))],
      hooks: { setCursor: [(plot) => this._tell(plot.cursor.idx)] },
    }, this.data, this.place);
    this._tell(null);
  }

  /** Shows the values at an index, or the last of each. */
  _tell(index) {
    this.series.forEach((_, i) => {
      const column = this.data[i + 1];
      const value = index === null || index === undefined ? column.findLast((each) => each !== null) : column[index];
      this.values[i].lastChild.textContent = brief(value ?? NaN);
    });
    const at = index ?? this.data[0].length - 1;
    this.step.textContent = this.data[0].length ? `step ${count(this.data[0][at])}` : "no steps yet";
  }

  _move(event) {
    const last = this.data[0].length - 1;
    const now = this.plot?.cursor.idx ?? last;
    const stride = event.shiftKey ? 10 : 1;
    const next = { ArrowLeft: now - stride, ArrowRight: now + stride, Home: 0, End: last }[event.key];
    if (next === undefined || !this.plot || last < 0) return;
    event.preventDefault();
    const index = Math.max(0, Math.min(last, next));
    this.plot.setCursor({ left: this.plot.valToPos(this.data[0][index], "x"), top: 10 });
    this._tell(index);
  }
}

/** Rows of metrics as columns; a later row of a step replaces what an interrupted attempt told of it. */
export class Rows {
  constructor() { this.rows = []; }

  add(row) {
    while (this.rows.length && this.rows.at(-1).step >= row.step) this.rows.pop();
    this.rows.push(row);
  }

  get columns() {
    const names = ["step", ...CURVES.flatMap(({ series }) => series.map(([name]) => name))];
    return Object.fromEntries(names.map((name) => [name, this.rows.map((row) => row[name] ?? null)]));
  }
}
