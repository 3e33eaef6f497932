  // ---- filters
  const boxes = []; // { box, name, text }
  const chip = (name, text) => {
    const box = html("input", { type: "checkbox", checked: "" });
    box.addEventListener("change", () => {
      off.get(name)[box.checked ? "delete" : "add"](text);
      draw();
      remember();
    });
    boxes.push({ box, name, text });
    return html("label", { class: "chip", ...(text.length > 60 && { title: text }) }, box, cut(text, 60));
  };
  const filters = () => {
    byId("filters").append(
      ...data.filters.map(({ name, title, values }) => html("fieldset", { "data-filter": name },
        html("legend", {}, title), ...values.map(({ text }) => chip(name, text)))),
      html("button", { type: "reset" }, "show all"));
    byId("filters").addEventListener("reset", () => {
      off.forEach((values) => values.clear());
      draw();
      remember();
    });
  };

  // ---- the setting or run that is chosen: marked wherever it is drawn, with the command that repeats it
  let chosen = null; // { group, run }, or null
  const isChosen = ({ group, run }) => chosen && (run && chosen.run ? run === chosen.run : group === chosen.group);
  const highlight = (within = document) => within.querySelectorAll(".mark").forEach((node) =>
    node.classList.toggle("chosen", Boolean(isChosen(marks.get(node)))));
  const choose = (choice) => {
    chosen = choice;
    byId("choice").hidden = !chosen;
    if (chosen) {
      const { group, run } = chosen;
      byId("about").textContent = run ? aboutRun(run) : aboutGroup(group);
      byId("again").textContent = (run ? [run] : runsOf(group)).map(commandOf).join("\n");
      byId("again").hidden = !group.command;
    }
    highlight();
  };
  const commandOf = (run) => // other threads give other numbers
    `${run.threads === null ? "" : `OMP_NUM_THREADS=${run.threads} `}${data.groups[run.group].command} --seed ${run.seed}`;
  const runsOf = (group) => data.runs.filter((run) => data.groups[run.group] === group);
  const pick = (node) => {
    const { group, run } = marks.get(node);
    choose(chosen && chosen.group === group && chosen.run === run ? null : { group, run });
    remember();
  };
  const clicked = (event) => {
    const node = markAt(event);
    if (node && !String(getSelection())) pick(node);
  };
  const pressed = (event) => {
    if (event.key === "Escape") {
      if (byId("tip").hidden) choose(null);
      hideTip();
      remember();
    }
    const node = markAt(event);
    if (node === event.target && (event.key === "Enter" || event.key === " ")) {
      pick(node);
      event.preventDefault();
    }
    walk(event);
  };

  // ---- the address keeps what is filtered and chosen: for a link, and when the page is loaded again
  const remember = () => {
    const left = Object.fromEntries([...off].filter(([, values]) => values.size).map(([name, values]) => [name, [...values]]));
    const state = { off: left, key: chosen && (chosen.run ?? runsOf(chosen.group)[0]).key, run: Boolean(chosen?.run) };
    history.replaceState(null, "", `#${encodeURIComponent(JSON.stringify(state))}`);
  };
  const recall = () => {
    let state = null;
    try {
      state = JSON.parse(decodeURIComponent(location.hash.slice(1)));
    } catch {
      return; // none, or one that someone else wrote
    }
    for (const { box, name, text } of boxes) {
      if (!state?.off?.[name]?.includes?.(text)) continue;
      box.checked = false;
      off.get(name).add(text);
    }
    const run = data.runs.find(({ key }) => key === state?.key);
    if (run) choose({ group: data.groups[run.group], run: state.run ? run : null });
  };

  const current = () => ({
    results: data.groups.filter(shown),
    runs: data.runs.filter((run) => shown(data.groups[run.group])),
  });
  const draw = () => {
    const { results, runs } = current();
    hideTip();
    byId("empty").hidden = results.length > 0;
    bestMap(results);
    if (manyRates) rateMaps(results);
    metric(results);
    curves(results, runs);
    layers(runs);
    tables.results(results);
    tables.runs(runs);
    highlight();
    edges();
  };

  const tables = makeTables();
  filters();
  recall();
  draw();
  document.querySelectorAll(".wide").forEach(watchEdges);
  byId("theme").addEventListener("change", ({ target }) => { document.documentElement.dataset.theme = target.value; });
  byId("leave").addEventListener("click", () => {
    choose(null);
    remember();
  });
  document.addEventListener("pointermove", pointed);
  document.addEventListener("pointerdown", pointed);
  document.addEventListener("focusin", focused);
  document.addEventListener("focusout", hideTip);
  document.addEventListener("keydown", pressed);
  document.addEventListener("click", clicked);
  let width = innerWidth;
  addEventListener("resize", () => { // a phone's height changes as one scrolls
    if (width === innerWidth) return;
    width = innerWidth;
    metric(current().results);
    highlight(byId("metric"));
    edges();
  });
