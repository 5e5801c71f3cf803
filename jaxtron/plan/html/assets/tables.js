// Plain tables: sorted by their headings' buttons, searched by a box above, with not more rows than a browser likes.
const MOST_ROWS = 500;

// `columns`: {name, value(row), text(row) or none, right, wide, mono, fixed (not sorted), node(row)}.
function table(label, columns, rows, options = {}) {
  const { search = false, sorted = null, pick = null, short = false, noun = "row" } = options;
  const body = el("tbody");
  const said = el("span", { class: "muted small", role: "status", "aria-live": "polite" });
  let [by, down] = sorted || [-1, false];
  let words = [];
  let picked = null;
  const textOf = (column, row) => (column.text ? column.text(row) : String(column.value(row) ?? ""));
  const whole = new Map(rows.map((row) => [row, columns.map((column) => textOf(column, row)).join(" ").toLowerCase()]));
  const heads = columns.map((column, place) => {
    const button = el("button", { type: "button", onclick: () => sort(place) }, column.name);
    const kind = column.right ? "right" : null;
    return el("th", { scope: "col", class: kind, title: column.title }, column.fixed ? column.name : button);
  });

  function sort(place) {
    // numbers are mostly looked at from the largest on
    down = by === place ? !down : Boolean(columns[place].right);
    by = place;
    fill();
  }

  // rows with the phrase, or where there are none, those with all of its words
  function matching() {
    const phrase = words.join(" ");
    let found = rows.filter((row) => whole.get(row).includes(phrase));
    if (!found.length) found = rows.filter((row) => words.every((word) => whole.get(row).includes(word)));
    if (by < 0) return found;
    const { value } = columns[by];
    const sign = down ? -1 : 1;
    return found.slice().sort((one, other) => {
      const [a, b] = [value(one), value(other)];
      // what is not known comes last, whichever way
      if (a === null || b === null) return (a === null) - (b === null);
      if (typeof a === "number" && typeof b === "number") return sign * (a - b);
      return sign * String(a ?? "").localeCompare(String(b ?? ""), "en", { numeric: true });
    });
  }

  function line(row) {
    const cells = columns.map((column, place) => {
      const kind = [column.right && "right", column.wide && "wide", column.mono && "mono"].filter(Boolean).join(" ");
      const text = textOf(column, row);
      let inner = column.node ? column.node(row) : text;
      if (pick && place === 0) inner = el("button", { type: "button" }, text);
      return el("td", { class: kind || null }, inner);
    });
    const found = el("tr", pick ? { class: "pick", "aria-selected": row === picked } : {}, ...cells);
    if (pick) found.addEventListener("click", () => pick(row));
    return found;
  }

  function fill() {
    const found = matching();
    body.replaceChildren(...found.slice(0, MOST_ROWS).map(line));
    heads.forEach((head, place) => {
      if (place === by) head.setAttribute("aria-sort", down ? "descending" : "ascending");
      else head.removeAttribute("aria-sort");
    });
    const hidden = found.length > MOST_ROWS ? `, the first ${count(MOST_ROWS)} shown` : "";
    said.textContent = `${count(found.length)} of ${plural(rows.length, noun)}${hidden}`;
    if (options.changed) options.changed(new Set(found));
  }

  const tools = el("div", { class: "tools" });
  if (search) {
    const box = el("input", { type: "search", placeholder: search, "aria-label": search, spellcheck: "false" });
    box.addEventListener("input", () => {
      words = box.value.toLowerCase().split(/\s+/).filter(Boolean);
      fill();
    });
    tools.append(box, said);
  }
  const inner = el("table", { "aria-label": label }, el("thead", {}, el("tr", {}, ...heads)), body);
  const scroll = el("div", { class: short ? "scroll short" : "scroll", tabindex: 0, role: "region", "aria-label": label }, inner);
  fill();
  const found = el("div", {}, search ? tools : null, scroll);
  found.choose = (row) => {
    picked = row;
    fill();
    const chosen = body.querySelector('[aria-selected="true"]');
    if (chosen) scroll.scrollTop = Math.max(0, chosen.offsetTop - scroll.clientHeight / 2);
  };
  return found;
}
