"""What a path names: folders, patterns, braces, lists, pipes, addresses; each shard once, or one clear line."""

from pathlib import Path

import pytest

from mmgen.config import from_mapping, parse_overrides
from mmgen.data.find import describe, find_shards, find_splits
from mmgen.data.loader import DataConfig
from mmgen.data.read import read_shards
from mmgen.data.rejects import Rejects
from mmgen.data.remote import RemoteConfig
from mmgen.data.shards import write_shards
from mmgen.data.source import SourceConfig
from mmgen.data.streams import SampleStream
from tests.parts import sample


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 samples: 30 of train in three shards, 10 of test."""
    path = tmp_path_factory.mktemp("data") / "set"
    items = [sample(i) for i in range(40)]
    split_of = {item.key: "test" if i >= 30 else "train" for i, item in enumerate(items)}
    write_shards(path, items, lambda item: split_of[item.key], "test", max_samples_per_shard=10)
    return path


def names(paths, split=None) -> list[str]:
    return [shard.name for shard in find_shards(paths, split)]


def test_braces_patterns_and_lists_name_shards_in_order(folder: Path):
    wanted = [f"train-{i:06d}.tar" for i in range(3)]
    assert names(str(folder / "train-{000000..000002}.tar")) == wanted
    assert names(str(folder / "train-00000{0,1,2}.tar")) == wanted
    assert names(str(folder / "train-*.tar")) == wanted
    assert names(str(folder), "train") == names(str(folder / "manifest.json"), "train") == wanted
    assert names([str(folder / "train-000002.tar"), str(folder / "train-{000000..000001}.tar")]) == [
        wanted[2],
        *wanted[:2],
    ]
    assert names(f"file://{folder}/train-000001.tar") == wanted[1:2]
    assert [shard.known.num_samples for shard in find_shards(folder) if shard.known] == [10] * 4


def test_a_name_with_braces_of_its_own_is_a_file(folder: Path, tmp_path: Path):
    (tmp_path / "a{1,2}.tar").write_bytes((folder / "train-000000.tar").read_bytes())
    assert len(find_shards(str(tmp_path / "a{1,2}.tar"))) == 1


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ("nowhere-{0..2}.tar", "no shards at nowhere-0.tar"),
        ("a-{0..2.tar", "the braces of a-{0..2.tar do not match"),
        ([], "the list of paths is empty"),
    ],
)
def test_what_names_nothing_is_one_line(paths, message: str):
    with pytest.raises(ValueError, match=message) as error:
        find_shards(paths)
    assert "\n" not in str(error.value)


def test_a_shard_named_twice_is_refused(folder: Path):
    with pytest.raises(ValueError, match="train-000000.tar is named twice"):
        find_shards([str(folder / "train-*.tar"), str(folder / "train-000000.tar")])


def test_a_list_of_sets_has_the_split_of_each(folder: Path, tmp_path: Path):
    write_shards(tmp_path / "other", [sample(50)], lambda _: "train", "other")
    both = [str(folder), str(tmp_path / "other")]
    assert len(find_shards(both, "train")) == 4
    assert find_splits(both) == ["test", "train"]
    with pytest.raises(ValueError, match="other has no split 'test', only train"):
        find_shards(both, "test")


def test_a_source_takes_one_path_or_a_list_in_a_file_and_on_the_command_line():
    for given in ("a-{0,1}.tar", ["a.tar", "b.tar"]):
        data = from_mapping({"sources": {"a": {"path": given}}}, DataConfig)
        assert data.sources["a"].path == (tuple(given) if isinstance(given, list) else given)
    default = DataConfig({"a": SourceConfig("x.tar")})
    for words, wanted in (
        (["a-{0,1}.tar"], "a-{0,1}.tar"),
        (["a.tar", "b-{0,1}.tar"], ("a.tar", "b-{0,1}.tar")),
    ):
        assert parse_overrides(DataConfig, default, ["--sources.a.path", *words]).sources["a"].path == wanted


def test_a_digest_knows_names_sizes_and_contents_but_not_the_place(folder: Path, tmp_path: Path):
    moved = tmp_path / "moved"
    moved.mkdir()
    for file in folder.iterdir():
        (moved / file.name).write_bytes(file.read_bytes())
    assert describe(find_shards(moved)) == describe(find_shards(folder))
    bare = [describe(find_shards(str(where / "*.tar"))) for where in (folder, moved)]
    assert bare[0] == bare[1] != describe(find_shards(folder))
    (moved / "train-000000.tar").rename(moved / "train-000009.tar")
    assert describe(find_shards(str(moved / "*.tar"))) != bare[0]


# -- pipes -----------------------------------------------------------------------------------------------------------

FAST = RemoteConfig(retries=2, backoff=0.01, timeout=2)


def stream_of(path, **options) -> SampleStream:
    return SampleStream("a", SourceConfig(path, window=7, remote=FAST, **options), seed=0)


def test_pipes_with_braces_give_what_the_files_give(folder: Path):
    found = [each.key for each in stream_of(f"pipe:cat {folder}/train-{{000000..000002}}.tar").epoch()]
    assert sorted(found) == sorted(f"sample{i}" for i in range(30))
    assert len(list(read_shards(find_shards(f"pipe:gzip -c {folder}/train-000001.tar"), Rejects()))) == 10


def test_a_command_that_fails_stops_with_its_name_and_is_not_counted_away(folder: Path):
    for command in ("exit 3", f"head -c 5000 {folder}/train-000000.tar; exit 3", "no-such-command 2>&-"):
        with pytest.raises(ValueError, match="pipe:.*cannot be read.*exit.*tried 3 times"):
            list(stream_of(f"pipe:{command}", max_broken=1.0).epoch())


def test_a_command_that_fails_at_times_is_run_again_and_nothing_is_repeated(folder: Path, tmp_path: Path):
    tar, flag = folder / "train-000000.tar", tmp_path / "failed"
    command = f"if [ -e {flag} ]; then cat {tar}; else touch {flag}; head -c 6000 {tar}; exit 1; fi"
    found = [each.key for each in stream_of(f"pipe:{command}").epoch()]
    assert flag.exists() and sorted(found) == sorted(f"sample{i}" for i in range(10))


def test_a_command_that_gives_half_a_tar_and_is_content_is_a_truncated_shard(folder: Path):
    half = (folder / "train-000000.tar").stat().st_size // 2
    stream = stream_of(f"pipe:head -c {half} {folder}/train-000000.tar", max_broken=1.0)
    assert 0 < len(list(stream.epoch())) < 10
    assert dict(stream.rejects.shards) == {"truncated shard": 1}
