  // ---- what is shown: `off` has the values that a filter leaves out, in words
  for (const group of data.groups) {
    group.settings = Object.fromEntries(data.filters.map(({ name, values }) => [name, values[group.places[name]]]));
  }
  const manyRates = data.filters.find(({ name }) => name === "lr").values.length > 1;
  const off = new Map(data.filters.map(({ name }) => [name, new Set()]));
  const shown = (group) => data.filters.every(({ name }) => !off.get(name).has(group.settings[name].text));
  const sizeOf = (group) => group.settings.batch_size.value;
  const sizesOf = (groups) => [...new Set(groups.map(sizeOf))].sort((a, b) => a - b);
  const lost = (group) => group.diverged_at.length + group.errors.length;
  const bestOf = (groups) => { // series -> batch size -> its best group
    const rows = new Map();
    for (const group of groups) {
      if (!rows.has(group.series)) rows.set(group.series, new Map());
      const row = rows.get(group.series);
      const size = sizeOf(group);
      if (!row.has(size) || group.score > row.get(size).score) row.set(size, group);
    }
    return rows;
  };
