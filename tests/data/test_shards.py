"""Shards: what is written is read back, the same bytes each time, and nothing broken passes unnoticed."""

import io
import json
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmgen.data.find import find_shards
from mmgen.data.read import read_shard, read_shards
from mmgen.data.rejects import Rejects
from mmgen.data.shards import Manifest, read_manifest, verify, write_shards
from mmgen.sequence import Sample


def picture(seed: int, width: int = 12, height: int = 8) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def same_pixels(a: Image.Image | None, b: Image.Image | None) -> bool:
    assert a is not None and b is not None
    return a.size == b.size and a.mode == b.mode and a.tobytes() == b.tobytes()


def captioned(count: int) -> list[Sample]:
    return [
        Sample(
            key=f"sample-{index}",
            shard="",
            captions={"text": f"número {index}", "group": "a thing"},
            picture=picture(index),
            metadata={"index": index, "tags": ["a", "b"]},
        )
        for index in range(count)
    ]


def by_parity(sample: Sample) -> str:
    return "odd" if sample.metadata["index"] % 2 else "even"


def write(folder: Path, samples: list[Sample], **options) -> Manifest:
    return write_shards(folder, samples, options.pop("split_of", lambda sample: "train"), "test", **options)


def png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def make_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    """A tar as other tools write it: Python's own tarfile, no manifest."""
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def read_all(path: Path, **options) -> tuple[list[Sample], Rejects]:
    rejects = Rejects(max_rate=1.0)
    return list(read_shard(path, rejects, **options)), rejects


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("picture_format", ["webp", "png"])
def test_captioned_pictures_come_back_exactly(tmp_path, picture_format, compress):
    written = captioned(7)
    manifest = write(
        tmp_path / "set",
        written,
        split_of=by_parity,
        picture_format=picture_format,
        compress=compress,
        max_samples_per_shard=3,
        licences=["MIT"],
        sources={"package": "1.0"},
    )
    assert (
        manifest.num_samples("even") == 4 and manifest.num_samples("odd") == 3 and manifest.num_samples() == 7
    )
    assert [shard.num_samples for shard in manifest.splits["even"]] == [3, 1]
    assert manifest.columns == tuple(sorted(["json", "txt", picture_format]))
    assert read_manifest(tmp_path / "set") == manifest == verify(tmp_path / "set")

    rejects = Rejects(max_rate=0)
    read = list(read_shards(find_shards(tmp_path / "set"), rejects))
    assert rejects.num_kept == 7
    assert sorted(sample.key for sample in read) == [sample.key for sample in written]
    for sample in read:
        original = written[sample.metadata["index"]]
        assert sample.captions == original.captions and sample.metadata == original.metadata
        assert same_pixels(sample.picture, original.picture)
    odd = list(read_shards(find_shards(tmp_path / "set", "odd"), Rejects()))
    assert [sample.metadata["index"] for sample in odd] == [1, 3, 5]
    assert {Path(sample.shard).name for sample in odd} == {manifest.splits["odd"][0].path}


def test_latents_and_interleaved_parts_come_back_exactly(tmp_path):
    latents = np.random.default_rng(0).standard_normal((8, 4, 6)).astype(np.float16)
    parts = ("first", picture(1), picture(2), "then\nmore", picture(3))
    write(
        tmp_path / "set",
        [
            Sample("latents", "", captions={"text": "a thing"}, latents=latents),
            Sample("document", "", parts=parts, metadata={"title": "t"}),
        ],
    )
    with_latents, document = read_shards(find_shards(tmp_path / "set"), Rejects())
    assert with_latents.latents is not None and with_latents.latents.dtype == np.float16
    assert np.array_equal(with_latents.latents, latents) and with_latents.picture is None
    assert document.metadata == {"title": "t"} and len(document.parts) == len(parts)
    for read, original in zip(document.parts, parts, strict=True):
        if isinstance(original, str):
            assert read == original
        else:
            assert not isinstance(read, str) and same_pixels(read, original)


def test_transparent_pictures_are_read_over_white(tmp_path):
    transparent = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    transparent.putpixel((1, 2), (0, 0, 255, 255))
    write(tmp_path / "set", [Sample("a", "", captions={"text": "a"}, picture=transparent)])
    (sample,) = read_shards(find_shards(tmp_path / "set"), Rejects())
    assert sample.picture is not None and sample.picture.mode == "RGB"
    assert sample.picture.getpixel((0, 0)) == (255, 255, 255) and sample.picture.getpixel((1, 2)) == (
        0,
        0,
        255,
    )


def test_the_same_samples_give_the_same_bytes(tmp_path):
    one = write(tmp_path / "one", captioned(5), compress=True)
    two = write(tmp_path / "two", captioned(5), compress=True)
    other = write(tmp_path / "three", captioned(4), compress=True)
    assert one.splits == two.splits != other.splits


def test_a_data_set_is_written_whole_or_not_at_all(tmp_path):
    def failing():
        yield from captioned(2)
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError):
        write(tmp_path / "set", failing())  # pyright: ignore[reportArgumentType]
    assert list(tmp_path.iterdir()) == []
    write(tmp_path / "set", captioned(2))
    with pytest.raises(ValueError, match="exists already"):
        write(tmp_path / "set", captioned(3))
    with pytest.raises(RuntimeError):
        write(tmp_path / "set", failing(), overwrite=True)  # pyright: ignore[reportArgumentType]
    assert verify(tmp_path / "set").num_samples() == 2
    write(tmp_path / "set", captioned(3), overwrite=True)
    assert verify(tmp_path / "set").num_samples() == 3 and len(list(tmp_path.iterdir())) == 1


def test_a_folder_that_is_no_data_set_is_never_overwritten(tmp_path):
    (tmp_path / "photo.jpg").write_bytes(b"dear")
    with pytest.raises(ValueError, match="no data set"):
        write(tmp_path, captioned(1), overwrite=True)
    assert (tmp_path / "photo.jpg").read_bytes() == b"dear"


@pytest.mark.parametrize("keys", [["a.b"], [""], ["twice", "twice"]])
def test_keys_that_would_mix_samples_up_are_refused(tmp_path, keys):
    with pytest.raises(ValueError, match="key"):
        write(tmp_path / "set", [Sample(key, "", captions={"text": "a"}) for key in keys])


def test_no_samples_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no samples"):
        write(tmp_path / "set", [])


def test_a_layout_of_img2dataset_reads_as_it_is(tmp_path):
    stream = io.BytesIO()
    picture(0, 32, 32).save(stream, "JPEG")
    metadata = {"url": "u", "caption": "a cat", "status": "success", "width": 32, "height": 32}
    make_tar(
        tmp_path / "00000.tar",
        [
            ("000000000.jpg", stream.getvalue()),
            ("000000000.json", json.dumps(metadata).encode()),
            ("000000000.txt", b"a cat"),
            ("000000001.jpg", stream.getvalue()),
            ("000000001.txt", b"a dog"),
        ],
    )
    for where in (tmp_path, tmp_path / "*.tar", tmp_path / "00000.tar"):
        cat, dog = read_shards(find_shards(where, "train"), Rejects())
        assert (
            cat.captions == {"text": "a cat"}
            and cat.metadata == metadata
            and dog.captions == {"text": "a dog"}
        )
        assert cat.picture is not None and cat.picture.size == (32, 32)


def array(values: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, values, allow_pickle=True)
    return stream.getvalue()


GOOD = [("good.png", png(picture(0))), ("good.txt", b"fine")]
BIG = png(Image.new("RGB", (100, 100)))
HALF = png(picture(1))[:200]


@pytest.mark.parametrize(
    ("reason", "members"),
    [
        ("corrupt picture", [("bad.png", b"\x89PNG\r\n\x1a\nnothing"), ("bad.txt", b"a")]),
        ("corrupt picture", [("bad.png", HALF), ("bad.txt", b"a")]),
        ("missing caption", [("bad.png", png(picture(1)))]),
        ("missing caption", [("bad.png", png(picture(1))), ("bad.txt", b" \n")]),
        ("picture too large", [("bad.png", BIG), ("bad.txt", b"a")]),
        ("bad json", [("bad.json", b"{"), ("bad.txt", b"a")]),
        ("bad json", [("bad.json", b"[1]"), ("bad.txt", b"a")]),
        ("bad json", [("bad.json", b"[" * 100_000), ("bad.txt", b"a")]),
        ("text is not utf-8", [("bad.json", b'{"captions": {"name": "a \\ud800 b"}}'), ("bad.txt", b"a")]),
        ("bad parts", [("bad.json", b'{"parts": [{"text": "\\ud800"}]}')]),
        ("bad captions", [("bad.json", b'{"captions": {"name": 3}}'), ("bad.txt", b"a")]),
        ("text is not utf-8", [("bad.txt", b"\xff\xfe\xff")]),
        ("bad latents", [("bad.latents.npy", b"\x93NUMPY"), ("bad.txt", b"a")]),
        (
            "bad latents",
            [("bad.latents.npy", array(np.full((4, 2, 2), np.nan, np.float16))), ("bad.txt", b"a")],
        ),
        ("bad parts", [("bad.json", b'{"parts": []}')]),
        ("missing picture of a part", [("bad.json", b'{"parts": [{"picture": "0.png"}]}')]),
    ],
)
def test_broken_samples_are_counted_by_reason_and_left_out(tmp_path, reason, members):
    path = make_tar(tmp_path / "a.tar", [*members, *GOOD])
    samples, rejects = read_all(path, max_pixels=99 * 100)
    assert [sample.key for sample in samples] == ["good"]
    assert dict(rejects.samples) == {reason: 1} and rejects.num_kept == 1 and not rejects.shards


def test_latents_of_objects_are_never_unpickled(tmp_path):
    data = array(np.array([{"a": 1}], dtype=object))
    _, rejects = read_all(make_tar(tmp_path / "a.tar", [("a.latents.npy", data), ("a.txt", b"a")]))
    assert dict(rejects.samples) == {"bad latents": 1}


def test_an_absurd_size_is_refused_from_the_header_alone(tmp_path):
    """A PNG that claims 60000 x 60000 pixels and holds none: decoding would say corrupt, or eat 10 GB."""
    header = bytearray(png(Image.new("RGB", (1, 1))))
    header[16:24] = (60000).to_bytes(4, "big") * 2
    header[29:33] = zlib.crc32(bytes(header[12:29])).to_bytes(4, "big")
    _, rejects = read_all(make_tar(tmp_path / "a.tar", [("a.png", bytes(header)), ("a.txt", b"a")]))
    assert dict(rejects.samples) == {"picture too large": 1}


def test_broken_shards_are_counted_by_reason(tmp_path):
    good = make_tar(tmp_path / "good.tar", GOOD)
    (tmp_path / "zero.tar").write_bytes(b"")
    make_tar(tmp_path / "nothing.tar", [])
    (tmp_path / "no.tar").write_bytes(b"this is a text file, not a tar " * 100)
    make_tar(tmp_path / "twice.tar", [("a.txt", b"a"), ("a.txt", b"b")])
    big = make_tar(tmp_path / "cut.tar", [(f"{index}.txt", b"x" * 2000) for index in range(10)])
    big.write_bytes(big.read_bytes()[: 512 * 12 + 100])  # within a member
    make_tar(tmp_path / "short.tar", [(f"{index}.txt", b"x" * 512) for index in range(10)])
    (tmp_path / "short.tar").write_bytes((tmp_path / "short.tar").read_bytes()[: 1024 * 5])  # between members

    expected = {
        "zero.tar": "empty shard",
        "nothing.tar": "empty shard",
        "no.tar": "not a tar",
        "twice.tar": "two members of one name",
        "cut.tar": "truncated shard",
        "short.tar": "truncated shard",
        "gone.tar": "missing shard",
    }
    rejects = Rejects(max_rate=1.0)
    for name, reason in expected.items():
        before = rejects.shards[reason]
        list(read_shard(tmp_path / name, rejects))
        assert rejects.shards[reason] == before + 1, name
    assert [sample.key for sample in read_shard(good, rejects)] == ["good"]
    assert rejects.num_shards == len(expected) + 1 and rejects.shards.total() == len(expected)


def test_samples_before_a_truncation_are_kept_and_the_cut_one_is_not(tmp_path):
    members = []
    for index in range(6):
        members += [(f"{index}.json", b'{"captions": {"name": "n"}}'), (f"{index}.txt", b"x" * 2000)]
    path = make_tar(tmp_path / "a.tar", members)
    path.write_bytes(path.read_bytes()[: 512 * 7 * 2 + 512 * 3])  # the third has its json, but not its text
    samples, rejects = read_all(path)
    assert [sample.key for sample in samples] == ["0", "1"] and dict(rejects.shards) == {"truncated shard": 1}


def test_too_many_broken_samples_raise_with_the_file_and_the_counts(tmp_path):
    bad = [(f"bad{index:03d}.png", b"no picture") for index in range(10)]
    good = [(f"good{index:03d}.txt", b"fine") for index in range(90)]
    members = [entry for name, data in bad for entry in ((name, data), (name.replace("png", "txt"), b"a"))]
    path = make_tar(tmp_path / "web.tar", [*good, *members])
    with pytest.raises(ValueError, match=r"web\.tar: bad\d+.*corrupt picture \d+.*accepted"):
        list(read_shard(path, Rejects(max_rate=0.05, min_samples=50)))
    assert len(list(read_shard(path, Rejects(max_rate=0.1, min_samples=50)))) == 90
    assert len(list(read_shard(path, Rejects(max_rate=0.05, min_samples=1000)))) == 90  # too few to judge by


def test_a_pass_over_too_many_broken_shards_raises_however_few_there_are(tmp_path):
    good = make_tar(tmp_path / "good.tar", GOOD)
    (tmp_path / "no.tar").write_bytes(b"no tar" * 1000)
    with pytest.raises(ValueError, match="not a tar 1"):
        list(read_shards([good, tmp_path / "no.tar"], Rejects(max_rate=0.05)))


def test_not_one_usable_sample_is_an_error(tmp_path):
    path = make_tar(tmp_path / "a.tar", [("a.png", b"no picture"), ("a.txt", b"a")])
    with pytest.raises(ValueError, match=r"no usable sample in .*a\.tar.*corrupt picture 1"):
        list(read_shards([path], Rejects()))


def test_verify_and_find_name_the_shard_that_is_wrong(tmp_path):
    manifest = write(tmp_path / "set", captioned(3))
    path = tmp_path / "set" / manifest.splits["train"][0].path
    data = path.read_bytes()
    path.write_bytes(data[:1000] + bytes([data[1000] ^ 1]) + data[1001:])
    assert [shard.path for shard in find_shards(tmp_path / "set")] == [path]  # the size is right
    with pytest.raises(ValueError, match=f"{path.name} is damaged"):
        verify(tmp_path / "set")
    path.write_bytes(data[:1000])
    with pytest.raises(ValueError, match=f"{path.name} has 1000 bytes"):
        find_shards(tmp_path / "set", "train")
    path.unlink()
    with pytest.raises(ValueError, match=f"{path.name} is missing"):
        verify(tmp_path / "set")


def test_what_is_no_data_set_is_a_clear_error(tmp_path):
    with pytest.raises(ValueError, match=r"no manifest\.json"):
        read_manifest(tmp_path)
    with pytest.raises(ValueError, match="no shards at"):
        find_shards(tmp_path)
    with pytest.raises(ValueError, match="no shards at"):
        find_shards(tmp_path / "*.tar")
    make_tar(tmp_path / "a.tar", GOOD)
    with pytest.raises(ValueError, match="no split 'validation'"):
        find_shards(tmp_path, "validation")
    (tmp_path / "manifest.json").write_text('{"splits": {"train": [{"path": "a.tar"}]}}')
    with pytest.raises(ValueError, match="not a manifest"):
        read_manifest(tmp_path)
    write(tmp_path / "set", captioned(1))
    with pytest.raises(ValueError, match="no split 'test', only train"):
        find_shards(tmp_path / "set", "test")
