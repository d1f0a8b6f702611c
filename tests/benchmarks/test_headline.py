"""The headline benchmark: what its ratios say of known distances, and one small run of all of it."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks import arms, imm_precision, imm_study
from benchmarks.headline import SHIFTS, Arguments, Score, _ratios, measure
from mmgen.config import load_yaml, save_yaml, to_mapping
from mmgen.evaluation.intervals import Estimate
from mmgen.objectives import FlowMatchingConfig, IMMConfig
from mmgen.training.run import RunConfig, build


def test_flow_matching_has_every_solver_and_grid_at_equal_evaluations():
    assert len(arms.plans("flow_matching", 1, SHIFTS)) == 1, (
        "one evaluation leaves no grid to choose and no room for Heun"
    )
    for evaluations in (2, 4, 16):
        plans = arms.plans("flow_matching", evaluations, SHIFTS)
        assert {plan.steps * (2 if plan.solver == "heun" else 1) for plan in plans} == {evaluations}
        euler, heun = ([plan for plan in plans if plan.solver == solver] for solver in ("euler", "heun"))
        assert euler == arms.plans("imm", evaluations, SHIFTS) and len(euler) == len(SHIFTS)
        assert len(heun) == (1 if evaluations == 2 else len(SHIFTS))
        assert len(plans) == len(set(plans))


def test_intervals_know_seeds_and_what_all_seeds_share():
    draw = np.random.default_rng(0)
    shared = np.concatenate([np.zeros((1, 1)), 0.1 * draw.standard_normal((4000, 1))])
    seeds = np.array([[1.0, 1.3, 1.6]])
    sure, unsure = np.ones((4001, 3)), seeds + shared
    assert arms.difference(sure, sure) == Estimate(0.0, 0.0, 0.0, 3)
    # Student's t with two degrees of freedom: 4.303 * 0.3 / sqrt(3), and 1.96 * 0.1 of what all share
    half = np.hypot(4.3027 * 0.3 / 3**0.5, 1.96 * 0.1)
    found = arms.difference(unsure, sure)
    assert found.value == pytest.approx(0.3) and found.num == 3
    assert found.high - 0.3 == pytest.approx(half, rel=0.01) == 0.3 - found.low
    twice = arms.ratio(2 * unsure, sure)
    assert twice.value == pytest.approx(2.6) and twice.high - 2.6 == pytest.approx(2 * half, rel=0.01)
    assert arms.ratio(unsure, 2 * unsure) == Estimate(0.5, 0.5, 0.5, 3), "what both have cancels"
    alone = arms.difference(unsure[:, :1], sure[:, :1])
    assert alone.num == 1 and alone.high == pytest.approx(1.96 * 0.1, rel=0.1)


def test_ratios_and_step_ratios_of_known_distances(tmp_path):
    arguments = Arguments(seeds=2, steps=(1, 2, 4, 8))
    known = {"flow_matching": {1: 8.0, 2: 4.0, 4: 2.0, 8: 1.0}, "imm": {1: 2.0, 2: 1.5, 4: 1.0, 8: 1.0}}
    scored = [
        Score(
            arms.Run(tmp_path, "digits", objective, seed, 1),
            steps,
            {},
            {metric: np.full(401, value) for metric in ("frechet", "kid")},
        )
        for objective, values in known.items()
        for steps, value in values.items()
        for seed in (0, 1)
    ]
    rows = {(row["steps"], row["flow_matching_steps"]): row for row in _ratios(scored, arguments)}
    assert rows[1, 2]["frechet_ratio"] == Estimate(0.5, 0.5, 0.5, 2)
    assert rows[2, 8]["kid_ratio"].value == 1.5 and rows[2, 8]["kid_difference"].high == 0.5
    # at 1 step as good as flow matching at 4, at 8 as good as at 8
    assert [rows[steps, 1]["step_ratio_frechet"] for steps in (1, 2, 4, 8)] == [4, 2, 2, 1]


def test_objectives_of_one_seed_are_resampled_alike():
    features, real = torch.randn(2, 60, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    first, again, other = (arms.resampled(features, real, seed) for seed in (3, 3, 4))
    for metric in ("frechet", "kid"):
        assert np.array_equal(first[metric], again[metric])
        assert first[metric][0] == other[metric][0] and not np.array_equal(first[metric], other[metric])
        # fewer different pictures are further away, which says nothing of the model
        assert first[metric][1:].mean() == pytest.approx(first[metric][0])


@pytest.mark.slow
def test_a_small_run_measures_both_objectives(tmp_path):
    rows = measure(Arguments(seeds=1, steps=(1, 2), quick=True, copies=1, runs=tmp_path))
    by_objective = {
        name: [row for row in rows if row["objective"] == name] for name in ("floor", "imm", "ratio")
    }
    assert len(by_objective["ratio"]) == 4 and len(by_objective["imm"]) == 2
    floor = by_objective["floor"][0]
    assert floor["label_agreement"].value > 0.9, "real pictures are what their captions say"
    assert all(row["frechet"] > 5 * floor["frechet"] for row in by_objective["imm"]), (
        "20 steps are no training"
    )
    trained = {row["objective"]: row["train_steps"] for row in rows if "train_steps" in row}
    assert trained["imm"] < trained["flow_matching"] < 4 / 3 * trained["imm"]


def test_the_study_changes_one_setting_and_keeps_the_flops(tmp_path):
    arguments = imm_study.Arguments(runs=tmp_path, train_steps=1000)
    base = arms.Run(tmp_path / "base", "digits", "imm", 0, 1000).config()
    for variant, settings in imm_study._variants(arguments).items():
        if variant[0] == imm_study.BEGIN:
            continue
        run = imm_study._run(variant, settings, 0, arguments)
        config = run.config()
        flops = [
            arms.picture_flops(c) * c.train.steps * c.data.pack.state_length * c.data.pack.rows
            for c in (config, base)
        ]
        assert flops[0] == pytest.approx(flops[1], rel=0.005), variant
        assert (to_mapping(config) != to_mapping(base)) == bool(settings) or variant[0] == imm_study.BASE
        build(config)  # raises where the settings do not fit together


@pytest.mark.slow
def test_a_run_that_begins_from_flow_matching_has_what_is_left_of_the_compute(tmp_path):
    arguments = imm_study.Arguments(
        seeds=1, steps=(1,), quick=True, copies=1, runs=tmp_path, factors=(imm_study.BEGIN,)
    )
    rows = imm_study.measure(arguments)
    for checkpoints in tmp_path.glob("*/checkpoints"):
        shutil.rmtree(checkpoints)  # figures are kept beside a run: what has them is not trained again
    again = imm_study.measure(arguments)
    assert again[:-1] == rows[:-1] and again[-1]["ratio"].value == rows[-1]["ratio"].value
    assert not list(tmp_path.glob("*/checkpoints"))
    lengths = {row["factor"]: row["train_steps"] for row in rows if "train_steps" in row}
    assert lengths == {imm_study.BASE: 20, imm_study.BEGIN: 15}
    (first,) = tmp_path.glob("digits-flow_matching-0-*/config.yaml")
    config = load_yaml(first, RunConfig)
    assert isinstance(config.objective, FlowMatchingConfig) and 5 < config.train.steps < 5 * 4 / 3
    begun = load_yaml(next(tmp_path.glob("digits-begin*/config.yaml")), RunConfig)
    assert begun.train.begin_from == str(first.parent) and isinstance(begun.objective, IMMConfig)


@pytest.mark.slow
def test_precision_is_measured_by_time_and_gap(tmp_path):
    run = arms.Run(tmp_path / "run", "digits", "imm", 0, 40, {"optim.warmup_steps": 0})
    arms.prepare("digits")
    arms.train([run], 1)
    rows = imm_precision.measure(imm_precision.Arguments(run=run.folder, k=(6, 14), quick=True))
    assert len(rows) == 4 * (len(imm_precision.EDGES) - 1)
    assert all(0 < row["cosine"].value <= 1.001 and row["gap"] > 0 for row in rows)
    near, kept, far = (
        [row["cosine"].value for row in rows if (row["k"], row["least"]) == of]
        for of in ((14, 0.0), (14, 0.003), (6, 0.0))
    )
    assert near[-1] < 0.6 < 0.9 < min(kept[-1], far[-1]), "what two near passes differ by is lost first"


def test_a_run_of_another_configuration_is_refused(tmp_path):
    run = arms.Run(tmp_path / "run", "digits", "imm", 0, 2)
    save_yaml(run.config(), tmp_path / "run.yaml")
    arms.check(run)
    with pytest.raises(ValueError, match=r"run.yaml has another objective, train than is asked for"):
        arms.check(replace(run, steps=3, settings={"objective.k": 4}))


def test_an_unknown_factor_is_refused():
    with pytest.raises(ValueError, match=r"factors \['kk'\] are none of k, gap"):
        imm_study.Arguments(factors=("kk",))
