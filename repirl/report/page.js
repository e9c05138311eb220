"use strict";
// Charts: a cursor that follows the pointer, or the arrow keys. The legend shows the values at the cursor.
for (const figure of document.querySelectorAll("figure")) {
  const svg = figure.querySelector(":scope > svg.chart");
  if (!svg) continue;
  const cursor = svg.querySelector(".cursor"), at = figure.querySelector(".at");
  const keys = [...figure.querySelectorAll(".legend li")];
  const lines = [...svg.querySelectorAll(".series")].map(group => {
    const words = name => (group.dataset[name] ? group.dataset[name].split(" ") : []);
    const places = [...group.querySelectorAll("polyline")]
      .flatMap(line => line.getAttribute("points").split(" ")).map(pair => pair.split(",").map(Number));
    return { xs: words("x"), ys: words("y"), places, mark: group.querySelector(".mark") };
  });
  // All x that occur, in their order, with their place.
  const stops = [...new Map(lines.flatMap(line => line.xs.map((x, i) => [x, line.places[i][0]])))]
    .sort((a, b) => a[1] - b[1]);
  const name = svg.getAttribute("aria-label").split(";")[0], xlabel = svg.dataset.xlabel;
  let now = stops.length - 1;
  const clear = () => {
    lines.forEach(line => line.mark.classList.remove("on"));
    cursor.style.visibility = "hidden";
    at.textContent = "";
    keys.forEach(k => { k.querySelector("b").textContent = k.dataset.last; });
  };
  const show = index => {
    now = Math.max(0, Math.min(stops.length - 1, index));
    const [x, place] = stops[now], said = [];
    cursor.setAttribute("x1", place);
    cursor.setAttribute("x2", place);
    cursor.style.visibility = "visible";
    at.textContent = xlabel + " " + x;
    lines.forEach((line, i) => {
      const here = line.xs.indexOf(x);
      line.mark.classList.toggle("on", here >= 0);
      if (here >= 0) {
        line.mark.setAttribute("cx", line.places[here][0]);
        line.mark.setAttribute("cy", line.places[here][1]);
        said.push(keys[i].querySelector("span").textContent + " " + line.ys[here]);
      }
      keys[i].querySelector("b").textContent = here >= 0 ? line.ys[here] : "\u2013";
    });
    svg.setAttribute("aria-valuenow", now);
    svg.setAttribute("aria-valuetext", xlabel + " " + x + ": " + said.join(", "));
  };
  svg.setAttribute("role", "slider");
  svg.setAttribute("tabindex", "0");
  svg.setAttribute("aria-label", name);
  svg.setAttribute("aria-valuemin", 0);
  svg.setAttribute("aria-valuemax", stops.length - 1);
  show(now);
  clear();
  const follow = event => {
    const box = svg.getBoundingClientRect();
    const x = (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width;
    let nearest = 0;
    stops.forEach((stop, i) => {
      if (Math.abs(stop[1] - x) < Math.abs(stops[nearest][1] - x)) nearest = i;
    });
    show(nearest);
  };
  svg.addEventListener("pointermove", follow);
  svg.addEventListener("pointerdown", follow);
  svg.addEventListener("pointerleave", clear);
  svg.addEventListener("focus", () => { if (svg.matches(":focus-visible")) show(now); });
  svg.addEventListener("blur", clear);
  svg.addEventListener("keydown", event => {
    const page = Math.max(1, Math.round(stops.length / 10));
    const moves = { ArrowLeft: now - 1, ArrowDown: now - 1, ArrowRight: now + 1, ArrowUp: now + 1,
      PageDown: now - page, PageUp: now + page, Home: 0, End: stops.length - 1 };
    if (!(event.key in moves) || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    show(moves[event.key]);
  });
}

// Tokens: the value of the one under the pointer, or chosen by the arrow keys.
const label = token => token.textContent
  .replace(/\n/g, "\u21b5").replace(/\t/g, "\u21e5").replace(/ /g, "\u00b7") || "\u2205";
for (const box of document.querySelectorAll(".tokens[data-r]")) {
  const output = box.closest(".variant").querySelector(".read"), values = box.dataset.r.split(" ");
  const tokens = [...box.querySelectorAll(".t:not(.p)")];
  let now = -1;
  const show = index => {
    if (tokens[now]) tokens[now].classList.remove("on");
    now = index;
    if (tokens[now]) tokens[now].classList.add("on");
    output.textContent = tokens[now] ? label(tokens[now]) + "  " + values[now] : "";
  };
  const point = event => {
    const token = event.target.closest(".t");
    if (token) show(tokens.indexOf(token));
  };
  box.addEventListener("pointerover", point);
  box.addEventListener("click", point);
  box.addEventListener("pointerleave", () => { if (document.activeElement !== box) show(-1); });
  box.addEventListener("focus", () => { if (now < 0 && box.matches(":focus-visible")) show(0); });
  box.addEventListener("blur", () => show(-1));
  box.addEventListener("keydown", event => {
    const moves = { ArrowLeft: now - 1, ArrowRight: now + 1, Home: 0, End: tokens.length - 1 };
    if (!(event.key in moves) || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    show(Math.max(0, Math.min(tokens.length - 1, moves[event.key])));
    tokens[now].scrollIntoView({ block: "nearest" });
  });
}

// Responses: those that were chosen, a few at a time.
const shelf = document.querySelector(".samples");
if (shelf) {
  const size = 6, cards = [...shelf.children], pager = document.querySelector(".pager");
  const selects = [...document.querySelectorAll(".filters select")], status = pager.querySelector("[role=status]");
  const [previous, next] = pager.querySelectorAll("button");
  let first = 0;
  const fits = card => selects.every(s => !s.value || card.dataset["f" + s.dataset.filter].split(" ").includes(s.value));
  const show = () => {
    const chosen = cards.filter(fits);
    const visible = new Set(chosen.slice(first, first + size));
    cards.forEach(card => { card.hidden = !visible.has(card); });
    status.textContent = chosen.length
      ? `${first + 1}\u2013${Math.min(first + size, chosen.length)} of ${chosen.length}` : "none of these";
    previous.disabled = first === 0;
    next.disabled = first + size >= chosen.length;
    pager.hidden = cards.length <= size && selects.length === 0;
  };
  selects.forEach(s => s.addEventListener("change", () => { first = 0; show(); }));
  for (const button of [previous, next]) {
    button.addEventListener("click", () => {
      first += size * Number(button.dataset.move);
      show();
      document.getElementById("responses").scrollIntoView();
    });
  }
  show();
}
