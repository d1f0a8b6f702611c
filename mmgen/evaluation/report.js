// What the page shows of its data, and what happens when somebody chooses. Text enters as textContent alone.

const DATA = JSON.parse(document.getElementById("data").textContent);
const CURRENCIES = {
  nfe: {label: "network evaluations a picture (log scale)", text: (v) => `${plain(v)} evaluation${v === 1 ? "" : "s"}`, tick: plain, budget: (v) => `${v}nfe`},
  flops: {label: "FLOPs a picture (log scale)", text: (v) => `${scaled(v)}FLOP`, tick: (v) => scaled(v).trim(), budget: (v) => `${up(v / 1e6)}mflop`},
  seconds: {label: "seconds a picture (log scale)", text: seconds, tick: seconds, budget: (v) => `${up(1000 * v)}ms`},
};
const several = DATA.runs.length > 1;
const state = {figure: DATA.figures[0].name, currency: "flops", run: 0, row: 0, prompt: 0, off: new Set(), bent: {}};
const at = (id) => document.getElementById(id);
const run = () => DATA.runs[state.run];
const figure = () => DATA.figures.find((f) => f.name === state.figure);

// --- numbers

function plain(v) { return String(Number(v.toPrecision(3))); }
function up(v) { const unit = 10 ** (Math.floor(Math.log10(v)) - 2); return plain(Math.ceil(v / unit - 1e-9) * unit); }
function scaled(v) {
  const [size, prefix] = [[1e15, "P"], [1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]].find(([s]) => v >= s) ?? [1, ""];
  return `${plain(v / size)} ${prefix}`;
}
function seconds(v) { return v >= 1 ? `${plain(v)} s` : v >= 1e-3 ? `${plain(1e3 * v)} ms` : `${plain(1e6 * v)} µs`; }
function minus(text) { return text.replace("-", "−"); }
function value(v, f, signed) {
  const sign = signed && v > 0 ? "+" : "";
  if (f.share) return minus(`${sign}${(100 * v).toFixed(1)}`) + (signed ? " points" : " %");
  return minus(sign + v.toFixed(Math.abs(v) < 10 ? 3 : 1));
}
function bare(v, f, signed) { return value(v, f, signed).replace(/ (points|%)$/, ""); }
function range([, low, high], f, signed) { return `(${bare(low, f, signed)} to ${bare(high, f, signed)})`; }
function tick(v, f, all) {
  if (f.share) return `${Number((100 * v).toFixed(1))} %`;
  const least = Math.min(...all.filter((t) => t).map(Math.abs), 1);
  return minus(String(Number(v.toFixed(Math.max(0, 1 - Math.floor(Math.log10(least)))))));
}

// --- elements

function make(tag, properties = {}, ...children) {
  const {label, ...rest} = properties;
  const made = Object.assign(document.createElement(tag), rest);
  if (label) made.setAttribute("aria-label", label);
  made.append(...children);
  return made;
}
function table(caption, heads, rows, textColumns = []) {
  const cell = (tag, content, column) => make(tag, {className: textColumns.includes(column) ? "text" : ""}, ...[content].flat());
  const head = make("tr", {}, ...heads.map((h) => Object.assign(cell("th", h), {scope: "col"})));
  const body = rows.map((cells) => make("tr", {}, ...cells.map((c, i) => cell("td", c, i))));
  const made = make("table", {}, make("caption", {}, caption), make("thead", {}, head), make("tbody", {}, ...body));
  return make("div", {className: "scroll", role: "region", tabIndex: 0, label: caption}, made);
}
function small(text) { return make("small", {}, text); }
function estimate(row) {
  const found = row.reported[state.figure];
  return found ? [value(found[0], figure()), " ", small(range(found, figure()))] : ["–"];
}
function of(each) { return several ? `${each.name}: ` : ""; }
function lineName(name) { return name === "jointly" ? "all axes jointly" : `${name} only`; }
function nothing() { return make("p", {className: "note"}, "Nothing is chosen by this figure: neither less nor more of it is better."); }

// --- the plot

const LINES = [...new Set(DATA.runs.flatMap((each) => each.lines.map((l) => l.name)))];
LINES.push(...LINES.splice(LINES.indexOf("jointly"), LINES.includes("jointly") ? 1 : 0));
function lineStyle(name) { return name === "jointly" ? 0 : 1 + (LINES.indexOf(name) % 4); }
function lineColor(name) { return several ? "--c0" : `--c${lineStyle(name)}`; }
function runColor(r) { return `--c${1 + (r % 5)}`; }

function seriesOf() {
  return DATA.runs.flatMap((each, r) => each.lines.map((line) => {
    const front = each.fronts[state.currency][state.figure]?.[line.name] ?? [], style = lineStyle(line.name);
    const points = front.filter((i) => each.rows[i].reported[state.figure])
      .map((i) => ({key: `${r}/${i}`, x: each.rows[i].cost[state.currency], y: each.rows[i].reported[state.figure]}));
    return {points, on: points.length && !state.off.has(line.name) && !state.off.has(r),
      color: several ? runColor(r) : lineColor(line.name), dash: DASHES[style], mark: MARKS[style]};
  }));
}

function toggle(key, swatch, name, more) {
  const on = !state.off.has(key), button = make("button", {type: "button"}, swatch, make("span", {}, name, " ", small(more ?? "")));
  button.setAttribute("aria-pressed", on);
  button.dataset.key = key;
  button.onclick = () => { state.off[on ? "add" : "delete"](key); plot(); };
  return button;
}
function swatch(color, style) {
  const made = draw("svg", {width: 34, height: 14, "aria-hidden": "true"});
  if (style === null) draw("rect", {x: 10, y: 0, width: 14, height: 14, rx: 2, style: `fill: var(${color})`}, made);
  else {
    draw("line", {x1: 0, x2: 34, y1: 7, y2: 7, "stroke-width": 1.75, "stroke-dasharray": DASHES[style], style: `stroke: var(${color})`}, made);
    draw("path", {d: MARKS[style], transform: "translate(17,7)", style: `fill: var(${color})`}, made);
  }
  return made;
}
function legend() {
  const focused = document.activeElement?.dataset?.key, held = (name) => DATA.runs[0].lines.find((l) => l.name === name)?.held;
  const runs = several ? DATA.runs.map((each, r) => toggle(r, swatch(runColor(r), null), each.name, DATA.comparable ? "" : each.measured_on)) : [];
  const lines = figure().better ? LINES.map((name) => toggle(name, swatch(lineColor(name), lineStyle(name)), lineName(name), !several && held(name) ? `at ${held(name)}` : "")) : [];
  const axis = [];
  if (threshold() !== null) {
    const bent = isBent(), button = make("button", {type: "button", id: "scale"}, `Quality axis: ${bent ? "logarithmic" : "linear"}`);
    button.dataset.key = "scale";
    button.onclick = () => { state.bent[state.figure] = !bent; plot(); };
    axis.push(button);
  }
  at("legend").replaceChildren(...[runs, [...lines, ...axis]].filter((row) => row.length).map((row) => make("div", {className: "legend"}, ...row)));
  if (focused !== undefined) at("legend").querySelector(`[data-key="${CSS.escape(focused)}"]`)?.focus();
}

// Where a bent axis turns logarithmic: at the width of an interval near the floor. null: a linear one is enough.
function threshold() {
  const all = DATA.runs.flatMap((r) => r.rows.map((row) => row.reported[state.figure]).filter(Boolean));
  if (figure().share || !all.length) return null;
  const width = Math.min(...all.map(([, low, high]) => high - low)), most = Math.max(...all.map(([v]) => Math.abs(v)));
  if (!(width > 0) || most < 8 * width) return null;
  const unit = 10 ** Math.floor(Math.log10(width));
  return [1, 2, 5, 10].map((d) => d * unit).find((t) => t >= width);
}
function isBent() { return threshold() !== null && (state.bent[state.figure] ?? true); }

function plot() {
  const f = figure(), series = seriesOf(), bent = isBent() ? threshold() : null;
  legend();
  const plans = DATA.runs.flatMap((each, r) => (state.off.has(r) ? [] : each.rows).map((row, i) => ({row, key: `${r}/${i}`, current: r === state.run && i === state.row})))
    .filter(({row}) => row.reported[state.figure])
    .map((p) => ({...p, label: sentence(p.key), x: p.row.cost[state.currency], y: p.row.reported[state.figure][0]}));
  const floors = new Map();
  DATA.runs.forEach((each, r) => {
    const found = each.floor[state.figure];
    if (!found || state.off.has(r)) return;
    const floor = floors.get(found.join()) ?? {value: found[0], low: found[1], high: found[2], names: []};
    floor.names.push(each.name);
    floors.set(found.join(), floor);
  });
  for (const floor of floors.values()) floor.label = floors.size > 1 ? `floor of ${floor.names.join(", ")}` : "floor: real against real pictures";
  const goal = f.better ? ` (${f.better} is better)` : "";
  drawPlot(at("plot"), {series: series.filter((s) => s.on), plans, floors: [...floors.values()], xLabel: CURRENCIES[state.currency].label,
    yLabel: `${f.label}${f.share ? ", share of pictures" : ""}${goal}`, xText: CURRENCIES[state.currency].tick,
    yText: (v, all) => tick(v, f, all), threshold: bent, powersOfTwo: state.currency === "nfe",
    on: {pick: (key) => { [state.run, state.row] = key.split("/").map(Number); explore(); plot(); }, look: readout}});
  at("scale-note").textContent = bent === null ? "" : `The quality axis is linear up to ${bent} and logarithmic beyond.`;
  at("figure-about").textContent = f.about;
  readout(null);
}
function sentence(key) {
  const [r, i] = key.split("/").map(Number), row = DATA.runs[r].rows[i], found = row.reported[state.figure];
  const costs = Object.entries(row.cost).map(([c, v]) => CURRENCIES[c].text(v)).join(", ");
  return `${of(DATA.runs[r])}${row.plan}. ${figure().label} ${found ? `${value(found[0], figure())} ${range(found, figure())}` : "not measured"}. ${costs}.`;
}
function readout(key) { at("readout").textContent = sentence(key ?? `${state.run}/${state.row}`); }

// --- pictures

function picture(r, i, prompt) {
  const each = DATA.runs[r], [width, height] = each.picture, count = each.prompts.length;
  const times = Math.max(1, Math.round(96 / width)), made = make("span", {className: `picture strip-${r}-${i}`});
  if (width <= 64) made.classList.add("small-one");
  made.style.cssText = `width:${width * times}px;aspect-ratio:${width}/${height};background-size:${100 * count}% 100%;` +
    `background-position:${count > 1 ? (100 * prompt) / (count - 1) : 0}% 0`;
  return made;
}
function strips() {
  const rules = DATA.runs.flatMap((each, r) => each.rows.map((row, i) => (row.picture ? `.strip-${r}-${i}{background-image:url("${row.picture}")}` : "")));
  document.head.append(make("style", {}, rules.join("\n")));
  // decoded ahead, so that moving a slider does not flash
  strips.kept = DATA.runs.flatMap((each) => each.rows.filter((row) => row.picture).map((row) => Object.assign(new Image(), {src: row.picture})));
}

function sliders() {
  const {axes, rows} = run();
  const made = axes.map((axis, place) => {
    const name = make("span", {}, axis.name), shown = make("output", {}, axis.values[rows[state.row].at[place]]);
    const input = make("input", {type: "range", min: 0, max: axis.values.length - 1, step: 1, value: rows[state.row].at[place], label: axis.name, disabled: axis.values.length < 2});
    input.dataset.axis = axis.name;
    input.setAttribute("aria-valuetext", shown.textContent);
    input.oninput = () => slide(place, Number(input.value));
    return make("label", {className: "slider"}, name, input, shown);
  });
  at("sliders").replaceChildren(...made);
}
function slide(place, to) {
  const {rows, axes} = run(), now = rows[state.row].at, wanted = now.map((v, i) => (i === place ? to : v));
  const far = (row) => row.at.reduce((sum, v, i) => sum + Math.abs(v - wanted[i]), 0);
  const there = rows.map((row, i) => [far(row), i]).filter(([, i]) => rows[i].at[place] === to).sort((a, b) => a[0] - b[0]);
  state.row = there[0][1];
  const moved = axes.filter((_, i) => rows[state.row].at[i] !== wanted[i]).map((axis) => axis.name);
  explore(moved.length ? `Not every combination was measured: ${moved.join(" and ")} moved along.` : "");
  plot();
}

function explore(note = "") {
  const each = run(), row = each.rows[state.row];
  at("run").value = state.run;
  if (at("sliders").dataset.run !== String(state.run)) { at("sliders").dataset.run = state.run; sliders(); }
  [...at("sliders").children].forEach((label, i) => {
    const shown = each.axes[i].values[row.at[i]], input = label.querySelector("input");
    input.value = row.at[i];
    input.setAttribute("aria-valuetext", shown);
    label.querySelector("output").textContent = shown;
  });
  at("moved").textContent = note;
  const facts = [["evaluations", [plain(row.cost.nfe)]], ["compute", [CURRENCIES.flops.text(row.cost.flops)]], ["time", [seconds(row.cost.seconds)]],
    ...DATA.figures.filter((f) => row.reported[f.name]).map((f) => [f.label, [value(row.reported[f.name][0], f), " ", small(range(row.reported[f.name], f))]])];
  for (const f of DATA.figures) if (each.floor[f.name]) facts.push([`floor of ${f.label}`, [value(each.floor[f.name][0], f), " ", small(range(each.floor[f.name], f))]]);
  at("costs").replaceChildren(...facts.flatMap(([name, content]) => [make("dt", {}, name), make("dd", {}, ...content)]));
  gallery();
  matrix();
}

function gallery() {
  const each = run(), box = at("pictures");
  if (!each.rows[state.row].picture) return box.replaceChildren(make("p", {className: "note"}, "No pictures of this plan were kept."));
  state.prompt = Math.min(state.prompt, each.prompts.length - 1);
  if (box.dataset.run !== String(state.run) || !box.querySelector(".tile")) {
    box.dataset.run = state.run;
    box.replaceChildren(...each.prompts.map((prompt, p) => {
      const tile = make("button", {type: "button", className: "tile", title: prompt}, picture(state.run, state.row, p), make("span", {}, prompt));
      tile.onclick = () => { state.prompt = p; gallery(); matrix(); };
      return tile;
    }));
    box.style.setProperty("--tile", `${Math.max(72, box.querySelector(".picture").style.width.replace("px", ""))}px`);
  }
  [...box.children].forEach((tile, p) => {
    tile.setAttribute("aria-pressed", p === state.prompt);
    tile.querySelector(".picture").className = tile.querySelector(".picture").className.replace(/strip-\S+/, `strip-${state.run}-${state.row}`);
  });
}

// One prompt over two axes (the first that were measured along), the others as the sliders have them.
function matrix() {
  const each = run(), current = each.rows[state.row].at;
  const places = each.axes.map((axis, place) => place).sort((a, b) => (each.axes[b].values.length > 1) - (each.axes[a].values.length > 1) || a - b);
  const [y, x] = places.slice(0, 2).sort((a, b) => a - b), down = each.axes[y], across = each.axes[x];
  if (!each.picture) return at("matrix").replaceChildren();
  const focused = document.activeElement?.dataset?.cell;
  const rows = down.values.map((name, d) => [`${down.name} ${name}`, ...across.values.map((_, a) => {
    const i = each.rows.findIndex((row) => row.at.every((v, place) => v === (place === y ? d : place === x ? a : current[place])));
    if (i < 0 || !each.rows[i].picture) return "–";
    const button = make("button", {type: "button", label: each.rows[i].plan, title: each.rows[i].plan}, picture(state.run, i, state.prompt));
    button.setAttribute("aria-pressed", i === state.row);
    button.dataset.cell = i;
    button.onclick = () => { state.row = i; explore(); plot(); };
    return button;
  })]);
  const held = each.axes.map((axis, i) => (i === y || i === x || axis.values.length < 2 ? "" : `${axis.name} ${axis.values[current[i]]}`)).filter(Boolean).join(", ");
  const caption = `“${each.prompts[state.prompt]}” over ${down.name} and ${across.name}${held ? ` at ${held}` : ""}`;
  at("matrix").replaceChildren(table(caption, ["", ...across.values.map((v) => `${across.name} ${v}`)], rows));
  if (focused !== undefined) at("matrix").querySelector(`[data-cell="${focused}"]`)?.focus();
}

// --- tables and words

function iso() {
  const made = DATA.runs.map((each) => {
    const rungs = each.iso[state.currency][state.figure];
    if (!rungs) return nothing();
    const rows = rungs.map(({budget, best}) => [CURRENCIES[state.currency].text(budget), ...each.lines.map((line) => {
      const i = best[line.name];
      if (i === null) return "–";
      return [...estimate(each.rows[i]), small(each.rows[i].plan)];
    })]);
    return table(`${of(each)}${figure().label} by budget of one picture`, ["at most", ...each.lines.map((l) => lineName(l.name))], rows);
  });
  at("iso").replaceChildren(...made);
}

function gains() {
  const f = figure();
  const made = DATA.runs.flatMap((each) => Object.entries(each.gains).flatMap(([axis, byFigure]) => {
    const found = byFigure[state.figure] ?? [];
    if (!found.length) return [];
    const words = (each.verdicts[state.currency][state.figure] ?? []).find((v) => v.axis === axis);
    const reach = Math.max(...found.flatMap((g) => [Math.abs(g.low), Math.abs(g.high)])) || 1;
    const width = Math.min(...found.map((g) => g.high - g.low).filter((w) => w > 0), reach), bent = reach > 5 * width ? width : null;
    const rows = found.map((g) => {
      const times = each.rows[g.after].cost[state.currency] / each.rows[g.before].cost[state.currency];
      const kind = f.better ? g.verdict : "open";
      return [g.move.join(" → "), g.held || "–", `× ${plain(times)}`, [value(g.change, f, true), " ", small(range([0, g.low, g.high], f, true))],
        drawInterval(g.change, g.low, g.high, reach, bent, kind), make("span", {className: kind}, f.better ? {better: "better", worse: "worse", open: "not shown"}[g.verdict] : "")];
    });
    const heads = [axis, "at", state.currency === "nfe" ? "evaluations" : state.currency === "flops" ? "FLOPs" : "seconds", `change of ${f.label}`, bent ? "95 % interval (log-like)" : "95 % interval", ""];
    return [make("p", {className: "verdict"}, `${of(each)}${words ? words.title : axis}`), ...(words ? [make("p", {}, words.text)] : []),
      make("details", {open: found.length <= 12}, make("summary", {}, `All ${found.length} comparisons`), table(`${of(each)}${axis}`, heads, rows, [1]))];
  }));
  at("gains").replaceChildren(...(made.length ? made : [make("p", {className: "note"}, "No two plans that were measured differ along one axis alone.")]));
}

function planner() {
  const made = DATA.runs.map((each) => {
    const found = each.planner[state.currency][state.figure];
    if (!found) return nothing();
    const rows = found.map(({budget, row}) => [make("code", {}, `--budget ${CURRENCIES[state.currency].budget(budget)}`), each.rows[row].plan, estimate(each.rows[row]),
      plain(each.rows[row].cost.nfe), CURRENCIES.flops.text(each.rows[row].cost.flops), seconds(each.rows[row].cost.seconds)]);
    return table(`${of(each)}plans by budget`, ["from", "plan", `expected ${figure().label}`, "evaluations", "compute", "time"], rows, [1]);
  });
  at("planner").replaceChildren(...made);
}

function short() {
  const made = DATA.runs.flatMap((each) => {
    const items = (each.verdicts[state.currency][state.figure] ?? []).map((v) => make("li", {}, `${v.title}.`));
    const chosen = (each.planner[state.currency][state.figure] ?? []).at(-1);
    if (chosen) {
      const row = each.rows[chosen.row], found = row.reported[state.figure];
      items.push(make("li", {}, `Chosen when compute is no object: ${row.plan}, for ${CURRENCIES[state.currency].text(row.cost[state.currency])}. ` +
        `${figure().label} ${value(found[0], figure())} ${range(found, figure())}.`));
    }
    return items.length ? [...(several ? [make("h3", {}, each.name)] : []), make("ul", {}, ...items)] : [];
  });
  at("short").replaceChildren(...(made.length ? made : [nothing()]));
}

function all() { short(); plot(); iso(); gains(); planner(); }

// --- start

function dark() {
  const told = document.documentElement.dataset.theme;
  return told ? told === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}
function nameTheme() { at("theme").textContent = dark() ? "Light" : "Dark"; at("theme").setAttribute("aria-label", `Use ${dark() ? "light" : "dark"} colours`); }

at("figure").append(...DATA.figures.map((f) => make("option", {value: f.name}, f.label)));
at("figure").onchange = () => { state.figure = at("figure").value; all(); };
at("currency").value = state.currency;
at("currency").onchange = () => { state.currency = at("currency").value; all(); };
at("theme").onclick = () => { document.documentElement.dataset.theme = dark() ? "light" : "dark"; nameTheme(); };
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", nameTheme);
at("run").append(...DATA.runs.map((each, i) => make("option", {value: i}, each.name)));
at("run-label").hidden = !several;
at("run").onchange = () => {
  const values = run().rows[state.row].at.map((v, i) => `${run().axes[i].name} ${run().axes[i].values[v]}`);
  state.run = Number(at("run").value);
  const common = (row) => row.at.filter((v, i) => values.includes(`${run().axes[i].name} ${run().axes[i].values[v]}`)).length;
  state.row = run().rows.map((row, i) => [common(row), -i]).sort((a, b) => b[0] - a[0] || b[1] - a[1])[0][1] * -1;
  explore(); plot();
};
// several runs: one line each to begin with, unless a run has no other
if (several && DATA.runs.every((each) => each.lines.some((l) => l.name === "jointly"))) LINES.filter((name) => name !== "jointly").forEach((name) => state.off.add(name));
state.row = (run().planner.flops[state.figure] ?? []).at(-1)?.row ?? 0;
at("bar").hidden = at("live").hidden = false;
strips();
nameTheme();
explore();
all();
let width = innerWidth;
addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; plot(); } });
