// The page's script: sorting, filtering, tooltips, and the plots, which Observable Plot draws from the data in the page.
"use strict";

const { styles, figures } = JSON.parse(document.getElementById("data").textContent);
const FACETS = ["operation", "backend", "dtype"];
const chosen = { operation: "", backend: "", dtype: "" };

// Filters: whatever carries data-operation, data-backend or data-dtype is shown where all that it carries is chosen.

const matches = (facets) => FACETS.every((name) => !chosen[name] || !facets[name] || facets[name].split("|").includes(chosen[name]));

function applyFilters() {
  for (const element of document.querySelectorAll("main :is([data-operation], [data-backend], [data-dtype])"))
    element.hidden = !matches(element.dataset);
  for (const table of document.querySelectorAll(".table")) {
    const rows = [...table.querySelectorAll("tbody tr")];
    table.hidden = !matches(table.dataset) || (rows.length > 0 && rows.every((row) => row.hidden)) || noBackendLeft(table);
  }
  drawAll();
}

// A table of times by backend says nothing without the one asked for.
function noBackendLeft(table) {
  const heads = [...table.querySelectorAll("th[data-backend]")];
  return heads.length > 0 && heads.every((head) => head.hidden);
}

const filters = document.querySelector(".filters");
filters?.addEventListener("change", (event) => {
  chosen[event.target.name] = event.target.value;
  applyFilters();
});
filters?.addEventListener("reset", () => {
  for (const name of FACETS) chosen[name] = "";
  applyFilters();
});
filters?.addEventListener("submit", (event) => event.preventDefault());

// Sorting: a column by its cells' values, numbers as numbers; what has no value stays last. A third click restores the order.

for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const head = button.closest("th");
    const body = head.closest("table").tBodies[0];
    const column = [...head.parentElement.children].indexOf(head);
    body.original ??= [...body.rows];
    const order = { ascending: "descending", descending: null }[head.ariaSort] ?? (head.ariaSort ? null : "ascending");
    for (const other of head.parentElement.children) other.removeAttribute("aria-sort");
    if (order) head.setAttribute("aria-sort", order);
    body.append(...(order ? sorted(body.original, column, order === "ascending" ? 1 : -1) : body.original));
  });
}

function sorted(rows, column, sign) {
  const value = (row) => {
    const text = row.cells[column].dataset.value;
    return text === undefined ? undefined : text === "" || isNaN(text.replace("inf", "Infinity")) ? text : Number(text.replace("inf", "Infinity"));
  };
  return [...rows].sort((a, b) => {
    const [x, y] = [value(a), value(b)];
    if (x === undefined || y === undefined) return (x === undefined) - (y === undefined);
    return sign * (typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y)));
  });
}

// What is wider than the page says that it goes on.

function markWide() {
  for (const scroll of document.querySelectorAll(".scroll"))
    scroll.parentElement.classList.toggle("wide", scroll.scrollWidth > scroll.clientWidth + scroll.scrollLeft + 1);
}
document.addEventListener("scroll", markWide, { capture: true, passive: true });

// Tooltips of table cells: under the pointer, and at a tap.

const tip = document.getElementById("tip");
function showTip(event) {
  const cell = event.target.closest?.("[data-tip]");
  tip.hidden = !cell;
  if (!cell) return;
  tip.textContent = cell.dataset.tip;
  const at = cell.getBoundingClientRect();
  tip.style.left = `${Math.max(8, Math.min(at.left, innerWidth - tip.offsetWidth - 8))}px`;
  const above = at.top - tip.offsetHeight - 4;
  tip.style.top = `${above > 0 ? above : at.bottom + 4}px`;
}
document.addEventListener("pointerover", showTip);
document.addEventListener("click", showTip);
document.addEventListener("scroll", () => (tip.hidden = true), { capture: true, passive: true });

// Numbers on axes.

const short = (value) => +value.toPrecision(3);
const scaled = (value, units) => {
  const [name, size] = units.find(([, size]) => value >= size * 0.9999) ?? units.at(-1);
  return `${short(value / size)} ${name}`;
};
const FORMATS = {
  seconds: (v) => scaled(v, [["s", 1], ["ms", 1e-3], ["µs", 1e-6], ["ns", 1e-9]]),
  mebibytes: (v) => scaled(v, [["GiB", 1024], ["MiB", 1], ["KiB", 1 / 1024], ["B", 2 ** -20]]),
  factor: (v) => `${short(v)}×`,
  tokens: (v) => (v >= 2 ** 20 ? `${short(v / 2 ** 20)}M` : v >= 1024 ? `${short(v / 1024)}k` : `${v}`),
};
const formatOf = (axis) => FORMATS[axis.unit] ?? ((v) => `${short(v)}`);

// Ticks of a log axis: round numbers, as many as fit.
function logTicks([low, high], unit, most) {
  if (unit === "mebibytes" || unit === "tokens") return thin(powers(2, low, high, [1]), most);
  const choices = [[1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8], [1, 2, 5], [1, 3], [1]].map((steps) => powers(10, low, high, steps));
  return choices.find((ticks) => ticks.length <= most) ?? thin(choices.at(-1), most);
}
function powers(base, low, high, steps) {
  const found = [];
  for (let e = Math.floor(Math.log(low) / Math.log(base)); base ** e <= high; e++)
    for (const step of steps) if (step * base ** e >= low * 0.999 && step * base ** e <= high * 1.001) found.push(step * base ** e);
  return found;
}
const thin = (values, most) => values.filter((_, i) => i % Math.ceil(values.length / most) === 0);

// As marks of their own: a log scale of Plot would leave out the labels of some ticks.
const axes = (spec, xs, ys) => [
  Plot.gridX(xs),
  Plot.gridY(ys),
  Plot.axisX(xs, { text: formatOf(spec.x), label: spec.x.label, labelAnchor: "center", labelArrow: "none" }),
  Plot.axisY(ys, { text: formatOf(spec.y), label: spec.y.label, labelArrow: "none" }),
];

// Names of rows, in as many lines as their room needs.
const room = (rows, width) => Math.min(7 * d3.max(rows, (row) => row.label.length) + 14, Math.max(110, width / 3));
const names = (rows, width) => Plot.axisY({ label: null, tickSize: 0, lineWidth: room(rows, width) / 13 });

const svgOf = (element) => (element.matches("svg") ? element : element.querySelector("svg"));
const INK = { fontSize: "12px", color: "var(--ink)", background: "none", fontFamily: "system-ui, sans-serif" };
const tipOf = (data, x, y, pointer = Plot.pointer) =>
  Plot.tip(data, pointer({ x, y, title: "tip", fill: "var(--card)", stroke: "var(--line)", fontSize: 12, lineWidth: 32 }));

// A curve's point in exact figures: what it is of, where, how much, and what else is known of it.
function tipText(spec, one, { x, y, low, high, tip, disturbed }) {
  const of = `${one.name}${one.dtype ? `, ${one.dtype}` : ""}`;
  if (spec.dots) return `${of}, ${tip}\n${y} GFLOP/s at ${x} FLOP/byte`;
  const amount = EXACT[spec.y.unit];
  const shaken = disturbed ? `\ndisturbed: ${disturbed}` : "";
  const quartiles = low === undefined ? "" : ` (quartiles ${amount(low)} to ${amount(high)})`;
  return `${of}\n${spec.x.name ?? "N"} = ${x.toLocaleString("en")}\n${amount(y)}${quartiles}${shaken}`;
}
const EXACT = {
  seconds: (v) => `${+(1e3 * v).toPrecision(6)} ms`,
  mebibytes: (v) => `${v} MiB`,
  factor: (v) => `${v}×`,
};

// One function per kind of figure; each returns an SVG, or null where the filters leave nothing.

const draw = {
  curves(spec, width, off) {
    const series = spec.series.filter((one) => matches(one) && !off.has(one.label));
    const points = series.flatMap((one) => one.points.map((point) => ({ ...point, ...look(one), tip: tipText(spec, one, point) })));
    if (!points.length) return null;
    const lines = (spec.lines ?? []).flatMap((line, i) => line.points.map((p) => ({ ...p, label: line.label, i })));
    const all = [...points, ...lines];
    const domain = (values) => {
      const [low, high] = d3.extent(values);
      const room = low === high ? 2 : (high / low) ** 0.04;
      return [low / room, high * room];
    };
    const x = domain(all.map((p) => p.x));
    const y = domain([...all.flatMap((p) => [p.low ?? p.y, p.high ?? p.y]), ...(spec.rule ? [spec.rule] : [])]);
// A slope's name stands at its foot, a roof's above its right end.
    const named = d3.groups(lines, (p) => p.i).map(([i, p]) => (i === 0 ? { ...p[0], dx: 14, dy: 6, anchor: "start" } : { ...p[1], dx: 0, dy: -7, anchor: "end" }));
    return svgOf(
      Plot.plot({
        width, height: Math.round(Math.max(290, Math.min(420, width * 0.68))), marginLeft: 62, marginBottom: 40, marginRight: 14, style: INK,
        x: { type: "log", base: spec.x.base, domain: x, axis: null },
        y: { type: "log", domain: y, axis: null },
        marks: [
          ...axes(spec, logTicks(x, spec.x.unit, width / 50), logTicks(y, spec.y.unit, 9)),
          spec.rule ? Plot.ruleY([spec.rule], { strokeWidth: 1 }) : null,
          Plot.line(lines, { x: "x", y: "y", z: "i", strokeWidth: 1.5, stroke: "var(--soft)" }),
          ...named.map((p) => Plot.text([p], { x: "x", y: "y", text: "label", dx: p.dx, dy: p.dy, textAnchor: p.anchor, fill: "var(--soft)" })),
          ...[false, true].map((hollow) =>
            spec.dots ? null : Plot.line(points.filter((p) => p.hollow === hollow),
              { x: "x", y: "y", z: "name", stroke: "colour", strokeWidth: 1.8, strokeDasharray: hollow ? "5 4" : null })),
          Plot.link(points.filter((p) => p.low), { x1: "x", x2: "x", y1: "low", y2: "high", stroke: "colour", strokeWidth: 3, strokeOpacity: 0.55 }),
          // A family's second operation is hollow; what was disturbed is, too, and its outline is dashed.
          ...["full", "hollow", "disturbed"].map((kind) =>
            Plot.dot(points.filter((p) => (p.disturbed ? "disturbed" : p.hollow ? "hollow" : "full") === kind),
              { x: "x", y: "y", symbol: "symbol", stroke: "colour", fill: kind === "full" ? "colour" : "var(--back)", strokeWidth: 1.6,
                strokeDasharray: kind === "disturbed" ? "2 2" : null,
                r: spec.dots ? (p) => 2 + 0.35 * Math.log2(p.size / 32) : 3.6 })),
          tipOf(points, "x", "y"),
        ],
        r: { type: "identity" },
        symbol: { type: "identity" },
      }),
    );
  },

  heat(spec, width) {
    const cells = spec.series.filter(matches).flatMap((one) =>
      one.points.map((p) => ({ ...p, row: one.name, tip: `${one.name}\nN = ${p.x.toLocaleString("en")}\n${p.y}× over ${spec.base}\n${p.tip}` })));
    if (!cells.length) return null;
    const columns = d3.sort(new Set(cells.map((c) => c.x)));
    const rows = [...new Set(cells.map((c) => c.row))];
    const left = 7 * d3.max(rows, (row) => row.length) + 12;
    const cell = Math.max(46, Math.min(84, (width - left - 10) / columns.length));
    const pale = (c) => Math.abs(Math.log2(c.y)) < 1.6;
    return svgOf(
      Plot.plot({
        width: left + cell * columns.length + 10, height: 30 * rows.length + 50, marginLeft: left, marginBottom: 42, padding: 0.04, style: INK,
        x: { type: "band", domain: columns, tickFormat: FORMATS.tokens, label: "tokens N", labelAnchor: "center", labelArrow: "none", tickSize: 0 },
        y: { type: "band", domain: rows, label: null, tickSize: 0 },
        color: { type: "diverging", interpolate: HEAT, domain: [-3, 3], pivot: 0, clamp: true },
        marks: [
          Plot.cell(cells, { x: "x", y: "row", fill: (c) => Math.log2(c.y), rx: 2 }),
          ...[true, false].map((isPale) =>
            Plot.text(cells.filter((c) => pale(c) === isPale), { x: "x", y: "row", text: (c) => FORMATS.factor(+c.y.toPrecision(2)), fill: isPale ? "#111" : "#fff" })),
          tipOf(cells, "x", "row"),
        ],
      }),
    );
  },

  bars(spec, width) {
    return svgOf(
      Plot.plot({
        width, height: 34 * new Set(spec.rows.map((row) => row.label)).size + 45, marginLeft: room(spec.rows, width), marginBottom: 36, style: INK,
        x: { label: "share of a training step", labelAnchor: "center", labelArrow: "none", tickFormat: (v) => `${Math.round(100 * v)} %`, ticks: Math.min(10, width / 80), grid: true },
        y: { domain: [...new Set(spec.rows.map((row) => row.label))], axis: null },
        color: { domain: spec.parts, range: PARTS },
        marks: [
          names(spec.rows, width),
          Plot.barX(spec.rows, Plot.stackX({ x: "value", y: "label", fill: "part", order: spec.parts, insetRight: 1 })),
          Plot.text(spec.rows.filter((row) => row.value * (width - 180) > 34),
            Plot.stackX({ x: "value", y: "label", z: "part", order: spec.parts, text: (row) => `${Math.round(100 * row.value)} %`, fill: "#111" })),
          Plot.tip(spec.rows, Plot.pointerX(Plot.stackX({ x: "value", y: "label", z: "part", order: spec.parts, title: "tip", fill: "var(--card)", stroke: "var(--line)", fontSize: 12 }))),
        ],
      }),
    );
  },

  intervals(spec, width) {
    const labels = spec.rows.map((row) => row.label);
    const seeds = spec.rows.flatMap((row) => row.values.map((value) => ({ label: row.label, value })));
    const low = d3.min(spec.rows, (row) => Math.min(row.low ?? row.mean, row.claim ?? row.mean, ...row.values));
    const high = d3.max(spec.rows, (row) => Math.max(row.high ?? row.mean, row.claim ?? row.mean, ...row.values));
    const margin = 0.06 * (high - low || 1);
    return svgOf(
      Plot.plot({
        width, height: 34 * labels.length + 55, marginLeft: room(spec.rows, width), marginRight: 14, marginBottom: 40, style: INK,
        x: { label: spec.unit, domain: [low - margin, high + margin], labelAnchor: "center", labelArrow: "none", ticks: width / 90, grid: true },
        y: { type: "band", domain: labels, axis: null },
        marks: [
          names(spec.rows, width),
          Plot.link(spec.rows.filter((row) => row.low !== null), { x1: "low", x2: "high", y: "label", stroke: "#0072B2", strokeWidth: 3, strokeOpacity: 0.6 }),
          Plot.dot(seeds, { x: "value", y: "label", dy: 8, r: 2, fill: "var(--soft)" }),
          Plot.dot(spec.rows.filter((row) => row.claim !== null), { x: "claim", y: "label", symbol: "diamond", r: 5, stroke: "#D55E00", strokeWidth: 2 }),
          Plot.dot(spec.rows, { x: "mean", y: "label", r: 5, fill: "#0072B2" }),
          tipOf(spec.rows, "mean", "label", Plot.pointerY),
        ],
      }),
    );
  },
};
// From orange, slower, to blue, faster.
const HEAT = d3.interpolateRgbBasis(["#a04a00", "#e69f00", "#f3f3f3", "#56a4d8", "#00508a"]);
// Okabe and Ito's colours but black, all dark text can stand on.
const PARTS = ["#E69F00", "#56B4E9", "#44B893", "#F0E442", "#CC79A7", "#E8845A", "#A9B1B8"];

const look = (one) => ({ name: one.label, ...styles[one.style ?? one.backend], hollow: one.hollow });

// Legends: a button per curve, which hides it.

function swatch({ colour, symbol, hollow }, line) {
  const svg = d3.create("svg").attr("width", 26).attr("height", 12).attr("viewBox", "-13 -6 26 12");
  if (line) svg.append("line").attr("x1", -13).attr("x2", 13).attr("stroke", colour).attr("stroke-width", 1.8).attr("stroke-dasharray", hollow ? "5 3" : null);
  svg.append("path").attr("d", d3.symbol(D3_SYMBOLS[symbol], 40)()).attr("stroke", colour).attr("stroke-width", 1.6)
    .attr("fill", hollow ? "var(--back)" : colour);
  return svg.node();
}
const D3_SYMBOLS = { circle: d3.symbolCircle, square: d3.symbolSquare, triangle: d3.symbolTriangle, diamond: d3.symbolDiamond, cross: d3.symbolCross,
  times: d3.symbolTimes, wye: d3.symbolWye, star: d3.symbolStar,
  hexagon: { draw(context, size) { const r = Math.sqrt(size / 2.6); for (let i = 0; i < 6; i++) context[i ? "lineTo" : "moveTo"](r * Math.cos(i * Math.PI / 3), r * Math.sin(i * Math.PI / 3)); context.closePath(); } } };

function legend(spec, off, redraw) {
  const box = Object.assign(document.createElement("div"), { className: "legend" });
  for (const one of (spec.kind === "curves" ? spec.series : []).filter(matches)) {
    const button = Object.assign(document.createElement("button"), { type: "button" });
    button.setAttribute("aria-pressed", !off.has(one.label));
    button.append(swatch(look(one), !spec.dots), one.label);
    button.addEventListener("click", () => {
      off.has(one.label) ? off.delete(one.label) : off.add(one.label);
      redraw();
    });
    box.append(button);
  }
  (spec.parts ?? []).forEach((part, i) => {
    const item = document.createElement("span");
    const svg = d3.create("svg").attr("width", 12).attr("height", 12);
    svg.append("rect").attr("width", 12).attr("height", 12).attr("rx", 2).attr("fill", PARTS[i]);
    item.append(svg.node(), part);
    box.append(item);
  });
  return box.childElementCount ? box : null;
}

// A figure for papers: as drawn, in the colours of a light page.

const LIGHT = { "var(--ink)": "#222222", "var(--soft)": "#5b6670", "var(--back)": "#ffffff", "var(--card)": "#f5f7f9", "var(--line)": "#d9dee3", currentColor: "#222222" };
function asFile(svg) {
  const copy = svg.cloneNode(true);
  copy.setAttribute("xmlns", "http://www.w3.org/2000/svg");
  copy.style.color = "#222222";
  copy.style.background = "#ffffff";
  copy.querySelectorAll("[aria-label=tip]").forEach((mark) => mark.remove());
  let text = new XMLSerializer().serializeToString(copy);
  for (const [name, colour] of Object.entries(LIGHT)) text = text.replaceAll(name, colour);
  return text;
}
function save(title, url, suffix) {
  const link = Object.assign(document.createElement("a"), { href: url, download: `${title.toLowerCase().replace(/[^a-z0-9]+/g, "-").slice(0, 80)}.${suffix}` });
  link.click();
}
function saveButtons(title, svg) {
  const box = Object.assign(document.createElement("div"), { className: "save" });
  const address = () => `data:image/svg+xml;charset=utf-8,${encodeURIComponent(asFile(svg))}`;
  const asPng = () => {
    const image = new Image();
    image.onload = () => {
      const canvas = Object.assign(document.createElement("canvas"), { width: 3 * svg.clientWidth, height: 3 * svg.clientHeight });
      canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
      save(title, canvas.toDataURL("image/png"), "png");
    };
    image.src = address();
  };
  for (const [name, action] of [["SVG", () => save(title, address(), "svg")], ["PNG", asPng]]) {
    const button = Object.assign(document.createElement("button"), { type: "button", textContent: name, title: `Save this plot as ${name}` });
    button.addEventListener("click", action);
    box.append(button);
  }
  return box;
}

// Drawing.

const hiddenSeries = figures.map(() => new Set());
function drawOne(element) {
  const number = Number(element.dataset.figure);
  const spec = figures[number];
  const off = hiddenSeries[number];
  const plot = element.querySelector(".plot");
  element.hidden = Boolean(spec.series) && !spec.series.some(matches);
  if (element.hidden) return;
  const svg = draw[spec.kind](spec, Math.max(280, plot.clientWidth), off);
  svg?.setAttribute("role", "img");
  svg?.setAttribute("aria-label", spec.title);
  plot.replaceChildren(...[legend(spec, off, () => drawOne(element)), svg, svg && saveButtons(spec.title, svg)].filter(Boolean));
}
function drawAll() {
  document.querySelectorAll("figure[data-figure]").forEach(drawOne);
  markWide();
}

let width = innerWidth;
let timer;
addEventListener("resize", () => {
  if (innerWidth === width) return; // a phone's address bar comes and goes
  width = innerWidth;
  clearTimeout(timer);
  timer = setTimeout(drawAll, 100);
});
applyFilters();
