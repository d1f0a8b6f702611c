"""Streams: which samples an epoch deals to whom, and in which order, decided by (seed, position) alone."""

import json
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import mmgen.data.source as source_module
from mmgen.data.deal import WHOLE, Part, deal
from mmgen.data.listing import index_path
from mmgen.data.shards import write_shards
from mmgen.data.source import SourceConfig, SourceReader
from mmgen.data.streams import Position, SampleStream
from mmgen.sequence import Sample
from tests.parts import sample

NUM = 50
START = Position()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """50 samples in 5 shards; the metadata field `kind` has two values, `tone` only some have."""
    items = []
    for i in range(NUM):
        one = sample(i)
        metadata = {"kind": "even" if i % 2 == 0 else "odd"} | ({"tone": 1} if i < 20 else {})
        items.append(Sample(one.key, "", one.captions, one.picture, metadata=metadata))
    path = tmp_path_factory.mktemp("data") / "set"
    write_shards(path, items, lambda _: "train", "test", max_samples_per_shard=10)
    return path


@pytest.fixture(scope="module", params=["manifest", "plain", "gzip"])
def kept(request: pytest.FixtureRequest, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same samples with a manifest, as bare tars, and as bare compressed ones."""
    if request.param == "manifest":
        return folder
    out = tmp_path_factory.mktemp("bare")
    for tar in folder.glob("*.tar"):
        if request.param == "plain":
            (out / tar.name).write_bytes(tar.read_bytes())
        else:
            with tarfile.open(tar) as old, tarfile.open(out / f"{tar.name}.gz", "w:gz") as new:
                for info in old:
                    new.addfile(info, old.extractfile(info))
    return out


def stream_of(path: Path, part: int = 0, parts: int = 1, seed: int = 0, **options: Any) -> SampleStream:
    return SampleStream("a", SourceConfig(str(path), **{"window": 20, **options}), seed, part, parts)


def keys(stream: SampleStream, epoch: int = 0) -> list[str]:
    return [each.key for each in stream.epoch(epoch)]


def walk(stream: SampleStream, position: Position = START) -> Iterator[tuple[str, Position]]:
    """(key, position after it), without end."""
    while True:
        position = stream.find(position)
        key = stream.at(position).key
        position = stream.next(position)
        yield key, position


# -- dealing ---------------------------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(
    counts=st.lists(st.integers(1, 12), min_size=1, max_size=30),
    streams=st.integers(1, 12),
    known=st.booleans(),
    epoch=st.integers(0, 3),
)
def test_every_sample_of_an_epoch_is_dealt_to_one_stream(
    counts: list[int], streams: int, known: bool, epoch: int
):
    dealt = [
        deal(counts if known else [None] * len(counts), "a", 5, epoch, stream, streams)
        for stream in range(streams)
    ]
    taken = Counter(
        (part.shard, number)
        for parts in dealt
        for part in parts
        for number in range(counts[part.shard])
        if part.takes(number)
    )
    assert set(taken) == {(shard, n) for shard, count in enumerate(counts) for n in range(count)}
    assert max(taken.values()) == 1
    opened = sum(len({part.shard for part in parts}) for parts in dealt)
    assert opened <= len(counts) + streams - 1, "not every stream opens every shard"
    if len(counts) >= WHOLE * streams:
        assert opened == len(counts), "a shard is one stream's"
    elif known:
        sizes = [sum(part.last - part.first for part in parts) for parts in dealt]
        assert max(sizes) - min(sizes) <= 1


def test_streams_that_divide_the_shards_take_them_whole():
    for known in ([10] * 6, [None] * 6):
        dealt = [deal(known, "a", 0, 0, stream, 3) for stream in range(3)]
        assert [len(parts) for parts in dealt] == [2, 2, 2]
        assert all(part.last - part.first == part.of for parts in dealt for part in parts)


def test_without_counts_a_shard_is_cut_into_as_few_equal_parts_as_divide_evenly():
    dealt = [deal([None] * 6, "a", 0, 0, stream, 4) for stream in range(4)]
    assert {part.of for parts in dealt for part in parts} == {2}
    assert [sum(part.last - part.first for part in parts) for parts in dealt] == [3, 3, 3, 3]
    assert Part(0, 1, 2, 2).takes(5) and not Part(0, 1, 2, 2).takes(4)


def test_epochs_and_seeds_deal_anew():
    one = deal([None] * 40, "a", 0, 0, 0, 4)
    assert one == deal([None] * 40, "a", 0, 0, 0, 4)
    for name, seed, epoch in (("a", 0, 1), ("a", 1, 0), ("b", 0, 0)):
        assert deal([None] * 40, name, seed, epoch, 0, 4) != one


# -- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 7, 20])
def test_streams_hold_each_sample_once_in_every_epoch(kept: Path, parts: int):
    reader = SourceReader(SourceConfig(str(kept), window=7))
    streams = [SampleStream("a", reader.config, 0, part, parts, reader) for part in range(parts)]
    seen = []
    for epoch in (0, 1):
        each = [keys(stream, epoch) for stream in streams]
        seen.append([key for found in each for key in found])
        assert Counter(seen[-1]) == Counter(f"sample{i}" for i in range(NUM))
    assert seen[0] != seen[1]


def test_the_order_is_a_function_of_the_seed(kept: Path):
    assert keys(stream_of(kept)) == keys(stream_of(kept)) != keys(stream_of(kept, seed=1))


def test_a_stream_opens_its_own_shards_alone(folder: Path, monkeypatch: pytest.MonkeyPatch):
    opened = []
    read = source_module.read_entries
    monkeypatch.setattr(
        source_module, "read_entries", lambda shard, *rest: opened.append(shard.name) or read(shard, *rest)
    )
    for part in range(5):
        before = len(opened)
        assert len(keys(stream_of(folder, part, 5, cache_mb=0))) == 10
        assert len(opened) - before == 2, "the epoch's, and that from which the next epoch begins"
    assert len(set(opened[::2])) == 5


@pytest.mark.parametrize("options", [{}, {"window": 7}, {"window": 1}, {"thin": {"tone": 0.5}}])
def test_a_position_gives_its_sample_wherever_one_comes_from(kept: Path, options: dict[str, Any]):
    """A fresh stream, and one that was elsewhere before, continue alike: 3 epochs, from every sixth position."""
    whole = list(islice(walk(stream_of(kept, 1, 2, **options)), 75))
    used = stream_of(kept, 1, 2, **options)
    for cut in range(5, 70, 6):
        position = Position(**json.loads(json.dumps(asdict(whole[cut][1]))))
        for stream in (stream_of(kept, 1, 2, **options), used):
            assert list(islice(walk(stream, position), 5)) == whole[cut + 1 : cut + 6]


def test_a_resume_reads_one_window_and_nothing_before_it(folder: Path, monkeypatch: pytest.MonkeyPatch):
    whole = list(islice(walk(stream_of(folder, window=8)), 30))
    read = []
    placed = source_module.Item
    monkeypatch.setattr(source_module, "Item", lambda *parts: read.append(1) or placed(*parts))
    stream = stream_of(folder, window=8)
    assert next(walk(stream, whole[28][1])) == whole[29]
    assert len(read) == 8


def test_shuffling_goes_beyond_a_shard_and_a_window_bounds_it(folder: Path):
    def shards(**options: int) -> list[int]:
        return [int(key.removeprefix("sample")) // 10 for key in keys(stream_of(folder, **options))]

    assert len(set(shards(window=50)[:10])) > 2
    assert len(set(shards(window=10)[:10])) == 1, "a window of one shard's samples"


def test_windows_do_not_repeat_an_order(folder: Path):
    orders = []
    for epoch in range(3):
        numbers = [int(key.removeprefix("sample")) % 10 for key in keys(stream_of(folder, window=10), epoch)]
        orders += [tuple(numbers[i : i + 10]) for i in range(0, NUM, 10)]
    assert len(set(orders)) == len(orders)


def test_more_streams_than_samples_are_refused_up_front(folder: Path):
    with pytest.raises(ValueError, match="source a has 50 samples, too few for data.streams 60"):
        stream_of(folder, 59, 60)


def test_an_empty_stream_of_unknown_shards_is_refused_when_it_is_asked(folder: Path, tmp_path: Path):
    (tar, *_) = folder.glob("*.tar")
    (tmp_path / "a.tar").write_bytes(tar.read_bytes())
    stream = stream_of(tmp_path, 19, 20)
    with pytest.raises(ValueError, match="no usable sample for each of 20 streams"):
        stream.find(Position())


# -- filters ---------------------------------------------------------------------------------------------------------


def test_include_and_thin(kept: Path, tmp_path: Path):
    (tmp_path / "kinds.txt").write_text("# taken\neven\n")
    stream = stream_of(kept, include={"kind": str(tmp_path / "kinds.txt")})
    for epoch in range(2):  # the second from memory
        assert sorted(keys(stream, epoch)) == sorted(f"sample{i}" for i in range(0, NUM, 2))
    stream = stream_of(kept, thin={"tone": 0.5})
    epochs = [set(keys(stream, epoch)) for epoch in range(8)]
    toned = {f"sample{i}" for i in range(20)}
    assert all({f"sample{i}" for i in range(20, NUM)} <= found for found in epochs), (
        "the others are never thinned"
    )
    assert 5 < sum(len(found & toned) for found in epochs) / 8 < 15
    assert epochs[0] != epochs[1]
    assert epochs[3] == set(keys(stream_of(kept, thin={"tone": 0.5}), 3)), "what is in memory decides nothing"


def test_a_filter_that_leaves_nothing_is_an_error(kept: Path, tmp_path: Path):
    (tmp_path / "kinds.txt").write_text("neither\n")
    stream = stream_of(kept, include={"kind": str(tmp_path / "kinds.txt")})
    with pytest.raises(ValueError, match="no usable sample"):
        stream.find(Position())


def test_filtered_pictures_are_not_decoded(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "kinds.txt").write_text("even\n")
    decoded = []
    decode = source_module.decode_sample
    monkeypatch.setattr(
        source_module, "decode_sample", lambda group: decoded.append(group["__key__"]) or decode(group)
    )
    stream = stream_of(folder, include={"kind": str(tmp_path / "kinds.txt")})
    found = keys(stream)
    assert sorted(decoded) == sorted(found), "nor any before it is drawn, nor any twice"


# -- memory ----------------------------------------------------------------------------------------------------------


def decodings(monkeypatch: pytest.MonkeyPatch, stream: SampleStream, epochs: int) -> list[int]:
    count = 0
    decode = source_module.decode_sample

    def counted(group: Any) -> Sample:
        nonlocal count
        count += 1
        return decode(group)

    monkeypatch.setattr(source_module, "decode_sample", counted)
    totals = [0]
    for epoch in range(epochs):
        keys(stream, epoch)
        totals.append(count)
    return [after - before for before, after in pairwise(totals)]


def test_a_small_set_is_decoded_once(kept: Path, monkeypatch: pytest.MonkeyPatch):
    assert decodings(monkeypatch, stream_of(kept), 3) == [NUM, 0, 0]


def test_without_memory_each_epoch_decodes_anew(kept: Path, monkeypatch: pytest.MonkeyPatch):
    assert decodings(monkeypatch, stream_of(kept, cache_mb=0), 3) == [NUM] * 3


def test_memory_is_bounded_by_the_size_of_what_is_decoded(tmp_path: Path):
    items = [
        Sample(f"s{i}", "", {"text": "a"}, Image.new("RGB", (256, 256))) for i in range(20)
    ]  # 196,608 bytes decoded, a few hundred on disk
    write_shards(tmp_path / "set", items, lambda _: "train", "test")
    reader = SourceReader(SourceConfig(str(tmp_path / "set"), cache_mb=1))
    assert len(list(SampleStream("a", reader.config, 0, reader=reader).epoch())) == 20
    held = [value for value, _ in reader._kept._values.values() if isinstance(value, Sample)]
    assert len(held) == 5


def test_a_small_compressed_set_is_read_once(folder: Path, tmp_path: Path):
    items = [sample(i) for i in range(30)]
    write_shards(tmp_path / "set", items, lambda _: "train", "test", max_samples_per_shard=10, compress=True)
    stream = stream_of(tmp_path / "set")
    first = keys(stream, 1)
    for tar in (tmp_path / "set").glob("*.tar.gz"):
        tar.unlink()
    assert keys(stream, 1) == first


# -- broken input ----------------------------------------------------------------------------------------------------


def test_what_is_broken_is_left_out_and_counted_once(folder: Path, tmp_path: Path):
    for tar in folder.glob("*.tar"):
        (tmp_path / tar.name).write_bytes(tar.read_bytes())
    (cut, *_) = sorted(tmp_path.glob("*.tar"))
    data = cut.read_bytes()
    cut.write_bytes(data[: len(data) // 2])
    (tmp_path / "zzz.tar").write_bytes(b"no tar" * 1000)
    stream = stream_of(tmp_path, max_broken=1.0)
    for epoch in range(3):
        found = keys(stream, epoch)
        assert len(found) == len(set(found)) and 40 < len(found) < NUM
    assert dict(stream.rejects.shards) == {"truncated shard": 1, "not a tar": 1}
    assert stream.rejects.num_shards == 6 and stream.rejects.num_samples == len(found)


def test_broken_pictures_are_counted_once_however_often_they_are_drawn(folder: Path, tmp_path: Path):
    (tar, *_) = sorted(folder.glob("*.tar"))
    data = bytearray(tar.read_bytes())
    start = data.index(b"RIFF")
    data[start : start + 4] = b"XXXX"
    (tmp_path / "a.tar").write_bytes(data)
    stream = stream_of(tmp_path, max_broken=1.0)
    for epoch in range(3):
        assert len(keys(stream, epoch)) == 9
    assert stream.rejects.summary() == "1 of 10 samples broken (corrupt picture 1)"


def test_an_index_beside_the_tar_changes_nothing_but_the_work(folder: Path, tmp_path: Path):
    with_index = keys(stream_of(folder))
    assert all(index_path(tar).is_file() for tar in folder.glob("*.tar")), "the writer wrote them"
    bare = tmp_path / "set"
    bare.mkdir()
    for file in folder.iterdir():
        if not file.name.endswith(".idx.json"):
            (bare / file.name).write_bytes(file.read_bytes())
    assert keys(stream_of(bare)) == with_index
    assert not list(bare.glob("*.idx.json")), "small tars are not worth one"


def test_position_is_small_and_plain(folder: Path):
    stream = stream_of(folder)
    position = stream.next(stream.find(replace(Position(), epoch=1)))
    assert Position(**json.loads(json.dumps(asdict(position)))) == position
    assert len(json.dumps(asdict(position))) < 100
