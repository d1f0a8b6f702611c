"""The page in a browser: it draws, it answers, it asks for nothing and fits a phone."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from mmgen.evaluation.report import report
from mmgen.sampling.plan import Plan
from tests.evaluation.test_frontier import kid, row
from tests.evaluation.test_report import NASTY, measurement

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Blocks by steps by guidance with one combination missing, and a second run of other prompts."""
    rows = [
        row(
            Plan(blocks=b, steps=s, guidance=g),
            {"kid_lite0": (0.4 / s, 0.4 / s + b / 50), "own_latent": (s / 8, s / 8), "copies_lite0": (0.1, 0.1)},
        )
        for b in (1, 2)
        for s in (1, 2, 4)
        for g in (1.0, 2.0)
        if (b, s, g) != (2, 4, 2.0)
    ]  # fmt: skip
    other = [kid(Plan(steps=s), 0.5 / s) for s in (1, 2, 4, 8)]
    file = tmp_path_factory.mktemp("report") / "report.html"
    file.write_text(report([measurement("one", rows=rows), measurement("other", rows=other, split="seen")]))
    return file


@contextmanager
def opened(
    browser: Any, path: Path, width: int = 1280, scheme: str = "light", scripts: bool = True
) -> Iterator[Any]:
    """The page; fails on an error in its console, and on a request for anything but the page itself."""
    context = browser.new_context(
        viewport={"width": width, "height": 800}, color_scheme=scheme, java_script_enabled=scripts
    )
    page = context.new_page()
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(path.as_uri())
    yield page
    assert said == [] and asked == [path.as_uri()]
    context.close()


def slide(page: Any, axis: str, to: int) -> None:
    page.locator(f'input[data-axis="{axis}"]').fill(str(to))


def shown(page: Any) -> str:
    """The strip from which the pictures are cut, as the browser paints it."""
    return page.locator("#pictures .picture").first.evaluate("node => getComputedStyle(node).backgroundImage")


def test_sliders_change_pictures_costs_and_figures(browser: Any, path: Path) -> None:
    with opened(browser, path) as page:
        assert page.locator("#pictures .tile").count() == len(NASTY)
        seen = {}
        for blocks in (0, 1):
            for steps in (0, 1, 2):
                slide(page, "guidance", 0)
                slide(page, "blocks", blocks)
                slide(page, "steps", steps)
                seen[blocks, steps] = shown(page)
                nfe = (blocks + 1) * 2**steps
                assert page.locator("#costs dd").first.inner_text() == str(nfe)
        assert len(set(seen.values())) == 6 and all(
            url.startswith('url("data:image/png') for url in seen.values()
        )
        assert "10.0 %" in page.locator("#costs").inner_text()
        # a combination that was not measured: another slider moves along, and the page says so
        slide(page, "guidance", 1)
        assert "Not every combination was measured" in page.locator("#moved").inner_text()


def test_each_picture_of_a_strip_is_its_prompts(browser: Any, path: Path) -> None:
    with opened(browser, path) as page:
        places = page.locator("#pictures .picture").evaluate_all(
            "nodes => nodes.map(node => [node.style.backgroundPosition, node.style.backgroundSize])"
        )
        assert places == [["0% 0px", "300% 100%"], ["50% 0px", "300% 100%"], ["100% 0px", "300% 100%"]]
        assert (
            page.locator(".tile").all_inner_texts() == NASTY
        )  # as text: nothing of it ran or became an element
        assert page.locator("#pictures b").count() == 0
        page.locator(".tile").nth(2).click()
        assert "“a plain one” over blocks and steps" in page.locator("#matrix caption").inner_text()
        page.locator("#matrix button").first.click()
        assert page.locator('input[data-axis="blocks"]').input_value() == "0"


def test_five_axes_have_lines_that_differ(browser: Any, tmp_path: Path) -> None:
    """By their colour, dashes and marks, the line of all of them included."""
    plans = [Plan(blocks=b, steps=s, guidance=g, thinking=n, candidates=c)
             for b in (1, 2) for s in (1, 2) for g in (1.0, 2.0) for n in (0, 8) for c in (1, 2)]  # fmt: skip
    rows = [kid(plan, 0.5 / (1 + number)) for number, plan in enumerate(plans)]
    (tmp_path / "report.html").write_text(report([measurement("one", rows=rows)]))
    with opened(browser, tmp_path / "report.html") as page:
        styles = page.evaluate(
            "LINES.map((name) => [lineColor(name), DASHES[lineStyle(name)], MARKS[lineStyle(name)]])"
        )
    assert len(styles) == 6
    for part in zip(*styles, strict=True):
        assert len(set(part)) == 6


def test_names_of_floors_of_several_runs_do_not_lie_on_each_other(browser: Any, tmp_path: Path) -> None:
    runs = [
        measurement(
            name,
            rows=[kid(Plan(steps=s), 0.5 / s) for s in (1, 2, 4)],
            floor={"value": floor, "low": floor - 0.01, "high": floor + 0.01, "num": 100},
        )
        for name, floor in (("a", 0.05), ("b", 0.051), ("c", 0.052))
    ]
    (tmp_path / "report.html").write_text(report(runs))
    for width in (360, 1280):
        with opened(browser, tmp_path / "report.html", width) as page:
            tops = page.locator(".floor-name").evaluate_all(
                "nodes => nodes.map(n => n.getBoundingClientRect().top)"
            )
            assert len(tops) == 3
            assert all(other - one >= 13 for one, other in pairwise(sorted(tops)))


def test_plots_are_drawn_and_redrawn(browser: Any, path: Path) -> None:
    with opened(browser, path) as page:
        assert (
            page.locator("#plot svg .series path").count() > 4
            and page.locator("#plot .plan").count() == 11 + 4
        )
        assert "floor" in page.locator("#plot svg").text_content()
        drawn = set()
        for currency, unit in (("nfe", "network evaluations"), ("flops", "FLOPs"), ("seconds", "seconds")):
            page.select_option("#currency", currency)
            assert f"{unit} a picture (log scale)" in page.locator("#plot svg").text_content()
            drawn.add(page.locator("#plot svg").inner_html())
            drawn.add(page.locator("#planner").inner_text())
        assert len(drawn) == 6
        page.select_option("#figure", "own_latent")
        assert "share of pictures (higher is better)" in page.locator("#plot svg").text_content()
        page.select_option("#figure", "copies_lite0")
        assert (
            page.locator("#plot .plan").count() == 11
            and page.locator("#plot [stroke-dasharray]").count() == 0
        )
        assert "Nothing is chosen by this figure" in page.locator("#iso").inner_text()


def test_lines_and_runs_can_be_taken_away(browser: Any, path: Path) -> None:
    with opened(browser, path) as page:
        assert "not measured on the same prompts" in page.locator(".warning").first.inner_text()
        before = page.locator("#plot .series").count()
        page.locator("#legend button", has_text="steps only").click()
        assert page.locator("#plot .series").count() != before
        page.locator("#legend button", has_text="other").click()
        assert page.locator("#plot .plan").count() == 11
        page.locator("#legend button", has_text="one").first.click()
        assert (
            page.locator("#plot svg").count() == 0
            and "Nothing is chosen" in page.locator("#plot").inner_text()
        )


def test_a_keyboard_is_enough(browser: Any, path: Path) -> None:
    with opened(browser, path) as page:
        assert page.locator('#plot .plan[tabindex="0"]').count() == 1
        page.locator('#plot .plan[tabindex="0"]').focus()
        before = page.locator("#readout").inner_text()
        page.keyboard.press("ArrowLeft")
        assert page.locator("#readout").inner_text() != before
        assert page.evaluate("document.activeElement.classList.contains('plan')")
        page.locator('input[data-axis="steps"]').focus()
        page.keyboard.press("Home")
        assert page.locator('input[data-axis="steps"]').input_value() == "0"
        unnamed = page.evaluate(
            """[...document.querySelectorAll("button, select, input, [role=region]")].filter(node => !node.hidden &&
               !node.getAttribute("aria-label") && !node.textContent.trim() && !node.labels?.length).length"""
        )
        assert unnamed == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_it_fits_and_has_both_colours(browser: Any, path: Path, scheme: str, width: int) -> None:
    with opened(browser, path, width, scheme) as page:
        for name in ("kid_lite0", "own_latent", "copies_lite0"):
            page.select_option("#figure", name)
            assert page.evaluate("document.documentElement.scrollWidth") <= width
        plot = page.locator("#plot svg").bounding_box()
        assert plot["x"] >= 0 and plot["x"] + plot["width"] <= width
        colours = [background(page)]
        page.locator("#theme").click()
        colours.append(background(page))
        assert [sum(colour) > 600 for colour in colours] == (
            [True, False] if scheme == "light" else [False, True]
        )


def background(page: Any) -> list[int]:
    found = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
    return found[:3]


def test_without_javascript_there_is_the_table(browser: Any, path: Path) -> None:
    with opened(browser, path, scripts=False) as page:
        assert page.locator("#plans tbody tr").count() == 11 + 4 and page.locator("#plans").is_visible()
        assert not page.locator("#bar").is_visible() and not page.locator("#live").is_visible()
