import json

import numpy as np
import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny, UNet2DModel
from PIL import Image

from mmgen.tokenization.assets import write_checksums
from mmgen.tokenization.latents import (
    DiffusersAutoencoder,
    Pixels,
    fit_pixels,
    fit_statistics,
    load_latent_codec,
    picture_to_tensor,
    psnr,
    reconstruct,
    tensor_to_picture,
)

CHANNELS = 4
# Class -> arguments of its constructor; three widths, so 4 pixels per side of a latent pixel.
NETWORKS = {
    AutoencoderKL: {
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "block_out_channels": (8, 8, 16),
        "norm_num_groups": 4,
        "latent_channels": CHANNELS,
    },
    AutoencoderTiny: {
        "encoder_block_out_channels": (8, 8, 8),
        "decoder_block_out_channels": (8, 8, 8),
        "num_encoder_blocks": (1, 1, 1),
        "num_decoder_blocks": (1, 1, 1),
        "latent_channels": CHANNELS,
    },
    AutoencoderDC: {
        "encoder_block_types": "ResBlock",
        "decoder_block_types": "ResBlock",
        "encoder_block_out_channels": (8, 8, 16),
        "decoder_block_out_channels": (8, 8, 16),
        "encoder_layers_per_block": (0, 1, 1),
        "decoder_layers_per_block": (0, 1, 1),
        "encoder_qkv_multiscales": ((), (), ()),
        "decoder_qkv_multiscales": ((), (), ()),
        "latent_channels": CHANNELS,
    },
}


def pictures(num: int, size: int = 16) -> torch.Tensor:
    return torch.rand(num, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.fixture(scope="module", params=NETWORKS, ids=lambda cls: cls.__name__)
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param.__name__)
    torch.manual_seed(0)
    network = request.param(**NETWORKS[request.param])
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if name.endswith("bias"):
                weight.normal_()  # so that latents are not centred by chance
    network.save_pretrained(folder)
    fit_statistics(folder, [pictures(40), pictures(24)])
    return folder


def test_shapes_and_range(folder):
    codec = load_latent_codec(str(folder))
    assert (codec.channels, codec.downsample) == (CHANNELS, 4)
    latents = codec.encode(pictures(3, 16)[:, :, :, :8])
    assert latents.shape == (3, CHANNELS, 4, 2) and latents.dtype == torch.float32
    pixels = codec.decode(latents * 100)
    assert pixels.shape == (3, 3, 16, 8) and pixels.dtype == torch.float32
    assert pixels.min() >= -1 and pixels.max() <= 1


def test_latents_have_zero_mean_and_unit_deviation_per_channel(folder):
    latents = load_latent_codec(str(folder)).encode(torch.cat([pictures(40), pictures(24)]))
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(CHANNELS), atol=1e-4, rtol=0)
    torch.testing.assert_close(latents.std((0, 2, 3), correction=0), torch.ones(CHANNELS), atol=1e-3, rtol=0)


def test_normalising_is_undone_before_decoding(folder):
    """Equals the network's own round trip; with the statistics left out of decode it does not."""
    codec = DiffusersAutoencoder(folder)
    pixels = pictures(4)
    raw = codec.encode(pixels) * codec._std + codec._mean
    expected = codec.network.decode(raw, return_dict=False)[0].clamp(-1, 1)
    torch.testing.assert_close(codec.decode(codec.encode(pixels)), expected, atol=1e-5, rtol=1e-4)
    assert (codec.network.decode(codec.encode(pixels), return_dict=False)[0] - expected).abs().max() > 1e-3


def test_encoding_is_deterministic_and_each_picture_on_its_own(folder):
    codec = load_latent_codec(str(folder))
    pixels = pictures(5)
    together = codec.encode(pixels)
    torch.testing.assert_close(codec.encode(pixels), together, atol=0, rtol=0)
    torch.testing.assert_close(
        torch.cat([codec.encode(p[None]) for p in pixels]), together, atol=1e-4, rtol=1e-4
    )


def test_the_fingerprint_is_of_weights_and_statistics(folder, tmp_path):
    fingerprint = DiffusersAutoencoder(folder).fingerprint
    assert DiffusersAutoencoder(folder).fingerprint == fingerprint
    for name in ("config.json", "diffusion_pytorch_model.safetensors", "statistics.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    assert DiffusersAutoencoder(tmp_path).fingerprint == fingerprint
    fit_statistics(tmp_path, [pictures(8)])
    assert DiffusersAutoencoder(tmp_path).fingerprint != fingerprint


def test_a_damaged_file_is_refused(folder, tmp_path):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    write_checksums(tmp_path)
    DiffusersAutoencoder(tmp_path)
    weights = bytearray((tmp_path / "diffusion_pytorch_model.safetensors").read_bytes())
    weights[-1] ^= 1
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(weights)
    with pytest.raises(ValueError, match=r"safetensors is damaged"):
        DiffusersAutoencoder(tmp_path)


def test_missing_parts_are_one_clear_line(tmp_path):
    AutoencoderTiny(**NETWORKS[AutoencoderTiny]).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"no statistics\.json; make it with `mmgen tokenizer fit-statistics`"
    ):
        DiffusersAutoencoder(tmp_path)
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    weights.rename(tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match="pickled weights are not read"):
        DiffusersAutoencoder(tmp_path)
    with pytest.raises(ValueError, match="expected `pixels` or a folder"):
        load_latent_codec("pixel")


def test_another_class_is_refused(tmp_path):
    UNet2DModel(
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=4,
        layers_per_block=1,
    ).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="_class_name is 'UNet2DModel'; it must be one of AutoencoderKL"):
        DiffusersAutoencoder(tmp_path)


def test_weights_of_another_network_are_refused(tmp_path):
    AutoencoderTiny(**NETWORKS[AutoencoderTiny]).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"latent_channels": CHANNELS + 1}))
    with pytest.raises(ValueError, match="is no AutoencoderTiny that can be loaded") as error:
        DiffusersAutoencoder(tmp_path)
    assert "\n" not in str(error.value)


def test_sizes_that_do_not_divide_are_refused(folder):
    codec = load_latent_codec(str(folder))
    with pytest.raises(ValueError, match="18x16 pixels: both must be multiples of 4"):
        codec.encode(torch.zeros(1, 3, 18, 16))
    with pytest.raises(ValueError, match=r"needs \[B, 4, h, w\]"):
        codec.decode(torch.zeros(1, 3, 4, 4))
    with pytest.raises(ValueError, match=r"needs \[B, 3, H, W\]"):
        codec.encode(torch.zeros(3, 16, 16))


def test_statistics_need_pictures_that_differ(folder, tmp_path):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(ValueError, match="no pictures to fit"):
        fit_statistics(tmp_path, [])


def test_statistics_renew_the_checksum(folder, tmp_path):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    write_checksums(tmp_path)
    fit_statistics(tmp_path, [pictures(8)])
    DiffusersAutoencoder(tmp_path)


def test_pixels_pass_and_are_normalised_by_given_statistics():
    pixels = pictures(2)
    codec = load_latent_codec("pixels")
    assert (codec.channels, codec.downsample) == (3, 1)
    torch.testing.assert_close(codec.encode(pixels), pixels, atol=0, rtol=0)
    scaled = Pixels(mean=(0.5, 0.0, -0.5), std=(0.5, 1.0, 2.0))
    torch.testing.assert_close(scaled.encode(pixels)[:, 0], (pixels[:, 0] - 0.5) / 0.5)
    torch.testing.assert_close(scaled.decode(scaled.encode(pixels)), pixels)
    assert scaled.fingerprint != codec.fingerprint
    assert codec.decode(torch.full((1, 3, 2, 2), 3.0)).max() == 1
    with pytest.raises(ValueError, match="do not fit 3 channels"):
        Pixels(std=(1.0, 0.0, 1.0))
    with pytest.raises(ValueError, match="or 1 where they are grey, not 2"):
        Pixels((0.0, 0.0), (1.0, 1.0))


@pytest.mark.parametrize("grey", [False, True])
def test_pixels_fitted_to_pictures_have_no_mean_and_unit_deviation(grey, tmp_path):
    pixels = pictures(40) * torch.tensor([0.5, 0.7, 0.1]).view(3, 1, 1) + 0.2
    if grey:
        pixels = pixels[:, :1].expand(-1, 3, -1, -1)
    fit_pixels(tmp_path / "pixels", [pixels[:16], pixels[16:]], grey)
    codec = load_latent_codec(str(tmp_path / "pixels"))
    latents = codec.encode(pixels)
    assert codec.channels == latents.shape[1] == (1 if grey else 3)
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(codec.channels), atol=1e-5, rtol=0)
    torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(codec.channels), atol=1e-3, rtol=0)
    torch.testing.assert_close(codec.decode(latents), pixels)
    (tmp_path / "pixels" / "statistics.json").write_text("{}")
    with pytest.raises(ValueError, match="damaged"):
        load_latent_codec(str(tmp_path / "pixels"))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1"])
def test_pictures_become_tensors_over_white_and_back(mode):
    levels = np.random.default_rng(0).integers(0, 256, (5, 7, 4), dtype=np.uint8)
    levels[0, :, 3], levels[1, :, 3] = 0, 255
    picture = Image.fromarray(levels, "RGBA").convert(mode)
    tensor = picture_to_tensor(picture)
    assert tensor.shape == (3, 5, 7) and tensor.min() >= -1 and tensor.max() <= 1
    if picture.has_transparency_data:
        assert (tensor[:, 0] == 1).all()  # transparent is white, whatever the colour beneath
    expected = tensor_to_picture(tensor)
    assert expected.mode == "RGB" and np.array_equal(
        np.array(expected), np.array(tensor_to_picture(picture_to_tensor(expected)))
    )
    if mode == "RGB":
        assert np.array_equal(np.array(expected), levels[..., :3])


def test_sixteen_bit_pictures_keep_their_brightness():
    picture = Image.fromarray(np.array([[0, 0x8000, 0xFFFF]], dtype=np.uint16))
    assert picture.mode.startswith("I;16")
    torch.testing.assert_close(picture_to_tensor(picture)[0, 0], torch.tensor([0, 128, 255]) / 127.5 - 1)


def test_psnr_is_the_mean_over_pictures_and_that_of_the_mean():
    originals = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    others = originals.clone()
    others[0] += 51  # 0.2 of the range: 13.98 dB
    others[1] += 5
    each, of_mean = psnr(originals, others)
    errors = [(51 / 255) ** 2, (5 / 255) ** 2]
    assert each == pytest.approx(np.mean([-10 * np.log10(error) for error in errors]))
    assert of_mean == pytest.approx(-10 * np.log10(np.mean(errors)))
    assert each - of_mean > 5
    assert psnr(originals, originals)[0] == 60


def test_reconstruct_of_pixels_is_exact():
    levels = torch.randint(256, (3, 3, 8, 8), dtype=torch.uint8)
    assert torch.equal(reconstruct(Pixels(), levels, batch_size=2), levels)
