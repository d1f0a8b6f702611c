// The sliders, the pictures of a plan, and one prompt over the surface.

function picture(r, i, prompt) {
  const each = DATA.runs[r],
    [width, height] = each.picture,
    count = each.prompts.length;
  const times = Math.max(1, Math.round(96 / width)),
    made = make("span", {className: `picture strip-${r}-${i}`});
  if (width <= 64) made.classList.add("small");
  made.style.cssText =
    `width:${width * times}px;aspect-ratio:${width}/${height};background-size:${100 * count}% 100%;` +
    `background-position:${count > 1 ? (100 * prompt) / (count - 1) : 0}% 0`;
  return made;
}
function strips() {
  const rules = DATA.runs.flatMap((each, r) =>
    each.rows.map((row, i) => (row.picture ? `.strip-${r}-${i}{background-image:url("${row.picture}")}` : "")),
  );
  document.head.append(make("style", {}, rules.join("\n")));
  // decoded ahead, so that moving a slider does not flash
  strips.kept = DATA.runs.flatMap((each) =>
    each.rows.filter((row) => row.picture).map((row) => Object.assign(new Image(), {src: row.picture})),
  );
}

function sliders() {
  const {axes, rows} = run();
  const made = axes.map((axis, place) => {
    const name = make("span", {}, axis.name),
      shown = make("output", {}, axis.values[rows[state.row].at[place]]);
    const input = make("input", {
      type: "range",
      min: 0,
      max: axis.values.length - 1,
      step: 1,
      value: rows[state.row].at[place],
      label: axis.name,
      disabled: axis.values.length < 2,
    });
    input.dataset.axis = axis.name;
    input.setAttribute("aria-valuetext", shown.textContent);
    input.oninput = () => slide(place, Number(input.value));
    return make("label", {className: "slider"}, name, input, shown);
  });
  at("sliders").replaceChildren(...made);
}
function slide(place, to) {
  const {rows, axes} = run(),
    now = rows[state.row].at,
    wanted = now.map((v, i) => (i === place ? to : v));
  const far = (row) => row.at.reduce((sum, v, i) => sum + Math.abs(v - wanted[i]), 0);
  const there = rows
    .map((row, i) => [far(row), i])
    .filter(([, i]) => rows[i].at[place] === to)
    .sort((a, b) => a[0] - b[0]);
  state.row = there[0][1];
  const moved = axes.filter((_, i) => rows[state.row].at[i] !== wanted[i]).map((axis) => axis.name);
  explore(moved.length ? `Not every combination was measured: ${moved.join(" and ")} moved along.` : "");
  plot();
}

function explore(note = "") {
  const each = run(),
    row = each.rows[state.row];
  at("run").value = state.run;
  if (at("sliders").dataset.run !== String(state.run)) {
    at("sliders").dataset.run = state.run;
    sliders();
  }
  [...at("sliders").children].forEach((label, i) => {
    const shown = each.axes[i].values[row.at[i]],
      input = label.querySelector("input");
    input.value = row.at[i];
    input.setAttribute("aria-valuetext", shown);
    label.querySelector("output").textContent = shown;
  });
  at("moved").textContent = note;
  const facts = [
    ["evaluations", [plain(row.cost.nfe)]],
    ["compute", [CURRENCIES.flops.text(row.cost.flops)]],
    ["time", [seconds(row.cost.seconds)]],
    ...DATA.figures
      .filter((f) => row.reported[f.name])
      .map((f) => [f.label, [value(row.reported[f.name][0], f), " ", small(range(row.reported[f.name], f))]]),
  ];
  for (const f of DATA.figures)
    if (each.floor[f.name])
      facts.push([
        `floor of ${f.label}`,
        [value(each.floor[f.name][0], f), " ", small(range(each.floor[f.name], f))],
      ]);
  at("costs").replaceChildren(
    ...facts.flatMap(([name, content]) => [make("dt", {}, name), make("dd", {}, ...content)]),
  );
  gallery();
  matrix();
}

function gallery() {
  const each = run(),
    box = at("pictures");
  if (!each.rows[state.row].picture)
    return box.replaceChildren(make("p", {className: "note"}, "No pictures of this plan were kept."));
  state.prompt = Math.min(state.prompt, each.prompts.length - 1);
  if (box.dataset.run !== String(state.run) || !box.querySelector(".tile")) {
    box.dataset.run = state.run;
    box.replaceChildren(
      ...each.prompts.map((prompt, p) => {
        const tile = make(
          "button",
          {type: "button", className: "tile", title: prompt},
          picture(state.run, state.row, p),
          make("span", {}, prompt),
        );
        tile.onclick = () => {
          state.prompt = p;
          gallery();
          matrix();
        };
        return tile;
      }),
    );
    box.style.setProperty("--tile", `${Math.max(72, box.querySelector(".picture").style.width.replace("px", ""))}px`);
  }
  [...box.children].forEach((tile, p) => {
    tile.setAttribute("aria-pressed", p === state.prompt);
    tile.querySelector(".picture").className = tile
      .querySelector(".picture")
      .className.replace(/strip-\S+/, `strip-${state.run}-${state.row}`);
  });
}

// One prompt over two axes (the first that were measured along), the others as the sliders have them.
function matrix() {
  const each = run(),
    current = each.rows[state.row].at;
  const places = each.axes
    .map((axis, place) => place)
    .sort((a, b) => (each.axes[b].values.length > 1) - (each.axes[a].values.length > 1) || a - b);
  const [y, x] = places.slice(0, 2).sort((a, b) => a - b),
    down = each.axes[y],
    across = each.axes[x];
  if (!each.picture) return at("matrix").replaceChildren();
  const focused = document.activeElement?.dataset?.cell;
  const rows = down.values.map((name, d) => [
    `${down.name} ${name}`,
    ...across.values.map((_, a) => {
      const i = each.rows.findIndex((row) =>
        row.at.every((v, place) => v === (place === y ? d : place === x ? a : current[place])),
      );
      if (i < 0 || !each.rows[i].picture) return "–";
      const button = make(
        "button",
        {type: "button", label: each.rows[i].plan, title: each.rows[i].plan},
        picture(state.run, i, state.prompt),
      );
      button.setAttribute("aria-pressed", i === state.row);
      button.dataset.cell = i;
      button.onclick = () => {
        state.row = i;
        explore();
        plot();
      };
      return button;
    }),
  ]);
  const held = each.axes
    .map((axis, i) => (i === y || i === x || axis.values.length < 2 ? "" : `${axis.name} ${axis.values[current[i]]}`))
    .filter(Boolean)
    .join(", ");
  const caption = `“${each.prompts[state.prompt]}” over ${down.name} and ${across.name}${held ? ` at ${held}` : ""}`;
  at("matrix").replaceChildren(table(caption, ["", ...across.values.map((v) => `${across.name} ${v}`)], rows));
  if (focused !== undefined) at("matrix").querySelector(`[data-cell="${focused}"]`)?.focus();
}
