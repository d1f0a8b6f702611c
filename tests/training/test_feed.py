"""Batches made ahead: the same whatever process makes them, from the same states on."""

import json
import time
from collections import Counter
from dataclasses import replace
from itertools import islice
from multiprocessing import active_children
from pathlib import Path

import pytest
import torch

from mmgen.data.compose import ComposeConfig
from mmgen.data.loader import DataConfig, build_loaders, describe_counts, row_of_counts
from mmgen.data.pack import PackConfig
from mmgen.data.shards import write_shards
from mmgen.data.source import SourceConfig
from mmgen.objectives import IMM, IMMConfig
from mmgen.training import feed as feed_module
from mmgen.training.feed import Feed, Part, feeds
from tests.parts import modalities, sample

STREAMS = 4


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    path = tmp_path_factory.mktemp("data") / "set"
    write_shards(path, [sample(i) for i in range(60)], lambda _: "train", "test", max_samples_per_shard=10)
    tasks = ComposeConfig({"text image": 0.6, "image text": 0.2, "text": 0.2})
    return DataConfig({"a": SourceConfig(str(path), window=30)}, tasks, PackConfig(2, 128, 128), STREAMS)


def made(
    data: DataConfig,
    workers: int,
    num: int,
    step: int = 0,
    states: list | None = None,
    part: Part = Part(),  # noqa: B008 (frozen)
):
    objective = IMM(IMMConfig(k=3.0, k_final=8.0))
    loaders = build_loaders(data, modalities(), 5, objective.grouping)
    for loader, state in zip(loaders, states or [], strict=states is not None):
        loader.load_state(state)
    ready = feeds(loaders, objective, 5, "runs", step=step, total_steps=20, workers=workers, part=part)
    return list(islice(ready, num))


def same(one: Feed, other: Feed) -> bool:
    pairs = [
        (one.batch.context.ids, other.batch.context.ids),
        (one.state.x["image"], other.state.x["image"]),
        (one.state.x_r["image"], other.state.x_r["image"]),
        (one.state.t, other.state.t),
        (one.batch.instances.group, other.batch.instances.group),
    ]
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_any_number_of_workers_makes_the_same_batches(data: DataConfig, workers: int):
    for (feed, states), (expected, expected_states) in zip(
        made(data, workers, 9), made(data, 0, 9), strict=True
    ):
        assert same(feed, expected) and states == expected_states


@pytest.mark.parametrize("cut", [3, 4])
def test_another_number_of_workers_goes_on_from_the_states_of_a_step(data: DataConfig, cut: int):
    whole = made(data, 2, 10)
    states = json.loads(json.dumps(whole[cut - 1][1]))
    for (feed, after), (expected, expected_after) in zip(
        made(data, 4, 5, cut, states), whole[cut:], strict=False
    ):
        assert same(feed, expected) and after == expected_after


def test_groups_and_samples_of_all_streams_have_numbers_of_their_own(data: DataConfig):
    feeds_, states = zip(*made(data, 0, 12), strict=True)
    groups = Counter(g for feed in feeds_ for g in feed.batch.instances.group.unique().tolist())
    assert max(groups.values()) == 1
    drawn = [state["num_drawn"] for state in states[-1]]
    assert min(drawn) > 0, "every stream was asked"
    numbers = [{d["number"] % STREAMS for d in state["waiting"]} for state in states[-1]]
    assert all(found <= {stream} for stream, found in enumerate(numbers))


@pytest.mark.parametrize("workers", [0, 2])
def test_what_is_broken_is_counted_over_all_processes(tmp_path: Path, workers: int):
    """Six samples of sixty are longer than a row; each process meets those of its own streams."""
    long = [replace(sample(i), captions={"text": "red " * (300 if i % 10 == 0 else 3)}) for i in range(60)]
    write_shards(tmp_path / "set", long, lambda _: "train", "test", max_samples_per_shard=10)
    sources = {"a": SourceConfig(str(tmp_path / "set"), window=30, max_broken=1.0)}
    data = DataConfig(sources, ComposeConfig({"text": 1.0}), PackConfig(2, 128, 128), STREAMS)
    treated = made(data, workers, 40)[-1][0].treated
    broken, seen = treated["a", "samples", "longer than a row of the batch"], treated["a", "samples", ""]
    assert 10 * broken == seen and seen == 60 * max(workers, 1), "each has met every sample, in some epoch"
    assert describe_counts(treated).startswith(f"a: {broken} of {seen} samples broken")
    assert row_of_counts(treated) == {"broken_samples": broken}


@pytest.mark.parametrize(("num_ranks", "workers", "micro_batches"), [(2, 0, 2), (2, 2, 4), (4, 1, 4)])
def test_ranks_share_the_batches_of_a_step_between_them(
    data: DataConfig, num_ranks: int, workers: int, micro_batches: int
):
    """Together they make what one process makes, and own the states of different streams."""
    steps = 3
    alone = made(data, 0, steps * micro_batches, part=Part(micro_batches))
    for rank in range(num_ranks):
        part = Part(micro_batches, rank, num_ranks)
        own = made(data, workers, steps * part.num_own, part=part)
        for (feed, _), (expected, _) in zip(own, alone[rank::num_ranks], strict=True):
            assert same(feed, expected)
        for stream in part.own_streams(STREAMS):
            assert own[-1][1][stream] == alone[-1][1][stream]
    other = made(data, 0, 1, part=Part(micro_batches, 1, num_ranks))[0][0]
    assert not same(other, alone[0][0])


def test_what_cannot_be_shared_evenly_is_refused(data: DataConfig):
    with pytest.raises(ValueError, match=r"data.streams 4 must be a multiple of 3 \(train.workers 3\)"):
        made(data, 3, 1)
    with pytest.raises(ValueError, match=r"streams 4 must be a multiple of 8 \(2 ranks x train.workers 4\)"):
        made(data, 4, 1, part=Part(2, 0, 2))
    with pytest.raises(ValueError, match=r"micro_batches 3 must be a multiple of the 2 ranks"):
        Part(3, 0, 2)


def test_workers_end_with_the_batches_however_long_one_is_at_its_next(
    data: DataConfig, monkeypatch: pytest.MonkeyPatch
):
    """Torch waits for MP_STATUS_CHECK_INTERVAL and then sends SIGTERM, which workers do not hear."""
    draw = feed_module.draw_state

    def slow(batch, modalities, objective, seed, *rest):
        time.sleep(3.0)
        return draw(batch, modalities, objective, seed, *rest)

    monkeypatch.setattr(feed_module, "draw_state", slow)
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.1)
    others = active_children()
    objective = IMM(IMMConfig(k=3.0))
    loaders = build_loaders(data, modalities(), 5, objective.grouping)
    ready = feeds(loaders, objective, 5, "runs", step=0, total_steps=20, workers=2)
    next(ready)
    workers = [child for child in active_children() if child not in others]
    assert len(workers) == 2
    ready.close()
    for worker in workers:
        worker.join(0.5)  # killed, and not at the end of its sleep
    assert not any(worker.is_alive() for worker in workers)
