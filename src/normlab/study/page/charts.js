  // ---- charts
  const LEFT = 66;
  const drawn = ({ kind }, value) => (kind === "error" ? -Math.log(1 - value) : kind === "log" ? Math.log(value) : value);
  const share = (axis, value) => { // 0 at the lowest value of the axis, 1 at the highest; as Axis.share in charts.py
    const [low, high, x] = [axis.low, axis.high, Math.min(Math.max(value, axis.low), axis.high)]
      .map((one) => drawn(axis, one));
    return (x - low) / (high - low);
  };
  const cut = (text, length) => (text.length > length ? `${text.slice(0, length - 1)}…` : text);
  const plot = (width, height, bottom, axis) => {
    const [top, floor] = [10, height - bottom];
    const y = (value) => top + (1 - share(axis, value)) * (floor - top);
    const every = Math.ceil((17 * axis.ticks.length) / (floor - top));
    const grid = axis.ticks.filter((_, place) => place % every === 0).flatMap(([tick, label]) => [
      svg("line", { class: "grid", x1: LEFT, x2: width, y1: y(tick), y2: y(tick) }),
      svg("text", { x: LEFT - 8, y: y(tick) + 4, "text-anchor": "end" }, label)]);
    return { y, floor, node: svg("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "group" }, ...grid) };
  };
  const cross = (x, y) => svg("path", { class: "cross", d: `M${x - 4} ${y - 4}l8 8m0 -8l-8 8` });
  const path = (points) => points.map(([x, y], place) => { // a gap where a point has no y
    if (y === null) return "";
    return `${place && points[place - 1][1] !== null ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`;
  }).join("");

  // ---- maps: a cell for each setting, its colour the metric
  const mapCell = (group, remarks) => {
    if (!group) return html("td", {}, "–");
    const node = html("td", {}, ...remarks(group));
    if (group.value === null) node.classList.add("lost");
    node.style.setProperty("--heat", 0.05 + 0.55 * group.warmth);
    if (group.frame) node.classList.add(group.frame);
    return mark(node, group, null, () => aboutGroup(group));
  };
  const mapTable = (node, corner, sizes, rows, remarks) => {
    node.replaceChildren(
      html("thead", {}, html("tr", {}, html("td", {}, corner),
        ...sizes.map((size) => html("th", { scope: "col" }, corner ? String(size) : `batch ${size}`)))),
      html("tbody", {}, ...rows.map(([head, find]) => html("tr", {},
        html("th", { scope: "row" }, ...head), ...sizes.map((size) => mapCell(find(size), remarks))))));
    walkable(node);
    return node;
  };
  const small = (text) => html("small", {}, text);
  const bestMap = (groups) => mapTable(byId("heat"), "", sizesOf(groups),
    [...bestOf(groups)].map(([series, row]) => [[swatch([...row.values()][0]), cut(series, 60)], (size) => row.get(size)]),
    (group) => [
      ...group.outcome.split(", ").map((part, place) => (place ? small(part) : part)),
      ...(manyRates ? [small(`learning rate ${group.settings.lr.text}`)] : []),
      ...(group.verdict ? [small(group.verdict)] : [])]);
  const rateMaps = (groups) => {
    const rates = data.filters.find(({ name }) => name === "lr").values.toReversed();
    byId("rates").replaceChildren(...[...bestOf(groups).keys()].map((series) => {
      const own = groups.filter((group) => group.series === series);
      const find = (rate) => (size) =>
        own.find((group) => group.settings.lr === rate && sizeOf(group) === size);
      const rows = rates.filter((rate) => own.some(({ settings }) => settings.lr === rate));
      const table = mapTable(html("table", { class: "map", "aria-label": `learning rates of ${series}` }), "rate \\ batch",
        sizesOf(own), rows.map((rate) => [[rate.text], find(rate)]),
        (group) => [
          group.value === null ? "×" : round(group.value, 3),
          ...(group.interval ? [small(between(group, 3))] : []),
          {% if some_stopped %}
          ...(group.made ? [small(`stopped, ${group.made}`)] : []),
          {% endif %}
          ...(lost(group) && group.value !== null ? [small(`${lost(group)} of ${group.seeds.length} ×`)] : [])]);
      return html("figure", {}, html("figcaption", {}, swatch(own[0]), cut(series, 60)), html("div", { class: "wide" }, table));
    }));
    byId("rates").querySelectorAll(".wide").forEach(watchEdges);
  };

  // ---- the metric against batch size
  const metric = (groups) => {
    const sizes = sizesOf(groups);
    const rows = [...bestOf(groups)];
    const room = byId("metric").clientWidth || 960;
    const width = Math.max(room, LEFT + sizes.length * Math.max(48, 11 * rows.length));
    const height = Math.min(380, 180 + room / 3);
    const strip = groups.some(lost) ? 30 : 0;
    const { node, y, floor } = plot(width, height, 42 + strip, data.axis);
    const band = (width - LEFT) / (sizes.length || 1);
    const spread = rows.length > 1 ? 0.7 : 0;
    const x = (size, place) => LEFT + band * (sizes.indexOf(size) + 0.5 + spread * ((place + 0.5) / rows.length - 0.5));
    const point = (group, place) => {
      const parts = [];
      if (group.value !== null) {
        if (group.interval) {
          const [low, high] = group.interval.map(y);
          parts.push(svg("path", { class: "bar", d: `M-4 ${high}h8M-4 ${low}h8M0 ${high}V${low}` }));
        }
        parts.push(svg("path", { class: "shape", d: group.shape, transform: `translate(0 ${y(group.value)})` }));
      }
      if (lost(group)) parts.push(cross(0, floor + 4 + strip / 2));
      const at = `translate(${x(sizeOf(group), place)} 0)`;
      const whole = svg("g", { class: "hue", transform: at, style: `--hue:${group.colour}` }, ...parts);
      return picture(whole, group, null, () => aboutGroup(group));
    };
    if (strip) {
      node.append(svg("rect", { class: "strip", x: LEFT, y: floor + 4, width: width - LEFT, height: strip }),
        svg("text", { x: LEFT - 8, y: floor + 8 + strip / 2, "text-anchor": "end" }, "no result"));
    }
    const below = (x, y, text) => node.append(svg("text", { x, y, "text-anchor": "middle" }, text));
    sizes.forEach((size, place) => below(LEFT + band * (place + 0.5), floor + strip + 20, String(size)));
    below(LEFT + (width - LEFT) / 2, height - 2, "batch size");
    rows.forEach(([series, row], place) => {
      const others = groups.filter((group) => group.series === series && group !== row.get(sizeOf(group)));
      const joined = sizes.map((size) => {
        const value = row.get(size)?.value ?? null;
        return [x(size, place), value === null ? null : y(value)];
      });
      const { colour, dash } = [...row.values()][0];
      node.append(
        svg("g", { class: "other" }, ...others.map((group) => point(group, place))),
        svg("path", { class: "line hue", d: path(joined), "stroke-dasharray": dash, style: `--hue:${colour}` }),
        svg("g", {}, ...[...row.values()].map((group) => point(group, place))));
    });
    walkable(node);
    byId("metric").replaceChildren(node);
    byId("legend").replaceChildren(
      ...rows.map(([series, row]) => html("span", {}, swatch([...row.values()][0]), cut(series, 80))));
  };

  // ---- panels of lines, each of a run: { run, xs, ys, tell: place -> text }
  const panel = (title, axis, lineOf, runs, foot) => {
    const [width, height] = [340, 210];
    const { node, y, floor } = plot(width, height, 30, axis);
    const all = runs.map(lineOf).filter(Boolean);
    const [first, last] = [Math.min(...all.map(({ xs }) => xs[0])), Math.max(...all.map(({ xs }) => xs.at(-1)))];
    const x = (value) => LEFT + ((width - LEFT - 6) * (value - first)) / (last - first || 1);
    for (const { run, xs, ys, tell } of all) {
      const points = xs.map((value, place) => [x(value), ys[place] === null ? null : y(ys[place])]);
      const end = points.findLast((point) => point[1] !== null);
      if (!end) continue;
      const group = data.groups[run.group];
      const about = (event) => {
        const box = node.getBoundingClientRect();
        const wanted = event ? ((event.clientX - box.left) / box.width) * width : end[0];
        const away = ([place, value]) => (value === null ? Infinity : Math.abs(place - wanted));
        const nearer = (best, point, place) => (away(point) < away(points[best]) ? place : best);
        return lines(aboutRun(run), tell(points.reduce(nearer, points.indexOf(end))));
      };
      const d = path(points);
      const opacity = all.length > 60 ? 0.45 : 0.9;
      const whole = svg("g", { class: "hue", style: `--hue:${group.colour}` },
        svg("path", { class: "near", d }),
        svg("path", { class: "curve", d, "stroke-dasharray": group.dash, opacity }));
      if (run.status === "diverged") whole.append(cross(...end));
      node.append(picture(whole, group, run, about));
    }
    const ends = all.length ? foot(first, last) : [];
    ends.forEach((text, place) => node.append(
      svg("text", { x: place ? width - 6 : LEFT, y: floor + 18, "text-anchor": place ? "end" : "start" }, cut(text, 22))));
    walkable(node);
    return html("figure", {}, html("figcaption", {}, title), node);
  };
  const curves = (groups, runs) => byId("curves").replaceChildren(...sizesOf(groups).map((size) => panel(
    `batch size ${size}`, data.loss_axis,
    (run) => {
      const xs = data.steps[run.steps_at] ?? [];
      return xs.length ? { run, xs, ys: run.curve, tell: (at) => `step ${xs[at]}: training loss ${run.curve[at]}` } : null;
    },
    runs.filter((run) => sizeOf(data.groups[run.group]) === size),
    (first, last) => [`step ${first.toLocaleString("en")}`, last.toLocaleString("en")])));
  const layers = (runs) => {
    const own = runs.filter((run) => run.layers);
    const sizes = sizesOf(own.map((run) => data.groups[run.group]));
    byId("layers").replaceChildren(...data.layer_axes.flatMap((axis, which) => sizes.map((size) => panel(
      `batch size ${size}: ${axis.title}`, axis,
      (run) => {
        const names = data.layers[run.layers_at];
        const ys = run.layers[which];
        return { run, xs: [...names.keys()], ys, tell: (at) => `${names[at]}: ${axis.title} ${ys[at]}` };
      },
      own.filter((run) => sizeOf(data.groups[run.group]) === size), () => ["first layer", "last"]))));
  };
