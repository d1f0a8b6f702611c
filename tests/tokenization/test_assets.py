"""The folders that ship: whole, within their limits, and as good as their recipes say."""

from pathlib import Path

import pytest
import torch
import yaml

from mmgen.data.find import find_shards
from mmgen.data.read import read_shards
from mmgen.data.rejects import Rejects
from mmgen.sequence import Sample
from mmgen.tokenization.assets import new_asset, verify_asset
from mmgen.tokenization.latents import load_latent_codec, psnr, reconstruct, to_unit
from mmgen.tokenization.text import load_text_tokenizer
from mmgen.tokenization.train_latents import stack_pictures

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "tokenizers"


@pytest.fixture(scope="module")
def unseen() -> list[Sample]:
    return list(
        read_shards(find_shards(ROOT / "data_pipelines/assets/emoji64", "unseen_concepts"), Rejects())
    )


@pytest.fixture(scope="module")
def pictures(unseen) -> torch.Tensor:
    return stack_pictures((sample.picture for sample in unseen if sample.picture is not None), 64)


@pytest.mark.parametrize("name", ["emoji-text", "emoji-latents"])
def test_shipped_folders_are_whole_and_say_how_they_were_made(name):
    assert (SHIPPED / name / "SHA256SUMS").is_file()
    verify_asset(SHIPPED / name)
    recipe = yaml.safe_load((SHIPPED / name / "recipe.yaml").read_text())
    assert (
        recipe["command"].startswith("mmgen tokenizer train-")
        and f"--out tokenizers/{name}" in recipe["command"]
    )


def test_the_shipped_codec_keeps_within_its_limits():
    codec = load_latent_codec(str(SHIPPED / "emoji-latents"))
    assert codec.encode(torch.zeros(1, 3, 64, 64)).shape == (1, codec.channels, 8, 8) and codec.channels <= 16
    assert sum(path.stat().st_size for path in (SHIPPED / "emoji-latents").iterdir()) <= 8 * 2**20


@pytest.mark.slow
def test_the_shipped_codec_reconstructs_unseen_concepts_as_its_recipe_says(pictures):
    codec = load_latent_codec(str(SHIPPED / "emoji-latents"))
    each, of_mean = psnr(pictures, reconstruct(codec, pictures))
    recipe = yaml.safe_load((SHIPPED / "emoji-latents" / "recipe.yaml").read_text())["held_out"]
    assert each >= 26 and len(pictures) == recipe["pictures"]
    assert each == pytest.approx(recipe["psnr"], abs=0.02)
    assert of_mean == pytest.approx(recipe["psnr_of_mean"], abs=0.02)


def test_the_shipped_latents_of_unseen_concepts_are_normalised_and_bear_noise(pictures):
    codec = load_latent_codec(str(SHIPPED / "emoji-latents"))
    some = pictures[::8]
    latents = codec.encode(to_unit(some))
    assert latents.mean((0, 2, 3)).abs().max() < 0.25
    assert latents.std((0, 2, 3)).min() > 0.8 and latents.std((0, 2, 3)).max() < 1.2
    noisy = latents + 0.1 * torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    assert (codec.decode(noisy) - codec.decode(latents)).square().mean().sqrt() < 0.1  # 0.05 of the range
    assert psnr(some, reconstruct(codec, some))[0] >= 26


def test_the_shipped_text_tokenizer_is_lossless_and_shorter_than_bytes(unseen):
    tokenizer = load_text_tokenizer(SHIPPED / "emoji-text")
    captions = [caption for sample in unseen for caption in sample.captions.values()]
    ids = [tokenizer.encode(caption) for caption in captions]
    assert [tokenizer.decode(some) for some in ids] == captions
    assert sum(len(caption.encode()) for caption in captions) / sum(map(len, ids)) > 2.4
    assert tokenizer.vocab_size <= 2048 and tokenizer.max_size == 64


def test_a_write_that_fails_leaves_the_old_folder(tmp_path):
    def write(text: str, fail: bool) -> None:
        with new_asset(tmp_path / "a", {"command": "x"}, overwrite=True) as beside:
            (beside / "model").write_text(text)
            if fail:
                raise KeyboardInterrupt

    write("first", fail=False)
    with pytest.raises(KeyboardInterrupt):
        write("second", fail=True)
    assert (tmp_path / "a" / "model").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    write("third", fail=False)
    assert (tmp_path / "a" / "model").read_text() == "third"
    verify_asset(tmp_path / "a")
    (tmp_path / "a" / "model").unlink()
    with pytest.raises(ValueError, match="model is missing, though SHA256SUMS lists it"):
        verify_asset(tmp_path / "a")
