"""The page as text: what is embedded, what is escaped, what is said of runs that do not compare."""

import io
import json
import re
from dataclasses import asdict, replace
from typing import Any

import pytest
from PIL import Image

from mmgen.evaluation.report import Measurement, _number, incomparable, report
from mmgen.sampling.plan import Plan
from tests.evaluation.test_frontier import estimate, grid, kid, row

NASTY = ["</script><script>alert(1)</script>", "<b>bold</b> & {{data}}", "a plain one"]


def record(rows: list[dict[str, Any]] | None = None, **fields: Any) -> dict[str, Any]:
    about = {
        "checkpoint": "step-00000100", "weights": "ema", "split": "test", "num": 100, "seed": 0, "run": "runs/x",
        "floor": estimate(0.0), "prompts": NASTY,
    }  # fmt: skip
    return {**about, "rows": grid() if rows is None else rows, **fields}


def strip(colour: int, count: int = len(NASTY), size: int = 8) -> bytes:
    """Pictures side by side, each of its own shade."""
    image = Image.new("RGB", (count * size, size))
    for place in range(count):
        image.paste((colour, 80 * place, 0), (place * size, 0, (place + 1) * size, size))
    data = io.BytesIO()
    image.save(data, "png")
    return data.getvalue()


def measurement(name: str = "one", pictures: bool = True, **fields: Any) -> Measurement:
    made = record(**fields)
    strips = {i: strip(20 * i) for i in range(len(made["rows"]))} if pictures else {}
    return Measurement(name, made, strips)


def embedded(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def test_prompts_and_names_are_text_wherever_they_stand() -> None:
    page = report([measurement("<i>run</i> & {{table}}")])
    assert embedded(page)["runs"][0]["prompts"] == NASTY
    assert page.count("<script") == 2 and "alert(1)</script>" not in page
    assert "<i>run" not in page and "<b>bold" not in page and "&lt;i&gt;run&lt;/i&gt; &amp; {{table}}" in page


def test_the_page_asks_for_nothing_and_leaves_no_part_out() -> None:
    page = report([measurement(prompts=["a", "b", "c"])])
    assert not re.findall(r"\{\{\w+\}\}", page)
    links = re.findall(r"(?:src|href|action)\s*=\s*[\"']?([^\"'\s>]+)", page)
    assert links == ["data:,"] and "@import" not in page and "default-src 'none'" in page
    assert set(re.findall(r"https?://[\w./]+", page)) <= {"http://www.w3.org/2000/svg"}


def test_what_is_shown_is_reported_and_what_is_chosen_is_not() -> None:
    rows = [kid(Plan(steps=1), 0.5, 0.6), kid(Plan(steps=2), 0.1, 0.9)]
    run = embedded(report([measurement(rows=rows)]))["runs"][0]
    assert [each["reported"]["kid_lite0"][0] for each in run["rows"]] == [0.6, 0.9]
    assert run["fronts"]["nfe"]["kid_lite0"]["steps"] == [0, 1]
    assert [each["row"] for each in run["planner"]["nfe"]["kid_lite0"]] == [0, 1]
    assert "0.500" not in report([measurement(rows=rows)]) and "0.1," not in json.dumps(run["rows"])


def test_a_policy_is_told_by_its_plans_and_its_threshold() -> None:
    cheap, dear = Plan(steps=1), Plan(steps=4)
    policy = {
        **kid(Plan(steps=2), 0.4),
        "policy": {"first": asdict(cheap), "then": asdict(dear), "threshold": -3.5},
    }
    del policy["plan"]
    made = measurement(rows=[kid(cheap, 0.8), kid(dear, 0.2)])
    made = replace(made, record={**made.record, "policies": [policy]})
    run = embedded(report([made]))["runs"][0]
    assert run["policies"][0]["plan"] == "steps 1; where its score is below -3.5: steps 4"
    chosen = [(each["budget"], each["row"]) for each in run["adaptive"]["nfe"]["kid_lite0"]]
    assert chosen == [(1, None), (2, 0), (4, None)]


def test_the_table_without_javascript_has_every_plan() -> None:
    page = report([measurement()])
    table = page[page.index('id="plans"') : page.index('id="h-about"')]
    assert table.count("<tr>") == 1 + 6 and "0.100 <small>(0.090 to 0.110)</small>" in table
    assert "<noscript>" in page


def test_figures_that_some_rows_lack_and_figures_nobody_knows() -> None:
    rows = [
        row(Plan(steps=1), {"sharpness": (1.0, 2.0)}),
        row(Plan(steps=2), {"sharpness": (1.5, 2.5), "copies_lite0": (0.1, 0.1)}),
        row(Plan(steps=4), {"copies_lite0": (0.2, 0.2)}),
    ]
    page = report([measurement(rows=rows, floor=None)])
    data = embedded(page)
    assert [figure["name"] for figure in data["figures"]] == ["sharpness", "copies_lite0"]
    run = data["runs"][0]
    assert run["fronts"]["flops"].keys() == {"sharpness"} and run["fronts"]["flops"]["sharpness"][
        "steps"
    ] == [0, 1]
    assert run["floor"] == {} and "–" in page[page.index('id="plans"') :]


def test_runs_on_other_prompts_are_said_not_to_compare() -> None:
    one, same = measurement("one"), measurement("same", seed=1, checkpoint="step-00000200")
    assert incomparable([one, same]) == []
    assert embedded(report([one, same]))["comparable"]
    for other in (
        measurement("other", split="seen"),
        measurement("other", num=60),
        measurement("other", prompts=["x", "y", "z"]),
        measurement("other", floor=estimate(0.5)),
    ):
        (text,) = incomparable([one, other])
        assert "neither better nor worse" in text and "one: 100 prompts of test" in text
        page = report([one, other])
        assert html_of(text) in page and not embedded(page)["comparable"]


def html_of(text: str) -> str:
    return f'<p class="warning" role="note">{text}</p>'


def test_text_has_a_section_where_it_was_measured() -> None:
    assert 'id="texts"' not in report([measurement()])
    text = [
        {
            "tokens_per_pass": 2, "temperature": 0.5, "source": "captions", "kept": estimate(0.83),
            "flops_per_token": 3.578e7, "tokens_per_second": estimate(1450.4), "bits_per_byte": estimate(1.25),
        },
        {"tokens_per_pass": 1, "temperature": 0.0, "source": "pictures"},
    ]  # fmt: skip
    page = report([measurement(text=text)])
    section = page[page.index('id="texts"') : page.index('id="plans"')]
    assert "0.83 <small>(0.82 to 0.84)</small>" in section and "captions" in section and "–" in section
    assert "35.8 M" in section and "<td>1450 <small>(1450 to 1450)</small>" in section and "e+" not in section


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (0.8312, "0.831"),
        (999.7, "1000"),
        (1450.4, "1450"),
        (999_700.0, "1 M"),
        (3.578e7, "35.8 M"),
        (999.9e6, "1 G"),
    ],
)
def test_numbers_are_no_powers_of_ten(value: float, said: str) -> None:
    assert _number(value) == said


def test_pictures_are_in_the_page_and_must_be_of_the_prompts() -> None:
    run = embedded(report([measurement()]))["runs"][0]
    assert run["picture"] == [8, 8]
    assert all(each["picture"].startswith("data:image/png;base64,") for each in run["rows"])
    assert embedded(report([measurement(pictures=False)]))["runs"][0]["picture"] is None
    with pytest.raises(ValueError, match="one: a strip of 32 x 8 does not show 3 pictures of one size"):
        report([Measurement("one", record(), {0: strip(0, count=4)})])


def test_nothing_to_show_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="one run or more"):
        report([])
    with pytest.raises(ValueError, match=r"empty: its tradeoff\.json has no plans"):
        report([Measurement("empty", record(rows=[]))])
