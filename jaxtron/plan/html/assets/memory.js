// What fills a device's memory, against its size, and how far each stage fills the room for activations.
function memory() {
  const { capacity, total, classes, stages, fits, hint } = PLAN.memory;
  const whole = Math.max(capacity, total);
  const shown = classes.filter(([, size]) => size > 0);
  const shades = new Map(classes.map(([name], place) => [name, kindColor(place)]));
  const parts = shown.map(([name, size]) => [name, size, shades.get(name), `${bytes(size)}, ${percent(size / capacity)} of the device`]);
  const told = parts.map(([name, , , text]) => `${name} ${text}`).join("; ");
  const mark = (name) => el("span", { class: "key" }, el("span", { class: "swatch", style: `background:var(--${shades.get(name)})` }), name);
  const verdict = fits
    ? `${bytes(total)} of ${bytes(capacity)}: ${bytes(capacity - total)} are free.`
    : `${bytes(total)} do not fit: ${bytes(total - capacity)} more than the ${bytes(capacity)} of a ${PLAN.gpu.toUpperCase()}.`;
  section("memory", "Memory of a device",
    el("p", { class: fits ? "muted" : "warning" }, verdict),
    hint ? el("p", {}, `Change first: ${hint}`) : null,
    el("div", { class: "limit", "aria-hidden": "true" }, el("span", { style: `left:${(100 * capacity) / whole}%` }, `${PLAN.gpu.toUpperCase()}: ${bytes(capacity)}`)),
    stack(`Memory of a device: ${told}`, parts, whole),
    el("div", { class: "columns" },
      table("Memory of a device by class", [
        { name: "class", value: (row) => row[0], node: (row) => mark(row[0]) },
        { name: "bytes", value: (row) => row[1], text: (row) => bytes(row[1]), right: true },
        { name: "of the device", value: (row) => row[1], text: (row) => percent(row[1] / capacity), right: true },
      ], shown),
      stages.length > 1 ? stageBars(stages) : null));
}

function stageBars(stages) {
  const most = Math.max(...stages.map((stage) => stage[2]), 1);
  const [width, height, left, bottom] = [560, 210, 62, 26];
  const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", id: "stages", "aria-label": `Activations of ${stages.length} stages, at most ${bytes(most)}` });
  const step = (width - left) / stages.length;
  for (const part of [0, 0.5, 1]) {
    const y = 8 + (1 - part) * (height - bottom - 8);
    picture.append(svg("line", { class: "axis", x1: left, x2: width, y1: y, y2: y }));
    picture.append(svg("text", { x: left - 6, y: y + 4, "text-anchor": "end" }, part ? bytes(most * part) : "0"));
  }
  stages.forEach(([layers, held, size], stage) => {
    const high = ((height - bottom - 8) * size) / most;
    const bar = svg("rect", { x: left + stage * step + step * 0.08, y: height - bottom - high, width: step * 0.84, height: high, fill: "var(--c2)" });
    const text = `stage ${stage}: ${bytes(size)} of activations\n${plural(layers, "layer")}, at most ${held} microbatch${held === 1 ? "" : "es"} held`;
    bar.append(svg("title", {}, text));
    picture.append(bar);
    if (stage % Math.ceil(stages.length / 16) === 0) {
      picture.append(svg("text", { x: left + (stage + 0.5) * step, y: height - 9, "text-anchor": "middle" }, String(stage)));
    }
  });
  const rows = stages.map((stage, place) => [place, ...stage]);
  return el("div", {}, el("h3", {}, "Activations by stage"), picture,
    el("p", { class: "muted small" }, "One program runs everywhere: every stage makes room for the fullest one; these fill that much of it."),
    el("details", {}, el("summary", {}, "As a table"), table("Activations by stage", [
      { name: "stage", value: (row) => row[0], right: true },
      { name: "layers", value: (row) => row[1], right: true },
      { name: "microbatches held", value: (row) => row[2], right: true },
      { name: "activations", value: (row) => row[3], text: (row) => bytes(row[3]), right: true },
    ], rows, { short: true })));
}
