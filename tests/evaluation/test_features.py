"""The frozen networks: deterministic, one by one as in batches, the real ones, and sane on real damage."""

import hashlib
from pathlib import Path

import pytest
import torch
from PIL import Image

from mmgen.evaluation import features as module
from mmgen.evaluation.distances import kid_value
from mmgen.evaluation.features import Lite0Features, SentenceFeatures, picture_features
from mmgen.tokenization.latents import tensor_to_picture


@pytest.fixture(scope="module")
def lite0() -> Lite0Features:
    return Lite0Features(batch_size=8)


@pytest.fixture(scope="module")
def minilm() -> SentenceFeatures:
    return SentenceFeatures()


def discs(num: int, blur: int = 1) -> torch.Tensor:
    """Coloured discs on white; `blur` averages over that many pixels."""
    generator = torch.Generator().manual_seed(0)
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    pictures = []
    for _ in range(num):
        centre, radius = (
            16 + 32 * torch.rand(2, generator=generator),
            6 + 12 * torch.rand(1, generator=generator),
        )
        inside = ((y - centre[0]) ** 2 + (x - centre[1]) ** 2 < radius**2).float()
        colour = 2 * torch.rand(3, 1, 1, generator=generator) - 1
        pictures.append(inside * colour + (1 - inside))
    stacked = torch.stack(pictures)
    padded = torch.nn.functional.pad(stacked, [blur // 2] * 4, mode="replicate")
    return torch.nn.functional.avg_pool2d(padded, blur, 1)


def test_picture_features_do_not_depend_on_the_batch(lite0: Lite0Features) -> None:
    pixels = discs(11)
    together = lite0(pixels)
    assert together.shape == (11, 1280) and together.dtype == torch.float32
    torch.testing.assert_close(together, lite0(pixels), rtol=0, atol=0)
    alone = torch.cat([lite0(pixels[i : i + 1]) for i in range(11)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-4)


def test_the_network_is_the_trained_one(lite0: Lite0Features) -> None:
    """Any weights give features; these classify. A plain disc on white is in ImageNet's eyes a round thing."""
    red = torch.tensor([1.0, -0.8, -0.8]).view(3, 1, 1)
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    disc = torch.where((y - 32) ** 2 + (x - 32) ** 2 < 24**2, red, torch.ones(3, 64, 64))
    logits = lite0._network._fc(lite0(disc[None]))
    assert logits.softmax(-1).max() > 0.05  # 50 times chance; random weights give about 0.001


def test_kid_grows_with_damage(lite0: Lite0Features) -> None:
    clean = lite0(discs(12))
    mild, strong = (kid_value(clean, lite0(discs(12, blur))) for blur in (5, 13))
    noise = kid_value(clean, lite0(2 * torch.rand(12, 3, 64, 64) - 1))
    assert 0 < mild < strong < noise


def test_wrong_shapes_are_refused(lite0: Lite0Features) -> None:
    with pytest.raises(ValueError, match=r"\(1, 1, 8, 8\)"):
        lite0(torch.zeros(1, 1, 8, 8))


def test_other_weights_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LITE0_SHA256", hashlib.sha256(b"other").hexdigest())
    with pytest.raises(ValueError, match="sha256"):
        Lite0Features()


def test_missing_package_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(ValueError, match=r"pip install 'mmgen-pretrain\[eval\]'"):
        Lite0Features()


def test_pictures_of_several_sizes_and_their_cache(
    lite0: Lite0Features, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    pictures = [tensor_to_picture(pixels) for pixels in discs(3)]
    pictures.append(Image.new("RGBA", (20, 30), (255, 0, 0, 0)))  # transparent: white
    fresh = picture_features(pictures, lite0, cached=True)
    torch.testing.assert_close(fresh[3:], lite0(torch.ones(1, 3, 30, 20)), rtol=0, atol=1e-4)
    assert len(list(tmp_path.rglob("lite0-*.npy"))) == 1
    done = []
    again = picture_features(pictures, lite0, cached=True, on_batch=done.append)
    assert torch.equal(fresh, again) and done == []
    picture_features(pictures[::-1], lite0, cached=True, on_batch=done.append)
    assert done == [4], "other pictures, or another order, are other features"


def test_sentences_are_unit_vectors_that_depend_on_nothing_else(minilm: SentenceFeatures) -> None:
    texts = ["a red apple, noto style", "a cat", "an animal that miaows, " * 60, "a cat"]
    together = minilm(texts)
    torch.testing.assert_close(together.norm(dim=1), torch.ones(4))
    assert torch.equal(together[1], together[3])
    torch.testing.assert_close(together, torch.cat([minilm([text]) for text in texts]), rtol=0, atol=1e-5)


def test_sentences_know_meaning(minilm: SentenceFeatures) -> None:
    kitten, cat, car = minilm(["a small kitten", "a cat", "a car"])
    assert kitten @ cat > kitten @ car + 0.2
