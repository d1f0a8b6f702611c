// What the page shows of its data, and what happens when somebody chooses.

const DATA = JSON.parse(document.getElementById("data").textContent);
const several = DATA.runs.length > 1;
const state = {figure: DATA.figures[0].name, currency: "flops", run: 0, row: 0, prompt: 0, off: new Set(), bent: {}};
const at = (id) => document.getElementById(id);
const run = () => DATA.runs[state.run];
const figure = () => DATA.figures.find((f) => f.name === state.figure);

function estimate(row) {
  const found = row.reported[state.figure];
  return found ? [value(found[0], figure()), " ", small(range(found, figure()))] : ["–"];
}
function of(each) {
  return several ? `${each.name}: ` : "";
}
function lineName(name) {
  return name === "jointly" ? "all axes jointly" : `${name} only`;
}
function nothing() {
  return make("p", {className: "note"}, "Nothing is chosen by this figure: neither less nor more of it is better.");
}

// --- the plot

const LINES = [...new Set(DATA.runs.flatMap((each) => each.lines.map((l) => l.name)))];
LINES.push(...LINES.splice(LINES.indexOf("jointly"), LINES.includes("jointly") ? 1 : 0));
function lineStyle(name) {
  return name === "jointly" ? 0 : 1 + (LINES.indexOf(name) % (DASHES.length - 1));
}
function lineColor(name) {
  return several ? "--c0" : `--c${lineStyle(name)}`;
}
function runColor(r) {
  return `--c${1 + (r % 5)}`;
}

function seriesOf() {
  return DATA.runs.flatMap((each, r) =>
    each.lines.map((line) => {
      const front = each.fronts[state.currency][state.figure]?.[line.name] ?? [],
        style = lineStyle(line.name);
      const points = front
        .filter((i) => each.rows[i].reported[state.figure])
        .map((i) => ({
          key: `${r}/${i}`,
          x: each.rows[i].cost[state.currency],
          y: each.rows[i].reported[state.figure],
        }));
      return {
        points,
        on: points.length && !state.off.has(line.name) && !state.off.has(r),
        color: several ? runColor(r) : lineColor(line.name),
        dash: DASHES[style],
        mark: MARKS[several ? r % MARKS.length : style],
      };
    }),
  );
}

// Of a figure that nothing is chosen by there is no front, only what each plan has.
function unchosen(plans) {
  return DATA.runs.map((each, r) => ({
    points: plans.filter((p) => p.run === r).map((p) => ({key: p.key, x: p.x, y: p.row.reported[state.figure]})),
    on: true,
    color: several ? runColor(r) : "--c0",
    dash: null,
    mark: MARKS[r % MARKS.length],
  }));
}

function toggle(key, swatch, name, more) {
  const on = !state.off.has(key),
    button = make("button", {type: "button"}, swatch, make("span", {}, name, " ", small(more ?? "")));
  button.setAttribute("aria-pressed", on);
  button.dataset.key = key;
  button.onclick = () => {
    state.off[on ? "add" : "delete"](key);
    plot();
  };
  return button;
}
// A line's dashes, and the mark where one belongs to it: several runs differ by colour and mark, their lines by dashes.
function swatch(color, dash, mark) {
  const made = draw("svg", {width: 34, height: 14, "aria-hidden": "true"});
  if (dash !== null) {
    const line = {x1: 0, x2: 34, y1: 7, y2: 7, "stroke-width": 1.75, "stroke-dasharray": dash};
    draw("line", {...line, style: `stroke: var(${color})`}, made);
  }
  if (mark) draw("path", {d: mark, transform: "translate(17,7)", style: `fill: var(${color})`}, made);
  return made;
}
function legend() {
  const focused = document.activeElement?.dataset?.key,
    held = (name) => DATA.runs[0].lines.find((l) => l.name === name)?.held;
  const runs = several
    ? DATA.runs.map((each, r) =>
        toggle(
          r,
          swatch(runColor(r), null, MARKS[r % MARKS.length]),
          each.name,
          DATA.comparable ? "" : each.measured_on,
        ),
      )
    : [];
  const lines = figure().better
    ? LINES.map((name) =>
        toggle(
          name,
          swatch(lineColor(name), DASHES[lineStyle(name)], several ? null : MARKS[lineStyle(name)]),
          lineName(name),
          !several && held(name) ? `at ${held(name)}` : "",
        ),
      )
    : [];
  const axis = [];
  if (threshold() !== null) {
    const bent = isBent(),
      button = make("button", {type: "button", id: "scale"}, `Quality axis: ${bent ? "logarithmic" : "linear"}`);
    button.dataset.key = "scale";
    button.onclick = () => {
      state.bent[state.figure] = !bent;
      plot();
    };
    axis.push(button);
  }
  at("legend").replaceChildren(
    ...[runs, [...lines, ...axis]]
      .filter((row) => row.length)
      .map((row) => make("div", {className: "legend"}, ...row)),
  );
  if (focused !== undefined)
    at("legend")
      .querySelector(`[data-key="${CSS.escape(focused)}"]`)
      ?.focus();
}

// Where a bent axis turns logarithmic: at the width of an interval near the floor. null: a linear one is enough.
function threshold() {
  const all = DATA.runs.flatMap((r) => r.rows.map((row) => row.reported[state.figure]).filter(Boolean));
  if (figure().share || !all.length) return null;
  const width = Math.min(...all.map(([, low, high]) => high - low)),
    most = Math.max(...all.map(([v]) => Math.abs(v)));
  if (!(width > 0) || most < 8 * width) return null;
  const unit = 10 ** Math.floor(Math.log10(width));
  return [1, 2, 5, 10].map((d) => d * unit).find((t) => t >= width);
}
function isBent() {
  return threshold() !== null && (state.bent[state.figure] ?? true);
}

function plot() {
  const f = figure(),
    bent = isBent() ? threshold() : null;
  legend();
  const plans = DATA.runs
    .flatMap((each, r) =>
      (state.off.has(r) ? [] : each.rows).map((row, i) => ({
        row,
        run: r,
        key: `${r}/${i}`,
        color: several ? runColor(r) : "--quiet",
        current: r === state.run && i === state.row,
      })),
    )
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
  for (const floor of floors.values())
    floor.label = floors.size > 1 ? `floor of ${floor.names.join(", ")}` : "floor: real against real pictures";
  const goal = f.better ? ` (${f.better} is better)` : "";
  drawPlot(at("plot"), {
    series: (f.better ? seriesOf() : unchosen(plans)).filter((s) => s.on),
    plans,
    floors: [...floors.values()],
    xLabel: CURRENCIES[state.currency].label,
    yLabel: `${f.label}${f.share ? ", share of pictures" : ""}${goal}`,
    xText: CURRENCIES[state.currency].tick,
    yText: (v, all) => tick(v, f, all),
    threshold: bent,
    powersOfTwo: state.currency === "nfe",
    on: {
      pick: (key) => {
        [state.run, state.row] = key.split("/").map(Number);
        explore();
        plot();
      },
      look: readout,
    },
  });
  at("scale-note").textContent =
    bent === null ? "" : `The quality axis is linear up to ${bent} and logarithmic beyond.`;
  at("figure-about").textContent = f.about;
  readout(null);
}
function sentence(key) {
  const [r, i] = key.split("/").map(Number),
    row = DATA.runs[r].rows[i],
    found = row.reported[state.figure];
  const costs = Object.entries(row.cost)
    .map(([c, v]) => CURRENCIES[c].text(v))
    .join(", ");
  const measured = found ? `${value(found[0], figure())} ${range(found, figure())}` : "not measured";
  return `${of(DATA.runs[r])}${row.plan}: ${figure().label} ${measured}; ${costs}.`;
}
function readout(key) {
  at("readout").textContent = sentence(key ?? `${state.run}/${state.row}`);
}

// --- start

function all() {
  short();
  plot();
  iso();
  gains();
  planner();
}

function dark() {
  const told = document.documentElement.dataset.theme;
  return told ? told === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}
function nameTheme() {
  at("theme").textContent = dark() ? "Light" : "Dark";
  at("theme").setAttribute("aria-label", `Use ${dark() ? "light" : "dark"} colours`);
}

at("figure").append(...DATA.figures.map((f) => make("option", {value: f.name}, f.label)));
at("figure").onchange = () => {
  state.figure = at("figure").value;
  all();
};
at("currency").value = state.currency;
at("currency").onchange = () => {
  state.currency = at("currency").value;
  all();
};
at("theme").onclick = () => {
  document.documentElement.dataset.theme = dark() ? "light" : "dark";
  nameTheme();
};
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", nameTheme);
at("run").append(...DATA.runs.map((each, i) => make("option", {value: i}, each.name)));
at("run-label").hidden = !several;
at("run").onchange = () => {
  const values = run().rows[state.row].at.map((v, i) => `${run().axes[i].name} ${run().axes[i].values[v]}`);
  state.run = Number(at("run").value);
  const common = (row) =>
    row.at.filter((v, i) => values.includes(`${run().axes[i].name} ${run().axes[i].values[v]}`)).length;
  state.row =
    run()
      .rows.map((row, i) => [common(row), -i])
      .sort((a, b) => b[0] - a[0] || b[1] - a[1])[0][1] * -1;
  explore();
  plot();
};
// several runs: one line each to begin with, unless a run has no other
if (several && DATA.runs.every((each) => each.lines.some((l) => l.name === "jointly")))
  LINES.filter((name) => name !== "jointly").forEach((name) => state.off.add(name));
state.row = (run().planner.flops[state.figure] ?? []).at(-1)?.row ?? 0;
at("bar").hidden = at("live").hidden = false;
strips();
nameTheme();
explore();
all();
let width = innerWidth;
addEventListener("resize", () => {
  if (innerWidth !== width) {
    width = innerWidth;
    plot();
  }
});
