"""What a loader's state is good for: the same batches after it, whatever made them; and a refusal on other data."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmgen.data.compose import ComposeConfig
from mmgen.data.loader import DataConfig, Loader, build_loaders
from mmgen.data.pack import PackConfig
from mmgen.data.shards import write_shards
from mmgen.data.source import SourceConfig
from mmgen.objectives import IMM, IMMConfig
from mmgen.sequence import PAD, Document, PackedBatch, Sample
from mmgen.training.feed import feeds
from tests.parts import modalities, picture, sample

TASKS = ComposeConfig({"text image": 0.6, "image text": 0.2, "text": 0.2})


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Captioned pictures, and texts of which some are longer than a row of 128 tokens."""
    root = tmp_path_factory.mktemp("data")
    items = [replace(sample(i), metadata={"tone": i % 3}) for i in range(50)]
    write_shards(root / "pictures", items, lambda _: "train", "test", max_samples_per_shard=10)
    texts = [
        Sample(f"text{i}", "", {"text": "red circle on white " * (3 + 37 * (i % 4 == 0))}) for i in range(30)
    ]
    write_shards(root / "texts", texts, lambda _: "train", "test", max_samples_per_shard=10)
    return {"pictures": root / "pictures", "texts": root / "texts"}


KINDS: dict[str, dict[str, Any]] = {
    "one source": {},
    "documents": {"sources": {"pictures": 1.0, "texts": 2.0}},
    "tokens": {"sources": {"pictures": 1.0, "texts": 2.0}, "weights": "tokens"},
    "split": {"sources": {"texts": 1.0}, "too_long": "split", "compose": ComposeConfig({"text": 1.0})},
    "thin": {"thin": {"tone": 0.3}, "window": 7},
}


def config(folders: dict[str, Path], **options: Any) -> DataConfig:
    sources = options.pop("sources", {"pictures": 1.0})
    each = {name: options.pop(name) for name in ("thin", "window") if name in options}
    named = {
        name: SourceConfig(str(folders[name]), weight=weight, **{"window": 12, "max_broken": 1.0, **each})
        for name, weight in sources.items()
    }
    return DataConfig(named, **{"compose": TASKS, "pack": PackConfig(2, 128, 128), "streams": 4, **options})


def flat(batch: PackedBatch) -> list[torch.Tensor]:
    context, state = batch.context, batch.state
    return [context.ids, context.values["image"], context.positions, context.layout.rank, context.layout.document,
            state.values["image"], state.layout.block, batch.labels, batch.instances.group]  # fmt: skip


def same(one: PackedBatch, other: PackedBatch) -> bool:
    return all(torch.equal(a, b) for a, b in zip(flat(one), flat(other), strict=True))


def make(data: DataConfig, workers: int, num: int, step: int = 0, states: list | None = None):
    objective = IMM(IMMConfig(k=3.0, k_final=8.0))
    loaders = build_loaders(data, modalities(), 5, objective.grouping)
    for loader, state in zip(loaders, states or [], strict=states is not None):
        loader.load_state(state)
    ready = feeds(loaders, objective, 5, "runs", step=step, total_steps=30, workers=workers)
    return [(feed.batch, states) for feed, states in islice(ready, num)]


@pytest.mark.parametrize("kind", KINDS)
def test_every_batch_is_the_same_after_a_resume_from_the_one_before(
    folders: dict[str, Path], kind: str, subtests: pytest.Subtests
):
    data = config(folders, **KINDS[kind])
    whole = make(data, 0, 14)
    for cut in range(1, 13):
        states = json.loads(json.dumps(whole[cut - 1][1]))
        with subtests.test(cut=cut):
            for (batch, after), (expected, wanted) in zip(
                make(data, 0, 2, cut, states), whole[cut : cut + 2], strict=True
            ):
                assert same(batch, expected) and after == wanted


@pytest.mark.parametrize("kind", KINDS)
def test_workers_make_the_same_batches_and_go_on_from_the_same_states(folders: dict[str, Path], kind: str):
    data = config(folders, **KINDS[kind])
    whole = make(data, 0, 12)
    states = json.loads(json.dumps(whole[4][1]))
    for (batch, after), (expected, wanted) in zip(make(data, 2, 7, 5, states), whole[5:], strict=True):
        assert same(batch, expected) and after == wanted


def watch(loader: Loader, placed: Counter[tuple[str, int]]) -> Callable[[], None]:
    """Counts (key, epoch) of what the loader places; to be told of the end of each batch."""
    place = loader._place

    def noted(packer: Any, unit: Sequence[tuple[Any, Document]]) -> None:
        placed.update((document.key, drawn.position.epoch) for drawn, document in unit)
        place(packer, unit)

    def ended() -> None:
        # what waits is offered again, and so counted again
        placed.subtract((loader._composed[drawn].key, drawn.position.epoch) for drawn in loader.waiting)

    loader._place = noted
    return ended


def test_ranks_and_workers_that_share_the_streams_anew_lose_and_repeat_nothing(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
):
    """Two ranks take the even and the odd streams, then one takes all, then four one each: the batches of each step are
    those of one process, and over an epoch every sample is placed once or waits."""
    data = replace(config(folders), compose=ComposeConfig({"text image": 1.0}, 0.0))
    num = data.streams * 5

    placed: Counter[tuple[str, int]] = Counter()

    def run(step: int, rounds: int, ranks: int, states: list[dict]) -> tuple[list[PackedBatch], list[dict]]:
        """Each rank has loaders of its own and makes the batches of its streams alone; states are then gathered."""
        batches: dict[int, PackedBatch] = {}
        gathered = list(states)
        for rank in range(ranks):
            loaders = build_loaders(data, modalities(), 5)
            own = range(rank, data.streams, ranks)
            for stream in own:
                if states:
                    loaders[stream].load_state(json.loads(json.dumps(states[stream])))
            ended = {stream: watch(loaders[stream], placed) for stream in own}
            made = {stream: iter(loaders[stream]) for stream in own}
            for at in range(step, step + rounds * data.streams):
                stream = at % data.streams
                if stream in made:
                    batches[at], state = next(made[stream])
                    ended[stream]()
                    gathered = gathered or [loader.state() for loader in loaders]
                    gathered[stream] = state
        return [batches[at] for at in sorted(batches)], gathered

    expected, _ = run(0, 5, 1, [])
    alone = +placed
    placed.clear()
    found, states = run(0, 2, 2, [])
    more, states = run(2 * data.streams, 2, 1, states)
    last, states = run(4 * data.streams, 1, 4, states)
    found += more + last
    assert len(found) == num and all(same(a, b) for a, b in zip(found, expected, strict=True))
    drawn = sum(state["num_drawn"] for state in states)
    waiting = sum(len(state["waiting"]) for state in states)
    assert sum(batch.num_documents for batch in found) + waiting == drawn
    assert +placed == alone and {*(+placed).values()} == {1}, "no sample twice in an epoch, over all three"
    assert len({key for key, epoch in +placed if epoch == 0}) == 50, "and none is lost"


@pytest.mark.parametrize("streams", [1, 4])
def test_every_sample_is_placed_once_an_epoch(folders: dict[str, Path], streams: int):
    data = replace(config(folders, streams=streams), compose=ComposeConfig({"text image": 1.0}, 0.0))
    placed: Counter[tuple[str, int]] = Counter()
    ends = []
    for loader in build_loaders(data, modalities(), 5):
        ended = watch(loader, placed)
        for _ in islice(loader, 8):
            ended()
        ends.append(loader.positions["pictures"].epoch)
    assert min(ends) >= 2
    placed = +placed
    assert {key for key, epoch in placed if epoch == 0} == {f"sample{i}" for i in range(50)}
    assert {count for (_, epoch), count in placed.items() if epoch == 0} == {1}


# -- weights ---------------------------------------------------------------------------------------------------------


def shares(loader: Loader, batches: int) -> dict[str, float]:
    for _ in islice(loader, batches):
        pass
    total = sum(loader.mix.tokens.values())
    return {name: tokens / total for name, tokens in loader.mix.tokens.items()}


def test_weights_by_tokens_hold_for_documents_of_very_different_lengths(folders: dict[str, Path]):
    options = {"compose": ComposeConfig({"interleaved": 1.0}), "streams": 1, "pack": PackConfig(8, 256, 128)}
    options |= {"too_long": "split"}
    by_tokens = config(folders, sources={"pictures": 1.0, "texts": 3.0}, weights="tokens", **options)
    loader = Loader(by_tokens, modalities(), 0)
    found = shares(loader, 100)
    assert loader.num_drawn > 2000
    assert abs(found["pictures"] - 0.25) < 0.01
    counted = Counter()
    for batch, _ in islice(Loader(by_tokens, modalities(), 0), 100):
        counted["context"] += int((batch.context.layout.document != PAD).sum())
        counted["state"] += int((batch.state.layout.document != PAD).sum())
    assert 0 <= sum(loader.mix.tokens.values()) - counted.total() < 17 * 256, (
        "all but what waits is in a batch"
    )
    by_documents = shares(Loader(replace(by_tokens, weights="documents"), modalities(), 0), 60)
    assert abs(by_documents["pictures"] - 0.25) > 0.05, "they are long enough to tell one from the other"


# -- too long --------------------------------------------------------------------------------------------------------


def test_a_long_text_is_cut_into_documents_that_hold_all_of_it(folders: dict[str, Path]):
    loader = Loader(config(folders, **{**KINDS["split"], "streams": 1}), modalities(), 0)
    text = modalities()["text"]
    found: dict[tuple[str, int], list[int]] = {}
    placed = loader._place

    def noted(packer: Any, unit: Sequence[tuple[Any, Document]]) -> None:
        for drawn, document in unit:
            ids = np.concatenate([span.ids for span in document.spans if span.ids is not None]).tolist()
            assert ids[0] == text.tokenizer.begin and len(ids) <= 128
            if drawn.position.epoch == 0:
                found.setdefault((document.key, drawn.piece or 0), ids[1:])
        placed(packer, unit)

    loader._place = noted
    while loader.positions["texts"].epoch < 2:
        loader._next_batch()
    for i in range(30):
        caption = "red circle on white " * (3 + 37 * (i % 4 == 0))
        pieces = [ids for (key, _), ids in sorted(found.items()) if key == f"text{i}"]
        assert [token for ids in pieces for token in ids] == [
            *text.tokenizer.encode(caption),
            text.tokenizer.end,
        ]
        assert len(pieces) == (1 if i % 4 else -(-(len(text.tokenizer.encode(caption)) + 1) // 127))
    assert "texts longer than a row of the batch were cut into" in loader.remarks()
    assert "longer than a row of the batch 8" not in loader.remarks()


def test_by_default_a_long_text_is_left_out_and_counted(folders: dict[str, Path]):
    loader = Loader(config(folders, **{**KINDS["split"], "too_long": "drop", "streams": 1}), modalities(), 0)
    while loader.positions["texts"].epoch < 2:
        loader._next_batch()
    assert loader.remarks() == "texts: 8 of 30 samples broken (longer than a row of the batch 8)"


def test_a_long_document_stops_where_that_is_asked(folders: dict[str, Path]):
    loader = Loader(config(folders, **{**KINDS["split"], "too_long": "stop", "streams": 1}), modalities(), 0)
    with pytest.raises(ValueError, match=r"source texts: .*: text\d+ has \d+ context and 0 state tokens"):
        list(islice(loader, 20))


def test_a_picture_is_never_cut(tmp_path: Path):
    """Its caption is too long for the row: the document is left out and counted, since cutting would part the two."""
    items = [sample(i) for i in range(20)] + [Sample("long", "", {"text": "red " * 200}, picture(0))]
    write_shards(tmp_path / "set", items, lambda _: "train", "test")
    source = SourceConfig(str(tmp_path / "set"), max_broken=1.0)
    data = DataConfig(
        {"a": source}, ComposeConfig({"text image": 1.0}, 0.0), PackConfig(2, 128, 128), too_long="split"
    )
    loader = Loader(data, modalities(), 0)
    while loader.positions["a"].epoch < 2:
        loader._next_batch()
    assert loader.remarks() == "a: 1 of 21 samples broken (longer than a row of the batch 1)"


# -- other data ------------------------------------------------------------------------------------------------------


def test_a_state_is_refused_on_other_data_with_what_changed(folders: dict[str, Path], tmp_path: Path):
    data = config(folders)
    state = json.loads(json.dumps(Loader(data, modalities(), 3, stream=1).state()))
    Loader(data, modalities(), 3, stream=1).load_state(state)

    def source(**changes: Any) -> DataConfig:
        return replace(data, sources={"pictures": replace(data.sources["pictures"], **changes)})

    write_shards(
        tmp_path / "fewer", [sample(i) for i in range(40)], lambda _: "train", "t", max_samples_per_shard=10
    )
    (tmp_path / "same").mkdir()
    for file in folders["pictures"].iterdir():
        (tmp_path / "same" / file.name).write_bytes(file.read_bytes())
    manifest = json.loads((tmp_path / "same" / "manifest.json").read_text())
    manifest["splits"]["train"][2]["sha256"] = "0" * 64
    (tmp_path / "same" / "manifest.json").write_text(json.dumps(manifest))
    for changed, message in (
        (replace(data, streams=2), "data.streams: its streams was 4, is 2"),
        (source(window=13), "the window of source pictures was 12, is 13"),
        (source(thin={"tone": 0.5}), "source pictures takes other samples"),
        (
            source(path=str(tmp_path / "fewer")),
            r"shards of source pictures were 5 shards of \d+ bytes, are 4 shards",
        ),
        (source(path=str(tmp_path / "same")), "shards of source pictures have other names or contents"),
        (
            config(folders, sources={"texts": 1.0}),
            r"trained on sources \['pictures'\], this run has \['texts'\]",
        ),
    ):
        with pytest.raises(ValueError, match=message) as error:
            Loader(changed, modalities(), 3, stream=1).load_state(state)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="does not say which data"):
        Loader(data, modalities(), 3).load_state({k: v for k, v in state.items() if k != "data"})
