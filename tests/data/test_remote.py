"""Shards over HTTP, from a real server that fails in the ways that servers do; and on disks that fail."""

import errno
import gzip
import os
import tarfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from mmgen.data.find import find_shards, find_splits
from mmgen.data.listing import list_tar, tar_members
from mmgen.data.remote import RemoteConfig, RemoteStream, Unreachable
from mmgen.data.shards import write_shards
from mmgen.data.source import SourceConfig
from mmgen.data.streams import SampleStream
from tests.parts import sample

FAST = RemoteConfig(retries=3, backoff=0.01, timeout=1)


@dataclass
class Faults:
    """What the server does wrong, and what it was asked."""

    unavailable: int = 0
    """503 for so many requests"""
    cut: list[int] = field(default_factory=list)
    """bytes after which the next responses end, though their Content-Length says more"""
    hang: int = 0
    """so many requests are accepted and never answered"""
    ranges: bool = True
    status: int | None = None
    asked: list[str] = field(default_factory=list)


class Handler(SimpleHTTPRequestHandler):
    def __init__(self, faults: Faults, *args, **options):
        self.faults = faults
        super().__init__(*args, **options)

    def do_GET(self) -> None:
        faults = self.faults
        path = Path(self.translate_path(self.path))
        if path.is_dir():
            self.send_error(404)
            return
        wanted = self.headers.get("Range")
        faults.asked.append(f"{path.name} {wanted or ''}".strip())
        if faults.hang:
            faults.hang -= 1
            threading.Event().wait(1.5)
            return
        if faults.unavailable:
            faults.unavailable -= 1
            self.send_error(503)
            return
        if faults.status is not None or not path.is_file():
            self.send_error(faults.status or 404)
            return
        data = path.read_bytes()
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and faults.ranges else 0
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        body = data[start:]
        self.wfile.write(body[: faults.cut.pop(0)] if faults.cut else body)

    def log_message(self, format: str, *args) -> None:
        pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write_shards(
        root / "set", [sample(i) for i in range(40)], lambda _: "train", "test", max_samples_per_shard=10
    )
    return root


@pytest.fixture
def server(folder: Path) -> Iterator[tuple[str, Faults]]:
    faults = Faults()
    http = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, faults, directory=str(folder)))
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{http.server_address[1]}", faults
    http.shutdown()
    http.server_close()


def stream_of(path: str, remote: RemoteConfig = FAST, **options) -> SampleStream:
    return SampleStream("a", SourceConfig(path, window=7, remote=remote, max_broken=1.0, **options), seed=0)


def keys(stream: SampleStream) -> list[str]:
    return sorted(each.key for each in stream.epoch())


ALL = sorted(f"sample{i}" for i in range(40))


@pytest.mark.parametrize("path", ["set/", "set/manifest.json", "set/train-{000000..000003}.tar"])
def test_a_set_behind_an_address_is_that_in_the_folder(server: tuple[str, Faults], folder: Path, path: str):
    url, _ = server
    stream = stream_of(f"{url}/{path}")
    assert keys(stream) == ALL and not stream.rejects.shards
    local = stream_of(str(folder / "set"))
    if "{" not in path:
        assert [each.key for each in stream.epoch(1)] == [each.key for each in local.epoch(1)]
        assert stream.reader.describe() == local.reader.describe(), (
            "a run may go on where the data was moved to"
        )
        assert find_splits(f"{url}/{path}") == ["train"]


def test_streams_of_an_address_hold_each_sample_once(server: tuple[str, Faults]):
    url, faults = server
    config = SourceConfig(f"{url}/set/", window=7, remote=FAST)
    found = [each.key for part in range(4) for each in SampleStream("a", config, 0, part, 4).epoch()]
    assert sorted(found) == ALL
    assert len({name for name in faults.asked if name.endswith(".tar")}) == 4


def test_a_server_that_is_unavailable_for_a_while_is_asked_again(server: tuple[str, Faults]):
    url, faults = server
    faults.unavailable = 3
    assert len(keys(stream_of(f"{url}/set/train-000000.tar"))) == 10
    assert faults.asked.count("train-000000.tar") >= 4


@pytest.mark.parametrize("ranges", [True, False])
def test_a_body_that_breaks_off_goes_on_at_its_byte(server: tuple[str, Faults], ranges: bool):
    url, faults = server
    faults.cut, faults.ranges = [5000, 9000, 300], ranges
    stream = stream_of(f"{url}/set/train-000000.tar", cache_mb=0)
    assert len(keys(stream)) == 10 and not stream.rejects.shards
    assert "train-000000.tar bytes=5000-" in faults.asked


def test_a_server_that_hangs_is_asked_again(server: tuple[str, Faults]):
    url, faults = server
    faults.hang = 1
    assert len(keys(stream_of(f"{url}/set/train-000000.tar"))) == 10


def test_what_stays_unavailable_stops_with_the_address_and_the_reason(server: tuple[str, Faults]):
    url, faults = server
    faults.unavailable = 1000
    with pytest.raises(ValueError, match=rf"{url}/set/train-000000.tar cannot be read: 503 .*tried 4 times"):
        keys(stream_of(f"{url}/set/train-000000.tar"))


def test_what_is_not_there_stops_at_once(server: tuple[str, Faults]):
    url, faults = server
    with pytest.raises(ValueError, match=r"/set/gone.tar cannot be read: 404 Not Found$"):
        keys(stream_of(f"{url}/set/gone.tar"))
    assert len(faults.asked) == 1
    with pytest.raises(ValueError, match=r"/none/manifest.json cannot be read: 404"):
        find_shards(f"{url}/none/")


def test_a_body_that_always_breaks_off_stops_with_how_far_it_came(server: tuple[str, Faults]):
    url, faults = server
    faults.cut = [5000] + [0] * 100
    with pytest.raises(ValueError, match=r"it ended after 5000 of \d+ bytes, tried 4 times"):
        keys(stream_of(f"{url}/set/train-000000.tar"))


def test_a_server_that_died_stops_the_run_though_shards_were_read_before(
    server: tuple[str, Faults], folder: Path
):
    """A dead address is no broken shard: with max_broken 1 those would all be forgiven."""
    url, _ = server
    port = urlsplit(url).port
    dead = f"http://127.0.0.1:{port + 1 if port and port < 65000 else 1}/a.tar"
    stream = stream_of([str(folder / "set" / "train-000000.tar"), dead])  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"a.tar cannot be read: .*refused.*tried 4 times"):
        keys(stream)
    assert not stream.rejects.shards


def test_a_shard_that_is_broken_at_the_server_is_counted_as_a_local_one(
    server: tuple[str, Faults], folder: Path
):
    url, _ = server
    data = (folder / "set" / "train-000000.tar").read_bytes()
    (folder / "half.tar").write_bytes(data[: len(data) // 2])
    stream = stream_of(f"{url}/half.tar")
    assert 0 < len(keys(stream)) < 10
    assert dict(stream.rejects.shards) == {"truncated shard": 1}


def test_a_shard_of_another_size_than_its_manifest_says_is_refused(
    server: tuple[str, Faults], tmp_path: Path, folder: Path
):
    url, _ = server
    (shard, *_) = find_shards(f"{url}/set/", remote=FAST)
    assert shard.num_bytes is not None
    with pytest.raises(Unreachable, match="bytes where .* are expected"):
        RemoteStream(shard.url, FAST, shard.num_bytes + 1).read(10)


def test_the_backoff_doubles(server: tuple[str, Faults], monkeypatch: pytest.MonkeyPatch):
    url, faults = server
    faults.unavailable = 1000
    slept: list[float] = []
    monkeypatch.setattr("mmgen.data.remote.time.sleep", slept.append)
    with pytest.raises(Unreachable):
        RemoteStream(f"{url}/set/train-000000.tar", RemoteConfig(3, 0.5, 1)).read(10)
    assert slept == [0.5, 1.0, 2.0]


# -- disks -----------------------------------------------------------------------------------------------------------


def failing(call: Callable, times: float, path: Path) -> Callable:
    """`call`, which raises an error of the disk the first `times` that it is asked for a file like `path`."""
    left = times

    def faulty(where: Any, *args: Any) -> Any:
        nonlocal left
        name = os.readlink(f"/proc/self/fd/{where}") if isinstance(where, int) else str(where)
        if name == str(path) and left > 0:
            left -= 1
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return call(where, *args)

    return faulty


@pytest.mark.parametrize("call", ["os.pread", "os.open", "mmgen.data.read.list_tar"])
def test_a_disk_that_fails_at_times_loses_no_sample(folder: Path, monkeypatch: pytest.MonkeyPatch, call: str):
    path = folder / "set" / "train-000001.tar"
    whole = keys(stream_of(str(folder / "set")))
    original = list_tar if call.endswith("list_tar") else getattr(os, call.removeprefix("os."))
    monkeypatch.setattr(call, failing(original, FAST.retries, path))
    stream = stream_of(str(folder / "set"))
    assert keys(stream) == whole
    assert not stream.rejects.shards


@pytest.mark.parametrize("call", ["os.pread", "os.open", "mmgen.data.read.list_tar"])
def test_a_disk_that_goes_on_failing_stops_with_the_file_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, call: str
):
    """It is no broken shard: with max_broken 1 the rest of it would be lost without a word."""
    path = folder / "set" / "train-000001.tar"
    original = list_tar if call.endswith("list_tar") else getattr(os, call.removeprefix("os."))
    monkeypatch.setattr(call, failing(original, float("inf"), path))
    with pytest.raises(
        Unreachable, match=r"train-000001\.tar cannot be read: Input/output error, tried 4 times"
    ):
        keys(stream_of(str(folder / "set")))


def test_a_disk_that_fails_under_a_compressed_tar_stops_too(folder: Path, monkeypatch: pytest.MonkeyPatch):
    path = folder / "set-000000.tar.gz"
    path.write_bytes(gzip.compress((folder / "set" / "train-000000.tar").read_bytes()))

    def fails(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
        yield next(tar_members(tar))
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("mmgen.data.read.tar_members", fails)
    with pytest.raises(Unreachable, match=r"set-000000\.tar\.gz cannot be read: Input/output error"):
        keys(stream_of(str(path)))
