"""The index of a tar: the same samples as reading it in order, and never an old one."""

import os
from pathlib import Path

import pytest

import mmgen.data.listing as listing_module
from mmgen.data.find import ShardFile
from mmgen.data.listing import Listing, index_path, list_tar, scan_tar
from mmgen.data.read import read_entries
from mmgen.data.remote import RemoteConfig
from mmgen.data.shards import write_shards
from tests.parts import sample

REMOTE = RemoteConfig()


@pytest.fixture
def tar(tmp_path: Path) -> Path:
    """Forty samples in one tar without its index."""
    write_shards(tmp_path / "set", [sample(i) for i in range(40)], lambda _: "train", "test")
    (path,) = (tmp_path / "set").glob("*.tar")
    index_path(path).unlink()
    return path


def keys(path: Path, listing: Listing | None, first: int = 0) -> list[str]:
    return [entry.key for entry in read_entries(ShardFile(str(path)), REMOTE, listing, first)]


@pytest.mark.parametrize("first", [0, 17, 39])
def test_samples_by_the_listing_are_those_in_order(tar: Path, first: int):
    whole = list(read_entries(ShardFile(str(tar)), REMOTE))
    placed = [entry.read() for entry in read_entries(ShardFile(str(tar)), REMOTE, scan_tar(tar), first)]
    assert placed == [entry.read() for entry in whole[first:]] and len(whole) == 40


def test_a_large_tar_gets_its_index_beside_it_and_a_small_one_does_not(
    tar: Path, monkeypatch: pytest.MonkeyPatch
):
    list_tar(tar)
    assert not index_path(tar).exists()
    monkeypatch.setattr(listing_module, "INDEX_FROM", 40)
    scanned = list_tar(tar)
    assert index_path(tar).is_file()
    monkeypatch.setattr(listing_module, "scan_tar", lambda path: pytest.fail("the index says it"))
    assert keys(tar, list_tar(tar)) == keys(tar, scanned)


@pytest.mark.parametrize("fault", ["older", "other size", "nonsense", "columns"])
def test_an_index_that_does_not_fit_is_not_believed(tar: Path, monkeypatch: pytest.MonkeyPatch, fault: str):
    monkeypatch.setattr(listing_module, "INDEX_FROM", 40)
    list_tar(tar)
    beside = index_path(tar)
    wrong = beside.read_text().replace("sample3", "sample_")
    if fault == "other size":
        wrong = wrong.replace(str(tar.stat().st_size), "1")
    beside.write_text("no json" if fault == "nonsense" else wrong)
    if fault == "columns":
        beside.write_text(wrong.replace('"keys":["', '"keys":["more","'))
    if fault == "older":
        os.utime(beside, ns=(0, tar.stat().st_mtime_ns - 1))
    assert "sample3" in keys(tar, list_tar(tar))


def test_a_place_that_cannot_be_written_costs_time_alone(tar: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(listing_module, "INDEX_FROM", 40)
    (index_path(tar) / "occupied").mkdir(parents=True)  # no file can take its place
    assert len(keys(tar, list_tar(tar))) == 40
    assert sorted(path.name for path in tar.parent.iterdir()) == sorted(
        ["manifest.json", tar.name, index_path(tar).name]
    )
