  // ---- tables: a column sorts by its value and shows its text
  const word = (title, value, text = (row) => String(value(row) ?? "–")) => ({ title, value, text, look: {} });
  const number = (...column) => ({ ...word(...column), look: { class: "number" } });
  const compare = (a, b) => (typeof a === "string" && typeof b === "string"
    ? a.localeCompare(b, "en", { numeric: true }) : a - b);
  const table = (id, columns, group, run) => {
    const order = { column: null, sign: 1 };
    let most = 200; // rows; laying out thousands takes a second
    let rows = [];
    const heads = columns.map(({ title, look }) =>
      html("th", { scope: "col", ...look }, html("button", { type: "button" }, title)));
    const body = html("tbody");
    const more = html("button", { type: "button" });
    const search = html("input", { type: "search", placeholder: "only rows with …", "aria-label": `Rows of ${id} with` });
    const count = html("span", { class: "soft", role: "status" });
    byId(id).append(html("thead", {}, html("tr", {}, ...heads)), body);
    byId(id).parentNode.before(html("div", { class: "tools" }, search, count, more));
    const texts = new Map(); // row -> what it says, in small letters
    const textOf = (row) => {
      if (!texts.has(row)) texts.set(row, columns.map(({ plain, text }) => (plain ?? text)(row)).join(" ").toLowerCase());
      return texts.get(row);
    };
    const sorted = (rows) => {
      if (!order.column) return rows;
      const value = order.column.value;
      const missing = (row) => Number(value(row) === null); // those are last, whichever way
      return rows.toSorted((a, b) =>
        missing(a) - missing(b) || (missing(a) ? 0 : order.sign * compare(value(a), value(b))));
    };
    const fill = () => {
      const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
      const found = words.length ? rows.filter((row) => words.every((one) => textOf(row).includes(one))) : rows;
      const shown = sorted(found).slice(0, most);
      count.textContent = `${shown.length} of ${rows.length}`;
      more.hidden = found.length <= most;
      more.textContent = `show all ${found.length}`;
      body.replaceChildren(...shown.map((row) => mark(
        html("tr", {}, ...columns.map(({ text, look }) => html("td", look, text(row)))), group(row), run(row), null)));
      walkable(body);
      highlight(body);
      edge(byId(id).parentNode);
    };
    search.addEventListener("input", fill);
    more.addEventListener("click", () => {
      most = Infinity;
      fill();
    });
    columns.forEach((column, place) => heads[place].firstChild.addEventListener("click", () => {
      Object.assign(order, { column, sign: order.column === column ? -order.sign : 1 });
      heads.forEach((head) => head.removeAttribute("aria-sort"));
      heads[place].setAttribute("aria-sort", order.sign > 0 ? "ascending" : "descending");
      fill();
    }));
    return (all) => {
      rows = all;
      fill();
    };
  };
  const settingColumns = (of) => data.filters.map(({ name, title }) => {
    const words = data.groups.some(({ settings }) => typeof settings[name].value === "string");
    const text = (row) => of(row).settings[name].text;
    return (words ? word : number)(title, (row) => of(row).settings[name].value, (row) => cut(text(row), 60));
  });
  const remark = (wrong, text) => html("span", wrong ? { class: "bad message", title: text } : {}, text);
  const said = (title, value, wrong, text) => // a column of words, red where something went wrong
    ({ ...word(title, value, (row) => remark(wrong(row), text(row))), plain: text });
  const steps = (group) => group.diverged_at.filter((step) => step !== null);
  const firstStep = (group) => (steps(group).length ? Math.min(...steps(group)) : null);
  const lastStep = (group) => (steps(group).length ? Math.max(...steps(group)) : null);
  const stepsOf = (low, high) => (low === null ? "–" : low === high ? String(low) : `${low} to ${high}`);
  const makeTables = () => ({
    results: table("results", [
      ...settingColumns((group) => group),
      said(data.axis.title, (group) => group.value, (group) => !group.trains, (group) => group.outcome),
      number("95 % interval", (group) => group.interval?.[0] ?? null, between),
      word("against the best", (group) => group.verdict ?? null),
      number("validation loss", (group) => group.loss, (group) => round(group.loss)),
      number("diverged at step", firstStep, (group) => stepsOf(firstStep(group), lastStep(group))),
      number("runs", (group) => group.seeds.length),
      number("ms a step", (group) => group.milliseconds, (group) => round(group.milliseconds, 2)),
    ], (group) => group, () => null),
    runs: table("runs", [
      ...settingColumns((run) => data.groups[run.group]),
      number("seed", (run) => run.seed),
      said("status", verdict, (run) => run.status !== "finished", verdict),
      number(data.axis.title, (run) => run.value, (run) => round(run.value)),
      ...data.others.map((name, place) => number(name, (run) => run.others[place], (run) => round(run.others[place]))),
      number("validation loss", (run) => run.loss, (run) => round(run.loss)),
      number("steps", (run) => run.steps),
      number("seconds", (run) => run.seconds, (run) => round(run.seconds, 1)),
      number("parameters", (run) => run.parameters),
      word("ended", (run) => run.finished_at, (run) => (run.finished_at ?? "–").slice(0, 19).replace("T", " ")),
      word("versions", (run) => run.versions, (run) => run.versions),
    ], (run) => data.groups[run.group], (run) => run),
  });
