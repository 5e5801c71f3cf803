// What a search found: step time against memory, a point a layout; a click shows the layout and the flags to type.
function search() {
  const found = DATA.search;
  const rows = found.candidates.map((row, number) => ({ ...row, number }));
  const shown = rows.filter((row) => row.seconds && row.bytes);
  const [width, height, left, bottom, head] = [1100, 440, 74, 44, 12];
  const times = shown.flatMap((row) => (row.kind === "formula" ? [row.seconds] : [row.seconds, row.formula]));
  const sizes = shown.flatMap((row) => [row.bytes, row.estimate]);
  const [fast, slow] = [Math.min(...times) / 1.06, Math.max(...times) * 1.06];
  const [low, high] = [Math.min(...sizes, found.capacity) * 0.9, Math.max(...sizes, found.capacity) * 1.04];
  const x = (time) => left + ((Math.log(time) - Math.log(fast)) / (Math.log(slow) - Math.log(fast))) * (width - left - 16);
  const y = (size) => head + (1 - (size - low) / (high - low)) * (height - head - bottom);
  const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, id: "scatter", tabindex: 0, role: "group", "aria-label": `Step time against memory of ${shown.length} layouts; left and right go from the faster to the slower` });
  axes();
  const points = new Map();
  for (const row of shown) {
    if (row.kind === "formula") continue;
    picture.append(svg("line", { class: "tie", x1: x(row.formula), y1: y(row.estimate), x2: x(row.seconds), y2: y(row.bytes) }));
  }
  // what was compiled lies above what was not
  for (const row of [...shown].sort((one, other) => (one.kind !== "formula") - (other.kind !== "formula") || one.own - other.own)) {
    const kind = `point ${row.kind === "formula" ? "" : row.kind} ${row.own ? "own" : ""}`.trim();
    const point = svg("circle", { class: kind, cx: x(row.seconds).toFixed(1), cy: y(row.bytes).toFixed(1), r: row.kind === "formula" ? 4.5 : 7, "data-i": row.number });
    points.set(row.number, point);
    picture.append(point);
  }

  function axes() {
    const ticks = niceTicks(fast, slow);
    for (const tick of ticks) {
      picture.append(svg("line", { class: "axis", x1: x(tick), x2: x(tick), y1: head, y2: height - bottom }));
      picture.append(svg("text", { x: x(tick), y: height - bottom + 16, "text-anchor": "middle" }, seconds(tick)));
    }
    const step = niceStep((high - low) / 2 ** 30 / 6) * 2 ** 30;
    for (let size = Math.ceil(low / step) * step; size <= high; size += step) {
      picture.append(svg("line", { class: "axis", x1: left, x2: width - 16, y1: y(size), y2: y(size) }));
      picture.append(svg("text", { x: left - 8, y: y(size) + 4, "text-anchor": "end" }, bytes(size)));
    }
    picture.append(svg("line", { class: "capacity", x1: left, x2: width - 16, y1: y(found.capacity), y2: y(found.capacity) }));
    picture.append(svg("text", { x: width - 18, y: y(found.capacity) - 5, "text-anchor": "end" }, `the device's ${bytes(found.capacity)}`));
    picture.append(svg("text", { x: (left + width) / 2, y: height - 6, "text-anchor": "middle" }, "step time (logarithmic)"));
    picture.append(svg("text", { transform: `translate(12 ${(head + height - bottom) / 2}) rotate(-90)`, "text-anchor": "middle" }, "memory of a device"));
  }

  const kindText = { compiled: "compiled", unfit: "compiled, does not fit", formula: "by formula" };
  const tell = (row) =>
    [
      `${row.mesh}${row.own ? " (the configuration's own)" : ""}`,
      `${seconds(row.seconds)} a step, MFU ${percent(row.mfu)}, ${bytes(row.bytes)}: ${kindText[row.kind]}`,
      row.kind === "formula" ? "" : `by formula ${seconds(row.formula)}, ${bytes(row.estimate)}`,
      `${row.schedule === "-" ? "" : `${row.schedule}, `}${plural(row.rows, "row")} a microbatch, ${row.microbatches} microbatch${row.microbatches === 1 ? "" : "es"}, recompute ${row.recompute}, zero ${row.zero}`,
      row.context ? `context by ${row.context}, axes ${row.order}` : "",
    ].filter(Boolean).join("\n");

  const box = el("div", { class: "picked-box", id: "picked", "aria-live": "polite" });
  let picked = null;
  let hot = null;

  function heat(row) {
    if (hot) points.get(hot.number)?.classList.remove("hot");
    hot = row;
    if (row) points.get(row.number)?.classList.add("hot");
  }

  function pick(row) {
    if (picked) points.get(picked.number)?.classList.remove("picked");
    picked = row;
    const point = points.get(row.number);
    if (point) {
      point.classList.add("picked");
      picture.append(point);
    }
    list.choose(row);
    const button = el("button", { type: "button" }, "Copy the flags");
    button.addEventListener("click", () => copy(row.flags, button));
    const parts = found.part_names.map((name, place) => [name, row.parts[place], partShade(name), `${seconds(row.parts[place])}, ${percent(row.parts[place] / row.seconds)}`]).filter(([, time]) => time > 0);
    box.replaceChildren(
      el("h3", {}, `${row.mesh}${row.own ? " – the configuration's own layout" : ""}`),
      el("p", { class: "small", style: "white-space:pre-line" }, tell(row).split("\n").slice(1).join("\n")),
      stack("The step by what takes the time", parts, parts.reduce((sum, part) => sum + part[1], 0)),
      keys(parts.map(([name, , shade, text]) => [shade, `${name} ${text}`])),
      el("div", { class: "tools" }, el("span", { class: "muted small" }, "Flags to type after the configuration"), button),
      el("pre", { class: "wrap", id: "flags" }, row.flags || "none: it is the configuration as it is"),
    );
  }

  const rowOf = (event) => (event.target.dataset && event.target.dataset.i !== undefined ? rows[Number(event.target.dataset.i)] : null);
  picture.addEventListener("pointermove", (event) => {
    const row = rowOf(event);
    heat(row);
    showTip(event, row ? tell(row) : "");
  });
  picture.addEventListener("pointerleave", () => {
    heat(null);
    hideTip();
  });
  picture.addEventListener("click", (event) => {
    const row = rowOf(event);
    if (row) pick(row);
  });
  const inOrder = [...shown].sort((one, other) => one.seconds - other.seconds);
  picture.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: 1, ArrowDown: -1, Home: -Infinity, End: Infinity }[event.key];
    if (!step) return;
    event.preventDefault();
    const at = picked ? inOrder.indexOf(picked) : step > 0 ? -1 : inOrder.length;
    pick(inOrder[Math.max(0, Math.min(inOrder.length - 1, at + step))]);
  });

  const list = table("Layouts", [
    { name: "mesh", value: (row) => row.mesh },
    { name: "schedule", value: (row) => row.schedule },
    { name: "rows", value: (row) => row.rows, right: true },
    { name: "recompute", value: (row) => row.recompute },
    { name: "zero", value: (row) => row.zero },
    { name: "step", value: (row) => row.seconds, text: (row) => seconds(row.seconds), right: true },
    { name: "MFU", value: (row) => row.mfu, text: (row) => percent(row.mfu), right: true },
    { name: "memory", value: (row) => row.bytes, text: (row) => bytes(row.bytes), right: true },
    { name: "by", value: (row) => `${kindText[row.kind]}${row.own ? ", own" : ""}${row.kind === "formula" && !row.fits ? ", memory?" : ""}` },
  ], rows, {
    search: "Search layouts, such as: tensor 4 1f1b", noun: "layout", pick: (row) => pick(row),
    changed: (left) => rows.forEach((row) => points.get(row.number)?.classList.toggle("faint", !left.has(row))),
  });

  const counted = `${plural(found.num_layouts, "layout")}; ${count(found.num_too_big)} do not fit by formula` +
    (found.num_refused ? `, ${count(found.num_refused)} have sizes that do not go together` : "") + ". ";
  section("search", "Layouts",
    el("p", { class: "muted" }, counted + "Point at a layout to see it, click it for its flags; left and right go through them by step time. " +
      "What was compiled is joined to what the formulas said of it: compare formulas with formulas."),
    found.own_problem ? el("p", {}, `The configuration's own layout does not run here: ${found.own_problem}`) : null,
    keys([["nvlink", "by formula"], ["good", "compiled"], ["bad", "compiled, does not fit"], ["own", "ring: the configuration's own"]]),
    picture, box, list,
    el("p", { class: "muted small" }, "Rows: of a microbatch on a device. memory?: above the device's by less than the estimate can be wrong." +
      (found.left_out ? ` ${count(found.left_out)} slower layouts are left out here; --json writes all.` : "")));
  if (rows.length) pick(rows.find((row) => row.kind === "compiled") || inOrder[0] || rows[0]);
  page.search = { rows, pick, picked: () => picked };
}

function niceStep(rough) {
  const power = 10 ** Math.floor(Math.log10(rough));
  return [1, 2, 5, 10].map((factor) => factor * power).find((step) => step >= rough);
}

// ticks of a logarithmic axis: at least three
function niceTicks(low, high) {
  for (const factors of [[1], [1, 2, 5], [1, 1.5, 2, 3, 4, 5, 7]]) {
    const found = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power += 1) {
      for (const factor of factors) {
        const tick = factor * 10 ** power;
        if (tick >= low && tick <= high) found.push(tick);
      }
    }
    if (found.length >= 3) return found;
  }
  const step = niceStep((high - low) / 5 || low);
  const found = [];
  for (let tick = Math.ceil(low / step) * step; tick <= high; tick += step) found.push(tick);
  return found;
}
