"""Pictures of any size are brought to the sizes that a run has; nothing else about them changes."""

import numpy as np
import pytest
import torch
from PIL import Image as Pictures

from mmgen.modalities import Image, MissingPart, Place
from mmgen.modalities.buckets import BucketConfig, choose_bucket, fit
from mmgen.rng import keyed_numpy
from mmgen.sequence import Sample
from tests.parts import modalities, picture

SIZES = ((16, 16), (16, 24), (24, 16), (8, 8))


def image(**buckets: object) -> Image:
    built = modalities(buckets={"sizes": [list(size) for size in SIZES], **buckets})["image"]
    assert isinstance(built, Image)
    return built


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (16, 16, (16, 16)),
        (100, 100, (16, 16)),  # both squares fit: the largest
        (100, 149, (16, 24)),
        (149, 100, (24, 16)),
        (100, 1000, (16, 24)),  # nothing is so wide: the widest
        (10, 10, (8, 8)),  # the larger square would enlarge it
        (100, 122, (16, 16)),  # nearest by ratio: sqrt(1.5) = 1.2247 divides the two
        (100, 123, (16, 24)),
        (15, 40, (8, 8)),  # it covers the small square alone
        (7, 40, None),
    ],
)
def test_the_nearest_aspect_ratio_is_chosen_and_then_the_largest(height, width, expected):
    assert choose_bucket(height, width, BucketConfig(SIZES)) == expected


def test_enlarging_is_as_far_as_the_configuration_says():
    assert choose_bucket(10, 10, BucketConfig(SIZES, max_enlarged=1.6)) == (16, 16)
    assert choose_bucket(10, 10, BucketConfig(SIZES, max_enlarged=1.5)) == (8, 8)


@pytest.mark.parametrize("size", SIZES)
def test_a_picture_of_a_buckets_size_is_bit_identical(size):
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    one = Sample("a", "s", {"text": "a"}, Pictures.fromarray(pixels))
    assert fit(one.picture, size) is one.picture
    assert torch.equal(image().latents(one), modalities()["image"].latents(one))


def test_a_picture_is_cut_around_its_centre_and_its_aspect_is_kept():
    """A disc in the middle of a wide picture is still in the middle, and as high as it is wide."""
    rows, columns = np.mgrid[:120, :300]
    disc = (rows - 59.5) ** 2 + (columns - 149.5) ** 2 < 40**2
    wide = Pictures.fromarray((255 * np.repeat(~disc[..., None], 3, -1)).astype(np.uint8))
    size = choose_bucket(120, 300, BucketConfig(SIZES))
    assert size == (16, 24)
    inside = np.asarray(fit(wide, size))[..., 0] < 128
    assert inside.any(0).sum() == inside.any(1).sum() in (10, 11, 12)
    assert np.array_equal(inside, inside[:, ::-1]) and np.array_equal(inside, inside[::-1])


def test_resizing_is_antialiased():
    """Fine stripes become grey; picking pixels would keep them black or white."""
    stripes = np.zeros((128, 128, 3), np.uint8)
    stripes[:, ::2] = 255
    grey = np.asarray(fit(Pictures.fromarray(stripes), (16, 16))).astype(int)
    assert abs(grey - 127).max() < 12
    picked = np.asarray(Pictures.fromarray(stripes).resize((16, 16), Pictures.Resampling.NEAREST)).astype(int)
    assert abs(picked - 127).max() > 120


def test_a_document_has_the_tokens_of_its_bucket():
    for seed, (height, width) in enumerate([(100, 149), (149, 100), (40, 41), (9, 9)]):
        source = picture(seed, 160).crop((0, 0, width, height))
        size, pixels = image().encode(
            Sample("a", str(seed), {}, source), Place(1, True, True), keyed_numpy(0)
        )
        chosen = choose_bucket(height, width, BucketConfig(SIZES))
        assert chosen is not None and len(pixels) == chosen[0] * chosen[1] // 16
        assert [
            image().tokenizer.height_of(int(size.ids[0])),
            image().tokenizer.width_of(int(size.ids[1])),
        ] == [
            chosen[0] // 4,
            chosen[1] // 4,
        ]


def test_a_picture_too_small_is_left_out_with_its_reason():
    with pytest.raises(MissingPart, match="picture too small for every bucket"):
        image().latents(Sample("a", "s", {}, picture(0, 6)))
    assert image(max_enlarged=2.0).latents(Sample("a", "s", {}, picture(0, 6))).shape == (3, 8, 8)


def test_stored_latents_are_left_alone():
    stored = np.random.default_rng(0).standard_normal((3, 12, 20)).astype(np.float16)
    assert image().latents(Sample("a", "s", latents=stored)).shape == (3, 12, 20)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ([[16, 18]], "multiples of 4 pixels"),
        ([[16, 400]], "tokens a side"),
        ([[16, 16], [16, 16]], "different pairs"),
    ],
)
def test_buckets_that_cannot_be_are_refused_up_front(sizes, message):
    with pytest.raises(ValueError, match=message):
        modalities(buckets={"sizes": sizes})
