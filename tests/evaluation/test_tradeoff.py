"""The surface of models whose quality by plan is known."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mmgen.data.shards import write_shards
from mmgen.data.source import SourceConfig
from mmgen.evaluation.evaluate import encode
from mmgen.evaluation.intervals import Estimate
from mmgen.evaluation.tradeoff import Judge, TradeoffConfig, pareto, surface
from mmgen.objectives import FlowMatchingConfig, build_objective
from mmgen.sampling.cost import Cost
from mmgen.sampling.plan import Plan
from mmgen.sampling.sampler import Result, Sampler
from tests import parts
from tests.evaluation.test_evaluate import SIZE, samples, split_of


class Better(Sampler):
    """Of every four prompts draws as many right as it has steps; with guidance one picture for all prompts."""

    def generate(self, prompts: Sequence[str | None], plan: Plan | None = None, *args, **kwargs) -> Result:
        assert plan is not None and isinstance(plan.steps, int)
        answers = {sample.captions["text"]: sample.picture for sample in samples()}
        others = [*list(answers.values())[3:], *list(answers.values())[:3]]
        wrong = dict(zip(answers, others, strict=True))
        images = [(answers if i % 4 < plan.steps else wrong)[prompt] for i, prompt in enumerate(prompts)]
        if plan.guidance != 1:
            images = images[:1] * len(prompts)
        nfe = plan.steps * (1 if plan.guidance == 1 else 2)
        return Result(
            images, encode(images, self), cost=Cost(nfe, refine_flops=nfe * len(prompts), seconds=1.0)
        )


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> tuple[Judge, Sampler]:
    folder = tmp_path_factory.mktemp("tradeoff")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        write_shards(folder / "data", samples(), split_of, "shapes")
        model = parts.model(dtype=torch.float32)
        sampler = Better(model, parts.modalities(), build_objective(FlowMatchingConfig()), (SIZE, SIZE))
        config = TradeoffConfig(num=24)
        return Judge(sampler, {"shapes": SourceConfig(str(folder / "data"))}, config), sampler


def test_what_is_better_is_found_and_the_choice_is_made_on_other_prompts(
    judge: tuple[Judge, Sampler],
) -> None:
    real, sampler = judge
    assert real.split == "unseen_pairs" and len(real.chosen) == 24
    config = TradeoffConfig({"steps": (1, 2, 4), "guidance": (1.0, 3.0)})
    plans = config.plans(sampler.plan)
    assert [(plan.steps, plan.guidance) for plan in plans] == [
        (1, 1.0), (1, 3.0), (2, 1.0), (2, 3.0), (4, 1.0), (4, 3.0)
    ]  # fmt: skip
    rows = surface(real, [real.measure(sampler, plan, 0)[0] for plan in plans])
    chosen = [row for row in rows if row["chosen"]]
    assert [(row["steps"], row["guidance"]) for row in chosen] == [(1, 1.0), (2, 1.0), (4, 1.0)]
    both = [[row[half]["own_latent"] for row in chosen] for half in ("choosing", "reported")]
    assert all(estimate.num == 12 for half in both for estimate in half)
    for steps, first, second in zip((1, 2, 4), *both, strict=True):
        assert (first.value + second.value) / 2 == pytest.approx(steps / 4, abs=0.1)
    assert (
        [row["nfe"] for row in chosen] == [1, 2, 4]
        and chosen[0]["flops"] == 1
        and chosen[0]["seconds"] == 1 / 24
    )
    assert pareto(rows, "flops", "own_latent") == chosen


def test_what_costs_more_and_gives_less_is_not_on_the_front() -> None:
    def row(flops: float, value: float, chosen: bool = True) -> dict:
        return {"flops": flops, "chosen": chosen, "choosing": {"kid_lite0": Estimate(value, value, value, 1)}}

    rows = [row(4, 0.5), row(1, 1.0), row(2, 1.1), row(3, 0.1, chosen=False), row(8, 0.4)]
    assert pareto(rows, "flops") == [rows[1], rows[0], rows[4]]


def test_halves_are_disjoint_and_cover_the_prompts(judge: tuple[Judge, Sampler]) -> None:
    one, other = judge[0].halves()
    assert sorted([*one.tolist(), *other.tolist()]) == list(range(24)) and len(one) == 12


def test_mistakes_are_one_line(judge: tuple[Judge, Sampler], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="num 7 must be at least 8"):
        TradeoffConfig(num=7)
    with pytest.raises(ValueError, match="steps must name one value or more"):
        TradeoffConfig({"steps": ()})
    with pytest.raises(ValueError, match="axis 'stpes' is no part of a plan"):
        TradeoffConfig({"stpes": (1,)})
    write_shards(tmp_path / "data", samples(), split_of, "shapes")
    source = {"shapes": SourceConfig(str(tmp_path / "data"))}
    with pytest.raises(ValueError, match="no split 'tset', only seen, unseen_pairs"):
        Judge(judge[1], source, TradeoffConfig(split="tset"))


def slower(plan: Plan, factor: int) -> Plan:
    """An axis of one's own."""
    return replace(plan, steps=factor * plan.block_steps[0])


def test_an_axis_is_any_part_of_a_plan_or_a_function_of_ones_own() -> None:
    axes = {"blocks": (1, 2), f"{__name__}:slower": (1, 3), "shift": (0.5, 1.0), "candidates": (1, 2)}
    plans = TradeoffConfig(axes).plans(Plan(steps=2))
    assert len(set(plans)) == len(plans) == 16
    assert {plan.steps for plan in plans} == {2, 6} and {plan.shift for plan in plans} == {0.5, 1.0}
    calls = [plan.blocks * plan.block_steps[0] * plan.candidates for plan in plans]
    assert calls == sorted(calls) and calls[0] == 2 and calls[-1] == 24
    assert TradeoffConfig({"blocks": (2, 1)}).plans(Plan(blocks=2, steps=(3, 1)))[0] == Plan(steps=3)


def test_labels_are_judged_where_there_are_few_with_many_pictures_each(
    judge: tuple[Judge, Sampler], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, _ = judge
    assert real.classifier is None and real.ceilings() == {}
    right, wrong = torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]])
    concepts = [each.concept for each in real.chosen]
    ones = torch.stack([right[0] if concept == concepts[0] else wrong[0] for concept in concepts])
    monkeypatch.setattr(real, "training", ones)
    assert real._classifier(real.chosen) is None, "too few of each"
    two = [replace(each, concept=str(each.concept == concepts[0])) for each in real.chosen] * 20
    monkeypatch.setattr(real, "training", ones.repeat(20, 1))
    classifier = real._classifier(two)
    assert classifier is not None and classifier.predict(right.numpy()) == ["True"]
    monkeypatch.setattr(real, "classifier", classifier)
    monkeypatch.setattr(real, "chosen", two[:24])
    assert real.labels(ones).all() and not real.labels(1 - ones).any()


def test_prompts_are_captions_of_one_level_and_pictures_without_it_are_left_out(tmp_path: Path) -> None:
    named = [
        replace(sample, captions={**sample.captions, "group": f"thing {index % 3}"}) if index % 2 else sample
        for index, sample in enumerate(samples())
    ]
    write_shards(tmp_path / "data", named, split_of, "shapes")
    model = parts.model(dtype=torch.float32)
    sampler = Better(model, parts.modalities(), build_objective(FlowMatchingConfig()), (SIZE, SIZE))
    source = {"shapes": SourceConfig(str(tmp_path / "data"))}
    judges = {level: Judge(sampler, source, TradeoffConfig(level=level)) for level in ("text", "group")}
    assert 8 <= len(judges["group"].chosen) < len(judges["text"].chosen)
    assert set(judges["group"].prompts) == {"thing 0", "thing 1", "thing 2"}
    place = {real.key: index for index, real in enumerate(judges["text"].chosen)}
    for row, real in enumerate(judges["group"].chosen):
        assert torch.equal(judges["group"].features[row], judges["text"].features[place[real.key]])
