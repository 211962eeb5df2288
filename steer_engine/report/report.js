"use strict";
// Lists the examples, filters and sorts them, and opens the samples of a figure's cell. Texts enter
// the page as text nodes alone, so that what a model wrote is never read as HTML.
(() => {
  const PAGE_SIZE = 20;
  const byId = (id) => document.getElementById(id);
  const read = (id) => JSON.parse(byId(id).textContent);
  const { texts, sets, examples, num_left_out: numLeftOut } = read("payload");
  const colour = (number) => `var(--series-${(number % 8) + 1})`;
  const query = byId("query"), chosenSet = byId("chosen-set"), order = byId("order");
  const list = byId("list"), more = byId("more"), count = byId("count");
  let found = [], words = [];

  for (const example of examples) example.haystack = texts[example.text].toLowerCase();

  function element(name, attributes = {}, ...children) {
    const made = Object.assign(document.createElement(name), attributes);
    made.append(...children);
    return made;
  }

  // The text with every occurrence of the words marked.
  function marked(text, wanted) {
    if (!wanted.length) return [text];
    const escaped = wanted.map((word) => word.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"));
    const parts = text.split(new RegExp(`(${escaped.join("|")})`, "gi"));
    return parts.map((part, place) => (place % 2 ? element("mark", {}, part) : part));
  }

  function setName(number) {
    const dot = element("i");
    dot.style.background = colour(number);
    return element("span", { className: "set" }, dot, sets[number]);
  }

  function about(example) {
    const facts = [setName(example.set), `#${example.index}`];
    if (example.label) facts.push(`label ${example.label}`);
    if (example.finish === "length") facts.push("cut at the longest length");
    if (example.attempts > 1) facts.push(`attempt ${example.attempts}`);
    return element("p", { className: "about" }, ...facts.map((fact) => element("span", {}, fact)));
  }

  function nearest([number, similarity]) {
    const summary = element("summary", {}, "nearest real text, similarity ");
    summary.append(element("b", {}, similarity.toFixed(2)));
    return element("details", {}, summary, element("p", {}, texts[number]));
  }

  function negatives(drawn) {
    const noun = drawn.length === 1 ? "negative example" : "negative examples";
    const details = element("details", {}, element("summary", {}, `${drawn.length} ${noun}`));
    // Filled when it is first opened: most never are.
    details.addEventListener("toggle", () => {
      const items = drawn.map(([name, number]) => element(
        "li", {}, element("b", {}, `${name}  `), number < 0 ? "(text not at hand)" : texts[number],
      ));
      details.append(element("ul", {}, ...items));
    }, { once: true });
    return details;
  }

  function item(example) {
    const text = element("p", { className: "text" }, ...marked(texts[example.text], words));
    const made = element("li", {}, text, about(example));
    if (example.nearest) made.append(nearest(example.nearest));
    if (example.negatives.length) made.append(negatives(example.negatives));
    return made;
  }

  const similarity = (example, missing) => (example.nearest ? example.nearest[1] : missing);
  const length = (example) => example.haystack.length;
  const ORDERS = {
    near: (a, b) => similarity(b, -2) - similarity(a, -2),
    far: (a, b) => similarity(a, 2) - similarity(b, 2),
    long: (a, b) => length(b) - length(a),
    short: (a, b) => length(a) - length(b),
  };

  function showMore() {
    const first = list.children.length;
    list.append(...found.slice(first, first + PAGE_SIZE).map(item));
    more.hidden = list.children.length >= found.length;
    return list.children[first];
  }

  function update() {
    words = query.value.toLowerCase().split(/\s+/).filter(Boolean);
    const wantedSet = chosenSet.value;
    found = examples.filter((example) =>
      (wantedSet === "" || example.set === Number(wantedSet))
      && words.every((word) => example.haystack.includes(word)));
    if (ORDERS[order.value]) found.sort(ORDERS[order.value]);
    list.replaceChildren();
    showMore();
    const left = numLeftOut ? `; ${numLeftOut} more are in the run directories alone` : "";
    count.textContent = `${found.length} of ${examples.length} examples${left}`;
  }

  // The address keeps the search, so that a view can be sent to somebody: #q=...&set=...&order=...
  function writeAddress() {
    const state = new URLSearchParams();
    if (query.value) state.set("q", query.value);
    if (chosenSet.value) state.set("set", chosenSet.value);
    if (order.value !== "index") state.set("order", order.value);
    history.replaceState(null, "", `#${state}`);
  }

  function readAddress() {
    const state = new URLSearchParams(location.hash.slice(1));
    if (!state.has("q") && !state.has("set") && !state.has("order")) return false;
    query.value = state.get("q") ?? "";
    chosenSet.value = sets[state.get("set")] === undefined ? "" : state.get("set");
    order.value = ORDERS[state.get("order")] ? state.get("order") : "index";
    return true;
  }

  function openSamples(cell) {
    const dialog = byId("samples");
    byId("samples-title").textContent = cell.label;
    const items = cell.examples.map((text) => element("li", {}, text));
    dialog.querySelector("ul").replaceChildren(...items);
    dialog.showModal();
  }

  // A figure is one stop for the Tab key; arrow keys go from cell to cell inside it.
  function connectCells() {
    for (const [name, cells] of Object.entries(read("cells"))) {
      const targets = cells.map((_, number) => byId(`cell-${name}-${number}`));
      targets.forEach((target, number) => connectCell(target, cells[number], targets, number));
    }
  }

  function connectCell(target, cell, targets, number) {
    target.setAttribute("role", "button");
    target.setAttribute("tabindex", number ? "-1" : "0");
    target.setAttribute("aria-label", cell.label);
    const title = document.createElementNS("http://www.w3.org/2000/svg", "title");
    title.textContent = cell.label;
    target.prepend(title);
    target.addEventListener("click", () => openSamples(cell));
    target.addEventListener("keydown", (event) => {
      const steps = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 };
      const next = targets[number + steps[event.key]];
      if (event.key === "Enter" || event.key === " ") openSamples(cell);
      else if (next) {
        target.setAttribute("tabindex", "-1");
        next.setAttribute("tabindex", "0");
        next.focus();
      } else return;
      event.preventDefault();
    });
  }

  let waiting = 0;
  query.addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(() => { writeAddress(); update(); }, 120);
  });
  for (const control of [chosenSet, order]) {
    control.addEventListener("change", () => { writeAddress(); update(); });
  }
  document.querySelector(".controls").addEventListener("submit", (event) => event.preventDefault());
  more.addEventListener("click", () => {
    const first = showMore();
    first.tabIndex = -1;
    first.focus();
  });
  byId("samples").addEventListener("click", (event) => {
    if (event.target === event.currentTarget) event.currentTarget.close();
  });
  addEventListener("hashchange", () => { if (readAddress()) update(); });
  connectCells();
  const isSearch = readAddress();
  update();
  if (isSearch) byId("examples").scrollIntoView({ behavior: "instant" });
})();
