// The pipeline's timeline on one canvas: zoomed by wheel, keys, buttons or by dragging; a row a stage.
function unpack(text, Kind) {
  const raw = atob(text);
  const held = new Uint8Array(raw.length);
  for (let place = 0; place < raw.length; place += 1) held[place] = raw.charCodeAt(place);
  return new Kind(held.buffer);
}

function timeline() {
  const data = PLAN.timeline;
  const starts = unpack(data.starts, Float32Array);
  const codes = unpack(data.codes, Uint16Array);
  const microbatches = unpack(data.microbatches, data.num_microbatches > 65535 ? Uint32Array : Uint16Array);
  const after = data.after.filter(([, time]) => time > 0);
  const end = data.end + after.reduce((sum, [, time]) => sum + time, 0);
  const names = data.slots;
  const shades = ["forward", "backward", "weight"];
  const slotOf = (place) => Math.floor(codes[place] / data.chunks);
  const lengths = Array.from({ length: data.stages }, (_, stage) =>
    names.map((slot) => data.virtual[stage].map((virtual) => (data.seconds[slot] ? data.seconds[slot][virtual] : 0))));
  const lengthOf = (stage, place) => lengths[stage][slotOf(place)][codes[place] % data.chunks];
  const [left, top] = [64, 22];
  const row = Math.max(7, Math.min(30, Math.floor(520 / data.stages)));
  const high = top + row * data.stages + 4;
  let [from, to] = [0, end];
  let focus = null; // [stage, place]

  // the first bar of a stage that ends after a time
  function firstAfter(stage, time) {
    let [low, up] = [data.offsets[stage], data.offsets[stage + 1]];
    while (low < up) {
      const middle = (low + up) >> 1;
      if (starts[middle] + lengthOf(stage, middle) <= time) low = middle + 1;
      else up = middle;
    }
    return low;
  }

  function paint(context, width) {
    const scale = (width - left) / (to - from);
    const x = (time) => left + (time - from) * scale;
    context.fillStyle = color("empty");
    for (let stage = 0; stage < data.stages; stage += 1) context.fillRect(left, top + stage * row + 0.5, width - left, row - 1);
    context.save();
    context.beginPath();
    context.rect(left, 0, width - left, high);
    context.clip();
    const labels = [];
    // one path a colour; later chunks are paler
    for (let slot = 0; slot < names.length; slot += 1) {
      for (let chunk = 0; chunk < data.chunks; chunk += 1) {
        const code = slot * data.chunks + chunk;
        context.beginPath();
        for (let stage = 0; stage < data.stages; stage += 1) {
          const length = lengths[stage][slot][chunk];
          const gap = length * scale > 3 ? 0.6 : 0;
          for (let place = firstAfter(stage, from); place < data.offsets[stage + 1] && starts[place] < to; place += 1) {
            if (codes[place] !== code) continue;
            const begin = x(starts[place]);
            context.rect(begin, top + stage * row + 0.5, Math.max(length * scale - gap, 0.35), row - 1);
            if (length * scale > 20 && row >= 10) labels.push([begin + (length * scale) / 2, top + (stage + 0.5) * row + 4, microbatches[place]]);
          }
        }
        context.globalAlpha = 1 - (0.5 * chunk) / data.chunks;
        context.fillStyle = color(shades[slot]);
        context.fill();
      }
    }
    let time = data.end;
    after.forEach(([, length], place) => {
      context.globalAlpha = place ? 0.5 : 0.85;
      context.fillStyle = color("after");
      context.fillRect(x(time), top, Math.max(length * scale, 0.5), row * data.stages);
      time += length;
    });
    context.globalAlpha = 1;
    if (data.until !== null && data.until < to) {
      context.fillStyle = color("card");
      context.fillRect(x(data.until), top, x(data.end) - x(data.until), row * data.stages);
    }
    context.fillStyle = isDark() ? "#10141a" : "#fff";
    context.textAlign = "center";
    if (labels.length < 3000) for (const [at, y, text] of labels) context.fillText(String(text), at, y);
    if (focus) {
      const [stage, place] = focus;
      context.strokeStyle = color("ink");
      context.lineWidth = 2;
      context.strokeRect(x(starts[place]), top + stage * row + 1, Math.max(2, lengthOf(stage, place) * scale), row - 2);
    }
    context.restore();
    context.fillStyle = color("muted");
    context.textAlign = "right";
    const every = Math.max(1, Math.ceil(13 / row));
    for (let stage = 0; stage < data.stages; stage += every) context.fillText(data.stages > 1 ? `stage ${stage}` : "device", left - 6, top + (stage + 0.5) * row + 4);
    axis(context, width, x);
  }

  function axis(context, width, x) {
    const rough = ((to - from) * 95) / (width - left);
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough);
    context.textAlign = "center";
    for (let tick = Math.ceil(from / step); tick * step <= to; tick += 1) {
      const at = x(tick * step);
      context.fillStyle = color("line");
      context.fillRect(at, top - 5, 1, 5);
      context.fillStyle = color("muted");
      // enough digits that neighbours differ
      const places = Math.max(0, -Math.floor(Math.log10(step)));
      const fewer = Math.log10(unitScale);
      if (at > left + 12 && at < width - 22) context.fillText(`${(tick * step * unitScale).toFixed(Math.max(0, places - fewer))} ${unitName}`, at, top - 9);
    }
  }

  const picture = canvas(`Timeline of ${plural(data.stages, "stage")}, ${plural(data.num_microbatches, "microbatch").replace(/chs$/, "ches")}: ${seconds(end)} a step`, high, paint);
  picture.style.cursor = "crosshair";
  const readout = el("p", { class: "readout", role: "status", "aria-live": "polite" });

  function tell(stage, place) {
    const [begin, length] = [starts[place], lengthOf(stage, place)];
    const chunk = data.chunks > 1 ? ` of chunk ${codes[place] % data.chunks}` : "";
    const what = { forward: "forward", backward: data.seconds.weight ? "backward to inputs" : "backward", weight: "weight gradients" }[names[slotOf(place)]];
    return `${data.stages > 1 ? `stage ${stage}, ` : ""}${what} of microbatch ${microbatches[place]}${chunk}\n${clock(begin)} to ${clock(begin + length)}: ${seconds(length)}`;
  }

  // a moment in the step's own unit, with digits enough for what is shown
  const [unitScale, unitName] = end >= 1 ? [1, "s"] : end >= 1e-3 ? [1e3, "ms"] : [1e6, "µs"];
  const clock = (time) => `${(time * unitScale).toFixed(Math.max(1, Math.min(7, 3 - Math.floor(Math.log10((to - from) * unitScale)))))} ${unitName}`;

  function at(x, y) {
    const width = picture.clientWidth;
    const stage = Math.floor((y - top) / row);
    if (x < left || stage < 0 || stage >= data.stages) return { text: "" };
    const time = from + ((x - left) / (width - left)) * (to - from);
    if (time > data.end) {
      let begin = data.end;
      for (const [name, length] of after) {
        if (time <= begin + length) return { text: `${name}: ${seconds(length)} after the last stage's slots` };
        begin += length;
      }
      return { text: "" };
    }
    const place = firstAfter(stage, time);
    if (place < data.offsets[stage + 1] && starts[place] <= time) return { stage, place, text: tell(stage, place) };
    const before = place > data.offsets[stage] ? starts[place - 1] + lengthOf(stage, place - 1) : 0;
    const next = place < data.offsets[stage + 1] ? starts[place] : data.end;
    return { stage, text: `stage ${stage} is idle for ${seconds(next - before)}` };
  }

  function show(low, up) {
    const size = Math.min(end, Math.max(up - low, end * 1e-6));
    from = Math.max(0, Math.min(low, end - size));
    to = from + size;
    if (end - size < end * 1e-9) [from, to] = [0, end];
    say();
    picture.redraw();
  }

  function say(text) {
    const range = from === 0 && to === end ? `the whole step, ${seconds(end)}` : `${clock(from)} to ${clock(to)} of ${seconds(end)}`;
    readout.textContent = (text ? text.replace("\n", ": ") : `Shown: ${range}`) || "";
  }

  const zoom = (factor, middle) => {
    const around = middle === undefined ? (from + to) / 2 : middle;
    show(around - (around - from) * factor, around + (to - around) * factor);
  };
  const timeAt = (event) => from + ((event.clientX - picture.getBoundingClientRect().left - left) / (picture.clientWidth - left)) * (to - from);

  picture.addEventListener("wheel", (event) => {
    // the page scrolls as usual unless the timeline was clicked, or Ctrl (a pinch) says that it is meant
    if (!event.ctrlKey && !event.metaKey && document.activeElement !== picture) return;
    event.preventDefault();
    if (Math.abs(event.deltaX) > Math.abs(event.deltaY)) return show(from + (event.deltaX / picture.clientWidth) * (to - from), to + (event.deltaX / picture.clientWidth) * (to - from));
    zoom(Math.exp(Math.max(-1, Math.min(1, event.deltaY / 300))), timeAt(event));
  }, { passive: false });

  let dragged = null;
  picture.addEventListener("pointerdown", (event) => {
    picture.setPointerCapture(event.pointerId);
    dragged = [event.clientX, from, to];
  });
  picture.addEventListener("pointerup", () => (dragged = null));
  picture.addEventListener("pointermove", (event) => {
    if (dragged) {
      const moved = ((event.clientX - dragged[0]) / (picture.clientWidth - left)) * (dragged[2] - dragged[1]);
      hideTip();
      return show(dragged[1] - moved, dragged[2] - moved);
    }
    const box = picture.getBoundingClientRect();
    const found = at(event.clientX - box.left, event.clientY - box.top);
    focus = found.place === undefined ? null : [found.stage, found.place];
    picture.redraw();
    showTip(event, found.text);
  });
  picture.addEventListener("pointerleave", () => {
    focus = null;
    hideTip();
    picture.redraw();
  });
  picture.addEventListener("dblclick", (event) => zoom(0.25, timeAt(event)));

  function step(down, along) {
    let [stage, place] = focus || [0, firstAfter(0, from)];
    if (focus && down) {
      stage = Math.max(0, Math.min(data.stages - 1, stage + down));
      place = firstAfter(stage, starts[place]);
    }
    if (focus && along) place += along;
    place = Math.max(data.offsets[stage], Math.min(data.offsets[stage + 1] - 1, place));
    focus = [stage, place];
    if (starts[place] < from || starts[place] > to) show(starts[place] - (to - from) / 2, starts[place] + (to - from) / 2);
    say(tell(stage, place));
    picture.redraw();
  }

  const size = () => to - from;
  const moves = {
    "+": () => zoom(0.6),
    "=": () => zoom(0.6),
    "-": () => zoom(1 / 0.6),
    w: () => zoom(0.6),
    s: () => zoom(1 / 0.6),
    ArrowLeft: () => show(from - size() / 8, to - size() / 8),
    ArrowRight: () => show(from + size() / 8, to + size() / 8),
    a: () => show(from - size() / 8, to - size() / 8),
    d: () => show(from + size() / 8, to + size() / 8),
    Home: () => show(0, size()),
    End: () => show(end - size(), end),
    0: () => show(0, end),
    ArrowUp: () => step(-1, 0),
    ArrowDown: () => step(1, 0),
    ",": () => step(0, -1),
    ".": () => step(0, 1),
  };
  picture.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || !moves[event.key]) return;
    event.preventDefault();
    moves[event.key]();
  });

  const button = (text, does, label) => el("button", { type: "button", onclick: does, "aria-label": label || text }, text);
  const longest = Math.max(...lengths.flat(2));
  const piece = Math.min(end, 14 * longest);
  const stages = data.busy.map((busy, stage) => [stage, busy, data.end - busy]);
  const kinds = [["forward", "forward"], ["backward", data.seconds.weight ? "backward to inputs" : "backward"]];
  if (data.seconds.weight) kinds.push(["weight", "weight gradients"]);
  kinds.push(["after", after.map(([name]) => name).join(", ") || "after"], ["empty", "idle"]);
  section("timeline", "Timeline",
    el("p", { class: "muted" },
      `${data.name}: ${plural(data.spans, "slot")} on ${plural(data.stages, "stage")}, in predicted seconds. ` +
      "Zoom: click it and use the wheel, or Ctrl and the wheel, double click, + and − (W and S). Move: drag, or ← and → (A and D). Slots by keys: ↑ ↓ choose a stage, comma and full stop go along it."),
    el("div", { class: "tools" },
      button("+", () => zoom(0.5), "Zoom in"), button("−", () => zoom(2), "Zoom out"), button("Whole step", () => show(0, end)),
      button("First slots", () => show(0, piece)), button("Middle", () => show((data.end - piece) / 2, (data.end + piece) / 2)), button("Last slots", () => show(end - piece, end)),
      el("span", { class: "grow" }), keys(kinds)),
    picture, readout,
    data.until === null ? null : el("p", { class: "muted small" }, `Slots that start before ${seconds(data.until)} are drawn: all ${count(data.spans)} are too many for a page.`),
    data.overlap ? el("p", { class: "muted small" }, "A forward and a backward that run together are drawn one after the other.") : null,
    el("details", {}, el("summary", {}, "Stages as a table"),
      table("Stages", [
        { name: "stage", value: (found) => found[0], right: true },
        { name: "busy", value: (found) => found[1], text: (found) => seconds(found[1]), right: true },
        { name: "idle", value: (found) => found[2], text: (found) => seconds(Math.max(0, found[2])), right: true },
        { name: "idle share", value: (found) => found[2] / data.end, text: (found) => percent(Math.max(0, found[2] / data.end)), right: true },
      ], stages, { short: true })));
  say();
  page.timeline = { at, show, range: () => [from, to], end, left, top, row };
}
