"use strict";
// The page: totals, the table of layers, details of one, charts of a run. All text enters as text, never as markup.

const data = JSON.parse(document.getElementById("data").textContent);
const find = (id) => document.getElementById(id);
const number = new Intl.NumberFormat("en-US");
const state = { variant: Object.keys(data.variants)[0], sort: null, down: false, chosen: new Set() };

/** Make an element with attributes and children; strings become text. */
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== undefined && value !== null) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

function short(value) {
  const prefixes = ["", " k", " M", " G", " T", " P"];
  let thousands = 0;
  while (Math.abs(value) >= 1000 && thousands < prefixes.length - 1) { value /= 1000; thousands += 1; }
  return `${thousands ? value.toFixed(3) : value}${prefixes[thousands]}`;
}

const share = (value) => `${(100 * value).toFixed(value < 0.1 ? 2 : 1)}%`;

function bar(value) {
  const inner = make("i");
  inner.style.width = `${Math.max(100 * value, value > 0 ? 1 : 0)}%`;
  return make("div", { class: "bar" }, inner);
}

/** Two bars, one in the other: what dense costs of the most, and what is left of it. */
function bars(dense, sparse, most) {
  const [all, left] = [make("i"), make("i")];
  all.style.width = `${(100 * dense) / most}%`;
  left.style.width = `${(100 * sparse) / most}%`;
  return make("div", { class: "bar of-all" }, all, left);
}

/** A path that may be broken after its dots. */
const breakable = (path) => path.split(/(?<=\.)/).flatMap((part) => [part, make("wbr")]);

// Totals

function showTotals() {
  const t = data.variants[state.variant].totals;
  const cards = [
    [share(t.density), `${number.format(t.kept)} of ${number.format(t.params)}`, "masked weights kept"],
    [share(t.inference_ratio), `${short(t.sparse_macs)} of ${short(t.dense_macs)} MACs`, "inference FLOPs"],
    [share(t.training_ratio), `published formula; ${share(t.exact_training_ratio)} by the schedule`, "training FLOPs"],
    [share(t.sparse_bytes / t.dense_bytes), `${short(t.sparse_bytes)}B of ${short(t.dense_bytes)}B`, "file"],
  ];
  const speed = state.variant === data.main ? data.speed : null;
  if (speed) cards.push([`${speed.speedup.toFixed(2)}x`, `${speed.sparse_ms.toFixed(2)} ms, dense ${speed.dense_ms.toFixed(2)} ms`, `${speed.what}, measured`]);
  const card = ([value, detail, title]) => make("div", { class: "total" }, make("span", {}, title), make("b", {}, value), make("span", {}, detail));
  find("totals").replaceChildren(...cards.map(card));
}

// The table

const COLUMNS = [
  { key: "name", title: "layer", text: true },
  { key: "op", title: "op", text: true, wide: true },
  { key: "shape", title: "weight", text: true, wide: true },
  { key: "kept", title: "kept" },
  { key: "density", title: "density" },
  { key: "sparse_macs", title: "MACs" },
];
if (data.speed) COLUMNS.push({ key: "measured", title: "faster", wide: true });

function rows() {
  const { layers } = data.variants[state.variant];
  const words = find("search").value.toLowerCase().split(/\s+/).filter(Boolean), status = find("status").value;
  const text = (x) => `${x.name} ${x.op} ${x.shape} ${x.status} ${x.reason}`.toLowerCase();
  const shown = layers.filter((x) => (!status || x.status === status) && words.every((word) => text(x).includes(word)));
  if (!state.sort) return shown;
  const order = (a, b) => (typeof a === "string" ? a.localeCompare(b, "en", { numeric: true }) : a - b);
  const sign = state.down ? -1 : 1;
  return [...shown].sort((a, b) => sign * order(a[state.sort], b[state.sort]));
}

function showTable() {
  const all = data.variants[state.variant].layers, shown = rows();
  const most = Math.max(1, ...all.map((x) => x.dense_macs));
  const heads = COLUMNS.map((column) => {
    const sorted = state.sort === column.key ? (state.down ? "descending" : "ascending") : "none";
    const classes = [column.text ? "" : "number", column.wide ? "wide" : ""].join(" ").trim();
    return make("th", { scope: "col", "aria-sort": sorted, class: classes || null },
      make("button", { type: "button", onclick: () => sortBy(column) }, column.title));
  });
  find("table").tHead.replaceChildren(make("tr", {}, ...heads));
  find("table").tBodies[0].replaceChildren(...shown.map((x) => {
    const cells = {
      name: make("td", { class: "name" }, ...breakable(x.name)),
      op: make("td", { class: "wide" }, x.op),
      shape: make("td", { class: "wide" }, x.shape),
      kept: make("td", { class: "number" }, x.params ? number.format(x.kept) : ""),
      density: make("td", { class: "number" }, x.params ? share(x.density) : "", x.params ? bar(x.density) : null),
      sparse_macs: make("td", { class: "number" }, short(x.sparse_macs), bars(x.dense_macs, x.sparse_macs, most)),
      measured: make("td", { class: "number wide" }, x.measured ? `${x.measured.toFixed(2)}x` : ""),
    };
    const row = make("tr", {
      class: x.status === "masked" ? null : "dense", "data-layer": x.name, tabindex: "0", "aria-selected": String(state.chosen.has(x.name)),
      onclick: () => choose([x.name], true),
      onkeydown: (event) => { if (event.key === "Enter") choose([x.name], true); },
    });
    row.append(...COLUMNS.map((column) => cells[column.key]));
    return row;
  }));
  find("shown").textContent = `${shown.length} of ${all.length}`;
}

function sortBy(column) {
  const first = !column.text; // numbers begin with the largest
  if (state.sort !== column.key) [state.sort, state.down] = [column.key, first];
  else if (state.down === first) state.down = !first;
  else state.sort = null;
  showTable();
}

// One layer

function choose(names, fromTable) {
  state.chosen = new Set(names);
  for (const row of find("table").tBodies[0].rows) row.setAttribute("aria-selected", String(state.chosen.has(row.dataset.layer)));
  if (!fromTable) {
    const row = find("table").querySelector('tr[aria-selected="true"]');
    if (row) row.scrollIntoView({ block: "nearest" });
  }
  view.choose(state.chosen, fromTable);
  showDetails();
}

function thumbnail(mask) {
  const canvas = make("canvas", { width: mask.width, height: mask.height, role: "img", "aria-label": "The mask" });
  const bytes = Uint8Array.from(atob(mask.values), (c) => c.charCodeAt(0));
  const image = new ImageData(mask.width, mask.height);
  bytes.forEach((value, i) => image.data.set([232, 110, 30, value], 4 * i));
  canvas.getContext("2d").putImageData(image, 0, 0);
  return make("figure", {}, canvas, make("figcaption", {}, mask.caption));
}

function showDetails() {
  const chosen = data.variants[state.variant].layers.filter((x) => state.chosen.has(x.name));
  if (!chosen.length) {
    find("details").replaceChildren(make("p", {}, "Choose a row or a coloured node. Blocks with + and − unfold and fold."));
    return;
  }
  find("details").replaceChildren(...chosen.map((x) => {
    const uses = data.nodes.filter((n) => n.weights.includes(x.name)).length;
    const facts = [
      ["status", x.reason ? `${x.status}: ${x.reason}` : x.status],
      ["weight", x.shape],
      ["kept", x.params ? `${number.format(x.kept)} of ${number.format(x.params)} (${share(x.density)})` : ""],
      ["MACs", `${number.format(x.sparse_macs)} of ${number.format(x.dense_macs)} dense`],
      ["dead outputs", x.dead_outputs ? number.format(x.dead_outputs) : "none"],
      ["used by", uses ? `${uses} node${uses > 1 ? "s" : ""} of the graph` : ""],
      ["speed", x.kernel ? `${x.kernel}: ${x.why}; predicted ${x.predicted.toFixed(2)}x, measured ${x.measured.toFixed(2)}x` : ""],
    ].filter(([, value]) => value);
    const list = make("dl", {}, ...facts.flatMap(([title, value]) => [make("dt", {}, title), make("dd", {}, value)]));
    const mask = state.variant === data.main ? data.masks[x.name] : null;
    return make("div", {}, make("h2", {}, ...breakable(x.name)), make("div", { class: "row" }, list, mask ? thumbnail(mask) : null));
  }));
}

// A run

function chart(title, steps, series, format) {
  const holder = make("div", { class: "chart" }, make("h3", {}, title));
  find("charts").append(holder);
  const colours = ["#d9731f", "#4878b0", "#3a9a5c", "#b04a78", "#8a6fc0", "#8a8f2a", "#2a9a9a", "#a06a3c"];
  const css = getComputedStyle(document.documentElement), soft = css.getPropertyValue("--soft").trim(), line = css.getPropertyValue("--line").trim();
  const axis = { stroke: soft, grid: { stroke: line, width: 1 }, ticks: { stroke: line } };
  const plot = new uPlot({
    width: Math.max(280, holder.clientWidth - 18), height: 220, scales: { x: { time: false } }, axes: [axis, { ...axis, size: 60, values: (_, v) => v.map(format) }],
    legend: { show: series.length <= 12 },
    series: [{ label: "step" }, ...series.map((s, i) => ({
      label: s.label, stroke: colours[i % colours.length], width: 1.5, paths: uPlot.paths.stepped({ align: 1 }), value: (_, v) => (v == null ? "" : format(v)) }))],
  }, [steps, ...series.map((s) => s.values)], holder);
  window.addEventListener("resize", () => plot.setSize({ width: Math.max(280, holder.clientWidth - 18), height: 220 }));
}

function showHistory() {
  const run = data.history;
  if (!run) return;
  find("history").hidden = false;
  const count = (v) => (v >= 1e6 ? `${v / 1e6} M` : v >= 1e4 ? `${v / 1e3} k` : String(v)), ratio = (v) => share(v);
  chart("Density of each layer", run.steps, run.densities, ratio);
  chart("FLOPs relative to dense", run.steps, [
    { label: "inference", values: run.inference_ratio }, { label: "training so far", values: run.training_ratio }], ratio);
  if (run.changes) chart("Weights dropped and grown by each update", run.changes.steps, [
    { label: "dropped", values: run.changes.dropped }, { label: "grown", values: run.changes.grown }], count);
}

// The page

function showAll() {
  showTotals();
  showTable();
  view.layers = Object.fromEntries(data.variants[state.variant].layers.map((x) => [x.name, x]));
  view.draw();
  showDetails();
  for (const button of find("variants").children) button.setAttribute("aria-pressed", String(button.dataset.variant === state.variant));
}

find("title").textContent = data.title;
find("subtitle").textContent = data.subtitle;
find("notes").append(...data.notes.map((note) => make("p", {}, note)));
const statuses = [...new Set(data.variants[state.variant].layers.map((x) => x.status))];
find("status").append(make("option", { value: "" }, "all layers"), ...statuses.map((s) => make("option", { value: s }, s)));
if (Object.keys(data.variants).length > 1) {
  find("variants").hidden = false;
  find("variants").append(...Object.keys(data.variants).map((name) =>
    make("button", { type: "button", "data-variant": name, onclick: () => { state.variant = name; showAll(); } }, name)));
}
const view = new GraphView(find("graph"), data.nodes, (node) => choose(node.weights, false));
find("search").addEventListener("input", showTable);
find("status").addEventListener("change", showTable);
find("filter").addEventListener("submit", (event) => event.preventDefault());
find("fold").addEventListener("click", () => view.foldAll());
find("fit").addEventListener("click", () => view.fit());
find("zoom-in").addEventListener("click", () => view.zoom(1.4));
find("zoom-out").addEventListener("click", () => view.zoom(1 / 1.4));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => view.paint());
showAll();
showHistory();
