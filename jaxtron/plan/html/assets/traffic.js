// Who sends how much to whom in a step: collectives as a table, and a matrix of nodes or devices on a canvas.
const MOST_CELLS = 400;
const MOST_EDGES = 2e7;

// Calls `send(device, peer, bytes, row)` for the devices from `low` on below `up`.
function eachEdge(grid, flows, low, up, send) {
  for (const flow of flows) {
    const dims = flow.dims.filter((dim) => grid.sizes[dim] > 1);
    const sizes = dims.map((dim) => grid.sizes[dim]);
    const whole = sizes.reduce((product, size) => product * size, 1);
    const group = flow.group || whole;
    if (group < 2) continue;
    // from the place in a group to the device, counted from the group's first
    const offset = (place) => {
      let found = 0;
      for (let dim = dims.length - 1; dim >= 0; dim -= 1) {
        found += (place % sizes[dim]) * grid.strides[dims[dim]];
        place = Math.floor(place / sizes[dim]);
      }
      return found;
    };
    const offsets = Array.from({ length: whole }, (_, place) => offset(place));
    for (let device = low; device < up; device += 1) {
      let place = 0;
      for (let dim = 0; dim < dims.length; dim += 1) place = place * sizes[dim] + grid.at(device, dims[dim]);
      const first = device - offsets[place];
      const begin = place - (place % group);
      const own = place - begin;
      const to = (other, size) => send(device, first + offsets[begin + other], size, flow.row);
      if (flow.pattern === "ring") to((own + 1) % group, flow.bytes);
      else if (flow.pattern === "all") {
        for (let other = 0; other < group; other += 1) if (other !== own) to(other, flow.bytes / (group - 1));
      } else {
        const round = flow.pattern === "both";
        if (round || own + 1 < group) to((own + 1) % group, flow.bytes / 2);
        if (round || own > 0) to((own + group - 1) % group, flow.bytes / 2);
      }
    }
  }
}

function traffic() {
  const rows = PLAN.communication.map((row, number) => ({ ...row, number }));
  const sent = (link) => rows.filter((row) => row.link === link).reduce((sum, row) => sum + row.sent, 0);
  const mark = (row) => el("span", { class: "key" }, row.link ? el("span", { class: "swatch", style: `background:var(--${row.link === "NVLink" ? "nvlink" : "network"})` }) : null, row.link || "–");
  const total = ["NVLink", "network"].filter(sent).map((link) => `${bytes(sent(link))} over ${link === "network" ? "the network" : link}`).join(" and ");
  section("communication", "Communication",
    el("p", { class: "muted" }, rows.length ? `In a step a device sends ${total || "nothing"}.` : "None: no data leaves a device."),
    rows.length ? table("Collectives", [
      { name: "kind", value: (row) => row.kind.replaceAll("_", "-") },
      { name: "axes", value: (row) => row.axes || "–" },
      { name: "slowest link", value: (row) => row.link || "", node: mark },
      { name: "loops", title: "trips of the loops around it, outermost first; if: in a branch", value: (row) => `${row.loops || "once"}${row.conditional ? " if" : ""}` },
      { name: "runs", value: (row) => row.executions, text: (row) => count(row.executions), right: true },
      { name: "payload", value: (row) => row.payload, text: (row) => bytes(row.payload), right: true },
      { name: "sent", value: (row) => row.sent, text: (row) => bytes(row.sent), right: true },
      { name: "async", title: "of so many instructions", value: (row) => row.asynchronous / row.operations, text: (row) => `${row.asynchronous}/${row.operations}`, right: true },
      { name: "time", value: (row) => row.seconds, text: (row) => seconds(row.seconds), right: true },
      { name: "hidden", title: "behind products", value: (row) => (row.seconds ? row.hidden / row.seconds : -1), text: (row) => (row.seconds ? percent(row.hidden / row.seconds, 0) : "–"), right: true },
    ], rows, { sorted: [8, true], search: rows.length > 6 ? "Search kinds, axes, links" : false }) : null);
  if (rows.length && PLAN.num_gpus > 1) matrix(rows);
}

function matrix(rows) {
  const { sizes, flows, unknown } = PLAN.traffic;
  const grid = makeGrid(sizes);
  const node = Math.min(PLAN.gpus_per_node, grid.devices);
  let only = -1; // one row of the table of collectives, or all
  let view;
  let cells = new Map();
  let most = 1;
  let least = 1;
  let hot = null;
  const top = () => {
    const nodes = Math.ceil(grid.devices / node);
    if (grid.devices <= 128 || nodes === 1) return { unit: 1, rows: [0, grid.devices], columns: [0, grid.devices] };
    return { unit: node * Math.ceil(nodes / MOST_CELLS), rows: [0, grid.devices], columns: [0, grid.devices] };
  };
  const peers = Math.max(1, flows.reduce((sum, flow) => sum + (flow.pattern === "all" ? flow.dims.reduce((product, dim) => product * sizes[dim], 1) : 2), 0));
  const nameOf = (cell, unit) => {
    if (unit === 1) return `device ${count(cell)} (node ${count(Math.floor(cell / node))})`;
    return unit === node ? `node ${count(cell)}` : `nodes ${count((cell * unit) / node)} to ${count(((cell + 1) * unit) / node - 1)}`;
  };

  function count_() {
    cells = new Map();
    const { unit, rows: [low, up], columns: [first, last] } = view;
    const used = only < 0 ? flows : flows.filter((flow) => flow.row === only);
    eachEdge(grid, used, low, Math.min(up, grid.devices), (device, peer, size) => {
      if (peer < first || peer >= last) return;
      const from = Math.floor(device / unit);
      const to = Math.floor(peer / unit);
      const key = from * 2 ** 21 + to;
      let cell = cells.get(key);
      if (!cell) cells.set(key, (cell = [from, to, 0, 0]));
      cell[Math.floor(device / node) === Math.floor(peer / node) ? 2 : 3] += size;
    });
    const all = [...cells.values()].map((cell) => cell[2] + cell[3]);
    most = Math.max(1, ...all.slice(0, 1), all.reduce((a, b) => Math.max(a, b), 0));
    least = all.reduce((a, b) => Math.min(a, b), most);
  }

  const geometry = (width) => {
    const across = Math.ceil((view.columns[1] - view.columns[0]) / view.unit);
    const down = Math.ceil((view.rows[1] - view.rows[0]) / view.unit);
    const [left, head] = [46, 20];
    const side = Math.min(width - left - 2, 630, 46 * Math.max(across, down));
    return { across, down, left, head, cell: side / Math.max(across, down) };
  };

  function paint(context, width) {
    const { across, down, left, head, cell } = geometry(width);
    const firstRow = Math.floor(view.rows[0] / view.unit);
    const firstColumn = Math.floor(view.columns[0] / view.unit);
    context.fillStyle = color("empty");
    context.fillRect(left, head, across * cell, down * cell);
    if (view.unit < node) {
      // where nodes begin
      context.fillStyle = color("line");
      for (let at = 0; at <= across; at += 1) if ((firstColumn + at) % node === 0) context.fillRect(left + at * cell, head, 1, down * cell);
      for (let at = 0; at <= down; at += 1) if ((firstRow + at) % node === 0) context.fillRect(left, head + at * cell, across * cell, 1);
    }
    const gap = cell > 6 ? 1 : 0;
    const size = Math.max(cell - gap, 1.6);
    for (const [from, to, inside, between] of cells.values()) {
      context.fillStyle = color(between > inside ? "network" : "nvlink");
      // by orders of magnitude: the least is still seen
      context.globalAlpha = most > least ? 0.3 + 0.7 * (Math.log(inside + between) - Math.log(least)) / (Math.log(most) - Math.log(least)) : 1;
      context.fillRect(left + (to - firstColumn) * cell, head + (from - firstRow) * cell, size, size);
    }
    context.globalAlpha = 1;
    if (hot) {
      context.strokeStyle = color("ink");
      context.lineWidth = 1.5;
      context.strokeRect(left + (hot[1] - firstColumn) * cell - 1, head + (hot[0] - firstRow) * cell - 1, Math.max(cell, 3) + 1, Math.max(cell, 3) + 1);
    }
    context.fillStyle = color("muted");
    const every = (many) => [1, 2, 4, 8, 16, 32, 64, 128].find((step) => step * cell >= 34 || step >= many) || 128;
    context.textAlign = "center";
    for (let at = 0; at < across; at += every(across)) context.fillText(String(firstColumn + at), left + (at + 0.5) * cell, head - 6);
    context.textAlign = "right";
    for (let at = 0; at < down; at += every(down)) context.fillText(String(firstRow + at), left - 6, head + (at + 0.5) * cell + 4);
  }

  const title = el("span", { class: "muted small" });
  const back = el("button", { type: "button", onclick: () => look(top()) }, "All devices");
  const near = Math.min(grid.devices, Math.max(64, node));
  const first = el("button", { type: "button", onclick: () => look({ unit: 1, rows: [0, near], columns: [0, near] }) }, `First ${near} devices`);
  const largest = el("div", {});
  const readout = el("p", { class: "readout", role: "status", "aria-live": "polite" });
  const picture = canvas(`Traffic between the ${plural(grid.devices, "device")} as a matrix`, (width) => {
    const { head, down, cell } = geometry(width);
    return head + down * cell + 4;
  }, paint);

  function tell(from, to) {
    const cell = cells.get(from * 2 ** 21 + to);
    const names = `${nameOf(from, view.unit)} to ${from === to && view.unit > 1 ? "itself" : nameOf(to, view.unit)}`;
    if (!cell) return `${names}\nnothing`;
    const parts = [cell[2] ? `${bytes(cell[2])} over NVLink` : "", cell[3] ? `${bytes(cell[3])} over the network` : ""];
    return `${names}\n${parts.filter(Boolean).join(", ")} a step`;
  }

  function under(event) {
    const box = picture.getBoundingClientRect();
    const { across, down, left, head, cell } = geometry(Math.floor(picture.clientWidth));
    const column = Math.floor((event.clientX - box.left - left) / cell);
    const line = Math.floor((event.clientY - box.top - head) / cell);
    if (column < 0 || line < 0 || column >= across || line >= down) return null;
    return [Math.floor(view.rows[0] / view.unit) + line, Math.floor(view.columns[0] / view.unit) + column];
  }

  const intro = () => (view.unit > 1 ? "Click a cell, or press Enter on it, to see the devices behind it." : "Rows send, columns receive.");

  function point(cell) {
    hot = cell;
    readout.textContent = cell ? tell(...cell).replace("\n", ": ") : intro();
    picture.redraw();
  }

  function enter(cell) {
    if (!cell || view.unit === 1) return;
    const unit = view.unit > node ? node : 1;
    const span = (at) => [at * view.unit, Math.min(grid.devices, (at + 1) * view.unit)];
    look({ unit, rows: span(cell[0]), columns: span(cell[1]) });
  }

  function look(next) {
    view = next;
    hot = null;
    count_();
    const whole = view.rows[1] - view.rows[0] >= grid.devices;
    back.hidden = whole;
    const unit = view.unit === 1 ? "devices" : view.unit === node ? `nodes of ${node} devices` : `groups of ${view.unit / node} nodes`;
    first.hidden = top().unit === 1;
    const shown = [...cells.values()].sort((one, other) => other[2] + other[3] - one[2] - one[3] || one[0] - other[0] || one[1] - other[1]);
    const name = (cell) => (view.unit === 1 ? `device ${count(cell)}` : nameOf(cell, view.unit));
    largest.replaceChildren(
      el("p", { class: "muted small" }, `${plural(cells.size, "cell")} with traffic; some of the largest of each amount:`),
      table("The largest cells of the matrix", [
        { name: "from", value: (cell) => cell[0], text: (cell) => name(cell[0]) },
        { name: "to", value: (cell) => cell[1], text: (cell) => (cell[0] === cell[1] && view.unit > 1 ? "itself" : name(cell[1])) },
        { name: "NVLink", value: (cell) => cell[2], text: (cell) => (cell[2] ? bytes(cell[2]) : ""), right: true },
        { name: "network", value: (cell) => cell[3], text: (cell) => (cell[3] ? bytes(cell[3]) : ""), right: true },
      ], distinct(shown)));
    title.textContent = whole ? `Rows send, columns receive: ${unit}` : `${unit} ${view.rows[0]}–${view.rows[1] - 1} to ${view.columns[0]}–${view.columns[1] - 1}`;
    point(null);
  }

  // the first few cells of each amount, so that one kind does not hide the others
  function distinct(shown) {
    const seen = new Map();
    return shown.filter((cell) => {
      const key = `${cell[2].toPrecision(4)} ${cell[3].toPrecision(4)}`;
      seen.set(key, (seen.get(key) || 0) + 1);
      return seen.get(key) <= 4;
    }).slice(0, 24);
  }

  picture.addEventListener("pointermove", (event) => {
    const cell = under(event);
    point(cell);
    showTip(event, cell ? tell(...cell) : "");
  });
  picture.addEventListener("pointerleave", () => {
    point(null);
    hideTip();
  });
  picture.addEventListener("click", (event) => {
    hideTip();
    enter(under(event));
  });
  picture.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    if (event.key === "Enter") return enter(hot);
    if (event.key === "Escape" || event.key === "Backspace") return look(top());
    if (!step) return;
    event.preventDefault();
    const clip = (at, [low, up]) => Math.max(Math.floor(low / view.unit), Math.min(Math.ceil(up / view.unit) - 1, at));
    const first = [Math.floor(view.rows[0] / view.unit), Math.floor(view.columns[0] / view.unit)];
    point(hot ? [clip(hot[0] + step[0], view.rows), clip(hot[1] + step[1], view.columns)] : first);
  });

  const choice = el("select", { "aria-label": "Which communication" }, el("option", { value: -1 }, "All communication"),
    ...flows.map((flow) => {
      const row = rows[flow.row];
      return el("option", { value: flow.row }, `${row.kind.replaceAll("_", "-")} over ${row.axes}: ${bytes(row.sent)}`);
    }));
  choice.addEventListener("change", () => {
    only = Number(choice.value);
    look(view);
  });
  const tooMany = grid.devices * peers > MOST_EDGES;
  view = top();
  if (!tooMany) look(view);
  section("traffic", "Traffic between devices",
    tooMany ? el("p", { class: "muted" }, "There are too many devices for a matrix; the table above has what each sends.") : el("div", {},
      el("div", { class: "tools" }, choice, back, first, title, el("span", { class: "grow" }), keys([["nvlink", "NVLink, inside a node"], ["network", "network, between nodes"]])),
      el("div", { class: "beside" }, el("div", {}, picture, readout), largest),
      el("p", { class: "muted small" },
        "Bytes of a step, stronger for more (by orders of magnitude). Gathers, scatters and reductions go round a ring in the mesh's order, all-to-alls to all alike, " +
        "messages of a pipeline to the stages beside it; the library that runs them may choose other ways." + (unknown ? ` ${bytes(unknown)} of a device match no axes and are left out.` : ""))));
  page.traffic = { cells: () => [...cells.values()], look, enter, under, view: () => view, total: () => {
    let [inside, between] = [0, 0];
    eachEdge(grid, flows, 0, grid.devices, (device, peer, size) => {
      if (Math.floor(device / node) === Math.floor(peer / node)) inside += size;
      else between += size;
    });
    return [inside, between];
  } };
}
