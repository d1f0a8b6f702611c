"""The protocol on a small real data set: what it says of a model that knows the answers, of one that confuses them, and
of one that knows nothing."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw

from mmgen.cli.evaluate import tables
from mmgen.data.shards import write_shards
from mmgen.data.source import SourceConfig
from mmgen.evaluation.evaluate import SEED_STRIDE, EvaluateConfig, Evaluation, Row, encode, evaluate
from mmgen.evaluation.real import SEEN, read_split, real_pictures, splits_of
from mmgen.objectives import FlowMatchingConfig, build_objective
from mmgen.sampling.plan import Plan
from mmgen.sampling.sampler import Result, Sampler
from mmgen.sequence import Sample
from tests import parts

SIZE = 32
COLOURS = ("red", "green", "blue", "orange", "purple", "black")
SHAPES = ("circle", "square", "triangle", "bar")
STYLES = ("plain", "framed", "tinted")


def draw(colour: str, shape: str, style: str) -> Image.Image:
    picture = Image.new("RGB", (SIZE, SIZE), "lightyellow" if style == "tinted" else "white")
    pen = ImageDraw.Draw(picture)
    if style == "framed":
        pen.rectangle((0, 0, SIZE - 1, SIZE - 1), outline="gray", width=2)
    if shape == "circle":
        pen.ellipse((6, 6, 26, 26), fill=colour)
    elif shape == "triangle":
        pen.polygon([(16, 4), (28, 27), (4, 27)], fill=colour)
    else:
        pen.rectangle((6, 6, 26, 26) if shape == "square" else (3, 13, 29, 19), fill=colour)
    return picture


def samples() -> list[Sample]:
    made = []
    for colour in COLOURS:
        for shape in SHAPES:
            for style in STYLES:
                name = f"a {colour} {shape}"
                captions = {"name": name, "text": f"{name}, {style} style"}
                metadata = {"concept": f"{colour}-{shape}", "style": style}
                made.append(
                    Sample(
                        f"{style}-{colour}-{shape}",
                        "",
                        captions,
                        draw(colour, shape, style),
                        metadata=metadata,
                    )
                )
    return made


def split_of(sample: Sample) -> str:
    """Each concept is held out in one of the three styles."""
    number = [f"{colour}-{shape}" for colour in COLOURS for shape in SHAPES].index(sample.metadata["concept"])
    return "unseen_pairs" if STYLES[number % 3] == sample.metadata["style"] else "train"


class Knows(Sampler):
    """Draws and describes by looking the answer up: what the protocol must say of it is known."""

    answers: dict[str, Image.Image]

    def generate(self, prompts: Sequence[str | None], plan: Plan | None = None, *args, **kwargs) -> Result:
        images = [self.answers[prompt] for prompt in prompts if prompt is not None]
        return Result(images, encode(images, self))

    def describe(self, pictures: Sequence[Image.Image], *args, **kwargs) -> Result:
        captions = {picture.tobytes(): prompt for prompt, picture in self.answers.items()}
        return Result(text=[captions[picture.tobytes()] for picture in pictures])


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> SourceConfig:
    folder = tmp_path_factory.mktemp("shapes") / "data"
    write_shards(folder, samples(), split_of, "shapes")
    return SourceConfig(str(folder))


def build(kind: type[Sampler]) -> Sampler:
    model = parts.model(dtype=torch.float32)
    return kind(model, parts.modalities(), build_objective(FlowMatchingConfig()), (SIZE, SIZE))


def run(sampler: Sampler, source: SourceConfig, **settings) -> Evaluation:
    return evaluate(sampler, {"shapes": source}, EvaluateConfig(**{"steps": (1,), "num": 24, **settings}))


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def known(source: SourceConfig) -> dict[str, Evaluation]:
    right = {sample.captions["text"]: sample.picture for sample in samples() if sample.picture is not None}
    # Pictures of another concept in the same style, and captions that say so.
    wrong = dict(zip(right, [*list(right.values())[3:], *list(right.values())[:3]], strict=True))
    made = {}
    for name, answers in (("right", right), ("wrong", wrong)):
        sampler = build(Knows)
        assert isinstance(sampler, Knows)
        sampler.answers = answers
        made[name] = run(sampler, source)
    return made


def figures(evaluation: Evaluation, split: str, source: str) -> dict[str, float]:
    (row,) = [row for row in evaluation.rows if row.split == split and row.source == source]
    return {name: estimate.value for name, estimate in row.figures.items()}


def texts(evaluation: Evaluation, split: str) -> dict[str, float]:
    rows = [row for row in evaluation.text_rows if row.split == split]
    return {name: estimate.value for row in rows for name, estimate in row.figures.items()}


@pytest.mark.slow
@pytest.mark.parametrize("split", [SEEN, "unseen_pairs"])
def test_a_model_that_knows_scores_the_real_pictures_figures(
    known: dict[str, Evaluation], split: str
) -> None:
    drawn, real = figures(known["right"], split, "model"), figures(known["right"], split, "real")
    assert drawn["own_latent"] == drawn["own_lite0"] == 1
    assert abs(drawn["kid_lite0"]) < 1e-6
    for figure in ("fd_lite0", "concept_lite0", "concept_text"):
        assert drawn[figure] == pytest.approx(real[figure])
    said = texts(known["right"], split)
    assert said["caption_exact"] == 1
    assert said["caption_minilm"] == said["caption_minilm_ceiling"] > 0.9


@pytest.mark.parametrize("split", [SEEN, "unseen_pairs"])
def test_a_model_that_confuses_prompts_draws_well_and_retrieves_nothing(
    known: dict[str, Evaluation], split: str
) -> None:
    drawn, real = figures(known["wrong"], split, "model"), figures(known["wrong"], split, "real")
    assert drawn["own_latent"] < 0.2 and drawn["own_lite0"] < 0.2
    assert drawn["concept_lite0"] < real["concept_lite0"] / 2
    assert drawn["concept_text"] < real["concept_text"] / 2
    assert drawn["kid_lite0"] < 0.5  # an untrained model: 1.5
    assert texts(known["wrong"], split)["caption_exact"] == 0


def test_copies_of_training_are_reported_and_held_out_pictures_are_not(known: dict[str, Evaluation]) -> None:
    assert figures(known["right"], SEEN, "model")["copies_lite0"] == 1
    assert figures(known["right"], SEEN, "model")["copies_pixels"] == 1
    assert figures(known["right"], "unseen_pairs", "model")["copies_lite0"] < 0.2
    assert figures(known["right"], "unseen_pairs", "model")["copies_pixels"] < 0.2


@pytest.fixture(scope="module")
def untrained(source: SourceConfig) -> Evaluation:
    return run(build(Sampler), source, steps=(1, 2), num=8, seed=1, splits=(SEEN,))


def test_an_untrained_model_goes_through_every_figure(untrained: Evaluation) -> None:
    assert [(row.split, row.source, row.steps) for row in untrained.rows] == [
        (SEEN, "real", None),
        (SEEN, "codec", None),
        (SEEN, "model", 1),
        (SEEN, "model", 2),
    ]
    one, two = untrained.rows[2:]
    assert (one.nfe, two.nfe) == (2, 4)  # guided
    assert one.flops and two.flops and two.flops > 1.5 * one.flops
    assert one.figures["kid_lite0"].low > 0.5 and one.figures["own_latent"].value < 0.5
    # Codec "pixels" loses nothing.
    assert figures(untrained, SEEN, "codec")["own_latent"] == 1
    assert texts(untrained, SEEN)["bits_per_byte"] > 2
    read = json.loads(json.dumps(untrained.to_json(), allow_nan=False))
    assert read["rows"][2]["figures"]["kid_lite0"]["num"] == 8


def test_figures_do_not_depend_on_what_was_drawn_before(untrained: Evaluation, source: SourceConfig) -> None:
    again = run(build(Sampler), source, steps=(2,), num=8, seed=1, splits=(SEEN,))
    assert again.rows[-1].figures == untrained.rows[-1].figures


def test_seeds_reach_the_sampler_far_apart(source: SourceConfig) -> None:
    """Request i draws from seed + i, so neighbouring seeds would share most of their noise."""

    class Stopped(Exception):
        pass

    class Stops(Sampler):
        def generate(
            self, prompts: Sequence[str | None], plan: Plan | None = None, seed: int = 0, **_
        ) -> Result:
            raise Stopped(seed)

    with pytest.raises(Stopped) as stopped:
        run(build(Stops), source, num=4, seed=3, splits=("unseen_pairs",))
    assert stopped.value.args == (3 * SEED_STRIDE,)
    assert SEED_STRIDE > 1_000_000


def test_mistakes_are_one_line(source: SourceConfig) -> None:
    with pytest.raises(ValueError, match="no split 'test', only seen, unseen_pairs"):
        run(build(Sampler), source, splits=("test",))
    with pytest.raises(ValueError, match="num 3"):
        EvaluateConfig(num=3)
    with pytest.raises(ValueError, match="steps"):
        EvaluateConfig(steps=(0,))


def test_real_pictures_are_read_in_one_order_with_their_concepts(
    source: SourceConfig, tmp_path: Path
) -> None:
    assert splits_of({"shapes": source}) == [SEEN, "unseen_pairs"]
    members = real_pictures(read_split(source, SEEN), (SIZE, SIZE))
    assert len(members) == 48
    assert [real.key for real in members[:5]] == [s.key for s in read_split(source, SEEN, limit=5)]
    shutil.copytree(source.path, tmp_path / "elsewhere")
    moved = read_split(SourceConfig(str(tmp_path / "elsewhere")), SEEN)
    assert [real.key for real in members] == [s.key for s in moved]
    red = next(real for real in members if real.key == "plain-red-square" or real.key == "framed-red-square")
    assert (red.name, red.concept) == ("a red square", "red-square")
    only = tmp_path / "list.txt"
    only.write_text("red-square\n")
    chosen = SourceConfig(source.path, include={"concept": str(only)})
    assert {s.metadata["concept"] for s in read_split(chosen, SEEN)} == {"red-square"}
    nothing = tmp_path / "other.txt"
    nothing.write_text("elephant\n")
    elsewhere = SourceConfig(source.path, include={"concept": str(nothing)})
    assert (
        len(read_split(elsewhere, "unseen_pairs")) == 24
    )  # no held-out picture is on the list: all are asked for
    with pytest.raises(ValueError, match="no usable sample"):
        read_split(elsewhere, SEEN)


def test_data_without_concepts_and_styles_has_captions_and_halves() -> None:
    plain = [Sample(f"k{i}", "", {"text": f"caption {i}"}, draw("red", "bar", "plain")) for i in range(40)]
    members = real_pictures([*plain, Sample("text only", "", {"text": "words"})], (16, 16))
    assert len(members) == 40 and members[0].picture.size == (16, 16)
    assert members[3].concept == members[3].name == "caption 3"
    assert {real.style for real in members} == {"half 0", "half 1"}


def test_tables_name_every_figure(known: dict[str, Evaluation]) -> None:
    evaluation = known["right"]
    shown = tables(evaluation)
    assert [table.title for table in shown] == [
        "seen: 24 prompts, guidance 2",
        "unseen_pairs: 24 prompts, guidance 2",
        "texts",
    ]
    labels = list(shown[0].columns[0].cells)
    row: Row = next(row for row in evaluation.rows if row.source == "model")
    assert len(labels) == len(row.figures) + 3
    column = [str(cell) for cell in shown[0].columns[3].cells]
    assert column[labels.index("own nearest, latents")].startswith("100.0%")
