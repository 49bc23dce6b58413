// How the run is: its state, workers, queue, what was given up, events, where the time goes.

import { byId, bytes, count, duration, element, fillFacts, fillTable, fixed, plural, short } from "./dom.js";

const STYLES = { done: "done", running: "done", failed: "error", stopped: "unfinished", degraded: "unfinished" };
let clockAhead = 0;
let live = false;

/** Seconds since a moment of the server's clock, kept up by `tick`. */
function since(time) {
  return element("span", { "data-since": time }, duration(Date.now() / 1000 - clockAhead - time));
}

/** Once in a while: what is told as "for so long" goes on. */
export function tick() {
  for (const shown of document.querySelectorAll("[data-since]")) {
    shown.textContent = duration(Date.now() / 1000 - clockAhead - Number(shown.dataset.since));
  }
}

export function showFacts({ step, max_steps: most, eta_s: eta, updated, facts }) {
  fillFacts(byId("facts"), facts);
  byId("progress").max = most || 1;
  byId("progress").value = step;
  const rest = live && eta > 0 ? `, about ${duration(eta)} to go` : "";
  byId("progress-text").replaceChildren(
    most ? `${count(step)} of ${plural(most, "update")}${rest}` : plural(step, "update"),
    ...(updated && live ? [", the last one ", since(updated), " ago"] : []));
  document.title = `${count(step)}/${most ? count(most) : "?"} · ${byId("main").querySelector("h1").textContent}`;
}

export function showStatus(told) {
  clockAhead = Date.now() / 1000 - told.now;
  const { status, problem } = told;
  const badge = byId("state");
  badge.textContent = status ? status.state : problem ? "queue unreachable" : "asking";
  badge.className = `badge ${status ? STYLES[status.state] ?? "" : problem ? "unfinished" : ""}`;
  live = Boolean(status && status.flow && !["done", "failed"].includes(status.state));
  const notice = byId("notice");
  notice.hidden = !(problem || status?.reason);
  notice.textContent = problem
    ? `The queue cannot be asked: ${problem.replace(/\.+$/, "")}. It is asked again every few seconds; what is below comes from the run directory.`
    : status?.reason ?? "";
  showFacts(told);
  showWorkers(status, problem);
  showFlow(status, problem);
}

function showWorkers(status, problem) {
  const hint = byId("workers-hint");
  if (!status || !status.flow) {
    fillTable(byId("workers-table"), [], []);
    hint.textContent = problem ? "Unknown: the queue cannot be asked."
      : status ? "The run does not go on: there are no workers." : "The queue is being asked.";
    return;
  }
  const missing = (status.workers_wanted ?? 0) > status.workers
    ? ` ${status.workers} of ${plural(status.workers_wanted, "rollout worker")}: others start, or wait for room.` : "";
  hint.textContent = `What every part is doing. One that has said nothing for 15 seconds is silent.${missing}`;
  const heads = [["part", "whole"], ["heartbeat", ""], ["doing", "text"], ["for", "n"], ["version", "whole"], ["groups", "n"],
    ["memory", "n"], ["node, pid", "whole"]];
  const silent = status.silent.map((part) =>
    [part, element("span", { class: "warning" }, "silent"), "-", "-", "-", "-", "-", "-"]);
  const alive = status.parts.map((beat) => [
    beat.part, element("span", { class: "up" }, "heard"),
    beat.ordinal === null ? beat.state : `${beat.state} (ordinal ${count(beat.ordinal)})`,
    since(beat.since), version(beat.version, status.version), count(beat.groups), bytes(beat.rss_bytes), `${beat.node}, ${beat.pid}`]);
  fillTable(byId("workers-table"), heads, [...silent, ...alive]);
}

function version(mine, newest) {
  if (!mine) return "-";
  const behind = newest ? newest.step - mine.step : 0;
  return `${mine.epoch}.${mine.step}${behind > 0 ? ` (${behind} behind)` : ""}`;
}

function showFlow(status, problem) {
  const flow = status?.flow;
  const hint = byId("queue-hint");
  if (!flow) {
    fillFacts(byId("flow"), []);
    hint.textContent = problem ? "The queue cannot be asked; the curves are from the run directory."
      : status ? "The queue has ended with the run; the curves are from the run directory." : "The queue is being asked.";
    return;
  }
  hint.textContent = "The queue now, and the curves against updates.";
  fillFacts(byId("flow"), [
    ["trained", `${count(flow.trained)} of ${count(flow.of)}`], ["waiting", `${count(flow.depth)} (${bytes(flow.bytes)})`],
    ["being sampled", count(flow.issued)], ["at most at once", count(flow.window)], ["given up", count(flow.dead)]]);
}

/** What was given up: as the queue tells it while there is one, else as the events do. */
export function showLetters(status, told) {
  const fromQueue = status?.dead_letters?.length ? status.dead_letters : null;
  const rows = fromQueue
    ? fromQueue.toReversed().slice(0, 200).map((letter) => [count(letter.ordinal), count(letter.attempts), letter.reason])
    : told.letters.map((letter) => [letter.ordinal === null ? "-" : count(letter.ordinal), "-", letter.detail]);
  const all = fromQueue ? fromQueue.length : told.letters_seen;
  fillTable(byId("letters-table"), [["ordinal", "n"], ["attempts", "n"], ["why", "text"]], rows);
  byId("letters-hint").textContent = all === 0 ? "No group was given up."
    : `${plural(all, "group")} could not be made, and will not be trained.${all > rows.length ? ` The newest ${rows.length}:` : ""}`;
}

export function showEvents(told) {
  const rows = told.events.map((event) => [
    new Date(event.time * 1000).toLocaleString([], { dateStyle: "short", timeStyle: "medium" }),
    element("span", { class: event.level }, event.what), event.step === null ? "" : count(event.step),
    event.ordinal === null ? "" : count(event.ordinal), event.detail]);
  fillTable(byId("events-table"), [["at", "n"], ["what", "whole"], ["step", "n"], ["ordinal", "n"], ["why", "text"]], rows);
  const torn = told.unreadable ? ` ${plural(told.unreadable, "line")} of metrics.jsonl could not be read: one, torn, is normal after a crash.` : "";
  byId("events-hint").textContent = (rows.length === 0 ? "No restarts, no dead letters, nothing out of the ordinary."
    : told.events_seen > rows.length ? `The newest ${rows.length} of ${count(told.events_seen)}.` : "Newest first.") + torn;
}

export function showMemory(told) {
  const parts = Object.entries(told.memory).sort((one, other) => other[1] - one[1]);
  fillTable(byId("memory-table"), [["process", ""], ["peak resident", "n"]], parts.map(([part, size]) => [part, bytes(size)]));
  byId("memory").hidden = parts.length === 0;
}

export function showTimes(told) {
  byId("times").replaceChildren(...told.times.map((time) => {
    const bar = element("div", { class: "shares", "aria-hidden": "true" }, ...time.shares.map((one) => {
      const part = element("span", { class: `f${one.tone}` });
      part.style.flexGrow = one.share;
      return part;
    }));
    const rows = time.shares.map((one) => element("tr", {},
      element("td", {}, element("span", { class: `swatch f${one.tone}` }), one.name),
      element("td", { class: "n" }, `${fixed(one.seconds)} s`),
      element("td", { class: "n" }, `${(100 * one.share).toFixed(1)} %`)));
    return element("div", { class: "card" },
      element("header", {}, element("h3", {}, time.title), element("span", {}, `${fixed(time.seconds, 2)} s`)),
      bar, element("table", {}, element("tbody", {}, ...rows)), time.note && element("p", { class: "hint" }, time.note));
  }));
}
