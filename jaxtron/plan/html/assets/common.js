// What all parts share: the data, elements, numbers as text, colours that follow light and dark, the tip by the pointer.
const DATA = JSON.parse(document.getElementById("data").textContent);
const PLAN = DATA.plan;
const main = document.getElementById("main");
// what a test, or a curious reader at the console, can look at
const page = (window.page = { data: DATA, errors: [], table });
window.addEventListener("error", (event) => page.errors.push(event.message));

function el(tag, attributes, ...children) {
  const found = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name.startsWith("on")) found.addEventListener(name.slice(2), value);
    else if (name.startsWith("aria-")) found.setAttribute(name, String(value));
    else if (value === true) found.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) found.setAttribute(name, value);
  }
  found.append(...children.filter((child) => child !== null && child !== undefined));
  return found;
}

function svg(tag, attributes, text) {
  const found = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes || {})) found.setAttribute(name, value);
  if (text !== undefined) found.textContent = text;
  return found;
}

function section(id, title, ...children) {
  const heading = el("h2", { id: `${id}-title` }, title);
  const found = el("section", { id, "aria-labelledby": heading.id }, heading, ...children);
  main.append(found);
  document.getElementById("nav").append(el("a", { href: `#${id}` }, title));
  return found;
}

const digits = (number, count) => Number(number.toPrecision(count)).toLocaleString("en-US", { maximumFractionDigits: 12 });

function scaled(number, step, units) {
  let place = 0;
  while (Math.abs(Number(number.toPrecision(4))) >= step && place < units.length - 1) {
    number /= step;
    place += 1;
  }
  return `${digits(number, 4)} ${units[place]}`;
}

const bytes = (number) => scaled(number, 1024, ["B", "KiB", "MiB", "GiB", "TiB", "PiB"]);
const flops = (number) => scaled(number, 1000, ["FLOPs", "kFLOPs", "MFLOPs", "GFLOPs", "TFLOPs", "PFLOPs", "EFLOPs"]);
const count = (number) => number.toLocaleString("en-US");
const percent = (part, places = 1) => (Number.isFinite(part) ? `${(100 * part).toFixed(places)}%` : "–");
const plural = (number, noun) => `${count(number)} ${noun}${number === 1 ? "" : "s"}`;

function seconds(number) {
  if (!number) return "0 s";
  for (const [unit, scale] of [["s", 1], ["ms", 1e-3], ["µs", 1e-6]]) {
    if (Math.abs(number) >= scale) return `${digits(number / scale, 3)} ${unit}`;
  }
  return `${digits(number / 1e-6, 3)} µs`;
}

function billions(number) {
  if (number >= 1e12) return `${digits(number / 1e12, 4)} trillion`;
  if (number >= 1e9) return `${digits(number / 1e9, 4)} billion`;
  if (number >= 1e6) return `${digits(number / 1e6, 4)} million`;
  return count(number);
}

// Colours live in the style sheet as custom properties with light-dark(); a canvas reads them through this element.
const probe = el("span", { hidden: true });
document.body.append(probe);
const painters = [];
let known = new Map();

function color(name) {
  if (!known.has(name)) {
    probe.style.color = `var(--${name})`;
    known.set(name, getComputedStyle(probe).color);
  }
  return known.get(name);
}

// the same in every bar of a step's time
const PART_SHADES = {
  products: "c0", "passes over memory": "c1", "tensor parallelism": "c2", "fsdp gathers": "c3", "context parallelism": "c4",
  "expert exchange": "c5", "pipeline messages": "c6", bubble: "c10", "gradients, weights": "c8", optimizer: "c9",
};
const partShade = (name) => PART_SHADES[name] || "c7";
const kindColor = (place) => `c${place % 11}`;

function repaint() {
  known = new Map();
  for (const paint of painters) paint();
}

// A canvas as wide as its place and sharp on any screen; `paint(context, width, height)` draws it again when either changes.
function canvas(label, height, paint) {
  const found = el("canvas", { tabindex: 0, role: "img", "aria-label": label });
  let drawn = [0, 0, 0];
  const draw = () => {
    const width = Math.floor(found.clientWidth);
    if (!width) return;
    const high = typeof height === "function" ? Math.ceil(height(width)) : height;
    const ratio = window.devicePixelRatio || 1;
    if (drawn[0] !== width || drawn[1] !== high || drawn[2] !== ratio) {
      drawn = [width, high, ratio];
      found.width = width * ratio;
      found.height = high * ratio;
      found.style.height = `${high}px`;
    }
    const context = found.getContext("2d");
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, width, high);
    context.font = "11px system-ui, sans-serif";
    paint(context, width, high);
  };
  painters.push(draw);
  let asked = false;
  found.redraw = () => {
    if (asked) return;
    asked = true;
    requestAnimationFrame(() => {
      asked = false;
      draw();
    });
  };
  new ResizeObserver(found.redraw).observe(found);
  return found;
}

const tip = document.getElementById("tip");

function showTip(event, text) {
  if (!text) return hideTip();
  tip.textContent = text;
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  const left = event.clientX + 14 + box.width > innerWidth ? event.clientX - 14 - box.width : event.clientX + 14;
  const top = event.clientY + 16 + box.height > innerHeight ? event.clientY - 12 - box.height : event.clientY + 16;
  tip.style.left = `${Math.max(4, left)}px`;
  tip.style.top = `${Math.max(4, top)}px`;
}

function hideTip() {
  tip.hidden = true;
}

// a long name may break after its dots
function dotted(name) {
  return el("span", {}, ...name.split(/(?<=[._])/).flatMap((piece) => [piece, el("wbr")]));
}

function keys(entries) {
  const swatch = (name) => el("span", { class: "swatch", style: `background:var(--${name})` });
  return el("div", { class: "keys" }, ...entries.map(([name, text]) => el("span", { class: "key" }, swatch(name), text)));
}

async function copy(text, button) {
  const said = button.textContent;
  let done = true;
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // a page from a file may have no clipboard: the old way
    const area = el("textarea", { style: "position:fixed;opacity:0" });
    area.value = text;
    document.body.append(area);
    area.select();
    done = document.execCommand("copy");
    area.remove();
  }
  button.textContent = done ? "Copied" : "Select and copy by hand";
  setTimeout(() => (button.textContent = said), 1500);
}

// A bar of parts beside each other; `whole` is its full width.
function stack(label, parts, whole) {
  const bar = el("div", { class: "stack", role: "img", "aria-label": label });
  for (const [name, size, shade, text] of parts) {
    const part = el("span", { style: `width:${(100 * size) / whole}%;background:var(--${shade})` });
    part.addEventListener("pointermove", (event) => showTip(event, `${name}: ${text}`));
    part.addEventListener("pointerleave", hideTip);
    bar.append(part);
  }
  return bar;
}

const theme = document.getElementById("theme");
const darkness = matchMedia("(prefers-color-scheme: dark)");
const isDark = () => (document.documentElement.style.colorScheme || (darkness.matches ? "dark" : "light")) === "dark";
const nameTheme = () => (theme.textContent = isDark() ? "Light" : "Dark");
theme.addEventListener("click", () => {
  document.documentElement.style.colorScheme = isDark() ? "light" : "dark";
  nameTheme();
  repaint();
});
darkness.addEventListener("change", () => {
  nameTheme();
  repaint();
});
nameTheme();
