"""Bytes of shards that are not files: web addresses, pipes, and the other schemes that webdataset opens.

WebDataset opens web addresses by `curl`, which must be installed and starts a download anew where it broke off; here
the standard library does it, so that a download goes on at its byte. What cannot be read after some tries is an error
that names the address: data that is out of reach is not broken data, which would be counted and left out.
"""

import http.client
import io
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeVar
from urllib.parse import urlsplit

from webdataset.gopen import gopen

REMOTE = re.compile(r"pipe:|(?!file:)[a-z][a-z0-9+.-]*://", re.IGNORECASE)
PASSING = (408, 425, 429, 500, 502, 503, 504)  # HTTP statuses that another try may not meet again
TAIL = 1024  # the zeros that end a tar


class Unreachable(ValueError):
    """A shard could not be read; names its address or file, the reason and the number of tries."""


@dataclass(frozen=True)
class RemoteConfig:
    retries: int = 5
    """further tries to read a shard where a connection or a disk fails, before the run stops; anew after every byte
    that came"""
    backoff: float = 1.0
    """seconds before the first of them; doubles with each"""
    timeout: float = 60.0
    """seconds without a byte after which a web address is tried again"""

    def __post_init__(self) -> None:
        if self.retries < 0 or self.backoff < 0 or self.timeout <= 0:
            raise ValueError(
                f"retries {self.retries} and backoff {self.backoff} must be >= 0, timeout {self.timeout} above 0"
            )


def is_remote(url: str) -> bool:
    """Whether `url` is anything but a local path."""
    return REMOTE.match(url) is not None


class _Bytes(Protocol):
    def read(self, size: int, /) -> bytes: ...
    def close(self) -> object: ...


class _Failure(Exception):
    """One try failed; `final` where another would not help."""

    def __init__(self, reason: str, final: bool = False) -> None:
        super().__init__(reason)
        self.final = final


FAILURES = (_Failure, OSError, http.client.HTTPException)
T = TypeVar("T")


def retried(read: Callable[[], T], url: str, config: RemoteConfig) -> T:
    """What `read` gives, tried again where it fails. Raises Unreachable."""
    tries = 0
    while True:
        try:
            return read()
        except FAILURES as error:
            failure = error if isinstance(error, _Failure) else _Failure(_reason(error, config))
            tries += 1
            if failure.final or tries > config.retries:
                times = f", tried {tries} times" if tries > 1 else ""
                raise Unreachable(f"{url} cannot be read: {failure}{times}") from None
            time.sleep(config.backoff * 2 ** (tries - 1))


class RemoteStream(io.RawIOBase):
    """The bytes behind a remote address, once and in order, whatever happens to the connections that bring them.

    `num_bytes` is how many there must be, where that is known. Raises Unreachable.
    """

    def __init__(self, url: str, config: RemoteConfig, num_bytes: int | None = None) -> None:
        self.url = url
        self.config = config
        self.num_bytes = num_bytes
        self.position = 0
        self.head = self.tail = b""
        """the first bytes that came, and the last, up to TAIL"""
        self._open = _open_http if urlsplit(url).scheme.lower() in ("http", "https") else _open_command
        self._source: _Bytes | None = None
        self._version: str | None = None
        self._ended = False

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1, /) -> bytes:
        if size < 0:
            return self.readall()
        if self._ended or not size:
            return b""
        chunk = retried(partial(self._read_once, size), self.url, self.config)
        self.head = self.head or chunk[:TAIL]
        self.position += len(chunk)
        self.tail = (self.tail + chunk)[-TAIL:]
        return chunk

    def readinto(self, buffer, /) -> int:
        view = memoryview(buffer).cast("B")
        chunk = self.read(len(view))
        view[: len(chunk)] = chunk
        return len(chunk)

    def _read_once(self, size: int) -> bytes:
        try:
            return self._read_on(size)
        except FAILURES:
            self._drop()
            raise

    def _read_on(self, size: int) -> bytes:
        if self._source is None:
            opened = self._open(self.url, self.position, self.config.timeout)
            self._source = opened.source
            self._check(opened)
            self._skip(self.position - opened.start)  # what it gave again
        chunk = self._source.read(size)
        if not chunk:
            if self.num_bytes is not None and self.position < self.num_bytes:
                raise _Failure(f"it ended after {self.position} of {self.num_bytes} bytes")
            self._close_at_end()
            self._ended = True
        return chunk

    def _skip(self, num_bytes: int) -> None:
        assert self._source is not None
        while num_bytes:
            chunk = self._source.read(min(num_bytes, 1 << 16))
            if not chunk:
                raise _Failure(f"it ended before byte {self.position}, to which it was read before")
            num_bytes -= len(chunk)

    def _check(self, opened: "_Opened") -> None:
        """The same bytes as before: parts of two versions would make a shard of nonsense."""
        if opened.num_bytes is not None:
            if self.num_bytes not in (None, opened.num_bytes):
                raise _Failure(
                    f"it has {opened.num_bytes} bytes where {self.num_bytes} are expected", final=True
                )
            self.num_bytes = opened.num_bytes
        if opened.version is not None:
            if self._version not in (None, opened.version):
                raise _Failure("it changed while it was read", final=True)
            self._version = opened.version

    def _close_at_end(self) -> None:
        source, self._source = self._source, None
        if source is not None:
            source.close()  # a pipe says only now that its command failed

    def _drop(self) -> None:
        source, self._source = self._source, None
        if source is not None:
            with suppress(OSError):  # a command that was stopped before its end says so
                source.close()

    def close(self) -> None:
        if not self.closed:
            self._drop()
        super().close()


@dataclass(frozen=True)
class _Opened:
    source: _Bytes
    start: int = 0
    """the byte that comes first"""
    num_bytes: int | None = None
    """of the whole"""
    version: str | None = None


def _open_http(url: str, position: int, timeout: float) -> _Opened:
    headers = {"User-Agent": "mmgen", "Accept-Encoding": "identity"}
    if position:
        headers["Range"] = f"bytes={position}-"
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=timeout)
    except urllib.error.HTTPError as error:
        raise _Failure(f"{error.code} {error.reason}", final=error.code not in PASSING) from None
    except http.client.InvalidURL as error:
        raise _Failure(str(error), final=True) from None
    version = response.headers.get("ETag") or response.headers.get("Last-Modified")
    length = response.headers.get("Content-Length")
    num_bytes = None if length is None else int(length)
    if response.status != 206:
        return _Opened(response, 0, num_bytes, version)
    found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
    if found is None or int(found[1]) > position:
        raise _Failure(f"it was asked for byte {position} on and did not say what it sent", final=True)
    return _Opened(response, int(found[1]), None if found[2] == "*" else int(found[2]), version)


def _open_command(url: str, position: int, timeout: float) -> _Opened:
    """What webdataset runs a command for: `pipe:COMMAND`, s3://, gs:// and others. It begins from the start."""
    try:
        return _Opened(gopen(url))
    except (ValueError, ImportError) as error:  # no such scheme, or a package for it is missing
        raise _Failure(str(error), final=True) from None


def _reason(error: Exception, config: RemoteConfig) -> str:
    inner = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(inner, TimeoutError):
        return f"no answer within {config.timeout:g} s"
    return getattr(inner, "strerror", None) or str(inner) or type(inner).__name__


def read_remote(url: str, config: RemoteConfig) -> bytes:
    """All bytes behind an address. Raises Unreachable."""
    with RemoteStream(url, config) as stream:
        return b"".join(iter(partial(stream.read, 1 << 16), b""))
