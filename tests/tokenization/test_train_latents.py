import json
import os
import stat
from dataclasses import replace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from mmgen.tokenization.assets import verify_asset
from mmgen.tokenization.augment import augment
from mmgen.tokenization.latents import load_latent_codec
from mmgen.tokenization.train_latents import (
    LOG,
    STATE,
    LatentRecipe,
    LatentTrainer,
    build_autoencoder,
    psnr,
    stack_pictures,
    train_latents,
)

TINY = LatentRecipe(
    channels=4,
    widths=(8, 8, 16),
    layers=(0, 1, 1),
    num_samples=48,
    batch_size=8,
    lr=3e-3,
    warmup=16,
    ema=16,
)


@pytest.fixture(scope="module")
def pictures() -> torch.Tensor:
    """Rectangles of one colour on white: there is something to learn."""
    generator = torch.Generator().manual_seed(3)
    levels = torch.full((40, 3, 16, 16), 255, dtype=torch.uint8)
    for picture in levels:
        top, left, height, width = torch.randint(1, 8, (4,), generator=generator).tolist()
        colour = torch.randint(0, 220, (3, 1, 1), generator=generator, dtype=torch.uint8)
        picture[:, top : top + height, left : left + width] = colour
    return levels


def weights_of(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "diffusion_pytorch_model.safetensors")


def test_training_writes_a_folder_that_loads_and_learns(tmp_path, pictures):
    recipe = replace(TINY, num_samples=640)
    figures = train_latents(
        recipe,
        pictures[:32],
        pictures[32:],
        tmp_path / "out",
        tmp_path / "work",
        provenance={"command": "mine"},
    )
    before = LatentTrainer(recipe, pictures, tmp_path / "none")
    assert figures[0] > psnr(pictures[32:], before.reconstruct(pictures[32:]))[0] + 3
    codec = load_latent_codec(str(tmp_path / "out"))
    assert (codec.channels, codec.downsample) == (4, 4)
    latents = codec.encode(pictures[:32].float() / 127.5 - 1)
    torch.testing.assert_close(latents.std((0, 2, 3), correction=0), torch.ones(4), atol=1e-3, rtol=0)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        "config.json",
        "diffusion_pytorch_model.safetensors",
        "statistics.json",
        "recipe.yaml",
        "SHA256SUMS",
    }
    assert {weight.dtype for weight in weights_of(tmp_path / "out").values()} == {torch.float16}
    assert (tmp_path / "out" / "recipe.yaml").read_text().startswith("command: mine\n")
    verify_asset(tmp_path / "out")
    for path in (tmp_path / "out").iterdir():
        assert stat.S_IMODE(os.stat(path).st_mode) & 0o444 == 0o444, (
            f"{path.name} can be read by its owner alone"
        )


def test_a_cut_run_ends_as_an_uncut_one_bit_for_bit(tmp_path, pictures):
    uncut = train_latents(TINY, pictures[:32], pictures[32:], tmp_path / "a", tmp_path / "wa", save_every=2)

    class Cut(Exception):
        pass

    def cut(step: int, _: dict[str, float]) -> None:
        if step == 5:  # one step behind the last checkpoint
            raise Cut

    with pytest.raises(Cut):
        train_latents(
            TINY, pictures[:32], pictures[32:], tmp_path / "b", tmp_path / "wb", save_every=2, on_step=cut
        )
    assert not (tmp_path / "b").exists()
    seen: list[int] = []
    again = train_latents(
        TINY,
        pictures[:32],
        pictures[32:],
        tmp_path / "b",
        tmp_path / "wb",
        save_every=2,
        on_step=lambda step, _: seen.append(step),
    )
    assert seen == [5, 6] and again == uncut
    first, second = load_file(tmp_path / "wa" / STATE), load_file(tmp_path / "wb" / STATE)
    assert first.keys() == second.keys() and any(name.startswith("optimizer.exp_avg_sq.") for name in first)
    assert all(torch.equal(first[name], second[name]) for name in first)
    for name in ("diffusion_pytorch_model.safetensors", "statistics.json", "SHA256SUMS"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    logs = [
        [{**json.loads(line), "seconds": 0} for line in (tmp_path / work / LOG).read_text().splitlines()]
        for work in ("wa", "wb")
    ]
    assert logs[0] == logs[1] and [entry["step"] for entry in logs[0]] == [2, 4, 6]


def test_another_seed_is_another_network(tmp_path, pictures):
    for seed in (0, 1):
        train_latents(
            replace(TINY, seed=seed), pictures, pictures[:2], tmp_path / f"o{seed}", tmp_path / f"w{seed}"
        )
    first, second = weights_of(tmp_path / "o0"), weights_of(tmp_path / "o1")
    assert any(not torch.equal(first[name], second[name]) for name in first)


def test_a_step_is_adamw_on_the_gradient_of_the_whole_batch(tmp_path, pictures):
    """Weights are channels_last and gradients are not; a fused step pairs them by memory and diverges."""
    trainer = LatentTrainer(replace(TINY, warmup=0, weight_decay=0.0, noise=0.0), pictures, tmp_path)
    assert any(not weight.is_contiguous() for weight in trainer.network.parameters())
    before = {name: weight.detach().clone() for name, weight in trainer.network.named_parameters()}
    trainer.train_step()
    # The first step of Adam is lr * sign(gradient), nearly: where it is not, gradient and weight were mismatched.
    agreeing = total = 0
    for name, weight in trainer.network.named_parameters():
        assert weight.grad is not None
        clear = weight.grad.abs() > 1e-4
        moved = (weight.detach() - before[name])[clear]
        agreeing += int((moved.sign() == -weight.grad[clear].sign()).sum())
        total += int(clear.sum())
    assert total > 1000 and agreeing == total


def test_workers_share_a_batch_without_changing_its_gradient(tmp_path, pictures):
    grads = []
    for workers in (1, 2, 4):
        trainer = LatentTrainer(replace(TINY, workers=workers, noise=0.0), pictures, tmp_path)
        trainer.train_step()
        grads.append(torch.cat([weight.grad.flatten() for weight in trainer.network.parameters()]))
    for other in grads[1:]:  # bfloat16 rounds each share on its own
        assert torch.nn.functional.cosine_similarity(grads[0], other, dim=0) > 0.99


def test_a_checkpoint_of_another_recipe_or_other_pictures_is_refused(tmp_path, pictures):
    trainer = LatentTrainer(TINY, pictures, tmp_path)
    trainer.train_step()
    trainer.save()
    assert LatentTrainer(TINY, pictures, tmp_path).step == 1
    with pytest.raises(ValueError, match="of another recipe or other pictures"):
        LatentTrainer(replace(TINY, lr=1e-3), pictures, tmp_path)
    with pytest.raises(ValueError, match="of another recipe or other pictures"):
        LatentTrainer(TINY, pictures[1:], tmp_path)
    (tmp_path / STATE).write_bytes(b"cut off")
    with pytest.raises(ValueError, match="cannot be read"):
        LatentTrainer(TINY, pictures, tmp_path)


def test_an_existing_folder_stops_training_before_it_begins(tmp_path, pictures):
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="exists already"):
        train_latents(TINY, pictures, pictures, tmp_path / "out", tmp_path / "work")
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"widths": (8, 16)}, "one entry per resolution"),
        ({"layers": (1, 0, 1)}, "must be at least 1"),
        ({"workers": 3}, "multiple of workers"),
        ({"num_samples": 7}, "less than one batch"),
    ],
)
def test_impossible_recipes_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(TINY, **change)


def test_pictures_that_do_not_divide_are_refused(tmp_path):
    with pytest.raises(ValueError, match="multiples of 4"):
        LatentTrainer(TINY, torch.zeros(4, 3, 18, 18, dtype=torch.uint8), tmp_path)


def test_the_learning_rate_rises_and_falls():
    rates = [LatentRecipe(num_samples=16_000, warmup=1600, lr=1.0).lr_at(step) for step in range(1000)]
    assert rates.index(max(rates)) == 99 and rates[0] == pytest.approx(0.01)
    assert 0.9 < max(rates) <= 1 and rates[-1] < 0.02 and rates[99:] == sorted(rates[99:], reverse=True)


def test_channels_that_do_not_divide_the_width_still_build():
    network = build_autoencoder(replace(TINY, channels=6))
    assert network.encode(torch.zeros(1, 3, 16, 16), return_dict=False)[0].shape == (1, 6, 4, 4)


def test_pictures_are_stacked_over_white_at_one_size():
    clear = Image.new("RGBA", (20, 10), (255, 0, 0, 0))
    stacked = stack_pictures([clear, Image.new("RGB", (16, 16), (1, 2, 3))], 16)
    assert stacked.shape == (2, 3, 16, 16) and stacked.dtype == torch.uint8
    assert (stacked[0] == 255).all() and stacked[1, :, 5, 5].tolist() == [1, 2, 3]
    with pytest.raises(ValueError, match="no pictures"):
        stack_pictures([], 16)


def test_augmented_pictures_stay_pictures(pictures):
    pixels = pictures.float() / 127.5 - 1
    draw = torch.Generator().manual_seed(0)
    changed = augment(pixels.repeat(8, 1, 1, 1), draw)
    assert changed.shape == (320, 3, 16, 16) and changed.abs().max() <= 1 + 1e-5
    white = torch.ones(64, 3, 16, 16)
    torch.testing.assert_close(augment(white, draw), white)  # nothing dark comes in from beyond an edge
    repeated = augment(pixels, torch.Generator().manual_seed(5))
    assert torch.equal(repeated, augment(pixels, torch.Generator().manual_seed(5)))
    assert not torch.equal(repeated, augment(pixels, torch.Generator().manual_seed(6)))
    same = (changed == pixels.repeat(8, 1, 1, 1)).flatten(1).all(1).float().mean()
    mirrored = (changed.flip(-1) == pixels.repeat(8, 1, 1, 1)).flatten(1).all(1).float().mean()
    assert 0.15 < same < 0.4 and 0.15 < mirrored < 0.4  # a quarter each, and half are neither
