  // ---- elements: text is only ever set as text, never parsed
  const byId = (id) => document.getElementById(id);
  const build = (node, attributes, children) => {
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    node.append(...children);
    return node;
  };
  const html = (name, attributes = {}, ...children) => build(document.createElement(name), attributes, children);
  const svg = (name, attributes = {}, ...children) =>
    build(document.createElementNS("http://www.w3.org/2000/svg", name), attributes, children);
  const swatch = ({ colour, dash, shape }) =>
    svg("svg", { class: "swatch hue", viewBox: "-17 -7 34 14", style: `--hue:${colour}`, "aria-hidden": "true" },
      svg("path", { class: "line", d: "M-17 0H17", "stroke-dasharray": dash }),
      svg("path", { class: "shape", d: shape }));

  // ---- words
  const round = (value, digits = 4) => {
    if (value === null) return "–";
    return Math.abs(value) >= 1e6 || (value && Math.abs(value) < 1e-4) ? value.toPrecision(4) : value.toFixed(digits);
  };
  const lines = (...parts) => parts.filter(Boolean).join("\n");
  const describe = (group) => data.filters
    .map(({ name, title }) => (name === "norm" ? group.settings.norm.text : `${title} ${group.settings[name].text}`))
    .join(" · ");
  const verdict = (run) => {
    if (run.status === "diverged" && run.diverged_at !== null) return `diverged at step ${run.diverged_at}`;
    return run.status === "failed" && run.error ? `failed: ${run.error}` : run.status;
  };
  const between = ({ interval }, digits = 4) => (interval ? interval.map((end) => round(end, digits)).join(" to ") : "–");
  const aboutGroup = (group) => lines(
    describe(group),
    group.outcome,
    group.interval && `95 % interval ${between(group)}`,
    group.verdict,
    group.loss !== null && `validation loss ${round(group.loss)}`,
    group.diverged_at.length && `diverged at step ${group.diverged_at.map((step) => step ?? "unknown").join(", ")}`,
    ...group.errors.map((error) => `failed: ${error}`),
    `${group.seeds.length === 1 ? "seed" : "seeds"} ${group.seeds.join(", ")}`);
  const aboutRun = (run) => lines(
    `${describe(data.groups[run.group])} · seed ${run.seed}`,
    verdict(run) + (run.value === null ? "" : `, ${data.axis.title} ${round(run.value)}`),
    run.by_epoch.length > 1 && `by epoch ${run.by_epoch.map((value) => round(value)).join(", ")}`);

  // ---- marks: what tells more when pointed at or reached with the keyboard, and can be chosen
  const marks = new WeakMap(); // node -> { tip: function that gives text, or none; group; run, or null }
  const mark = (node, group, run, tip) => {
    node.classList.add("mark");
    marks.set(node, { group, run, tip });
    return node;
  };
  const picture = (node, group, run, tip) =>
    mark(build(node, { role: "img", "aria-label": tip() }, []), group, run, tip);
  const walkable = (container) => {
    container.dataset.walk = "";
    container.querySelectorAll(".mark").forEach((node, place) => node.setAttribute("tabindex", place ? -1 : 0));
  };
  const hideTip = () => { byId("tip").hidden = true; };
  const showTip = (text, x, y) => {
    const tip = byId("tip");
    tip.textContent = text.length > 600 ? `${text.slice(0, 600)} …` : text;
    tip.hidden = false;
    const { width, height } = tip.getBoundingClientRect();
    tip.style.left = `${Math.max(4, Math.min(x + 14, innerWidth - width - 4))}px`;
    tip.style.top = `${y + 18 + height > innerHeight ? Math.max(4, y - height - 12) : y + 18}px`;
  };
  const markAt = (event) => event.target.closest?.(".mark");
  const pointed = (event) => {
    const tip = marks.get(markAt(event))?.tip;
    if (tip) showTip(tip(event), event.clientX, event.clientY);
    else hideTip();
  };
  const focused = (event) => {
    const node = markAt(event);
    const tip = marks.get(node)?.tip;
    if (!tip || !node.matches(":focus-visible")) return;
    const box = node.getBoundingClientRect();
    showTip(tip(), box.left, box.bottom);
  };
  const STEPS = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1, Home: -Infinity, End: Infinity };
  const neighbour = (node, key) => {
    if (node.matches("td") && (key === "ArrowDown" || key === "ArrowUp")) { // a map: the same column
      const row = node.parentNode[key === "ArrowDown" ? "nextElementSibling" : "previousElementSibling"];
      const cell = row?.cells[node.cellIndex];
      return cell?.matches(".mark") ? cell : node;
    }
    const all = [...node.closest("[data-walk]").querySelectorAll(".mark")];
    const place = all.indexOf(node) + STEPS[key];
    return Number.isFinite(place) ? all.at(place % all.length) : all.at(place > 0 ? -1 : 0);
  };
  const walk = (event) => {
    const node = markAt(event);
    if (!STEPS[event.key] || !node) return;
    if (node.matches("tr") && /Left|Right/.test(event.key)) return; // scrolls the table
    const next = neighbour(node, event.key);
    node.setAttribute("tabindex", -1);
    next.setAttribute("tabindex", 0);
    next.focus();
    event.preventDefault();
  };

  // ---- what is wider than its place says so
  const edge = (node) =>
    node.classList.toggle("goes-on", node.scrollLeft + node.clientWidth < node.scrollWidth - 1);
  const edges = () => document.querySelectorAll(".wide").forEach(edge);
  const resized = new ResizeObserver(edges);
  const watchEdges = (node) => {
    node.after(html("div", { class: "wide-note", "aria-hidden": "true" }, "more to the right: scroll sideways ⟶"));
    node.addEventListener("scroll", () => edge(node), { passive: true });
    resized.observe(node);
  };
