"""Pictures to tokens and back."""

import numpy as np
import pytest
import torch

from mmgen.modalities import MissingPart, Place, bands, build_modalities
from mmgen.rng import keyed_numpy
from mmgen.sequence import Sample
from mmgen.tokenization.latents import picture_to_tensor
from tests.parts import modalities, picture, sample, tokenizer


def test_patches_are_in_raster_order_and_come_back():
    image = modalities()["image"]
    latents = torch.randn(3, 8, 12)
    tokens, rows, columns = image.patchify(latents)
    assert (rows, columns, tokens.shape) == (2, 3, (6, 48))
    corner = latents[:, 4:8, 8:12].reshape(-1) * image.sigma_data
    assert torch.equal(tokens[5], corner)
    torch.testing.assert_close(image.unpatchify(tokens, rows, columns), latents)


def test_stored_latents_are_taken_as_they_are():
    image = modalities()["image"]
    stored = np.random.default_rng(0).standard_normal((3, 8, 8)).astype(np.float16)
    spans = image.encode(Sample("a", "s", latents=stored), Place(1, True, True), keyed_numpy(0))
    torch.testing.assert_close(
        image.unpatchify(spans[1].values, 2, 2), torch.from_numpy(stored.astype(np.float32))
    )


def test_a_picture_is_encoded_once_and_remembered_within_the_limit():
    image = modalities()["image"]
    calls = []
    encode = image.codec.encode
    image.codec.encode = lambda pixels: calls.append(1) or encode(pixels)
    one = sample(0)
    for _ in range(3):
        spans = image.encode(one, Place(1, True, True), keyed_numpy(0))
    assert len(calls) == 1
    expected = picture_to_tensor(one.picture)
    torch.testing.assert_close(image.unpatchify(spans[1].values, 4, 4), expected, rtol=0, atol=2e-3)
    small = modalities(cache_mb=0)["image"]
    for i in range(3):
        small.encode(sample(i), Place(1, True, True), keyed_numpy(0))
    assert len(small._cache) == 1


def test_committed_latents_carry_the_configured_noise():
    image = modalities(context_noise=0.2)["image"]
    values = torch.zeros(4000, 3)
    committed = image.commit(values + 1.0, keyed_numpy(0))
    assert abs(committed.mean() - 0.8) < 0.01
    assert abs(committed.std() - 0.2 * image.sigma_data) < 0.005
    assert torch.equal(committed, image.commit(values + 1.0, keyed_numpy(0)))
    assert torch.equal(modalities(context_noise=0.0)["image"].commit(values, keyed_numpy(0)), values)


def test_a_sample_without_a_picture_is_named():
    with pytest.raises(MissingPart, match="missing picture: a"):
        modalities()["image"].encode(Sample("a", "s"), Place(1, True, True), keyed_numpy(0))


def test_a_picture_that_does_not_divide_is_counted_not_resized():
    odd = Sample("a", "s", picture=picture(0, size=18))
    with pytest.raises(MissingPart, match="no multiples of 4 pixels: a"):
        modalities()["image"].encode(odd, Place(1, True, True), keyed_numpy(0))


@pytest.mark.parametrize("shape", [(4, 4, 4), (3, 0, 4), (3, 4, 5)])
def test_latents_of_another_shape_are_counted_as_broken(shape: tuple[int, int, int]):
    """The tests' codec gives 3 channels, and a token has 4 x 4 of them."""
    foreign = Sample("a", "s", latents=np.zeros(shape, np.float16))
    with pytest.raises(MissingPart, match=f"latents of {shape[0]} x {shape[1]} x {shape[2]}.*: a"):
        modalities()["image"].encode(foreign, Place(1, True, True), keyed_numpy(0))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"image": {}}, "lack text"),
        ({"text": {}, "sound": {}}, "sound.*none of"),
        ({"text": {}, "sound": {"kind": "nowhere:Sound"}}, "cannot be imported"),
        ({"text": {}, "image": {"ptach": 2}}, r"modalities\.image.*patch"),
        ({"text": {}, "image": {"context_noise": 2.0}}, "context_noise 2.0"),
        ({"text": {"captions": {"name": 0.0}}}, "captions"),
    ],
)
def test_what_cannot_be_built_is_said_in_one_line(config: dict, message: str):
    with pytest.raises(ValueError, match=message) as error:
        build_modalities(config, tokenizer())
    assert "\n" not in str(error.value)


def test_an_embedding_tells_the_place_in_the_picture_and_not_the_place_in_the_document():
    image = modalities()["image"]
    embedding = image.build_embedding(16)
    values = torch.zeros(6, image.channels)
    here, there = (torch.tensor(image.positions(2, 3, start)) for start in (5, 40))
    embedded = embedding(values, here)
    assert torch.pdist(embedded).min() > 0.1  # six places, six vectors
    torch.testing.assert_close(embedded, embedding(values, there))


def test_an_embedding_needs_a_width_that_two_axes_of_sines_and_cosines_share():
    with pytest.raises(ValueError, match="width 18 must be a multiple of 4"):
        modalities()["image"].build_embedding(18)


def test_times_near_noise_are_drawn_by_the_uniform_share():
    draw = keyed_numpy(0)
    late = {}
    for share in (0.0, 0.25, 1.0):
        image = modalities(time={"kind": "logit_normal", "uniform": share})["image"]
        times = np.array([image.draw_time(draw) for _ in range(20_000)])
        assert abs(np.median(times) - 0.5) < 0.02 and times.min() >= 0 and times.max() <= 1
        late[share] = (times > 0.98).mean()
    assert late[0.0] < 2e-4 and abs(late[0.25] - 0.005) < 0.002 and abs(late[1.0] - 0.02) < 0.004


@pytest.mark.parametrize(("key", "value"), [("std", 0.0), ("uniform", 1.5)])
def test_times_that_make_no_sense_are_refused(key: str, value: float):
    with pytest.raises(ValueError, match=rf"modalities.image: time: {key} {value} must be"):
        modalities(time={"kind": "logit_normal", key: value})


def test_bands_are_whole_rows_and_even():
    assert bands(4, 3, 1) == (slice(0, 12),)
    assert bands(4, 3, 4) == (slice(0, 3), slice(3, 6), slice(6, 9), slice(9, 12))
    rows = [(band.stop - band.start) // 5 for band in bands(8, 5, 3)]
    assert sum(rows) == 8 and max(rows) - min(rows) == 1


def test_the_number_of_blocks_is_drawn_for_every_document():
    image = modalities(blocks={"counts": [1, 2, 4], "weights": [0.5, 0.3, 0.2]})["image"]
    draw, place = keyed_numpy(0), Place(1, True, True)
    spans = [image.encode(sample(0), place, draw)[1] for _ in range(600)]
    lengths = {(16,): 0.5, (8, 8): 0.3, (4, 4, 4, 4): 0.2}
    for blocks, share in lengths.items():
        assert abs(sum(span.blocks == blocks for span in spans) / 600 - share) < 0.06
    assert all((span.committed is None) == (len(span.blocks) == 1) for span in spans), (
        "nobody reads the picture, but a band is read by those below it"
    )
    wide = Sample("wide", "shard", latents=np.zeros((3, 8, 32), np.float16))
    assert max(len(image.encode(wide, place, draw)[1].blocks) for _ in range(100)) == 2, "at most one a row"
    default = modalities(blocks={"counts": [1, 2, 4]})["image"].config.blocks
    drawn = [default.draw(draw) for _ in range(700)]
    assert drawn.count(1) > 1.5 * drawn.count(2) > 2 * drawn.count(4) > 0


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ({"counts": []}, "counts"),
        ({"counts": [0]}, "counts"),
        ({"counts": [2, 2]}, "counts"),
        ({"counts": [1, 2], "weights": [1.0]}, "weights"),
        ({"counts": [1, 2], "weights": [0.0, 0.0]}, "weights"),
    ],
)
def test_blocks_that_make_no_sense_are_refused(blocks: dict, message: str):
    with pytest.raises(ValueError, match=rf"modalities.image: blocks: {message} \("):
        modalities(blocks=blocks)
