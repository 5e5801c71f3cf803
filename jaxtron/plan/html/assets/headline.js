// The first lines: what was planned, and the four numbers that are asked for first.
function headline() {
  const { step, memory } = PLAN;
  const nodes = Math.ceil(PLAN.num_gpus / PLAN.gpus_per_node);
  const gpu = PLAN.gpu.toUpperCase();
  const best = DATA.search ? "The fastest layout that was compiled: " : "";
  document.getElementById("subtitle").textContent =
    best +
    `${billions(PLAN.parameters_total)} parameters on ${count(PLAN.num_gpus)} ${gpu} (${plural(nodes, "node")}); ` +
    `${PLAN.schedule}; compiled with JAX ${PLAN.jax_version}`;
  const card = (label, value, unit, note, kind) =>
    el(
      "div",
      { class: "card" },
      el("div", { class: "label" }, label),
      el("div", { class: `value ${kind || ""}` }, value, unit ? el("small", {}, ` ${unit}`) : null),
      el("div", { class: "note" }, note),
    );
  const [time, unit] = seconds(step.seconds).split(" ");
  const [held, heldUnit] = bytes(memory.total).split(" ");
  // a tiny model on large GPUs has an MFU all the same
  const part = (size) => percent(size, size < 0.001 ? 3 : size < 0.01 ? 2 : 1);
  const fits = memory.fits ? "fits" : "does not fit";
  main.append(
    el(
      "div",
      { class: "cards", id: "headline" },
      card("Step time, predicted", time, unit, `bound of the compiled step: ${seconds(PLAN.bound.seconds)}`),
      card("Tokens a second", count(Math.round(step.tokens_per_second)), "", step.days || `${count(Math.round(step.tokens_per_second / PLAN.num_gpus))} a GPU`),
      card("MFU", part(step.mfu), "", `HFU ${part(step.hfu)}; bound ${part(PLAN.bound.mfu)}`),
      card("Memory of a GPU", held, heldUnit, `${fits}: ${percent(memory.total / memory.capacity, 0)} of ${bytes(memory.capacity)}`, memory.fits ? "" : "bad"),
    ),
  );
}

function stepTime() {
  const { step, bound } = PLAN;
  const shown = step.parts.filter(([, time]) => time > 1e-6 * step.seconds);
  const parts = shown.map(([name, time]) => [name, time, partShade(name), `${seconds(time)}, ${percent(time / step.seconds)}`]);
  const told = parts.map(([name, , , text]) => `${name} ${text}`).join("; ");
  const mark = (name) => el("span", { class: "key" }, el("span", { class: "swatch", style: `background:var(--${partShade(name)})` }), name);
  const predicted = table(
    "Predicted step by what takes the time",
    [
      { name: "part", value: (row) => row[0], node: (row) => mark(row[0]) },
      { name: "time", value: (row) => row[1], text: (row) => seconds(row[1]), right: true },
      { name: "share", value: (row) => row[1], text: (row) => percent(row[1] / step.seconds), right: true },
    ],
    shown,
  );
  const rate = (row) => {
    if (!row[1] || row[0].startsWith("exposed") || !row[2]) return "";
    return row[3] ? `${flops(row[3] / row[1]).slice(0, -1)}/s` : `${bytes(row[2] / row[1])}/s`;
  };
  const least = table(
    "Bound of the compiled step, kernel by kernel",
    [
      { name: "part", value: (row) => row[0] },
      { name: "time", value: (row) => row[1], text: (row) => seconds(row[1]), right: true },
      { name: "share", value: (row) => row[1], text: (row) => percent(row[1] / bound.seconds), right: true },
      { name: "bytes", value: (row) => row[2], text: (row) => (row[2] ? bytes(row[2]) : ""), right: true },
      { name: "rate", value: (row) => (row[1] ? row[3] / row[1] || row[2] / row[1] : 0), text: rate, right: true },
      { name: "launches", value: (row) => row[4], text: (row) => (row[4] ? count(row[4]) : ""), right: true },
    ],
    bound.rows,
  );
  section(
    "time",
    "Step time",
    stack(`The predicted step: ${told}`, parts, step.seconds),
    el("div", { class: "columns uneven" },
      el("div", {}, el("h3", {}, `Predicted: ${seconds(step.seconds)}`), predicted),
      el("div", {}, el("h3", {}, `Bound of the compiled step: ${seconds(bound.seconds)}`), least)),
    el("p", { class: "muted small" },
      "The prediction is a model of time with constants of the GPU; communication counts where no product hides it. The bound " +
      "takes every kernel of the compiled program at the best rate assumed of its GPU and nothing between them. Neither was measured."),
  );
}

function command() {
  const whole = el("pre", { class: "wrap", id: "command-line" }, DATA.command);
  const button = el("button", { type: "button" }, "Copy");
  button.addEventListener("click", () => copy(DATA.command, button));
  const lines = PLAN ? PLAN.choices.map((line) => el("p", { class: "small muted" }, line)) : [];
  section("command", "Command",
    el("div", { class: "tools" }, el("span", { class: "muted small" }, "This page was made by"), button),
    whole, ...lines,
    el("details", {}, el("summary", {}, "The report as text"), el("pre", { id: "report-text" }, DATA.text)));
}

function diagnostics() {
  if (!PLAN.diagnostics.length) return section("diagnostics", "Diagnostics", el("p", { class: "muted" }, "None: the compiled program shows nothing that was not asked for."));
  return section("diagnostics", "Diagnostics", table("Diagnostics",
    [
      { name: "what", value: (row) => row[0], wide: true },
      { name: "bytes a GPU and step", value: (row) => row[1], text: (row) => (row[1] ? bytes(row[1]) : ""), right: true },
      { name: "where", value: (row) => row[2], mono: true, wide: true },
    ], PLAN.diagnostics));
}

function parameters() {
  const shape = (row) => row[1].map(count).join(" × ") || "scalar";
  const size = (row) => row[1].reduce((whole, part) => whole * part, 1);
  const spec = (row) => (row[1].length ? `(${row[3].map((flags) => flags || "-").join(", ")})` : "()");
  const held = PLAN.parameters.reduce((sum, row) => sum + row[5], 0);
  section("parameters", "Parameters",
    el("p", { class: "muted" },
      `${count(PLAN.parameters_total)} parameters in ${plural(PLAN.parameters.length, "array")}; a device holds ${bytes(held)} of them at rest. ` +
      "The spec says which setting of the mesh splits each dimension; replicas are the devices that hold the same part."),
    table("Parameters",
      [
        { name: "name", value: (row) => row[0], node: (row) => dotted(row[0]), mono: true, wide: true },
        { name: "shape", title: "sorted by size", value: size, text: shape },
        { name: "logical axes", value: (row) => row[2].join(", "), mono: true },
        { name: "spec at rest", value: spec, mono: true },
        { name: "role", value: (row) => row[4] },
        { name: "bytes a device", value: (row) => row[5], text: (row) => bytes(row[5]), right: true },
        { name: "replicas", value: (row) => row[6], text: (row) => count(row[6]), right: true },
        PLAN.parameters.some((row) => row[7]) && { name: "padding", title: "elements that make the parts even", value: (row) => row[7], text: (row) => (row[7] ? count(row[7]) : ""), right: true },
      ].filter(Boolean), PLAN.parameters, { search: "Search names, shapes, specs", noun: "array" }));
}
