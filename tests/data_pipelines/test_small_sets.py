"""Digits and Fashion-MNIST: every picture and label arrives, and what is damaged is said."""

import gzip
import struct
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

from data_pipelines import digits, fashion_mnist
from data_pipelines.common import run
from mmgen.data.find import find_shards
from mmgen.data.read import read_shards
from mmgen.data.rejects import Rejects
from mmgen.data.shards import verify


def test_digits_end_to_end(tmp_path, capsys):
    out = tmp_path / "digits"
    assert run(digits.Options, digits.build, [str(out)]) == 0
    assert "1,797 pictures" in capsys.readouterr().out
    pixels, labels = (np.asarray(array) for array in load_digits(return_X_y=True))
    splits = {s: list(read_shards(find_shards(out, s), Rejects(max_rate=0))) for s in verify(out).splits}
    assert set(splits) == {"train", "validation"}
    indices = [sample.metadata["index"] for samples in splits.values() for sample in samples]
    assert sorted(indices) == list(range(1797))  # disjoint and complete
    held_out = Counter(sample.metadata["digit"] for sample in splits["validation"])
    for digit, count in Counter(labels.tolist()).items():
        assert abs(held_out[digit] - 0.15 * count) <= 1  # stratified
    for sample in splits["validation"]:
        assert sample.picture is not None
        index = sample.metadata["index"]
        assert sample.metadata["digit"] == labels[index]
        read = np.asarray(sample.picture)[:, :, 0].astype(float) * 16 / 255
        assert np.array_equal(np.rint(read), pixels[index].reshape(8, 8))
    eight = next(sample for sample in splits["train"] if sample.metadata["digit"] == 8)
    assert eight.captions["text"] == eight.captions["name"] == "an eight"


def test_digits_refuse_a_bad_share(tmp_path, capsys):
    assert run(digits.Options, digits.build, [str(tmp_path / "set"), "--validation", "1.5"]) == 2
    assert capsys.readouterr().err == "error: --validation must be at least 0 and below 1, not 1.5\n"


def idx(array: np.ndarray) -> bytes:
    header = struct.pack(f">4B{array.ndim}i", 0, 0, 8, array.ndim, *array.shape)
    return gzip.compress(header + array.astype(np.uint8).tobytes())


@pytest.fixture
def fashion(tmp_path) -> Path:
    draw = np.random.default_rng(0)
    folder = tmp_path / "fashion"
    folder.mkdir()
    for name, count in (("train", 30), ("t10k", 20)):
        pictures = draw.integers(0, 256, (count, 28, 28))
        (folder / f"{name}-images-idx3-ubyte.gz").write_bytes(idx(pictures))
        (folder / f"{name}-labels-idx1-ubyte.gz").write_bytes(idx(np.arange(count) % 10))
    return folder


def test_fashion_mnist_end_to_end(fashion, tmp_path):
    assert (
        run(fashion_mnist.Options, fashion_mnist.build, [str(tmp_path / "out"), "--folder", str(fashion)])
        == 0
    )
    raw = fashion_mnist.read_idx(fashion / "t10k-images-idx3-ubyte.gz")
    assert verify(tmp_path / "out").num_samples("train") == 30
    test = list(read_shards(find_shards(tmp_path / "out", "test"), Rejects(max_rate=0)))
    assert len(test) == 20
    for index, sample in enumerate(test):
        assert sample.picture is not None and sample.picture.size == (32, 32)
        read = np.asarray(sample.picture)[:, :, 1]
        assert np.array_equal(read[2:30, 2:30], raw[index]) and read[:2].max() == 0
        assert sample.captions["text"] == fashion_mnist.CLASSES[index % 10][0]


def test_missing_or_damaged_fashion_mnist_is_said(fashion, tmp_path, capsys):
    arguments = [str(tmp_path / "out"), "--folder"]
    assert run(fashion_mnist.Options, fashion_mnist.build, [*arguments, str(tmp_path / "none")]) == 2
    assert "apt-get install dataset-fashion-mnist" in capsys.readouterr().err
    path = fashion / "train-images-idx3-ubyte.gz"
    whole = path.read_bytes()
    for data, message in (
        (whole[:-20], "no whole gzip file"),
        (gzip.compress(gzip.decompress(whole)[:-1]), "is truncated"),
        (gzip.compress(b"hello"), "no IDX file"),
    ):
        path.write_bytes(data)
        assert run(fashion_mnist.Options, fashion_mnist.build, [*arguments, str(fashion)]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.skipif(
    not fashion_mnist.Options(Path()).folder.is_dir(),
    reason="Debian's dataset-fashion-mnist is not installed",
)
def test_the_installed_fashion_mnist_is_complete():
    folder = fashion_mnist.Options(Path()).folder
    assert fashion_mnist.read_idx(folder / "train-images-idx3-ubyte.gz").shape == (60000, 28, 28)
    assert np.bincount(fashion_mnist.read_idx(folder / "t10k-labels-idx1-ubyte.gz")).tolist() == [1000] * 10
