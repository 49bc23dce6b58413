// The run page: asks for what there is, and then follows what is new.

import { ChartView } from "./charts.js";
import { showConfiguration } from "./configuration.js";
import { Lost, Refused, ask, byId, count } from "./dom.js";
import { GalleryView } from "./gallery.js";
import { follow } from "./live.js";
import { showEvents, showFacts, showLetters, showMemory, showStatus, showTimes, tick } from "./parts.js";

const TOLD_AGAIN_MS = 5000;
const views = new Map();
let range = {};
let newest = 0;
let resumes = [];
let status = null;
let told = null;

const about = await ask("api/run");
byId("about").textContent = about.config_error || `${about.model}, seed ${about.seed}`;
byId("footer").textContent = `dgpo-cluster ${about.version}. This page reads, and changes nothing. dgpo report writes a page to keep.`;
const gallery = new GalleryView(about);

const seen = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    const view = [...views.values()].find((one) => one.figure === target);
    if (view === undefined) continue;
    view.shown = isIntersecting;
    if (isIntersecting && view.due) load(view);
  }
}, { rootMargin: "300px" });

const load = guarded((view) => view.load(range, newest, resumes));

/** A new answer to which charts there are; those there already stay where they are. */
const listCharts = guarded(async () => {
  const found = await ask("api/charts");
  resumes = found.resumes;
  for (const chart of found.charts) {
    const known = views.get(chart.key);
    if (known && JSON.stringify(known.chart) === JSON.stringify(chart)) continue;
    const view = new ChartView(chart, (first, last) => choose({ first, last }));
    views.set(chart.key, view);
    if (known) known.figure.replaceWith(view.figure);
    else document.querySelector(`[data-charts=${chart.section}]`).append(view.figure);
    seen.observe(view.figure);
  }
});

function reload(which = () => true) {
  for (const view of views.values()) {
    if (!which(view)) continue;
    if (view.shown) load(view);
    else view.stale = true;
  }
}

function choose(wanted) {
  range = wanted;
  for (const button of document.querySelectorAll("[data-last]")) {
    const mine = range.first === undefined && String(range.recent ?? "") === button.dataset.last;
    button.setAttribute("aria-pressed", String(mine));
  }
  byId("range").textContent = range.first === undefined ? "" : `steps ${count(range.first)} to ${count(range.last)}`;
  reload();
}

const askTold = guarded(async () => {
  told = await ask("api/told");
  showEvents(told);
  showTimes(told);
  showMemory(told);
  showLetters(status, told);
});

for (const button of document.querySelectorAll("[data-last]")) {
  button.addEventListener("click", () => choose(button.dataset.last ? { recent: Number(button.dataset.last) } : {}));
}
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => views.forEach((view) => view.restyle()));
setInterval(tick, 1000);
setInterval(() => document.hidden || status === null || status.flow === null || askTold(), TOLD_AGAIN_MS);
guarded(showConfiguration)();

follow({
  lost: guarded(async () => {
    say("Connection lost; trying again.");
    await ask("api/run");
  }),
  back: () => say(""),
  reading: ({ percent }) => (byId("progress-text").textContent = `reading metrics.jsonl: ${percent} %`),
  reset: guarded(async (facts) => {
    newest = facts.step;
    showFacts(facts);
    await listCharts();
    reload();
    await askTold();
  }),
  rows: guarded(async ({ columns, ...facts }) => {
    const first = newest === 0;
    newest = facts.step;
    showFacts(facts);
    if (first) await listCharts();
    for (const view of views.values()) {
      if (view.due && !view.loading && !view.failed) continue;
      if (!view.append(columns)) load(view);
    }
  }),
  status: (answer) => {
    status = answer.status;
    showStatus(answer);
    if (told) showLetters(status, told);
  },
  told: guarded(async () => {
    await listCharts();
    reload((view) => view.chart.marked);
    await askTold();
  }),
  groups: guarded(({ total }) => gallery.news(total)),
});

/** The same, but that what fails is said on the page. */
function guarded(work) {
  return async (...given) => {
    try {
      return await work(...given);
    } catch (error) {
      if (error instanceof Refused) say("The page was started again with another token: open the address that it has printed.");
      else if (error instanceof Lost) say("Connection lost; trying again.");
      else {
        say(`Something went wrong: ${error}. Load the page again.`);
        console.error(error);
      }
      return undefined;
    }
  };
}

function say(text) {
  byId("connection").textContent = text;
}
