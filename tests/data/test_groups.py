"""Batches hold whole groups of one shape; who finds no others is neither lost nor waits for ever."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch

from mmgen.data import loader as loader_module
from mmgen.data.compose import ComposeConfig, compose
from mmgen.data.loader import DataConfig, Loader
from mmgen.data.pack import PackConfig
from mmgen.data.shards import write_shards
from mmgen.data.source import SourceConfig
from mmgen.data.units import Units, fill_groups, kind_of
from mmgen.modalities.layout import BatchWriter
from mmgen.rng import keyed_numpy
from mmgen.sequence import PAD, UNGROUPED, Document, Grouping, PackedBatch, Sample
from tests.parts import documents, modalities, picture, sample

FOUR = Grouping(4)
WITHIN = Grouping(4, "within")
TASKS = {"text image": 0.6, "image text": 0.2, "text": 0.2}


def write(folder: Path, sizes: Sequence[int]) -> Path:
    """A data set of square pictures, so many pixels a side each."""
    items = [Sample(f"s{i}", "", sample(i).captions, picture(i, size)) for i, size in enumerate(sizes)]
    write_shards(folder, items, lambda _: "train", "test", max_samples_per_shard=10)
    return folder


@pytest.fixture(scope="module")
def two_sizes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two of three pictures have 16 tokens, the others 4."""
    return write(tmp_path_factory.mktemp("groups") / "set", [16, 16, 8] * 13)


def loader(
    folder: Path,
    grouping: Grouping,
    pack: PackConfig | None = None,
    tasks: dict[str, float] = TASKS,
    **image: object,
) -> Loader:
    source = SourceConfig(str(folder))
    data = DataConfig({"a": source}, ComposeConfig(tasks), pack or PackConfig(2, 128, 128))
    return Loader(data, modalities(**image), 3, grouping)


def groups(batch: PackedBatch) -> dict[int, list[int]]:
    """Instances of each group, in the order of their particles."""
    own = batch.instances
    found: dict[int, dict[int, int]] = {}
    for index, (group, particle) in enumerate(zip(own.group.tolist(), own.particle.tolist(), strict=True)):
        assert particle not in found.setdefault(group, {}), "a particle has one place"
        found[group][particle] = index
    return {
        group: [particles[i] for i in range(len(particles))] for group, particles in sorted(found.items())
    }


def shapes(batch: PackedBatch) -> list[tuple[int, int]]:
    return list(zip(batch.instances.modality.tolist(), batch.instances.num_tokens.tolist(), strict=True))


def source_of(batch: PackedBatch) -> list[int]:
    """The document of each instance."""
    instance = batch.state.instance
    assert instance is not None
    document = batch.state.layout.document
    real = document != PAD
    return [int(document[real & (instance == i)][0]) for i in range(len(batch.instances.group))]


def assert_groups_are_whole(batch: PackedBatch, particles: int) -> None:
    kinds = shapes(batch)
    for members in groups(batch).values():
        assert len(members) == particles
        assert len({kinds[index] for index in members}) == 1, "one shape"


@pytest.mark.parametrize("image", [{}, {"copies": 2}, {"copies": 3}])
def test_every_batch_holds_whole_groups_of_one_shape(two_sizes: Path, image: dict):
    following = 0
    seen: Counter[tuple[int, int]] = Counter()
    for batch, _ in islice(loader(two_sizes, FOUR, **image), 6):
        assert_groups_are_whole(batch, 4)
        numbers = sorted(groups(batch))
        assert numbers == list(range(following, following + len(numbers))), "groups are counted over batches"
        following += len(numbers)
        seen.update(shapes(batch))
    assert len(seen) == 2, "both shapes are trained on"


def test_instances_have_one_context_where_they_read_the_same():
    """Copies of one picture and pictures of one caption do; a picture that is read makes a context nobody shares."""
    parts = modalities(copies=2)
    caption = {"text": "red square"}
    items = [Sample(f"c{i}", "", caption if i < 2 else {"text": "blue"}, picture(i)) for i in range(3)]
    config = ComposeConfig({"text image": 1.0})
    made = [compose(item, config, parts, keyed_numpy(i)) for i, item in enumerate(items)]
    twice = [replace(items[0], key=f"t{i}", parts=(picture(9), "again", picture(9))) for i in range(2)]
    made += [compose(each, ComposeConfig({"interleaved": 1.0}), parts, keyed_numpy(9)) for each in twice]
    writer = BatchWriter(1, 512, 512, parts)
    for document in made:
        writer.write(0, document)
    batch = writer.finish()
    found: dict[int, list[int]] = {}
    for document, context in zip(source_of(batch), batch.instances.context.tolist(), strict=True):
        found.setdefault(document, []).append(context)
    red, too, blue, *both = found.values()
    assert red == too == [red[0]] * 2 and blue == [blue[0]] * 2 and blue[0] != red[0]
    (first, second), (other, last) = ((set(each[:2]), set(each[2:])) for each in both)
    assert first == other and len(first) == 1, "both begin with the same picture, having read nothing"
    assert len(second) == len(last) == 1 and second != last, "later they have read a picture of their own"


def test_without_groups_batches_would_not_hold_them(two_sizes: Path):
    """The control: what first-fit packs by itself is no multiple of four."""
    counts = [Counter(shapes(batch)) for batch, _ in islice(loader(two_sizes, UNGROUPED), 6)]
    assert any(count % 4 for batch in counts for count in batch.values())


def test_a_group_of_one_is_what_it_was_without_groups(two_sizes: Path):
    for (batch, state), (other, expected) in zip(
        islice(loader(two_sizes, Grouping(1)), 4), islice(loader(two_sizes, UNGROUPED), 4), strict=True
    ):
        assert state == expected
        assert batch.instances.particle.eq(0).all()
        assert torch.equal(batch.instances.group, other.instances.group)
        assert batch.instances.group.diff().eq(1).all()
        assert torch.equal(batch.context.ids, other.context.ids)


def flat(batch: PackedBatch) -> list[torch.Tensor]:
    context, state, own = batch.context, batch.state, batch.instances
    return [context.ids, context.layout.rank, batch.labels, state.values["image"], state.layout.block,
            own.group, own.particle, own.num_tokens]  # fmt: skip


def test_resuming_after_any_batch_gives_the_same_groups(two_sizes: Path):
    whole = list(islice(loader(two_sizes, FOUR), 8))
    assert any(len(state["waiting"]) % 4 for _, state in whole), "some wait for others of their shape"
    for cut in (1, 4):
        again = loader(two_sizes, FOUR)
        again.load_state(json.loads(json.dumps(whole[cut - 1][1])))
        for (batch, after), (expected, expected_after) in zip(islice(again, 3), whole[cut:], strict=False):
            assert after == expected_after
            assert all(torch.equal(x, y) for x, y in zip(flat(batch), flat(expected), strict=True))


@pytest.mark.parametrize("grouping", [FOUR, Grouping(8)])
def test_no_document_is_lost_between_batches(two_sizes: Path, grouping: Grouping):
    loads = loader(two_sizes, grouping, PackConfig(4, 128, 128))
    placed = sum(batch.num_documents for batch, _ in islice(loads, 6))
    assert placed + len(loads.waiting) == loads.num_drawn
    assert len({drawn.number for drawn in loads.waiting}) == len(loads.waiting)


def test_across_puts_the_copies_of_a_picture_into_different_groups(two_sizes: Path):
    for batch, _ in islice(loader(two_sizes, FOUR, PackConfig(4, 128, 128), copies=2), 4):
        of, kinds = source_of(batch), shapes(batch)
        num_groups = Counter(kinds[members[0]] for members in groups(batch).values())
        for members in groups(batch).values():
            if num_groups[kinds[members[0]]] >= 2:
                assert len({of[index] for index in members}) == 4


def test_within_makes_each_group_of_one_picture(two_sizes: Path):
    for batch, _ in islice(loader(two_sizes, WITHIN, copies=4), 4):
        assert_groups_are_whole(batch, 4)
        of = source_of(batch)
        assert all(len({of[index] for index in members}) == 1 for members in groups(batch).values())


def test_context_puts_pictures_of_one_caption_together_and_the_rest_with_others():
    """Six red, five blue, one green: a whole group of each of the first two, and one of what is left of all."""
    captions = ["red"] * 3 + ["blue"] * 5 + ["green"] + ["red"] * 3
    config, parts = ComposeConfig({"text image": 1.0}, 0.0), modalities()
    writer = BatchWriter(1, 256, 256, parts, grouping=Grouping(4, "context"))
    for number, caption in enumerate(captions):
        item = Sample(f"c{number}", "", {"text": caption}, picture(number))
        writer.write(0, compose(item, config, parts, keyed_numpy(number)))
    batch = writer.finish()
    assert_groups_are_whole(batch, 4)
    of = source_of(batch)
    found = [Counter(captions[of[index]] for index in members) for members in groups(batch).values()]
    assert found == [{"red": 4}, {"blue": 4}, {"blue": 1, "green": 1, "red": 2}]


def test_copies_that_make_no_group_within_a_picture_are_an_error_of_the_caller():
    writer = BatchWriter(1, 128, 128, modalities(), grouping=WITHIN)
    (document,) = documents(1, copies=2)
    with pytest.raises(AssertionError, match="2 copies"):
        writer.write(0, document)


def test_more_copies_than_groups_are_spread_evenly():
    writer = BatchWriter(1, 128, 256, modalities(), grouping=FOUR)
    many, *others = documents(5, copies=1)
    many = Document(tuple(replace(span, copies=4) for span in many.spans))
    for document in [many, *others]:
        writer.write(0, document)
    batch = writer.finish()
    of = source_of(batch)
    counts = [Counter(of[index] for index in members)[0] for members in groups(batch).values()]
    assert counts == [2, 2], "four copies, two groups"


def test_groups_are_numbered_by_their_first_instance_whatever_the_shape():
    writer = BatchWriter(1, 128, 128, modalities(), first_group=7, grouping=Grouping(2))
    small = [Document(tuple(document.spans)) for document in _pictures([8, 16, 8, 16])]
    for document in small:
        writer.write(0, document)
    assert writer.finish().instances.group.tolist() == [7, 8, 7, 8]


def _pictures(sizes: Sequence[int]) -> list[Document]:
    config = ComposeConfig({"image": 1.0})
    return [
        compose(Sample(f"p{i}", "", picture=picture(i, size)), config, modalities(), keyed_numpy(i))
        for i, size in enumerate(sizes)
    ]


def test_a_rare_shape_waits_for_its_own_kind_and_then_is_placed(tmp_path: Path):
    """One picture in forty is small: it waits, over batches, until there are four; nothing fills in for it."""
    loads = loader(write(tmp_path / "set", [16] * 39 + [8]), FOUR)
    rare = 0
    for batch, state in islice(loads, 60):
        rare += sum(tokens == 4 for tokens in batch.instances.num_tokens.tolist())
        assert len(state["waiting"]) < PackConfig().lookahead + 8
    assert rare and rare % 4 == 0
    assert loads.remarks() == ""


def test_shapes_too_many_to_match_fill_groups_by_themselves_and_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A score of shapes, and groups of eight: few find others, yet all are trained on and few wait."""
    monkeypatch.setattr(loader_module, "UNMATCHED", 1)
    items = [
        Sample(f"s{i}", "", sample(i).captions, picture(i, 8).crop((0, 0, 1 + i % 8, 1 + i // 8)))
        for i in range(40)
    ]
    write_shards(tmp_path / "set", items, lambda _: "train", "test", max_samples_per_shard=10)

    def start() -> Loader:
        return loader(tmp_path / "set", Grouping(8), PackConfig(1, 512, 2560), {"text image": 1.0}, patch=1)

    loads = start()
    whole = list(islice(loads, 4))
    for batch, state in whole:
        assert_groups_are_whole(batch, 8)
        assert len(state["waiting"]) <= 8 + PackConfig().lookahead
    placed = sum(batch.num_documents for batch, _ in whole)
    assert placed + len(loads.waiting) == loads.num_drawn, "none is lost"
    assert "documents filled groups by themselves" in loads.remarks()
    assert any(item["alone"] for item in whole[0][1]["waiting"]), (
        "who waits for room is still to fill its groups"
    )
    resumed = start()
    resumed.load_state(json.loads(json.dumps(whole[0][1])))
    batch, state = next(iter(resumed))
    assert state == whole[1][1]
    assert all(torch.equal(x, y) for x, y in zip(flat(batch), flat(whole[1][0]), strict=True))


def test_a_batch_with_no_room_for_a_group_is_an_error_that_says_so(tmp_path: Path):
    """Four pictures of 64 tokens are 256; a batch of one row of 128 never holds them, nor four copies of one."""
    folder = write(tmp_path / "set", [32] * 20)
    with pytest.raises(ValueError, match="none can be used.*no room in a batch for a group of 4"):
        next(iter(loader(folder, FOUR, PackConfig(1, 128, 128), {"text image": 1.0})))


def test_a_group_may_have_its_rows_apart(tmp_path: Path):
    """Two pictures to a row, four to a group: it spans two rows."""
    folder = write(tmp_path / "set", [32] * 20)
    batch, _ = next(iter(loader(folder, FOUR, PackConfig(2, 256, 128))))
    assert_groups_are_whole(batch, 4)
    assert len(groups(batch)) == 1


def test_documents_wait_by_kind_and_leave_in_whole_units():
    units: Units[int] = Units(FOUR)
    small, large = _pictures([8, 16])
    text = documents(1, "text")[0]
    assert kind_of(text, FOUR) == frozenset()
    assert [item for item, _ in units.offer(0, text)] == [0], "what needs no other goes at once"
    for item, document in enumerate([small, large, small, small, large, large]):
        assert units.offer(item, document) == []
    assert len(units) == 6
    assert [item for item, _ in units.waiting()] == [0, 2, 3, 1, 4, 5]
    assert [item for item, _ in units.offer(6, small)] == [0, 2, 3, 6]
    assert units.pop_oldest()[0] == 1
    assert units.offer(7, large) == [] and [item for item, _ in units.offer(8, large)] == [4, 5, 7, 8]
    assert len(units) == 0


def test_copies_shrink_the_unit_and_filling_makes_a_document_whole():
    (three,) = documents(1, copies=3)
    (two,) = documents(1, copies=2)
    units: Units[int] = Units(FOUR)
    assert units.offer(0, two) == [] and len(units.offer(1, two)) == 2
    assert [len(units.offer(i, three)) for i in range(4)] == [0, 0, 0, 4]
    assert kind_of(fill_groups(three, FOUR), FOUR) == frozenset()
    assert fill_groups(three, FOUR).spans[-1].copies == 12
    assert fill_groups(two, FOUR).spans[-1].copies == 4
