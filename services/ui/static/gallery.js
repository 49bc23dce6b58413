// Kept groups, newest first: of each its best and its worst sample side by side, and all of them behind a button.

import { ask, byId, count, element, fixed, plural, signed } from "./dom.js";

const ON_A_PAGE = 12;

export class GalleryView {
  constructor(about) {
    this.about = about;
    this.first = 0;
    this.total = 0;
    this.asked = 0;
    this.place = byId("gallery");
    byId("newest").addEventListener("click", () => this.show(0));
    byId("newer").addEventListener("click", () => this.show(Math.max(0, this.first - ON_A_PAGE)));
    byId("older").addEventListener("click", () => this.show(this.first + ON_A_PAGE));
    byId("jump").addEventListener("submit", (event) => {
      event.preventDefault();
      this.show(0, byId("jump-step").value);
    });
  }

  /** There are new ones: shown at once, but not under the hands of somebody who reads. */
  news(total) {
    const reading = this.place.querySelector("details[open]") || this.place.contains(document.activeElement);
    if (this.first === 0 && !reading) this.show(0);
    else {
      this.first += this.first === 0 ? 0 : total - this.total;
      this.total = total;
      this.#describe(this.first === 0);
    }
  }

  async show(first, step = null) {
    const mine = ++this.asked;
    const where = step === null ? `first=${first}` : `step=${encodeURIComponent(step)}`;
    const found = await ask(`api/groups?count=${ON_A_PAGE}&${where}`);
    if (mine !== this.asked) return;
    this.total = found.total;
    this.first = found.first;
    this.shown = found.groups.length;
    this.place.replaceChildren(...found.groups.map((group) => this.#group(group)));
    this.#describe(false);
  }

  #describe(more) {
    const { samples_every: every, whole_step: whole } = this.about;
    byId("pager").hidden = this.total === 0;
    byId("newest").disabled = this.first === 0 && !more;
    byId("newer").disabled = this.first === 0;
    byId("older").disabled = this.first + this.shown >= this.total;
    const range = this.shown ? `${count(this.first + 1)} to ${count(this.first + this.shown)}` : "none";
    byId("page-text").textContent = `${range} of ${plural(this.total, "group")}${more ? ", new ones above: Newest shows them" : ""}`;
    byId("groups-hint").textContent =
      this.total > 0
        ? "Newest first. Of each prompt the best and the worst sample: total reward, advantage, and what was read in the image where the reward says so." +
          (whole ? " Advantages are those within the group; the learner also sees the rest of the step." : "")
        : every === 0 ? "No groups are kept (telemetry.samples_every is 0)." : "No groups have been kept yet.";
  }

  #group(group) {
    if (group.problem) {
      return element("article", { class: "group" }, element("h3", {}, `Step ${count(group.step)}`),
        element("p", { class: "soft" }, group.problem));
    }
    const head = element("header", {}, element("h3", {}, group.prompt),
      element("span", { class: "soft" },
        `step ${count(group.step)} · group ${count(group.ordinal)} · sampled with version ${group.version} · mean ${fixed(group.mean)}`),
      group.flat && element("span", { class: "soft" }, "all equal: teaches nothing"));
    const [best, worst] = [group.members[0], group.members.at(-1)];
    const sides = element("div", { class: "sides" }, this.#member(group, best),
      group.members.length > 1 && this.#member(group, worst));
    const all = element("details", {}, element("summary", {}, `All ${group.members.length} samples`));
    all.addEventListener("toggle", () => {
      if (all.open && all.children.length === 1) {
        all.append(element("div", { class: "members" }, ...group.members.map((member) => this.#member(group, member))));
      }
    });
    return element("article", { class: "group" }, head, sides, all);
  }

  #member(group, member) {
    const label = member.best ? "best" : member.worst ? "worst" : "";
    const told = `${label ? `${label} ` : ""}sample ${member.place} of group ${group.ordinal}`;
    const scores = member.scores.map(([name, score]) => `${name} ${fixed(score, 2)}`).join(" · ");
    const image = element("img", {
      src: `api/groups/${encodeURIComponent(group.key)}/${member.place}?v=${group.changed}`,
      alt: `${told}, reward ${fixed(member.total)}, advantage ${signed(member.advantage)}`,
      class: this.about.tiny && "tiny", loading: "lazy", decoding: "async",
    });
    const direction = member.advantage > 0 ? "up" : member.advantage < 0 ? "down" : null;
    return element("div", { class: `member ${label}` }, image,
      element("div", { class: "numbers" }, element("b", { title: "total reward" }, fixed(member.total)),
        element("span", { class: direction, title: "advantage" }, signed(member.advantage))),
      element("div", { class: "soft" }, label && element("span", { class: "tag" }, label),
        label && member.text && " ", member.text && `“${member.text}”`),
      scores && element("div", { class: "soft" }, scores));
  }
}
