"""Tables of pages that no benchmark's own test holds to the committed results, cell by cell."""

from itertools import product

from tests.quotes import bare, interval, missing, rows, span


def test_attention() -> None:
    found = [row for row in rows("kernels") if "seed" in row]
    packs = {
        "a batch of the demo (1,408 and 1,792 tokens, short documents)": ("demo", 1),
        "one document of 512 to 2,048 tokens, texts and pictures in turns": ("document", 1),
        "the same, four noisy copies of each picture": ("document", 4),
    }
    lines = []
    for title, (pack, particles) in packs.items():
        each = [
            row
            for row in found
            if row["pack"].startswith(pack) and (row["particles"], row["backend"]) == (particles, "runs")
        ]
        allowed = span([100 * row["allowed"] for row in each], 1 if pack == "demo" else 0)
        forward, backward = (
            span([row[f"{part}_over_dense"]["value"] for row in each], 2)
            for part in ("forward", "with_backward")
        )
        backward = f"**{backward}**" if (pack, particles) == ("document", 1) else backward
        lines.append(f"| {title} | {allowed} % | {forward} | {backward} |")
    assert missing("attention.md", lines) == []
    lines = []
    for title, pack in (
        ("a batch of the demo", "demo"),
        ("a document of 512", "document of 512"),
        ("a document of 2,048", "document of 2048"),
    ):
        each = [row for row in found if (row["pack"], row["particles"]) == (pack, 1)]
        dense = [1000 * row["dense_plan_seconds"] for row in each if row["backend"] == "runs"]
        others = [
            [1000 * row["plan_seconds"] for row in each if row["backend"] == backend]
            for backend in ("runs", "flex", "varlen")
        ]
        cells = [span(values, 0) for values in (dense, *others)]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    powers = {
        row["backend"]: row["plan_power"]
        for row in rows("kernels")
        if row["pack"] == "growth" and row["particles"] == 1
    }
    cells = [
        f"{bare(p['value'], 1)} [{bare(p['low'], 1)}, {bare(p['high'], 1)}]"
        for p in (powers[name] for name in ("dense", "runs", "flex", "varlen"))
    ]
    lines.append(f"| power of the length, 512 to 2,048 | {' | '.join(cells)} |")
    assert missing("attention.md", lines) == []


def test_a_training_step() -> None:
    found = rows("training_step")

    def tokens(value: float) -> str:
        return f"{round(value, -1):,.0f}"

    lines = []
    for width, length in product((128, 256, 384), (512, 2048)):
        (row,) = (
            row for row in found if row["what"] == "size" and (row["width"], row["length"]) == (width, length)
        )
        speed = row["tokens_per_second"]
        shown = f"{tokens(speed['value'])} ({tokens(speed['low'])} to {tokens(speed['high'])})"
        pictures, memory = row["pictures_per_second"]["value"], row["memory_gb"]["value"]
        lines.append(f"| {length:,} | {shown} | {pictures:.0f} | {bare(memory, 2)} |")
    for what, title in (
        ("context", "tokens of the context, 256 to 4,096"),
        ("pictures", "pictures in it, 1 to 16, each read by the later ones"),
        ("particles", "particles of its picture, 2 to 32, after 1,024 tokens"),
    ):
        (row,) = (row for row in found if row["what"] == f"growth with {what}, over seeds")
        counted = next(row["flops_last_power"] for row in found if row["what"] == f"growth with {what}")
        cells = [interval(row[name], 2) for name in ("power", "last_power")]
        lines.append(f"| {title} | {' | '.join(cells)} | {bare(counted, 2)} |")
    assert missing("training.md", lines) == []


def test_waiting_for_data() -> None:
    found = rows("data_wait")
    waits = {
        workers: [row["data_wait"] for row in found if row["workers"] == workers and "seed" in row]
        for workers in (0, 1)
    }
    speed = next(row["speed"] for row in found if "speed" in row)
    assert {f"{100 * wait:.0f}" for wait in waits[0]} == {"7"}
    one = span([100 * wait for wait in waits[1]], 1)
    lines = [
        f"goes by waiting without a worker and {one} %",
        f"{interval(speed, 2)} times as many samples a second",
    ]
    assert missing("training.md", lines) == []


def test_what_the_cache_saves() -> None:
    found = [row for row in rows("sampling") if (row["model"], row["requests"]) == ("models/emoji", 4)]
    plans = {
        "one step": {"blocks": 1, "steps": 1, "guidance": 1.0},
        "8 steps": {"blocks": 1, "steps": 8, "guidance": 1.0},
        "4 steps, guidance": {"blocks": 1, "steps": 4, "guidance": 2.0},
        "4 blocks of 2 steps": {"blocks": 4, "steps": 2, "guidance": 1.0},
        "up to 24 tokens of text": {"task": "complete"},
    }
    units = {"one step": " pictures a second", "up to 24 tokens of text": " tokens a second"}
    lines = []
    for title, plan in plans.items():
        cells = []
        for prompt in (8, 64):
            each = [
                row
                for row in found
                if row["prompt_tokens"] == prompt and all(row.get(key) == plan[key] for key in plan)
            ]
            assert [row["seed"] for row in each] == [0, 1, 2]
            rate = sum(row["per_second"] for row in each) / 3
            unit = units.get(title, "") if prompt == 8 else ""
            counted = sum(row["counted"] for row in each) / 3
            cells += [
                f"{rate:.0f}{unit}",
                span([row["speed"]["value"] for row in each], 2),
                f"{counted:.1f}" if counted < 10 else f"{counted:.0f}",
            ]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    assert missing("sampling.md", lines) == []


def test_the_planner() -> None:
    lines = []
    for title, name in (("training", "planner_seen"), ("held-out pairs", "planner")):
        (row,) = (row for row in rows(name) if (row["figure"], row["currency"]) == ("kid_lite0", "flops"))
        cells = [interval(row[name], 3) for name in ("fixed", "planner", "adaptive")]
        lines.append(f"| {title} | {row['plans']} | {' | '.join(cells)} |")
    assert missing("surface.md", lines) == []


def test_latency() -> None:
    found = {
        (row["what"], row.get("guidance")): row for row in rows("latency") if row["what"] != "copying memory"
    }
    lines = []
    for title, key in (
        ("a token of text", ("a token", None)),
        ("a step of 256 latents", ("a step", 1.0)),
        ("the same with guidance", ("a step", 2.0)),
    ):
        ms, share = found[key]["ms"], found[key]["share"]
        lines.append(
            f"| {title} | {ms['value']:.0f} ({ms['low']:.0f} to {ms['high']:.0f}) | {bare(share, 2)} |"
        )
    assert missing("speed.md", lines) == []
