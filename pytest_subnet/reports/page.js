"use strict";
(() => {
const nonce = document.querySelector("style").nonce;
const create = document.createElement.bind(document);
// Plotly adds style sheets of its own, which the page's policy lets in by the nonce alone.
document.createElement = (name, ...more) => {
  const made = create(name, ...more);
  if (String(name).toLowerCase() === "style") made.nonce = nonce;
  return made;
};

const data = JSON.parse(document.getElementById("data").textContent);
const PAGE = 50;
const PRINTED = 500;
const MARKS = 2000;
const CELLS = 250;
const WIDE = 690;
const FLOOR = "0";
const FONT = "system-ui, sans-serif";
const BUTTONS = [["zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", "resetScale2d"]];

const count = (value) => (typeof value === "number" ? value.toLocaleString("en-US") : value ?? "");
function digits(value) {
  if (typeof value !== "number") return value ?? "";
  const size = Math.abs(value);
  if (size && (size < 1e-3 || size >= 1e6)) return value.toExponential(3).replace(/\.?0*e\+?/, "e");
  return String(Number(value.toPrecision(4)));
}
function percent(share) {
  if (typeof share !== "number") return "";
  const text = (100 * share).toFixed(2);
  if (share < 1 && text === "100.00") return ">99.99%";
  return share > 0 && text === "0.00" ? "<0.01%" : `${text}%`;
}
const ratio = (a, b) => (typeof a === "number" && typeof b === "number" && b ? a / b : null);
const plural = (number, noun) => `${count(number)} ${noun}${number === 1 ? "" : "s"}`;
// Plotly reads markup in labels; with these characters as entities it shows them instead.
const plain = (text) =>
  String(text).replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
const brief = (text, most) =>
  text.length <= most ? text : `${text.slice(0, most / 2 - 1)}…${text.slice(1 - most / 2)}`;
const largest = (values) => values.reduce((most, each) => (each > most ? each : most), 0);
/* A name in pieces between which a line may break. */
const breakable = (name) =>
  name.split(/(?<=[._/])/).flatMap((part, at) => (at ? [create("wbr"), part] : [part]));
const median = (values) => [...values].sort((a, b) => a - b)[Math.floor(values.length / 2)];

function element(tag, attributes = {}, ...children) {
  const made = create(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (value !== false && value !== null) made.setAttribute(key, value === true ? "" : value);
  }
  made.append(...children);
  return made;
}

function namesOf(coded) {
  const names = [];
  let before = "";
  for (let at = 0; at < coded.length; at += 2) {
    before = before.slice(0, coded[at]) + coded[at + 1];
    names.push(before);
  }
  return names;
}
const words = (coded) => coded.codes.map((code) => coded.words[code]);
const numbered = (values) => values.map((_, index) => index);

/* What each table shows: of row number `row`, the value to sort by and the text. */
const column = (title, values, show = digits, more = {}) => ({ title, values, show, ...more });
const text = (title, values, more = {}) => column(title, values, String, { isText: true, ...more });

function pairTable(pair) {
  const { names, kind, layer, dtype, shape, entries, updated, beyond } = pair.tensors;
  const density = updated.map((value, row) => ratio(value, entries[row]));
  const moved = pair.tensors.change_norm.map((value, row) => ratio(value, pair.tensors.base_norm[row]));
  return {
    noun: "tensor",
    kind,
    layer,
    columns: [
      text("name", names, { className: "name" }),
      text("kind", kind),
      column("layer", layer, (value) => value ?? "–"),
      text("dtype", dtype),
      text("shape", shape),
      column("entries", entries, count),
      column("moved", updated, count),
      column("density", density, percent, { isShare: true }),
      column("beyond 1e-5", beyond.map((value, row) => ratio(value, entries[row])), percent, { isShare: true }),
      column("max |Δ|", pair.tensors.max_change),
      column("‖Δ‖ / ‖base‖", moved),
    ],
  };
}

function spectrumTable(spectrum) {
  const { names, kind, layer, rank, max_rank, stable_rank, resolved_rank } = spectrum;
  return {
    noun: "matrix",
    kind,
    layer,
    columns: [
      text("name", names, { className: "name" }),
      text("kind", kind),
      column("layer", layer, (value) => value ?? "–"),
      column("rank", rank, count),
      column("of", max_rank, count),
      column("share", rank.map((value, row) => ratio(value, max_rank[row])), percent, { isShare: true }),
      column("stable rank", stable_rank),
      column("beyond rounding", resolved_rank, count),
    ],
  };
}

function overlapTable({ short, cells }) {
  const of = (index) => cells.map((cell) => cell[index]);
  return {
    noun: "overlap",
    columns: [
      text("a", of(0).map((run) => short[run]), { className: "name" }),
      text("b", of(1).map((run) => short[run]), { className: "name" }),
      column("in both", of(2), count),
      column("by chance", of(3), (value) => (value === null ? "" : count(Math.round(value)))),
      column("lift", of(4)),
      column("kappa", of(5)),
      column("Jaccard", of(6), percent),
      column("of a in b", of(7), percent),
      column("of b in a", of(8), percent),
    ],
  };
}

function trajectoryTable({ checkpoints, whole, steps }) {
  const density = (values) => checkpoints.map((_, row) => (values[row] == null ? null : 1 - values[row]));
  return {
    noun: "checkpoint",
    columns: [
      text("checkpoint", checkpoints, { className: "name" }),
      column("density", density(whole), percent),
      column("sparsity", whole, percent),
      column("density of the step", density(steps), percent),
      column("sparsity of the step", steps, percent),
    ],
  };
}

class Table {
  constructor(root, { columns, noun, kind, layer }) {
    Object.assign(this, { columns, noun, kind, layer, page: 0, sorted: null, most: PAGE });
    this.total = columns[0].values.length;
    for (const each of columns) if (each.isShare) each.most = largest(each.values) || 1;
    this.order = numbered(columns[0].values);
    this.body = element("tbody");
    this.heads = columns.map((each, index) =>
      element(
        "th",
        { scope: "col", class: each.isText ? "" : "right" },
        element("button", { type: "button", onclick: () => this.sort(index) }, each.title),
      ),
    );
    this.status = element("output", { "aria-live": "polite" });
    this.back = element("button", { type: "button", onclick: () => this.turn(-1) }, "Previous");
    this.next = element("button", { type: "button", onclick: () => this.turn(1) }, "Next");
    this.scroll = element(
      "div",
      { class: "wide scroll", tabindex: "0", role: "region", "aria-label": `Table: ${noun}` },
      element("table", {}, element("thead", {}, element("tr", {}, ...this.heads)), this.body),
    );
    if (this.total > 8 && kind) root.append(this.controls());
    root.append(this.scroll, element("div", { class: "pages" }, this.status, this.back, this.next));
    this.root = root;
    this.filter();
  }

  controls() {
    const again = () => this.filter();
    const choices = (values, label) => [
      element("option", { value: "" }, `every ${label}`),
      ...values.map((value) => element("option", { value: String(value) }, brief(String(value), 40))),
    ];
    const layers = [...new Set(this.layer)].sort((a, b) => (a ?? Infinity) - (b ?? Infinity));
    this.search = element("input", { type: "search", placeholder: "Search names", "aria-label": "Search names", oninput: again });
    this.byKind = element("select", { "aria-label": "Kind", onchange: again }, ...choices([...new Set(this.kind)].sort(), "kind"));
    this.byLayer = element("select", { "aria-label": "Layer", onchange: again }, ...choices(layers.map((each) => each ?? "none"), "layer"));
    return element("div", { class: "controls" }, this.search, this.byKind, this.byLayer);
  }

  filter() {
    const wanted = (this.search?.value ?? "").toLowerCase().split(/\s+/).filter(Boolean);
    const [kind, layer] = [this.byKind?.value, this.byLayer?.value];
    this.lower ??= this.columns[0].values.map((name) => name.toLowerCase());
    this.found = this.order.filter(
      (row) =>
        wanted.every((word) => this.lower[row].includes(word)) &&
        (!kind || this.kind[row] === kind) &&
        (!layer || String(this.layer[row] ?? "none") === layer),
    );
    this.page = 0;
    this.draw();
  }

  show(kind, layer) {
    if (!this.search) return;
    this.search.value = "";
    this.byKind.value = kind;
    this.byLayer.value = String(layer ?? "none");
    this.filter();
    this.root.scrollIntoView({ block: "start" });
    this.search.focus({ preventScroll: true });
  }

  sort(index) {
    const { values, isText } = this.columns[index];
    const first = isText ? "ascending" : "descending";
    const other = isText ? "descending" : "ascending";
    const direction = this.sorted === index && this.direction === first ? other : first;
    const sign = direction === "ascending" ? 1 : -1;
    const compare = isText
      ? (a, b) => (values[a] < values[b] ? -1 : values[a] > values[b] ? 1 : 0)
      : (a, b) => values[a] - values[b];
    const isKnown = (row) => isText || typeof values[row] === "number";
    const all = numbered(values);
    const known = all.filter(isKnown).sort((a, b) => sign * compare(a, b) || a - b);
    this.order = [...known, ...all.filter((row) => !isKnown(row))];
    Object.assign(this, { sorted: index, direction });
    this.heads.forEach((head, at) => head.removeAttribute("aria-sort"));
    this.heads[index].setAttribute("aria-sort", direction);
    this.filter();
  }

  turn(by) {
    this.page += by;
    this.draw();
    this.scroll.scrollTop = 0;
  }

  draw() {
    const start = this.page * this.most;
    const rows = this.found.slice(start, start + this.most);
    this.body.replaceChildren(...rows.map((row) => this.row(row)));
    const end = start + rows.length;
    const all = this.found.length === this.total ? "" : ` (of ${count(this.total)})`;
    const nouns = this.noun === "matrix" ? "matrices" : `${this.noun}s`;
    this.status.textContent = rows.length
      ? `${count(start + 1)}–${count(end)} of ${count(this.found.length)} ${nouns}${all}`
      : `No ${this.noun} fits${all}`;
    this.back.disabled = start === 0;
    this.next.disabled = end >= this.found.length;
    this.back.hidden = this.next.hidden = this.found.length <= this.most;
  }

  row(row) {
    const cells = this.columns.map(({ values, show, isText, isShare, className, most }) => {
      const cell = create("td");
      const shown = show(values[row]);
      if (className === "name") cell.append(...breakable(shown));
      else cell.textContent = shown;
      cell.className = className ?? (isShare ? "right share" : isText ? "" : "right");
      if (isShare && values[row]) cell.style.setProperty("--share", values[row] / most);
      return cell;
    });
    const made = create("tr");
    made.append(...cells);
    return made;
  }

  print(printing) {
    this.most = printing ? PRINTED : PAGE;
    this.page = 0;
    this.draw();
  }
}

/* Colours of the page, as it is lit now. */
function colours() {
  const style = getComputedStyle(document.documentElement);
  const of = (name) => style.getPropertyValue(`--${name}`).trim();
  return { text: of("text"), muted: of("muted"), line: of("line"), page: of("page"), raised: of("raised"), failed: of("failed") };
}
const HUES = ["#3b82c4", "#d97b29", "#3f9b63", "#b65fb0", "#c9a227", "#5a6fd0", "#d0566b", "#3aa6a6", "#9a7b5b", "#8a8f98"];
const SYMBOLS = ["circle", "square", "diamond", "triangle-up", "cross", "x", "triangle-down", "star", "hexagon", "pentagon"];

function layout(more) {
  const { text, muted, line, raised } = colours();
  const axis = { gridcolor: line, linecolor: line, zeroline: false, tickfont: { color: muted }, automargin: true };
  const printing = document.documentElement.classList.contains("printing");
  const { xaxis, yaxis, yaxis2, ...rest } = more;
  return {
    autosize: !printing,
    ...(printing ? { width: WIDE } : {}),
    margin: { l: 8, r: 8, t: 34, b: 8 },
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: FONT, size: 12, color: text },
    hoverlabel: { bgcolor: raised, bordercolor: line, font: { family: FONT, color: text }, align: "left" },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: muted, activecolor: text },
    hovermode: "closest",
    xaxis: { ...axis, ...xaxis },
    yaxis: { ...axis, ...yaxis },
    ...(yaxis2 ? { yaxis2: { ...axis, ...yaxis2 } } : {}),
    ...rest,
  };
}

/* Numbers on an axis whose places are 0, 1, 2, …: labels that fit. */
function ticks(labels, room) {
  const every = Math.max(1, Math.ceil(labels.length / Math.max(2, room)));
  const at = numbered(labels).filter((index) => index % every === 0);
  return {
    tickmode: "array",
    tickvals: at,
    ticktext: at.map((index) => plain(brief(String(labels[index]), 26))),
    range: [-0.5, labels.length - 0.5],
  };
}

const ORDER = ["embed", "q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "router", "gate_proj", "up_proj", "down_proj", "norm", "head"];
/* Tensors by layer and kind: the layers in order, then what stands in none. */
function grid({ layer, kind }) {
  const known = [...new Set(layer)].sort((a, b) => (a ?? Infinity) - (b ?? Infinity));
  const rank = (each) => (ORDER.includes(each) ? ORDER.indexOf(each) : ORDER.length);
  const kinds = [...new Set(kind)].sort((a, b) => rank(a) - rank(b));
  const place = new Map(known.map((each, index) => [each, index]));
  const level = new Map(kinds.map((each, index) => [each, index]));
  const members = new Map();
  layer.forEach((each, row) => {
    const cell = level.get(kind[row]) * known.length + place.get(each);
    if (!members.has(cell)) members.set(cell, []);
    members.get(cell).push(row);
  });
  return { layers: known, kinds, place, members, labels: known.map((each) => each ?? "–") };
}
const whereOf = (layer) => (layer === null ? "outside the layers" : `layer ${layer}`);

function colourbar(title) {
  const { muted } = colours();
  return { title: { text: title, side: "right" }, thickness: 10, outlinewidth: 0, tickfont: { color: muted } };
}

const charts = {
  density(index, width) {
    const pair = data.pairs[index];
    const all = grid(pair.tensors);
    const [layers, kinds] = [all.layers.slice(0, CELLS), all.kinds.slice(0, CELLS)];
    const labels = all.labels.slice(0, CELLS);
    const isCut = all.layers.length > CELLS || all.kinds.length > CELLS;
    const counted = document.querySelector(`[data-count="${index}"]`).value;
    const sum = (rows, values) => rows.reduce((total, row) => total + values[row], 0);
    const z = kinds.map(() => labels.map(() => null));
    const hover = kinds.map(() => labels.map(() => ""));
    for (const [cell, rows] of all.members) {
      const [y, x] = [Math.floor(cell / all.labels.length), cell % all.labels.length];
      if (y >= kinds.length || x >= labels.length) continue;
      const entries = sum(rows, pair.tensors.entries);
      const moved = sum(rows, pair.tensors[counted]);
      z[y][x] = ratio(moved, entries);
      hover[y][x] = [
        `<b>${plain(brief(kinds[y], 60))}</b>, ${whereOf(layers[x])}`,
        `density ${percent(z[y][x])}`.replace("<", "&lt;").replace(">", "&gt;"),
        `${count(moved)} of ${count(entries)} entries`,
        plural(rows.length, "tensor"),
      ].join("<br>");
    }
    const most = largest(z.flat());
    const height = Math.min(1400, Math.max(150, 26 * kinds.length + 90));
    return {
      traces: [{
        type: "heatmap", z, text: hover, hoverinfo: "text", colorscale: "Cividis", zmin: 0,
        zmax: most || 1, xgap: 1, ygap: 1, colorbar: { ...colourbar(""), tickformat: ".3~p" },
      }],
      layout: layout({
        height,
        xaxis: { ...ticks(labels, (width - 180) / 26), title: { text: "layer" }, showgrid: false },
        yaxis: { ...ticks(kinds, height / 14), range: [kinds.length - 0.5, -0.5], showgrid: false },
      }),
      click: ({ x, y }) => tables.get(`pairs-${index}`).show(kinds[y], layers[x]),
      note: isCut ? ` Only the first ${CELLS} layers and kinds.` : "",
    };
  },

  change(index, width) {
    const { tensors, tolerances } = data.pairs[index];
    const values = tensors.max_change;
    const { text, failed } = colours();
    const known = values.filter((each) => typeof each === "number");
    if (!known.length) return null;
    const above = known.filter((each) => each > 0);
    // Zero has no place on a logarithmic axis: it gets the decade below everything else.
    const low = Math.floor(Math.log10(above.reduce((a, b) => Math.min(a, b), tolerances[0]))) - 1;
    const high = Math.ceil(Math.log10(above.reduce((a, b) => Math.max(a, b), tolerances.at(-1))) + 0.2);
    const decades = Array.from({ length: high - low }, (_, step) => low + 1 + step);
    const marks = scattered(tensors, values, (rows) => rows.reduce((a, b) => (values[b] > values[a] ? b : a)));
    const traces = marks.groups.map((group) => ({
      ...group.trace,
      y: group.rows.map((row) => values[row] || 10 ** low),
      text: group.rows.map((row) => `${plain(brief(tensors.names[row], 70))}<br>max |Δ| ${digits(values[row])}`),
    }));
    return {
      traces,
      layout: layout({
        height: 360 + legendRoom(traces, width),
        legend: LEGEND,
        xaxis: { ...ticks(marks.labels, (width - 60) / 26), title: { text: "layer" }, showgrid: false },
        yaxis: {
          type: "log", range: [low - 0.3, high], tickmode: "array",
          tickvals: [10 ** low, ...decades.map((each) => 10 ** each)],
          ticktext: [FLOOR, ...decades.map((each) => (each < -3 || each > 3 ? `1e${each}` : String(10 ** each)))],
        },
        shapes: tolerances.map((each) => ({
          type: "line", xref: "paper", x0: 0, x1: 1, y0: each, y1: each,
          line: { color: failed, width: 1.5, dash: "dash" },
        })),
        annotations: tolerances.map((each) => ({
          xref: "paper", x: 1, xanchor: "right", y: Math.log10(each), yanchor: "bottom", showarrow: false,
          text: `atol=${digits(each)}`, font: { color: text, size: 11 },
        })),
      }),
      click: ({ x, name }) => tables.get(`pairs-${index}`).show(name, marks.layers[Math.round(x)]),
      note: marks.isThinned ? " Each mark is the largest of a layer and kind." : "",
    };
  },

  spectrum(index, width) {
    const spectrum = data.spectra[index];
    const share = spectrum.rank.map((value, row) => ratio(value, spectrum.max_rank[row]));
    const middle = (rows) => {
      const wanted = median(rows.map((row) => spectrum.stable_rank[row]));
      return rows.find((row) => spectrum.stable_rank[row] === wanted) ?? rows[0];
    };
    const marks = scattered(spectrum, spectrum.stable_rank, middle);
    const hover = (row) =>
      `${plain(brief(spectrum.names[row], 70))}<br>rank ${count(spectrum.rank[row])} of ` +
      `${count(spectrum.max_rank[row])}<br>stable rank ${digits(spectrum.stable_rank[row])}`;
    const traces = marks.groups.flatMap(({ trace, rows }) => [
      { ...trace, y: rows.map((row) => share[row]), text: rows.map(hover) },
      { ...trace, y: rows.map((row) => spectrum.stable_rank[row]), text: rows.map(hover), yaxis: "y2", showlegend: false },
    ]);
    return {
      traces,
      layout: layout({
        height: 480 + legendRoom(marks.groups, width),
        legend: LEGEND,
        xaxis: { ...ticks(marks.labels, (width - 60) / 26), title: { text: "layer" }, showgrid: false, anchor: "y2" },
        yaxis: { domain: [0.56, 1], range: [-0.03, 1.06], tickformat: ".0%", title: { text: "rank / full rank" } },
        yaxis2: { domain: [0, 0.44], type: "log", title: { text: "stable rank" }, nticks: 6 },
      }),
      click: ({ x, name }) => tables.get(`spectra-${index}`).show(name, marks.layers[Math.round(x)]),
      note: marks.isThinned ? " Each mark is the median of a layer and kind." : "",
    };
  },

  overlap(index, width) {
    const { runs, short, cells } = data.overlaps[index];
    const measure = document.querySelector(`[data-measure="${index}"]`).value;
    const [forward, backward, show] = MEASURES[measure];
    const z = runs.map(() => runs.map(() => null));
    const hover = runs.map(() => runs.map(() => ""));
    for (const cell of cells) {
      for (const [a, b, value] of [[cell[0], cell[1], cell[forward]], [cell[1], cell[0], cell[backward]]]) {
        z[a][b] = typeof value === "number" ? value : null;
        hover[a][b] =
          `${plain(brief(runs[a], 60))}<br>${plain(brief(runs[b], 60))}<br>` +
          `${measure} ${plain(show(value))}<br>${count(cell[2])} entries in both`;
      }
    }
    const known = z.flat().filter((each) => each !== null);
    const low = known.reduce((a, b) => Math.min(a, b), measure === "lift" ? 1 : 0); // 1 is chance
    const most = largest(known) || 1;
    const isDark = (value) => (value - low) / (most - low || 1) < 0.55;
    const number = (at) => runs.length > 1 ? `${at + 1}` : "";
    const hasRoom = (width - 8 * largest(short.map((each) => Math.min(each.length, 40)))) / runs.length > 60;
    const labels = short.map((run, at) => `${number(at)}  ${brief(run, width < 500 ? 16 : 40)}`);
    const height = Math.min(900, 34 * runs.length + 90);
    return {
      traces: [{
        type: "heatmap", z, text: hover, hoverinfo: "text", colorscale: "Cividis",
        zmin: low, zmax: most, xgap: 1, ygap: 1, colorbar: colourbar(""),
      }],
      layout: layout({
        height,
        xaxis: { ...ticks(runs.map((_, at) => number(at)), width / 26), showgrid: false, side: "top" },
        yaxis: {
          ...ticks(labels, height / 14), ticktext: labels.map(plain), tickvals: numbered(labels),
          range: [runs.length - 0.5, -0.5], showgrid: false,
        },
        annotations: !hasRoom ? [] : z.flatMap((row, y) => row.flatMap((value, x) =>
          value === null ? [] : [{
            x, y, text: plain(show(value)), showarrow: false, font: { size: 11, color: isDark(value) ? "#ffffff" : "#111111" },
          }])),
      }),
    };
  },

  trajectory(index, width) {
    const { checkpoints, whole, steps } = data.trajectories[index];
    const line = (name, values, at, dash) => ({
      type: "scatter", mode: "lines+markers", name, x: numbered(checkpoints),
      y: checkpoints.map((_, row) => (typeof values[row] === "number" ? 1 - values[row] : null)),
      text: checkpoints.map((each, row) => `${plain(brief(each, 60))}<br>${name}: density ` +
        `${plain(percent(1 - values[row]))}<br>sparsity ${plain(percent(values[row]))}`),
      hoverinfo: "text", line: { color: HUES[at], dash, width: 2 }, marker: { symbol: SYMBOLS[at], size: 7 },
    });
    return {
      traces: [line("against the first", whole, 0, "solid"), line("of the step", steps, 1, "dot")],
      layout: layout({
        height: 340,
        legend: LEGEND,
        xaxis: { ...ticks(checkpoints, (width - 60) / 110), showgrid: false },
        yaxis: { tickformat: ".2~p", rangemode: "tozero", title: { text: "density" } },
      }),
    };
  },
};
const LEGEND = { orientation: "h", x: 0, y: 1.02, yanchor: "bottom" };
const legendRoom = (traces, width) => 22 * Math.ceil((traces.length * 110) / Math.max(width, 200));
const MEASURES = {
  lift: [4, 4, digits],
  kappa: [5, 5, digits],
  Jaccard: [6, 6, percent],
  "one-sided": [7, 8, percent],
};

/* Marks by layer, coloured by kind: a tensor each, or where there are too many the one that
   `pick` takes of each layer and kind. */
function scattered(tensors, values, pick) {
  const { layers, labels, kinds, place, members } = grid(tensors);
  const isKnown = (row) => typeof values[row] === "number";
  const isThinned = values.length > MARKS;
  const cells = [...members.values()].map((rows) => rows.filter(isKnown)).filter((rows) => rows.length);
  const rows = isThinned ? cells.map(pick) : cells.flat();
  const named = kinds.slice(0, kinds.length <= HUES.length ? HUES.length : HUES.length - 1);
  const groups = [...named, null].map((kind, at) => {
    const mine = rows.filter((row) => (kind === null ? !named.includes(tensors.kind[row]) : tensors.kind[row] === kind));
    // A kind has its own lane within a layer: marks of one height do not hide each other.
    const lane = ((at + 0.5) / (named.length + 1) - 0.5) * 0.7;
    const name = kind === null ? "other kinds" : plain(brief(kind, 24));
    return {
      rows: mine,
      trace: {
        type: "scatter", mode: "markers", hoverinfo: "text", name,
        x: mine.map((row) => place.get(tensors.layer[row]) + lane),
        customdata: mine.map((row) => tensors.kind[row]),
        marker: { color: HUES[at % HUES.length], symbol: SYMBOLS[at % SYMBOLS.length], size: 7, opacity: 0.85 },
      },
    };
  });
  return { layers, labels, isThinned, groups: groups.filter((group) => group.rows.length) };
}

/* Plotly takes longer to parse than all else: it waits as text until the page answers. */
function loadPlotly() {
  if (window.Plotly) return;
  const script = create("script");
  script.textContent = document.getElementById("plotly").textContent;
  document.head.append(script);
}

/* Charts are drawn when they come near, and anew when the page is lit or sized otherwise. */
const drawn = new Set();
function draw(root) {
  loadPlotly();
  const spec = charts[root.dataset.chart](Number(root.dataset.index), root.clientWidth || WIDE);
  if (spec === null) {
    root.closest("figure").hidden = true;
    return;
  }
  const options = { displaylogo: false, responsive: false, modeBarButtons: BUTTONS };
  Plotly.react(root, spec.traces, spec.layout, options);
  if (!drawn.has(root)) {
    drawn.add(root);
    root.on("plotly_click", ({ points: [point] }) => root.click_?.({ x: point.x, y: point.y, name: point.customdata }));
    if (spec.note) root.closest("figure").querySelector("figcaption").append(spec.note);
  }
  root.click_ = spec.click;
}

function redraw() {
  for (const root of drawn) draw(root);
}

function print(printing) {
  if (document.documentElement.classList.contains("printing") === printing) return;
  document.documentElement.classList.toggle("printing", printing);
  for (const folded of document.querySelectorAll("details.message")) folded.open = printing;
  for (const table of tables.values()) table.print(printing);
  for (const root of document.querySelectorAll(".chart")) draw(root);
}

const tables = new Map();
const KINDS = { pairs: pairTable, spectra: spectrumTable, overlaps: overlapTable, trajectories: trajectoryTable };
for (const each of [...data.pairs.map((pair) => pair.tensors), ...data.spectra]) {
  each.names = namesOf(each.names);
  for (const [key, value] of Object.entries(each)) if (value?.codes) each[key] = words(value);
}
for (const root of document.querySelectorAll("[data-table]")) {
  const { table, index } = root.dataset;
  tables.set(`${table}-${index}`, new Table(root, KINDS[table](data[table][index])));
}
for (const select of document.querySelectorAll("[data-measure]")) {
  const { cells } = data.overlaps[select.dataset.measure];
  const had = Object.entries(MEASURES).filter(([, [at]]) => cells.some((cell) => cell[at] !== null));
  select.append(...had.map(([name]) => element("option", {}, name)));
}
for (const select of document.querySelectorAll("[data-count], [data-measure]")) {
  select.addEventListener("change", () => draw(document.querySelector(
    select.dataset.count
      ? `[data-chart="density"][data-index="${select.dataset.count}"]`
      : `[data-chart="overlap"][data-index="${select.dataset.measure}"]`,
  )));
}

document.addEventListener("DOMContentLoaded", () => {
  const afterPaint = (work) => requestAnimationFrame(() => setTimeout(work));
  // One at a time: each chart is seen before the next one is worked on.
  const near = [];
  const next = () => {
    const root = near.shift();
    if (near.length) afterPaint(next);
    draw(root);
  };
  const watcher = new IntersectionObserver((seen) => {
    const isIdle = !near.length;
    for (const { isIntersecting, target } of seen) {
      if (!isIntersecting) continue;
      watcher.unobserve(target);
      near.push(target);
    }
    if (isIdle && near.length) afterPaint(next);
  }, { rootMargin: "300px" });
  for (const root of document.querySelectorAll(".chart")) watcher.observe(root);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  matchMedia("print").addEventListener("change", ({ matches }) => print(matches));
  addEventListener("beforeprint", () => print(true));
  addEventListener("afterprint", () => print(false));
  let width = innerWidth;
  addEventListener("resize", () => {
    // Phones resize the window whenever their bars come and go: only the width matters.
    if (innerWidth !== width && !document.documentElement.classList.contains("printing")) redraw();
    width = innerWidth;
  });
});
})();
