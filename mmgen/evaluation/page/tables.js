// The sections of tables and words, of the figure and the currency that were chosen.

function iso() {
  const made = DATA.runs.map((each) => {
    const rungs = each.iso[state.currency][state.figure];
    if (!rungs) return nothing();
    const rows = rungs.map(({budget, best}) => [
      CURRENCIES[state.currency].text(budget),
      ...each.lines.map((line) => {
        const i = best[line.name];
        if (i === null) return "–";
        return [...estimate(each.rows[i]), small(each.rows[i].plan)];
      }),
    ]);
    return table(
      `${of(each)}${figure().label} by budget of one picture`,
      ["at most", ...each.lines.map((l) => lineName(l.name))],
      rows,
    );
  });
  at("iso").replaceChildren(...made);
}

function gains() {
  const f = figure();
  const made = DATA.runs.flatMap((each) =>
    Object.entries(each.gains).flatMap(([axis, byFigure]) => {
      const found = byFigure[state.figure] ?? [];
      if (!found.length) return [];
      const words = (each.verdicts[state.currency][state.figure] ?? []).find((v) => v.axis === axis);
      const reach = Math.max(...found.flatMap((g) => [Math.abs(g.low), Math.abs(g.high)])) || 1;
      const width = Math.min(...found.map((g) => g.high - g.low).filter((w) => w > 0), reach),
        bent = reach > 5 * width ? width : null;
      const rows = found.map((g) => {
        const times = each.rows[g.after].cost[state.currency] / each.rows[g.before].cost[state.currency];
        const kind = f.better ? g.verdict : "open";
        return [
          g.move.join(" → "),
          g.held || "–",
          `× ${plain(times)}`,
          [value(g.change, f, true), " ", small(range([0, g.low, g.high], f, true))],
          drawInterval(g.change, g.low, g.high, reach, bent, kind),
          make(
            "span",
            {className: kind},
            f.better ? {better: "better", worse: "worse", open: "not shown"}[g.verdict] : "",
          ),
        ];
      });
      const heads = [
        axis,
        "at",
        state.currency === "nfe" ? "evaluations" : state.currency === "flops" ? "FLOPs" : "seconds",
        `change of ${f.label}`,
        bent ? "95 % interval (log-like)" : "95 % interval",
        "",
      ];
      return [
        make("p", {className: "verdict"}, `${of(each)}${words ? words.title : axis}`),
        ...(words ? [make("p", {}, words.text)] : []),
        make(
          "details",
          {open: found.length <= 12},
          make("summary", {}, `All ${found.length} comparisons`),
          table(`${of(each)}${axis}`, heads, rows, [1]),
        ),
      ];
    }),
  );
  at("gains").replaceChildren(
    ...(made.length
      ? made
      : [make("p", {className: "note"}, "No two plans that were measured differ along one axis alone.")]),
  );
}

function planner() {
  const heads = ["from", "plan", `expected ${figure().label}`, "evaluations", "compute", "time"];
  const line = (budget, chosen, more) => [
    make("code", {}, `--budget ${CURRENCIES[state.currency].budget(budget)}${more}`),
    chosen.plan,
    estimate(chosen),
    plain(chosen.cost.nfe),
    CURRENCIES.flops.text(chosen.cost.flops),
    seconds(chosen.cost.seconds),
  ];
  const made = DATA.runs.flatMap((each) => {
    const found = each.planner[state.currency][state.figure];
    if (!found) return [nothing()];
    const rows = found.map(({budget, row}) => line(budget, each.rows[row], ""));
    const policies = (each.adaptive[state.currency][state.figure] ?? [])
      .filter(({row}) => row !== null)
      .map(({budget, row}) => line(budget, each.policies[row], " --adaptive"));
    const plans = table(`${of(each)}plans by budget`, heads, rows, [1]);
    if (!policies.length) return [plans];
    return [plans, table(`${of(each)}where a policy is better, by mean budget`, heads, policies, [1])];
  });
  at("planner").replaceChildren(...made);
}

function short() {
  const made = DATA.runs.flatMap((each) => {
    const items = (each.verdicts[state.currency][state.figure] ?? []).map((v) => make("li", {}, `${v.title}.`));
    const chosen = (each.planner[state.currency][state.figure] ?? []).at(-1);
    if (chosen) {
      const row = each.rows[chosen.row],
        found = row.reported[state.figure];
      const cost = CURRENCIES[state.currency].text(row.cost[state.currency]);
      const measured = `${figure().label} ${value(found[0], figure())} ${range(found, figure())}`;
      items.push(make("li", {}, `Chosen when compute is no object: ${row.plan}, for ${cost}: ${measured}.`));
    }
    return items.length ? [...(several ? [make("h3", {}, each.name)] : []), make("ul", {}, ...items)] : [];
  });
  at("short").replaceChildren(...(made.length ? made : [nothing()]));
}
