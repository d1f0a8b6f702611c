// Numbers as people read them, and elements. Text enters as textContent alone.

const CURRENCIES = {
  nfe: {
    label: "network evaluations a picture (log scale)",
    text: (v) => `${plain(v)} evaluation${v === 1 ? "" : "s"}`,
    tick: plain,
    budget: (v) => `${v}nfe`,
  },
  flops: {
    label: "FLOPs a picture (log scale)",
    text: (v) => `${scaled(v)}FLOP`,
    tick: (v) => scaled(v).trim(),
    budget: (v) => `${up(v / 1e6)}mflop`,
  },
  seconds: {label: "seconds a picture (log scale)", text: seconds, tick: seconds, budget: (v) => `${up(1000 * v)}ms`},
};

function plain(v) {
  return String(Number(v.toPrecision(3)));
}
function up(v) {
  const unit = 10 ** (Math.floor(Math.log10(v)) - 2);
  return plain(Math.ceil(v / unit - 1e-9) * unit);
}
function scaled(v) {
  const [size, prefix] = [
    [1e15, "P"],
    [1e12, "T"],
    [1e9, "G"],
    [1e6, "M"],
    [1e3, "k"],
  ].find(([s]) => v >= s) ?? [1, ""];
  return `${plain(v / size)} ${prefix}`;
}
function seconds(v) {
  return v >= 1 ? `${plain(v)} s` : v >= 1e-3 ? `${plain(1e3 * v)} ms` : `${plain(1e6 * v)} µs`;
}
function minus(text) {
  return text.replace("-", "−");
}
function value(v, f, signed) {
  const sign = signed && v > 0 ? "+" : "";
  if (f.share) return minus(`${sign}${(100 * v).toFixed(1)}`) + (signed ? " points" : " %");
  return minus(sign + v.toFixed(Math.abs(v) < 10 ? 3 : 1));
}
function bare(v, f, signed) {
  return value(v, f, signed).replace(/ (points|%)$/, "");
}
function range([, low, high], f, signed) {
  return `(${bare(low, f, signed)} to ${bare(high, f, signed)})`;
}
function tick(v, f, all) {
  if (f.share) return `${Number((100 * v).toFixed(1))} %`;
  const least = Math.min(...all.filter((t) => t).map(Math.abs), 1);
  return minus(String(Number(v.toFixed(Math.max(0, 1 - Math.floor(Math.log10(least)))))));
}

function make(tag, properties = {}, ...children) {
  const {label, ...rest} = properties;
  const made = Object.assign(document.createElement(tag), rest);
  if (label) made.setAttribute("aria-label", label);
  made.append(...children);
  return made;
}
function table(caption, heads, rows, textColumns = []) {
  const cell = (tag, content, column) =>
    make(tag, {className: textColumns.includes(column) ? "text" : ""}, ...[content].flat());
  const head = make("tr", {}, ...heads.map((h) => Object.assign(cell("th", h), {scope: "col"})));
  const body = rows.map((cells) => make("tr", {}, ...cells.map((c, i) => cell("td", c, i))));
  const made = make("table", {}, make("caption", {}, caption), make("thead", {}, head), make("tbody", {}, ...body));
  return make("div", {className: "scroll", role: "region", tabIndex: 0, label: caption}, made);
}
function small(text) {
  return make("small", {}, text);
}
