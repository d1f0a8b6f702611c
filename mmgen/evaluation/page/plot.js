"use strict";
// Scales and SVG: draws what it is given and knows nothing of runs or plans.

const SVG = "http://www.w3.org/2000/svg";
const DASHES = ["", "6 4", "2 3", "10 3 2 3", "1 4", "14 4"];
const MARKS = [
  "M-4.5,0a4.5,4.5 0 1,0 9,0a4.5,4.5 0 1,0 -9,0Z",
  "M-4.2,-4.2H4.2V4.2H-4.2Z",
  "M0,-5.4L5.2,4H-5.2Z",
  "M0,-5.8L5.8,0L0,5.8L-5.8,0Z",
  "M0,5.4L5.2,-4H-5.2Z",
  "M-1.7,-5H1.7V-1.7H5V1.7H1.7V5H-1.7V1.7H-5V-1.7H-1.7Z",
];

function draw(tag, attributes, parent, text) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== undefined) made.textContent = text;
  if (parent) parent.append(made);
  return made;
}

// Linear within +-threshold and logarithmic beyond, so that a distance may be 0 or less. Linear for threshold null.
function bend(value, threshold) {
  if (threshold === null) return value;
  const size = Math.abs(value) / threshold;
  return size <= 1 ? value / threshold : Math.sign(value) * (1 + Math.log10(size));
}

function logTicks(low, high, toPixel, powersOfTwo) {
  const apart = (ticks) => ticks.every((v, i) => !i || toPixel(v) - toPixel(ticks[i - 1]) >= 52);
  if (powersOfTwo) {
    let ticks = [];
    for (let v = 1; v <= high; v *= 2) if (v >= low) ticks.push(v);
    while (!apart(ticks)) ticks = ticks.filter((_, i) => i % 2 === 0);
    return ticks;
  }
  let ticks = [];
  for (const digits of [
    [1, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9],
    [1, 1.5, 2, 3, 4, 5, 7],
    [1, 1.5, 2, 3, 5, 7],
    [1, 2, 5],
    [1, 3],
    [1],
  ]) {
    ticks = [];
    for (let p = Math.floor(Math.log10(low)); p <= Math.ceil(Math.log10(high)); p++)
      ticks.push(...digits.map((digit) => digit * 10 ** p).filter((v) => v >= low && v <= high));
    if (apart(ticks)) break;
  }
  return ticks;
}

// Pixels by which points that would lie on one another are moved, so that each interval is seen.
function sideBySide(points) {
  const gap = 7,
    shifts = new Map();
  let cluster = [];
  const place = () => cluster.forEach((p, i) => shifts.set(p, (i - (cluster.length - 1) / 2) * gap));
  for (const p of [...points].sort((a, b) => a.x - b.x)) {
    if (cluster.length && p.x - cluster.at(-1).x >= gap) {
      place();
      cluster = [];
    }
    cluster.push(p);
  }
  place();
  return shifts;
}

function linearTicks(low, high, most) {
  const rough = (high - low) / most;
  const unit = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((d) => d * unit).find((s) => s >= rough);
  const found = [];
  for (let k = Math.ceil(low / step); k * step <= high; k++) found.push(k * step);
  return found;
}

function bentTicks(low, high, threshold, toPixel) {
  const candidates = [0, threshold, -threshold];
  const tens = Math.ceil(Math.log10(threshold));
  for (const digit of [1, 3])
    for (let p = tens; p < tens + 8; p++) candidates.push(digit * 10 ** p, -digit * 10 ** p);
  candidates.push(threshold / 2);
  const found = [];
  for (const v of candidates)
    if (v >= low && v <= high && found.every((other) => Math.abs(toPixel(v) - toPixel(other)) > 26)) found.push(v);
  return found;
}

// series: [{color, dash, mark, points: [{key, x, y: [value, low, high]}]}]; plans: [{key, label, x, y, current}];
// floors: [{value, low, high, label}]. on: {pick(key), look(key or null)}.
function drawPlot(box, {series, plans, floors, xLabel, yLabel, xText, yText, threshold, powersOfTwo, on}) {
  const width = Math.max(280, box.clientWidth),
    height = width < 560 ? 330 : 420;
  const yNames = yLabel.length > 50 && width < 560 ? yLabel.slice(0, 48) + "…" : yLabel;
  const edge = {left: 56, right: 14, top: 30, bottom: 48};
  const focused =
    document.activeElement && box.contains(document.activeElement) ? document.activeElement.dataset.key : null;
  box.replaceChildren();
  if (!plans.length) return box.append("Nothing is chosen to be drawn.");
  const svg = draw(
    "svg",
    {width, height, viewBox: `0 0 ${width} ${height}`, role: "group", "aria-label": `${yLabel} against ${xLabel}`},
    box,
  );

  const xs = plans.map((p) => p.x);
  const lows = [],
    highs = [];
  for (const [value, low, high] of [
    ...plans.map((p) => [p.y, p.y, p.y]),
    ...series.flatMap((s) => s.points.map((p) => p.y)),
    ...floors.map((f) => [f.value, f.low, f.high]),
  ]) {
    lows.push(bend(Math.min(value, low), threshold));
    highs.push(bend(Math.max(value, high), threshold));
  }
  const x0 = Math.log(Math.min(...xs)),
    x1 = Math.log(Math.max(...xs)),
    xSpan = x1 - x0 || 1;
  const inset = 26;
  const toX = (v) =>
    edge.left +
    inset +
    (xs.length && x1 > x0 ? (Math.log(v) - x0) / xSpan : 0.5) * (width - edge.left - edge.right - 2 * inset);
  let y0 = Math.min(...lows),
    y1 = Math.max(...highs);
  const pad = (y1 - y0 || 0.1) * 0.05;
  y0 -= pad * (floors.length ? 1.6 : 1);
  y1 += pad; // room for the floor's name
  const toY = (v) =>
    height - edge.bottom - ((bend(v, threshold) - y0) / (y1 - y0)) * (height - edge.top - edge.bottom);
  const unbend = (u) =>
    threshold === null || Math.abs(u) <= 1
      ? u * (threshold ?? 1)
      : Math.sign(u) * threshold * 10 ** (Math.abs(u) - 1);
  const right = width - edge.right,
    bottom = height - edge.bottom;

  const yTicks = threshold === null ? linearTicks(y0, y1, 6) : bentTicks(unbend(y0), unbend(y1), threshold, toY);
  for (const v of yTicks) {
    draw("line", {class: "grid", x1: edge.left, x2: right, y1: toY(v), y2: toY(v)}, svg);
    draw("text", {x: edge.left - 8, y: toY(v) + 4, "text-anchor": "end"}, svg, yText(v, yTicks));
  }
  for (const v of logTicks(Math.min(...xs) * 0.999, Math.max(...xs) * 1.001, toX, powersOfTwo)) {
    draw("line", {class: "grid", x1: toX(v), x2: toX(v), y1: edge.top, y2: bottom}, svg);
    draw("text", {x: toX(v), y: bottom + 18, "text-anchor": "middle"}, svg, xText(v));
  }
  const names = [];
  for (const floor of floors) {
    const top = toY(floor.high);
    draw(
      "rect",
      {class: "floor", x: edge.left, width: right - edge.left, y: top, height: Math.max(1, toY(floor.low) - top)},
      svg,
    );
    draw("line", {class: "floor-line", x1: edge.left, x2: right, y1: toY(floor.value), y2: toY(floor.value)}, svg);
    names.push({label: floor.label, y: floors.length > 1 ? top - 4 : toY(floor.low) + 14});
  }
  // names of floors that are near each other stand one above the other
  names.sort((a, b) => b.y - a.y);
  names.forEach((name, i) => {
    if (i) name.y = Math.min(name.y, names[i - 1].y - 14);
    draw("text", {class: "floor-name", x: right - 4, y: name.y, "text-anchor": "end"}, svg, name.label);
  });
  draw("path", {class: "frame", d: `M${edge.left},${edge.top}V${bottom}H${right}`, fill: "none"}, svg);
  draw("text", {class: "title", x: 0, y: 14}, svg, yNames);
  draw("text", {class: "title", x: right, y: height - 8, "text-anchor": "end"}, svg, xLabel);

  const lying = series.map((each) => each.points.map((p) => ({key: p.key, x: toX(p.x), y: p.y.map(toY)})));
  const shifts = sideBySide(lying.flat());
  series.forEach((each, place) => {
    const at = lying[place].map((p) => ({...p, x: p.x + shifts.get(p)}));
    const lines = draw("g", {class: "series", style: `stroke: var(${each.color}); fill: none`}, svg);
    const joined = at.map((p, i) => `${i ? "L" : "M"}${p.x},${p.y[0]}`).join("");
    if (each.dash !== null) draw("path", {d: joined, "stroke-width": 1.75, "stroke-dasharray": each.dash}, lines);
    for (const p of at) {
      draw(
        "path",
        {d: `M${p.x},${p.y[1]}V${p.y[2]}M${p.x - 3},${p.y[1]}h6M${p.x - 3},${p.y[2]}h6`, "stroke-width": 1.25},
        lines,
      );
      draw(
        "path",
        {
          d: each.mark,
          transform: `translate(${p.x},${p.y[0]})`,
          style: `fill: var(${each.color}); stroke: var(--page)`,
        },
        lines,
      );
    }
  });

  const marked = new Set(series.flatMap((each) => each.points.map((p) => p.key)));
  const order = [...plans].sort((a, b) => a.x - b.x || a.y - b.y);
  const nodes = order.map((plan) => {
    const g = draw(
      "g",
      {
        class: marked.has(plan.key) ? "plan marked" : "plan",
        role: "button",
        tabindex: plan.current ? 0 : -1,
        "aria-label": plan.label,
        "data-key": plan.key,
        transform: `translate(${toX(plan.x)},${toY(plan.y)})`,
      },
      svg,
    );
    draw("circle", {class: "hit", r: 11}, g);
    draw("circle", {class: "ring", r: 3.5, style: `--own: var(${plan.color})`}, g);
    if (plan.current) draw("circle", {class: "current", r: 9}, g);
    g.addEventListener("click", () => on.pick(plan.key));
    g.addEventListener("mouseenter", () => on.look(plan.key));
    g.addEventListener("mouseleave", () => on.look(null));
    g.addEventListener("focus", () => on.look(plan.key));
    return g;
  });
  if (nodes.length && !nodes.some((g) => g.getAttribute("tabindex") === "0")) nodes[0].setAttribute("tabindex", 0);
  svg.addEventListener("keydown", (event) => {
    const place = nodes.indexOf(document.activeElement);
    const move = {ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1}[event.key];
    if (place < 0 || !(move || event.key === "Enter" || event.key === " ")) return;
    event.preventDefault();
    const next = order[Math.min(order.length - 1, Math.max(0, place + (move ?? 0)))];
    on.pick(next.key);
  });
  if (focused) nodes.find((g) => g.getAttribute("tabindex") === "0")?.focus();
}

// A difference with its interval on a line with a mark at 0.
function drawInterval(change, low, high, reach, threshold, kind) {
  const width = 150,
    height = 18;
  const to = (v) => width / 2 + (bend(v, threshold) / bend(reach, threshold)) * (width / 2 - 6);
  const svg = draw("svg", {width, height, "aria-hidden": "true", class: kind});
  draw("line", {x1: width / 2, x2: width / 2, y1: 0, y2: height, stroke: "var(--rule)"}, svg);
  draw("path", {d: `M${to(low)},${height / 2}H${to(high)}`, stroke: "currentColor", "stroke-width": 1.5}, svg);
  draw("circle", {cx: to(change), cy: height / 2, r: 3.5, fill: "currentColor"}, svg);
  return svg;
}
