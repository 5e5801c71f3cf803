// The mesh on its nodes: every device a square, coloured by its place along one axis; who communicates along it lights up.
const MOST_DEVICES = 16384;

// Coordinates of devices: axes outermost first, devices fill nodes in order.
function makeGrid(sizes) {
  const strides = sizes.map((_, place) => sizes.slice(place + 1).reduce((product, size) => product * size, 1));
  return {
    sizes,
    strides,
    devices: sizes.reduce((product, size) => product * size, 1),
    at: (device, place) => Math.floor(device / strides[place]) % sizes[place],
  };
}

const MEANING = {
  pipe: "stages of the pipeline",
  data: "copies of the model, gradients are summed",
  fsdp: "parts of the batch that also share the state",
  context: "parts of a sequence",
  tensor: "parts of heads, widths and vocabulary",
};

function mesh() {
  const { sizes, axes } = PLAN.traffic;
  const grid = makeGrid(sizes);
  const node = PLAN.gpus_per_node;
  const split = axes.map((name, place) => [name, place]).filter(([, place]) => sizes[place] > 1);
  let chosen = split.length ? split[split.length - 1][1] : 0;
  let hot = -1;
  const shown = Math.min(grid.devices, MOST_DEVICES);
  const layout = (width) => {
    const inNode = Math.min(node, grid.devices);
    const nodes = Math.ceil(shown / node);
    const largest = nodes > 200 ? 7 : nodes > 60 ? 9 : nodes > 8 ? 13 : 22;
    const cell = Math.max(3, Math.min(largest, Math.floor((width - 12) / inNode)));
    const wide = inNode * cell + Math.max(6, cell);
    const most = Math.max(1, Math.min(nodes, Math.floor((width + cell) / wide)));
    // rows alike
    const columns = Math.ceil(nodes / Math.ceil(nodes / most));
    return { cell, wide, columns, high: cell + Math.max(5, cell * 0.6), rows: Math.ceil(nodes / columns) };
  };
  const place = (device, found) => {
    const number = Math.floor(device / node);
    return [(number % found.columns) * found.wide + (device % node) * found.cell + 1, Math.floor(number / found.columns) * found.high + 1];
  };
  const together = (device) => {
    const here = grid.at(device, chosen);
    const first = device - here * grid.strides[chosen];
    return Array.from({ length: sizes[chosen] }, (_, place) => first + place * grid.strides[chosen]);
  };
  const tell = (device) => {
    const places = split.map(([name, at]) => `${name} ${grid.at(device, at)}`).join(", ") || "the only device";
    return `device ${count(device)}, node ${count(Math.floor(device / node))}, GPU ${device % node}\n${places}`;
  };
  const readout = el("p", { class: "readout", role: "status", "aria-live": "polite" });
  const picture = canvas(
    `Mesh of ${plural(grid.devices, "device")}: ${split.map(([name, at]) => `${name} ${sizes[at]}`).join(" x ") || "one device"}`,
    (width) => layout(width).rows * layout(width).high + 4,
    (context, width) => {
      const found = layout(width);
      const group = new Set(hot >= 0 ? together(hot) : []);
      for (let device = 0; device < shown; device += 1) {
        const [x, y] = place(device, found);
        const at = grid.at(device, chosen);
        context.globalAlpha = group.size && !group.has(device) ? 0.22 : 1;
        context.fillStyle = sizes[chosen] <= 10 ? color(kindColor(at)) : hue(at / sizes[chosen]);
        context.fillRect(x, y, found.cell - 1, found.cell - 1);
        if (found.cell >= 17) {
          context.fillStyle = "#fff";
          context.textAlign = "center";
          context.fillText(String(at), x + found.cell / 2 - 0.5, y + found.cell / 2 + 4);
        }
      }
      context.globalAlpha = 1;
      if (hot >= 0) {
        const [x, y] = place(hot, found);
        context.strokeStyle = color("ink");
        context.lineWidth = 2;
        context.strokeRect(x - 0.5, y - 0.5, found.cell, found.cell);
      }
    },
  );
  const point = (device) => {
    hot = device;
    const name = axes[chosen];
    readout.textContent = device < 0 ? intro : `${tell(device).replace("\n", ": ")}; lit are those that it communicates with along ${name}`;
    picture.redraw();
  };
  const under = (event) => {
    const box = picture.getBoundingClientRect();
    const found = layout(Math.floor(picture.clientWidth));
    const [x, y] = [event.clientX - box.left, event.clientY - box.top];
    const column = Math.floor(x / found.wide);
    const inside = Math.floor((x - column * found.wide) / found.cell);
    const device = (Math.floor(y / found.high) * found.columns + column) * node + inside;
    return column < found.columns && inside >= 0 && inside < node && device < shown && device >= 0 ? device : -1;
  };
  const intro = "Point at a device, or use the arrow keys: the devices light up that it communicates with along the chosen axis.";
  readout.textContent = intro;
  picture.addEventListener("pointermove", (event) => {
    const device = under(event);
    point(device);
    showTip(event, device < 0 ? "" : tell(device));
  });
  picture.addEventListener("pointerleave", () => {
    point(-1);
    hideTip();
  });
  picture.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -node, ArrowDown: node }[event.key];
    if (!step) return;
    event.preventDefault();
    point(hot < 0 ? 0 : Math.min(shown - 1, Math.max(0, hot + step)));
  });
  const buttons = split.map(([name, at]) => {
    const button = el("button", { type: "button", "aria-pressed": at === chosen }, `${name} ${sizes[at]}`);
    button.addEventListener("click", () => {
      chosen = at;
      for (const other of buttons) other.setAttribute("aria-pressed", other === button);
      point(-1);
    });
    return button;
  });
  const rows = split.map(([name, at]) => {
    const span = grid.strides[at] * sizes[at];
    const inside = span <= node || grid.devices <= node ? "inside a node" : grid.strides[at] >= node ? "between nodes" : "inside and between nodes";
    return [name, sizes[at], grid.strides[at], inside, MEANING[name.replace(/_\d+$/, "")] || ""];
  });
  const experts = Object.entries(PLAN.mesh.experts).filter(([, parts]) => parts > 1);
  section("mesh", "Mesh",
    el("p", { class: "muted" }, `${plural(grid.devices, "device")} in nodes of ${node}; axes are from the outermost, whose neighbours are far apart, to the innermost, whose neighbours share a node.` +
      (experts.length ? ` Experts see the devices as ${experts.map(([name, parts]) => `${name} ${parts}`).join(" x ")}.` : "")),
    rows.length ? table("Axes of the mesh", [
      { name: "axis", value: (row) => row[0] },
      { name: "parts", value: (row) => row[1], text: (row) => count(row[1]), right: true },
      { name: "neighbours are", value: (row) => row[2], text: (row) => `${plural(row[2], "device")} apart`, right: true },
      { name: "where", value: (row) => row[3] },
      { name: "for", value: (row) => row[4] },
    ], rows) : null,
    el("div", { class: "tools" }, rows.length ? el("span", { class: "muted small" }, "Colour by place along") : null, ...buttons),
    picture, readout,
    grid.devices > shown ? el("p", { class: "muted small" }, `The first ${count(shown)} devices are drawn; the others go on like them.`) : null);
  page.mesh = { point, grid, choose: (at) => buttons[at].click(), under, place: (device) => place(device, layout(Math.floor(picture.clientWidth))) };
}

const hue = (part) => `hsl(${Math.round(215 + 300 * part) % 360} 60% ${isDark() ? 62 : 50}%)`;
