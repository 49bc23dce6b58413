// One chart: uPlot on a canvas, and beside it, as text, what it says.

import { ask, element, fixed, short } from "./dom.js";

const MOST_POINTS = 1500;
const HEIGHT = 180;

export class ChartView {
  /**
   * @param chart as api/charts describes it.
   * @param zoomed called with the first and last step of what was dragged over.
   */
  constructor(chart, zoomed) {
    this.chart = chart;
    this.zoomed = zoomed;
    this.curves = null;
    this.stale = false;
    this.failed = false;
    this.waiting = [];
    this.asked = 0;
    this.shown = false;
    this.keys = chart.curves.map((curve) => element("em"));
    this.at = element("span", { class: "at" });
    this.said = element("span", { class: "unseen", "aria-live": "polite" });
    this.place = element("div", { class: "plot", tabindex: "0", role: "img", "aria-label": chart.title });
    const keys = chart.curves.map((curve, place) =>
      element("span", { class: "key" },
        element("i", { class: `k${curve.tone}${curve.dashed ? " dashed" : ""}` }), `${curve.name} `, this.keys[place]));
    const caption = element("figcaption", {}, element("b", {}, chart.title), this.at, element("div", {}, ...keys));
    this.figure = element("figure", {}, caption, this.place, this.said);
    if (chart.note) this.figure.append(element("div", { class: "note soft" }, chart.note));
    this.place.addEventListener("keydown", (event) => this.#step(event));
    this.place.addEventListener("blur", () => this.#point(null));
    new ResizeObserver(() => this.#resize()).observe(this.place);
  }

  /** Nothing was loaded yet, or what is drawn is not of the range that was chosen since. */
  get due() {
    return this.curves === null || this.stale;
  }

  /** Ask for the points within a range: {first, last} or {recent}. */
  async load(range, newest, resumes) {
    this.range = range;
    this.resumes = resumes;
    const mine = ++this.asked;
    this.waiting = [];
    this.loading = true;
    this.stale = this.failed = false;
    const wanted = new URLSearchParams({ most: MOST_POINTS });
    if (range.first !== undefined) wanted.set("first", range.first);
    if (range.last !== undefined) wanted.set("last", range.last);
    if (range.recent) wanted.set("first", Math.max(0, newest - range.recent + 1));
    let found;
    try {
      found = await ask(`api/charts/${encodeURIComponent(this.chart.key)}?${wanted}`);
    } catch (error) {
      if (mine === this.asked) {
        this.loading = false;
        this.failed = true;
        this.waiting = [];
      }
      throw error;
    }
    if (mine !== this.asked) return;
    this.loading = false;
    this.curves = found.curves;
    for (const columns of this.waiting) this.#take(columns);
    this.#draw();
  }

  /** Rows that have been written since; false where it is time to load anew. */
  append(columns) {
    if (this.failed) return false;
    if (this.loading) this.waiting.push(columns);
    if (this.loading || this.due || this.chart.marked || this.range.last !== undefined) return true;
    this.#take(columns);
    this.#draw();
    return Math.max(0, ...this.curves.map((curve) => curve.x.length)) < 2 * MOST_POINTS;
  }

  #take(columns) {
    const steps = columns.step;
    this.chart.curves.forEach((curve, place) => {
      const values = columns[curve.column] ?? [];
      const spreads = columns[curve.spread] ?? [];
      const line = this.curves[place];
      steps.forEach((step, row) => {
        const value = values[row];
        if (value === null || value === undefined) return;
        add(line, step, value);
        if (line.low && typeof spreads[row] === "number") {
          add(line.low, step, value - spreads[row]);
          add(line.high, step, value + spreads[row]);
        }
      });
      if (this.range.recent) {
        const first = steps[steps.length - 1] - this.range.recent + 1;
        for (const one of [line, line.low, line.high]) if (one) cut(one, first);
      }
    });
  }

  #draw() {
    const lines = [];
    this.chart.curves.forEach((curve, place) => {
      const found = this.curves[place];
      if (found.low) lines.push(found.low, found.high);
      lines.push(found);
    });
    this.data = uPlot.join(lines.map((line) => [line.x, line.y]));
    this.error = this.chart.marked ? this.curves.map((curve) => curve.error) : null;
    if (this.data[0].length === 0) {
      this.plot?.destroy();
      this.plot = null;
      this.place.replaceChildren(element("p", { class: "soft nothing" }, "nothing measured yet"));
    } else if (this.plot) {
      this.plot.setData(this.data);
    } else {
      this.restyle();
    }
    this.#tell(null);
    const last = this.curves.map((curve, place) => `${this.chart.curves[place].name} ${short(curve.y.at(-1))}`);
    this.place.setAttribute("aria-label", `${this.chart.title}. Last: ${last.join(", ")}. Arrow keys move along the steps.`);
  }

  /** Draw with the colours that the page has now. */
  restyle() {
    if (!this.data || this.data[0].length === 0) return;
    this.plot?.destroy();
    this.place.replaceChildren();
    const style = getComputedStyle(document.documentElement);
    const colour = (name) => style.getPropertyValue(`--${name}`).trim();
    const series = [{}];
    const bands = [];
    for (const [place, curve] of this.chart.curves.entries()) {
      const stroke = colour(`c${Math.min(curve.tone, 5)}`);
      if (this.curves[place].low) {
        bands.push({ series: [series.length + 1, series.length], fill: `${stroke}24` });
        series.push({ width: 0, points: { show: false }, spanGaps: true }, { width: 0, points: { show: false }, spanGaps: true });
      }
      series.push({
        stroke, width: 1.6, dash: curve.dashed ? [5, 4] : undefined, spanGaps: true,
        points: this.chart.marked ? { show: true, size: 6, fill: stroke, stroke } : undefined,
      });
    }
    const axis = {
      stroke: colour("soft"), font: '11px system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif',
      grid: { stroke: colour("grid"), width: 1 }, ticks: { show: false },
    };
    const { floor, whole } = this.chart;
    this.plot = new uPlot({
      width: Math.max(this.place.clientWidth, 160), height: HEIGHT, legend: { show: false }, bands, series, padding: [8, 24, 0, 0],
      scales: { x: { time: false, range: (u, low, high) => (low === high ? [low - 1, high + 1] : [low, high]) },
        y: { range: (u, low, high) => spanned(...this.#reach(low, high), floor, whole) } },
      axes: [{ ...axis, size: 26, gap: 4, incrs: [1, 2, 5].flatMap((n) => [0, 1, 2, 3, 4, 5, 6, 7].map((p) => n * 10 ** p)).sort((a, b) => a - b), values: (u, splits) => splits.map((v) => v.toLocaleString("en-US")), space: 60, grid: { show: false } },
        { ...axis, size: 44, gap: 4, space: 34, incrs: whole ? [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 5000, 1e4, 1e5, 1e6, 1e7] : undefined, values: (u, splits) => splits.map((v) => short(Math.abs(v) < 1e-12 ? 0 : v)) }],
      cursor: { y: false, sync: { key: "steps", scales: ["x", null] }, drag: { x: true, y: false, setScale: false }, points: { size: 6 } },
      hooks: {
        setCursor: [(u) => this.#tell(u.cursor.idx)],
        setSelect: [(u) => this.#dragged(u)],
        draw: [(u) => this.#extras(u, colour)],
      },
    }, this.data, this.place);
  }

  /** What the y axis has to show: error bars too. */
  #reach(low, high) {
    if (this.error === null || low === null) return [low, high];
    const all = this.curves.flatMap((curve) => curve.y.flatMap((y, i) => [y - curve.error[i], y + curve.error[i]]));
    return [Math.min(low, ...all), Math.max(high, ...all)];
  }

  #extras(u, colour) {
    const { ctx, bbox } = u;
    ctx.save();
    ctx.lineWidth = devicePixelRatio;
    ctx.strokeStyle = colour("soft");
    ctx.setLineDash([2 * devicePixelRatio, 3 * devicePixelRatio]);
    ctx.beginPath();
    for (const step of this.resumes ?? []) {
      if (step < u.scales.x.min || step > u.scales.x.max) continue;
      const x = u.valToPos(step, "x", true);
      ctx.moveTo(x, bbox.top);
      ctx.lineTo(x, bbox.top + bbox.height);
    }
    ctx.stroke();
    ctx.setLineDash([]);
    for (const [place, errors] of (this.error ?? []).entries()) {
      ctx.strokeStyle = colour(`c${Math.min(this.chart.curves[place].tone, 5)}`);
      ctx.beginPath();
      this.curves[place].x.forEach((step, i) => {
        const x = u.valToPos(step, "x", true);
        ctx.moveTo(x, u.valToPos(this.curves[place].y[i] - errors[i], "y", true));
        ctx.lineTo(x, u.valToPos(this.curves[place].y[i] + errors[i], "y", true));
      });
      ctx.stroke();
    }
    ctx.restore();
  }

  #dragged(u) {
    if (u.select.width < 4) return;
    const first = Math.floor(u.posToVal(u.select.left, "x"));
    const last = Math.ceil(u.posToVal(u.select.left + u.select.width, "x"));
    u.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
    this.zoomed(Math.max(0, first), last);
  }

  #resize() {
    if (this.plot && this.place.clientWidth > 0) this.plot.setSize({ width: this.place.clientWidth, height: HEIGHT });
  }

  /** The values at a place of the data, or the last ones. */
  #tell(place) {
    const step = place === null || place === undefined ? null : this.data[0][place];
    this.at.textContent = step === null ? "" : `step ${step.toLocaleString("en-US")}`;
    this.curves.forEach((curve, number) => {
      const value = step === null ? curve.y.at(-1) : curve.y[upTo(curve.x, step)];
      this.keys[number].textContent = this.chart.whole ? fixed(value, 0) : short(value);
    });
    return step;
  }

  #step(event) {
    if (!this.plot) return;
    const length = this.data[0].length;
    const from = this.plot.cursor.idx ?? length;
    const stride = event.shiftKey ? Math.max(1, Math.round(length / 20)) : 1;
    const moves = { ArrowLeft: from - stride, ArrowRight: from + stride, Home: 0, End: length - 1, Escape: null };
    if (!(event.key in moves)) return;
    event.preventDefault();
    const to = moves[event.key];
    this.#point(to === null ? null : Math.min(Math.max(to, 0), length - 1));
  }

  #point(place) {
    if (!this.plot) return;
    if (place === null) {
      this.plot.setCursor({ left: -10, top: -10 });
      this.said.textContent = "";
      return;
    }
    this.plot.setCursor({ left: this.plot.valToPos(this.data[0][place], "x"), top: 10 });
    const step = this.#tell(place);
    this.said.textContent = `step ${step}: ` + this.chart.curves.map((c, i) => `${c.name} ${this.keys[i].textContent}`).join(", ");
  }
}

function add(line, step, value) {
  if (line.x.length && step <= line.x.at(-1)) return;
  line.x.push(step);
  line.y.push(value);
}

function cut(line, first) {
  const start = line.x.findIndex((x) => x >= first);
  if (start > 0) {
    line.x.splice(0, start);
    line.y.splice(0, start);
  }
}

/** Place of the last step that is not behind this one. */
function upTo(steps, step) {
  let [low, high] = [0, steps.length - 1];
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (steps[middle] <= step) low = middle;
    else high = middle - 1;
  }
  return low;
}

function spanned(low, high, floor, whole) {
  if (low === null || high === null) return [0, 1];
  if (floor !== null) low = Math.min(floor, low);
  if (whole) high = Math.max(high, low + 4);
  const pad = (high - low) * 0.06 || Math.abs(high) * 0.1 || 1;
  return [floor !== null && low >= floor ? low : low - pad, high + pad];
}
