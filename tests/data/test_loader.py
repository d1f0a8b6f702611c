"""Batches: nothing cut, lost or repeated; the state of one batch gives the next one bit for bit."""

import json
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmgen.data.compose import ComposeConfig, compose
from mmgen.data.loader import DataConfig, Loader, count_treated
from mmgen.data.pack import PackConfig, Packer
from mmgen.data.shards import write_shards
from mmgen.data.source import SourceConfig
from mmgen.modalities.layout import BatchWriter
from mmgen.rng import keyed_numpy
from mmgen.sequence import NO_LABEL, PAD, UNGROUPED, Grouping, PackedBatch, Sample
from tests.parts import documents, modalities, sample, tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """50 samples in 5 shards; the metadata field `kind` has two values, `tone` only some have."""
    items = []
    for i in range(50):
        one = sample(i)
        metadata = {"kind": "even" if i % 2 == 0 else "odd"} | ({"tone": 1} if i < 20 else {})
        items.append(Sample(one.key, "", one.captions, one.picture, metadata=metadata))
    path = tmp_path_factory.mktemp("data") / "set"
    write_shards(path, items, lambda _: "train", "test", max_samples_per_shard=10)
    return path


def config(folder: Path, **sources: float) -> DataConfig:
    named = {
        name: SourceConfig(str(folder), weight=weight, window=20)
        for name, weight in (sources or {"a": 1.0}).items()
    }
    tasks = ComposeConfig({"text image": 0.6, "image text": 0.2, "text": 0.2})
    return DataConfig(named, tasks, PackConfig(2, 128, 128))


def flat(batch: PackedBatch) -> list[torch.Tensor]:
    context, state = batch.context, batch.state
    return [context.ids, context.values["image"], context.positions, context.layout.rank, context.layout.document,
            state.values["image"], state.layout.block, batch.labels, batch.instances.group]  # fmt: skip


@pytest.mark.parametrize("sources", [{"a": 1.0}, {"a": 1.0, "b": 3.0}])
def test_resuming_after_any_batch_gives_the_same_batches(folder: Path, sources: dict[str, float]):
    whole = list(islice(Loader(config(folder, **sources), modalities(), seed=3), 8))
    for cut in (1, 4):
        state = json.loads(json.dumps(whole[cut - 1][1]))
        loader = Loader(config(folder, **sources), modalities(), seed=3)
        loader.load_state(state)
        for (batch, after), (expected, expected_after) in zip(islice(loader, 3), whole[cut:], strict=False):
            assert after == expected_after
            assert all(torch.equal(x, y) for x, y in zip(flat(batch), flat(expected), strict=True))


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of two sizes; some samples are broken, some lack a picture, some are longer than a row."""
    items = []
    for i in range(48):
        one = sample(i, 8 if i % 3 == 0 else 16)
        match i % 8:
            case 1:
                one = replace(one, captions={})
            case 4:
                one = replace(one, picture=None)
            case 6:
                one = replace(one, captions={"text": "red " * 200})
        items.append(one)
    path = tmp_path_factory.mktemp("mixed") / "set"
    write_shards(path, items, lambda _: "train", "test", max_samples_per_shard=10)
    return path


@pytest.mark.parametrize("grouping", [UNGROUPED, Grouping(4), Grouping(3, "context")], ids=str)
@pytest.mark.parametrize("sources", [{"a": 1.0}, {"a": 1.0, "b": 3.0}])
@pytest.mark.parametrize("changes", [{}, {"weights": "tokens"}, {"too_long": "split"}], ids=str)
def test_samples_that_are_drawn_together_make_the_batches_of_samples_drawn_one_by_one(
    mixed: Path,
    sources: dict[str, float],
    changes: dict[str, Any],
    grouping: Grouping,
    monkeypatch: pytest.MonkeyPatch,
):
    """The states after them are the same, too: none is drawn whose batch might have been full before it."""
    data = config(mixed, **sources)
    named = {name: replace(source, max_broken=1.0) for name, source in data.sources.items()}
    data = replace(data, sources=named, **changes)
    loader, other = (Loader(data, modalities(), 3, grouping) for _ in range(2))
    together = list(islice(loader, 8))
    assert (loader._num_at_once(16) > 1) == (not changes or ("weights" in changes and len(sources) == 1))
    monkeypatch.setattr(Loader, "_num_at_once", lambda self, room: 1)
    for (batch, after), (expected, expected_after) in zip(together, islice(other, 8), strict=True):
        assert after == expected_after
        assert all(torch.equal(x, y) for x, y in zip(flat(batch), flat(expected), strict=True))
    assert count_treated([loader]) == count_treated([other])
    too_long = [] if "too_long" in changes else ["longer than a row"]
    for reason in ("missing caption", "missing picture", *too_long):
        assert reason in loader.remarks()


def test_no_sample_is_lost_between_batches(folder: Path):
    loader = Loader(config(folder), modalities(), seed=3)
    placed = sum(batch.num_documents for batch, _ in islice(loader, 6))
    assert placed + len(loader.waiting) == loader.num_drawn


def test_sources_are_drawn_by_weight(folder: Path):
    loader = Loader(config(folder, a=1.0, b=3.0), modalities(), seed=3)
    drawn = [loader.mix.next(number) for number in range(400)]
    assert 0.68 < drawn.count("b") / 400 < 0.82


def test_another_set_of_sources_is_refused(folder: Path):
    state = Loader(config(folder), modalities(), seed=3).state()
    with pytest.raises(ValueError, match="sources"):
        Loader(config(folder, b=1.0), modalities(), seed=3).load_state(state)


def test_a_task_with_an_unknown_modality_is_refused(folder: Path):
    data = DataConfig({"a": SourceConfig(str(folder))}, ComposeConfig({"text sound": 1.0}))
    with pytest.raises(ValueError, match="sound"):
        Loader(data, modalities(), seed=0)


def test_every_document_stands_whole_in_one_row_and_within_it_in_rank_order():
    items = documents(5) + documents(5, "image text") + documents(3, "text")
    packer = Packer(PackConfig(3, 128, 128), modalities())
    placed = [document for document in items if packer.add(document)]
    batch = packer.finish()
    layout = batch.context.layout
    lengths = {}
    for row in range(3):
        for document in layout.document[row].unique().tolist():
            if document != PAD:
                here = layout.document[row] == document
                assert document not in lengths, "a document lies in one row"
                lengths[document] = (
                    int(here.sum()),
                    int((batch.state.layout.document[row] == document).sum()),
                )
                assert layout.rank[row][here].diff().ge(0).all()
                assert here.nonzero()[:, 0].diff().eq(1).all()
    assert sorted(lengths.values()) == sorted(document.lengths for document in placed)


def test_a_document_longer_than_a_row_is_refused_not_cut():
    packer = Packer(PackConfig(1, 128, 128), modalities())
    (large,) = documents(1)
    long = compose(
        Sample("long", "", {"text": "red " * 200}), ComposeConfig({"text": 1.0}), modalities(), keyed_numpy(0)
    )
    assert packer.fits_empty(large)
    assert not packer.fits_empty(long)
    assert not packer.add(long)


def test_documents_that_have_no_room_together_take_none():
    """Each picture takes 16 state tokens, so that eight fill a row."""
    items = documents(17)
    packer, other = (Packer(PackConfig(2, 256, 128), modalities()) for _ in range(2))
    assert packer.fits_empty(*items[:16])
    assert not packer.fits_empty(*items)
    assert packer.add(*items[:10])
    assert not packer.add(*items[10:])
    assert packer.add(*items[10:16]), "the room of what was not placed is there again"
    assert other.add(*items[:16])
    assert torch.equal(packer.finish().context.ids, other.finish().context.ids)


def test_a_document_that_would_begin_with_what_is_to_be_predicted_is_refused():
    (document,) = documents(1)
    begin, *rest = document.spans
    wrong = replace(document, spans=(replace(begin, predicted=True), *rest))
    for items in ([wrong], [document, wrong]):
        packer = Packer(PackConfig(1, 128, 128), modalities())
        assert packer.add(*items)
        with pytest.raises(AssertionError, match="nothing to predict it"):
            packer.finish()


def test_a_span_has_as_many_of_everything_as_it_has_tokens():
    (document,) = documents(1, "image text")
    *_, picture, caption = document.spans
    with pytest.raises(AssertionError, match="every token has a position"):
        replace(caption, ids=caption.ids[:-1])
    with pytest.raises(AssertionError, match="blocks partition"):
        replace(picture, values=picture.values[:-1])
    with pytest.raises(AssertionError, match="all of the values"):
        replace(picture, committed=picture.committed[:-1])


def test_labels_are_the_next_tokens_and_nothing_predicts_the_first():
    names = tokenizer()
    batch = Packer(PackConfig(1, 128, 128), modalities())
    (document,) = documents(1)
    batch.add(document)
    packed = batch.finish()
    ids = np.concatenate([span.ids for span in document.spans if span.ids is not None])
    assert packed.context.ids[0, : len(ids)].tolist() == ids.tolist()
    assert packed.labels[0, : len(ids) - 1].tolist() == ids[1:].tolist()
    assert packed.labels[0, len(ids) - 1 :].eq(NO_LABEL).all()
    assert ids[0] == names.begin
    assert [names.height_of(int(ids[-2])), names.width_of(int(ids[-1]))] == [4, 4]


def test_a_picture_that_begins_a_document_is_read_committed_and_predicts_the_first_text_token():
    (document,) = documents(1, "image text")
    packer = Packer(PackConfig(1, 128, 128), modalities())
    packer.add(document)
    batch = packer.finish()
    picture, caption = document.spans[2], document.spans[3]
    assert picture.committed is not None and not torch.equal(picture.committed, picture.values)
    assert torch.equal(batch.context.values["image"][0, 3:19], picture.committed)
    assert torch.equal(batch.state.values["image"][0, :16], picture.values)
    assert batch.labels[0, 18] == caption.ids[0], "the last clean token predicts the first of the text"
    assert batch.labels[0, :18].eq(NO_LABEL).all(), "the size is given, not predicted"
    assert caption.ids[-1] == tokenizer().end


def test_nothing_follows_the_last_picture_and_its_clean_copy_is_not_in_the_context():
    (document,) = documents(1)
    assert document.spans[-1].modality == "image"
    context, state = document.lengths
    assert (context, state) == (len(document) - 16, 16)


@pytest.mark.parametrize("blocks", [(12,), (6, 6), (3, 3, 3, 3)])
def test_the_last_clean_block_is_in_the_context_only_where_something_reads_it(blocks: tuple[int, ...]):
    image = modalities()["image"]
    span = image.span(torch.zeros(12, image.channels), 3, 4, 10, keyed_numpy(0), read=False)
    lengths = [replace(span, blocks=blocks, read=read, copies=2).lengths for read in (False, True)]
    assert lengths == [(12 - blocks[-1], 24), (12, 24)]


def test_positions_go_on_after_a_picture_whether_or_not_it_is_in_the_context():
    image = modalities()["image"]
    span = image.span(torch.zeros(12, image.channels), 3, 4, 10, keyed_numpy(0), read=False)
    assert span.positions[0].tolist() == [10, 10, 10]
    assert span.positions[-1].tolist() == [10, 12, 13]
    assert span.next_position == 14


def test_a_dropped_condition_leaves_begin_and_size():
    for document in documents(5, drop=1.0):
        assert [span.modality for span in document.spans] == ["text", "text", "image"]
        assert [len(span) for span in document.spans] == [1, 2, 16]


def test_a_noisy_copy_reads_what_its_clean_twin_reads():
    """The state's tokens have the rank of the clean block, so the null context of a picture is 3 tokens."""
    writer = BatchWriter(1, 64, 64, modalities())
    (document,) = documents(1, "image text")
    writer.write(0, document)
    batch = writer.finish()
    clean = batch.context.layout.rank[0, 3]
    assert batch.state.layout.rank[0, :16].eq(clean).all()
    assert not batch.state.layout.public[0, :16].any()


def test_copies_share_one_context_and_have_noise_of_their_own():
    parts = modalities(copies=3)
    (document,) = documents(1, copies=3)
    assert document.lengths == (len(document) - 16, 48)
    packer = Packer(PackConfig(1, 128, 128), parts)
    packer.add(document)
    batch = packer.finish()
    layout = batch.state.layout
    assert layout.rank[0, :48].unique().numel() == 1
    assert layout.block[0, :48].unique_consecutive(return_counts=True)[1].tolist() == [16, 16, 16]
    assert batch.state.instance[0, :48].unique_consecutive().tolist() == [0, 1, 2]
    assert torch.equal(batch.state.values["image"][0, :16], batch.state.values["image"][0, 16:32])
    assert batch.instances.group.tolist() == [0, 1, 2]


def test_a_sample_of_no_use_is_counted_once_however_often_it_is_drawn(tmp_path: Path):
    items = [sample(i) for i in range(200)] + [
        Sample(f"bare{i}", "", picture=sample(i).picture) for i in range(2)
    ]
    write_shards(tmp_path / "set", items, lambda _: "train", "test")
    data = DataConfig({"a": SourceConfig(str(tmp_path / "set"))}, pack=PackConfig(2, 128, 128))
    loader = Loader(data, modalities(), seed=0)
    for _ in islice(loader, 60):
        pass
    assert loader.positions["a"].epoch > 2
    assert loader.remarks() == "a: 2 of 202 samples broken (missing caption 2)"


def test_too_many_samples_of_no_use_stop_with_the_file_named(tmp_path: Path):
    items = [sample(i) for i in range(100)] + [
        Sample(f"bare{i}", "", picture=sample(i).picture) for i in range(20)
    ]
    write_shards(tmp_path / "set", items, lambda _: "train", "test")
    loader = Loader(DataConfig({"a": SourceConfig(str(tmp_path / "set"))}), modalities(), seed=0)
    with pytest.raises(ValueError, match=r"train-000000.*bare.*missing caption"):
        for _ in islice(loader, 60):
            pass
