import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from mmgen.cli.main import main
from mmgen.data.find import find_shards
from mmgen.data.read import read_shards
from mmgen.data.rejects import Rejects
from mmgen.data.shards import read_manifest, verify, write_shards
from mmgen.sequence import Sample
from mmgen.tokenization.assets import verify_asset
from mmgen.tokenization.latents import load_latent_codec, picture_to_tensor
from mmgen.tokenization.text import load_text_tokenizer

TINY = ["--recipe.channels", "4", "--recipe.widths", "8", "8", "16", "--recipe.layers", "0", "1", "1"]
TINY += ["--recipe.num-samples", "32", "--recipe.batch-size", "8"]


def sample(index: int, size: int = 16) -> Sample:
    picture = Image.new("RGBA", (size, size), (0, 0, 0, 0))
    corner = index % (size // 2)
    colour = (index * 37 % 256, index * 91 % 256, index * 53 % 256, 255)
    ImageDraw.Draw(picture).rectangle([corner, 2, corner + 5, 9], fill=colour)
    return Sample(
        f"s{index:03d}",
        "",
        {"text": f"box number {index} in colour {colour[:3]}", "group": "a box"},
        picture,
        metadata={"corner": corner},
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "boxes"
    samples = [
        *map(sample, range(40)),
        Sample("text-only", "", {"text": "no picture here"}),
        sample(90, size=32),
    ]
    write_shards(
        folder,
        samples,
        lambda s: "unseen_concepts" if s.key in ("s003", "s017") else "train",
        "boxes",
        "coloured boxes",
        ("MIT",),
        {"boxes": "1.0"},
        "Drawn here.",
        max_samples_per_shard=16,
    )
    return folder


@pytest.fixture(scope="module")
def latents(data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("codec")
    work, out = folder / "work", folder / "boxes-latents"
    arguments = ["--data", str(data), "--out", str(out), "--work", str(work), "--size", "16", *TINY]
    assert main(["tokenizer", "train-latents", *arguments]) == 0
    return out


def samples_of(folder: Path, split: str) -> list[Sample]:
    return list(read_shards(find_shards(folder, split), Rejects()))


def test_train_latents_writes_a_verified_folder_with_its_command(latents):
    verify_asset(latents)
    assert (latents / "recipe.yaml").read_text().startswith("command: mmgen tokenizer train-latents --data ")
    assert load_latent_codec(str(latents)).channels == 4
    log = [json.loads(line) for line in (latents.parent / "work" / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log] == [4] and log[0]["psnr"] > 0


def test_encode_copies_the_data_set_with_latents(data, latents, tmp_path, capsys):
    out = tmp_path / "encoded"
    arguments = ["--data", str(data), "--latents", str(latents), "--out", str(out), "--batch-size", "8"]
    assert main(["tokenizer", "encode", *arguments]) == 0
    assert "42 samples, latents of 4 channels" in capsys.readouterr().out
    codec = load_latent_codec(str(latents))
    manifest = verify(out)
    old = read_manifest(data)
    assert manifest.sources == {"boxes": "1.0", "latents": f"boxes-latents {codec.fingerprint}"}
    assert (manifest.name, manifest.licences) == (
        old.name,
        old.licences,
    ) and "latents.npy" in manifest.columns
    assert (out / "ATTRIBUTION.md").read_text() == "Drawn here."
    for split in ("train", "unseen_concepts"):
        before, after = samples_of(data, split), samples_of(out, split)
        assert [s.key for s in after] == [s.key for s in before]
        for one, other in zip(before, after, strict=True):
            assert other.captions == one.captions and other.metadata == one.metadata
            if one.picture is None:
                assert other.picture is None and other.latents is None
                continue
            assert other.picture is not None and other.picture.tobytes() == one.picture.tobytes()
            side = one.picture.height // 4
            assert other.latents is not None and other.latents.dtype == np.float16
            assert other.latents.shape == (4, side, side)
            expected = codec.encode(picture_to_tensor(one.picture)[None])[0]
            torch.testing.assert_close(
                torch.from_numpy(other.latents).float(), expected, atol=5e-3, rtol=2e-3
            )


def test_encode_reads_a_folder_of_tars_without_manifest(data, latents, tmp_path):
    (tmp_path / "plain").mkdir()
    for shard in find_shards(data, "train"):
        assert shard.path is not None
        (tmp_path / "plain" / shard.name).write_bytes(shard.path.read_bytes())
    arguments = ["--data", str(tmp_path / "plain"), "--latents", str(latents), "--out", str(tmp_path / "out")]
    assert main(["tokenizer", "encode", *arguments]) == 0
    assert read_manifest(tmp_path / "out").num_samples("train") == 40


def test_encode_says_which_picture_does_not_divide(latents, tmp_path, capsys):
    write_shards(tmp_path / "odd", [sample(1, size=18)], lambda _: "train", "odd")
    arguments = ["--data", str(tmp_path / "odd"), "--latents", str(latents), "--out", str(tmp_path / "out")]
    assert main(["tokenizer", "encode", *arguments]) == 2
    message = capsys.readouterr().err
    assert (
        "s001: a picture of 18x18 pixels: both must be multiples of 4" in message and message.count("\n") == 1
    )
    assert not (tmp_path / "out").exists()


def test_train_text_reads_every_caption(data, tmp_path, capsys):
    out = tmp_path / "boxes-text"
    arguments = ["--data", str(data), "--out", str(out), "--vocab-size", "300", "--max-size", "4"]
    assert main(["tokenizer", "train-text", *arguments]) == 0
    assert "300 ids" in capsys.readouterr().out
    tokenizer = load_text_tokenizer(out)
    assert tokenizer.max_size == 4 and tokenizer.decode(tokenizer.encode("a box")) == "a box"
    assert "texts: 79" in (out / "recipe.yaml").read_text()  # 39 pictures with two captions, one text alone


def test_fit_statistics_serves_a_foreign_autoencoder(data, tmp_path):
    from diffusers import AutoencoderTiny

    AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    ).save_pretrained(tmp_path)
    assert main(["tokenizer", "fit-statistics", "--latents", str(tmp_path), "--data", str(data)]) == 0
    assert load_latent_codec(str(tmp_path)).downsample == 2


def test_fit_pixels_makes_a_codec(data, tmp_path):
    out = tmp_path / "pixels"
    assert main(["tokenizer", "fit-pixels", "--data", str(data), "--out", str(out), "--grey"]) == 0
    assert load_latent_codec(str(out)).channels == 1
    assert "fit-pixels" in (out / "recipe.yaml").read_text()


def test_mistakes_are_one_line(capsys, tmp_path):
    assert main(["tokenizer", "train-txt"]) == 2
    assert (
        "there are train-text, train-latents, fit-statistics, fit-pixels, encode" in capsys.readouterr().err
    )
    assert main(["tokenizer", "encode", "--data", "a", "--latent", "b"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    arguments = ["--data", str(tmp_path), "--latents", "pixels", "--out", str(tmp_path / "out")]
    assert main(["tokenizer", "encode", *arguments]) == 2
    assert "no shards at" in capsys.readouterr().err


def test_help_lists_the_commands(capsys):
    assert main(["tokenizer", "--help"]) == 0
    assert "fit-statistics" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main(["tokenizer", "train-latents", "--help"])
    assert stop.value.code == 0 and "--recipe.edge-weight" in capsys.readouterr().out
