// What the run was told to do, and how another one differs.

import { ask, byId, element, fillTable, plural } from "./dom.js";

const KINDS = { changed: "changed", added: "only here", removed: "only there" };

export async function showConfiguration() {
  const chosen = byId("against");
  const found = await ask("api/config");
  fillTable(byId("keys-table"), [["setting", ""], ["value", "text"]], found.keys);
  byId("keys").hidden = found.keys.length === 0;
  byId("compare").hidden = found.others.length === 0;
  chosen.replaceChildren(...found.others.map((name) => element("option", { value: name }, name)));
  chosen.addEventListener("change", () => compare(chosen.value));
  if (found.problem) byId("config-hint").textContent = found.problem;
  else if (found.others.length) await compare(found.others[0]);
  else byId("config-hint").textContent = "As resolved when the run began or was resumed. Start with --compare OTHER_RUN to see what differs.";
}

async function compare(other) {
  const found = await ask(`api/config?against=${encodeURIComponent(other)}`);
  const rows = found.changes.map((one) => [one.key, KINDS[one.kind],
    one.kind === "removed" ? "-" : one.here, one.kind === "added" ? "-" : one.there]);
  fillTable(byId("difference-table"), [["setting", ""], ["kind", ""], ["this run", "text"], ["other run", "text"]], rows);
  byId("config-hint").textContent = found.problem ||
    (rows.length ? `${plural(rows.length, "setting")} differ${rows.length === 1 ? "s" : ""}.` : "No setting differs.");
}
