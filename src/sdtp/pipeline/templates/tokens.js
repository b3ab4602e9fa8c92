"use strict";
// The token view: what was left after each stage, each token's scores, and a search over the prompt's text.
{
  const section = document.getElementById("tokens");
  const layers = JSON.parse(section.dataset.layers);
  const card = document.getElementById("scores");

  // One prompt under one keep ratio. Stages count from 0; a token's is the one that removed it, or `layers.length`.
  class View {
    constructor(details) {
      this.details = details;
      this.box = details.querySelector(".tokens");
      this.tokens = [...this.box.children];
      this.stages = this.tokens.map((token) => Number(/\bs(\d+)/.exec(token.className)[1]));
      this.slider = details.querySelector("input");
      this.said = details.querySelector("output");
      this.at = -1;
    }

    // How many tokens are left after the first `done` stages.
    left(done) {
      return this.stages.filter((stage) => stage >= done).length;
    }

    showAfter(done) {
      const gone = this.left(done - 1) - this.left(done);
      const text = done
        ? `${this.left(done)} of ${this.tokens.length} tokens left after stage ${done}, before layer ${layers[done - 1]}; ${gone} removed there`
        : `all ${this.tokens.length} tokens`;
      this.said.textContent = text;
      this.slider.setAttribute("aria-valuetext", text);
      this.tokens.forEach((token, index) => {
        token.classList.toggle("gone", this.stages[index] < done - 1);
        token.classList.toggle("going", this.stages[index] === done - 1);
      });
    }

    // Of each stage: every token's score by position (undefined where it was gone), and all of them, highest first.
    get scored() {
      this.found ??= JSON.parse(this.box.dataset.scores).map((scores, stage) => {
        const places = this.stages.flatMap((removed, index) => (removed >= stage ? [index] : []));
        const byToken = [];
        scores.forEach((score, place) => (byToken[places[place]] = score));
        return { byToken, ranked: scores.filter((score) => score !== null).sort((one, other) => other - one) };
      });
      return this.found;
    }

    // A line for each stage that the token entered: layer, score, rank among those that entered, what became of it.
    lines(index) {
      return this.scored.slice(0, this.stages[index] + 1).map(({ byToken, ranked }, stage) => {
        const score = byToken[index] ?? null;
        const rank = score === null ? "–" : `${ranked.findIndex((other) => other <= score) + 1} of ${ranked.length}`;
        return [layers[stage], score === null ? "–" : String(score).replaceAll("-", "−"), rank, stage === this.stages[index] ? "removed" : "kept"];
      });
    }

    // Where pointer or arrow keys are: the token's card beside it.
    point(index) {
      this.leave();
      this.at = index;
      const token = this.tokens[index];
      token.classList.add("pointed");
      const fate = this.stages[index] < layers.length ? `removed before layer ${layers[this.stages[index]]}` : "never removed";
      const head = element("strong", token.textContent.replaceAll("\n", "↵").replaceAll("\t", "⇥"));
      const table = document.createElement("table");
      table.append(rowOf("th", ["Before layer", "Score", "Rank", ""]));
      for (const line of this.lines(index)) table.append(rowOf("td", line));
      card.replaceChildren(head, element("div", `token ${index + 1} of ${this.tokens.length}, ${fate}`), table);
      card.hidden = false;
      this.follow();
    }

    // Keeps the card beside its token, as long as that is in sight.
    follow() {
      if (this.at < 0) return;
      const box = this.box.getBoundingClientRect();
      const beside = this.tokens[this.at].getClientRects()[0] ?? box;
      const [top, bottom] = [Math.max(box.top, 0), Math.min(box.bottom, innerHeight)];
      if (beside.bottom < top || beside.top > bottom) this.leave();
      else place(card, beside);
    }

    leave() {
      this.tokens[this.at]?.classList.remove("pointed");
      this.at = -1;
      card.hidden = true;
    }
  }

  const element = (name, text) => {
    const made = document.createElement(name);
    made.textContent = text;
    return made;
  };

  const rowOf = (name, cells) => {
    const row = document.createElement("tr");
    row.append(...cells.map((cell) => element(name, cell)));
    return row;
  };

  // Below what it belongs to, or above where there is no room; always whole in the window.
  const place = (box, beside) => {
    const { width, height } = box.getBoundingClientRect();
    const below = beside.bottom + 6;
    const fits = below + height <= innerHeight;
    box.style.left = `${Math.max(4, Math.min(beside.left, document.documentElement.clientWidth - width - 4))}px`;
    box.style.top = `${Math.max(4, fits ? below : beside.top - height - 6)}px`;
  };

  const views = [...section.querySelectorAll("details")].map((details) => new View(details));
  for (const controls of section.querySelectorAll(".controls")) controls.hidden = false;

  for (const view of views) {
    const { box, slider, tokens } = view;
    slider.addEventListener("input", () => view.showAfter(Number(slider.value)));
    view.showAfter(Number(slider.value)); // a browser may remember it over a reload
    tokens.forEach((token) => token.classList.toggle("newline", token.textContent.startsWith("\n")));
    const over = (event) => {
      const index = tokens.indexOf(event.target);
      if (index >= 0) view.point(index);
    };
    box.addEventListener("pointerover", over);
    box.addEventListener("click", over); // a finger points at nothing
    box.addEventListener("pointerleave", () => view.leave());
    box.addEventListener("blur", () => view.leave());
    document.addEventListener("scroll", () => view.follow(), { capture: true, passive: true });
    box.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (event.key === "Escape") view.leave();
      if (!step) return;
      event.preventDefault();
      let next = view.at < 0 && step < 0 ? tokens.length - 1 : view.at + step;
      while (tokens[next] && !tokens[next].textContent) next += step; // part of a character that another token shows
      if (!tokens[next]) return;
      tokens[next].scrollIntoView({ block: "nearest" });
      view.point(next);
    });
  }

  // Search: tokens are parts of words, so what is looked for may begin in one and end in another.
  const field = section.querySelector("input[type=search]");
  const [previous, next] = section.querySelectorAll(".find button");
  const said = section.querySelector(".find output");
  const lowered = (text) => text.toLowerCase().replace(/\s/g, " ");
  const texts = views[0].tokens.map((token) => lowered(token.textContent));
  const starts = texts.map(((sum) => (text) => (sum += text.length) - text.length)(0));
  const whole = texts.join("");
  let hits = []; // of each the tokens from its first to its last
  let shown = 0;

  const find = (wanted) => {
    const found = [];
    for (let from = wanted ? whole.indexOf(wanted) : -1; from >= 0; from = whole.indexOf(wanted, from + wanted.length)) {
      const until = from + wanted.length;
      found.push(texts.flatMap((text, index) => (starts[index] < until && starts[index] + text.length > from ? [index] : [])));
    }
    return found;
  };

  const show = (index) => {
    shown = index;
    said.textContent = hits.length ? `${index + 1} of ${hits.length}` : field.value ? "not found" : "";
    previous.disabled = next.disabled = hits.length < 2;
    const marked = new Set(hits.flat());
    const here = new Set(hits[index]);
    for (const { tokens } of views) {
      tokens.forEach((token, at) => {
        token.classList.toggle("hit", marked.has(at));
        token.classList.toggle("here", here.has(at));
      });
    }
    if (!hits.length) return;
    const view = views.find(({ details }) => details.open) ?? views[0];
    view.details.open = true;
    view.tokens[hits[index][0]].scrollIntoView({ block: "center" });
  };

  const go = (step) => hits.length && show((shown + step + hits.length) % hits.length);
  field.addEventListener("input", () => {
    hits = find(lowered(field.value));
    show(0);
  });
  field.addEventListener("keydown", (event) => event.key === "Enter" && go(event.shiftKey ? -1 : 1));
  previous.addEventListener("click", () => go(-1));
  next.addEventListener("click", () => go(1));
}
