"""Random changes of images, against Pillow, SciPy and the laws they keep; normalisation."""

import colorsys
import dataclasses
import functools

import hypothesis.extra.numpy
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from PIL import Image, ImageEnhance, ImageOps
from scipy import ndimage

from compat_jax.data.augment import Preprocess
from compat_jax.data.augment_operations import (
    COLOR,
    GEOMETRIC,
    OPERATIONS,
    apply_operations,
    jitter,
    randaugment,
    resized_crops,
)
from compat_jax.errors import UserError

KEY = 7


def preprocess(**options):
    none = {"crop_padding": 0, "flip": False}
    mean, std = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
    return Preprocess(mean=mean, std=std, **{**none, **options})


def images(batch=16, height=6, width=5, lowest=1):
    """Random pictures; no pixel is black, so that padding shows."""
    rng = np.random.default_rng(0)
    return rng.integers(lowest, 256, (batch, height, width, 3), dtype=np.uint8)


jit_augment = jax.jit(Preprocess.augment, static_argnums=0)


def augment(batch, key=KEY, **options):
    return np.asarray(jit_augment(preprocess(**options), jax.random.key(key), batch))


def possible_crops(image, padding):
    """{(row, column): crop}, by definition: zeros around, then a window of the old size."""
    height, width, _ = image.shape
    padded = np.pad(image, ((padding, padding), (padding, padding), (0, 0)))
    steps = range(2 * padding + 1)
    return {(i, j): padded[i : i + height, j : j + width] for i in steps for j in steps}


def test_normalisation_by_hand():
    batch = np.array([[[[0, 255, 51]]]], np.uint8)
    expected = [-0.5071 / 0.2675, (1 - 0.4867) / 0.2565, (0.2 - 0.4408) / 0.2761]
    result = preprocess().normalize(batch)
    assert result.shape == (1, 1, 1, 3) and result.dtype == jnp.float32
    np.testing.assert_allclose(result[0, 0, 0], expected, rtol=1e-5)


def test_normalisation_of_every_value():
    batch = np.arange(256, dtype=np.uint8)[:, None, None, None].repeat(3, axis=-1)
    mean, std = np.array(preprocess().mean), np.array(preprocess().std)
    np.testing.assert_allclose(preprocess().normalize(batch), (batch / 255 - mean) / std, atol=1e-6)


def test_a_mean_for_each_channel():
    with pytest.raises(UserError, match="have 3 numbers, the images have 1 channels: give one"):
        preprocess().normalize(np.zeros((2, 4, 4, 1), np.uint8))


def test_nothing_to_do():
    np.testing.assert_array_equal(augment(images()), images())


def test_crops_are_windows_of_the_zero_padded_image():
    batch = images(batch=400)
    result = augment(batch, crop_padding=2)
    assert result.dtype == np.uint8 and result.shape == batch.shape
    seen = []
    for before, after in zip(batch, result, strict=True):
        crops = possible_crops(before, 2)
        found = [offset for offset, crop in crops.items() if np.array_equal(crop, after)]
        assert len(found) == 1
        seen += found
    counts = np.unique(seen, axis=0, return_counts=True)[1]
    assert len(counts) == 25  # every offset comes, none much more often than 400 / 25 times
    assert counts.max() < 16 + 5 * 4


def test_flips_are_mirror_images_of_half_the_batch():
    batch = images(batch=400)
    result = augment(batch, flip=True)
    same = (result == batch).all(axis=(1, 2, 3))
    mirrored = (result == batch[:, :, ::-1]).all(axis=(1, 2, 3))
    assert (same ^ mirrored).all()
    assert abs(mirrored.sum() - 200) < 5 * 10


def test_both_together_make_no_new_value():
    batch = images() // 64 * 64 + 1  # 1, 65, 129, 193
    result = augment(batch, crop_padding=4, flip=True)
    assert set(np.unique(result)) == {0, 1, 65, 129, 193}
    for before, after in zip(batch, result, strict=True):
        crops = possible_crops(before, 4).values()
        assert any(np.array_equal(after, c) or np.array_equal(after, c[:, ::-1]) for c in crops)


def test_draws_follow_from_the_key():
    options = {"crop_padding": 4, "flip": True}
    expected = augment(images(), **options)
    np.testing.assert_array_equal(augment(images(), **options), expected)
    assert (augment(images(), key=8, **options) != expected).any()
    not_jitted = preprocess(**options).augment(jax.random.key(KEY), images())
    np.testing.assert_array_equal(not_jitted, expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((0.5,), (0.2, 0.2)), "one number per channel"),
        (((), ()), "one number per channel"),
        (((0.5, 0.5), (0.2, 0.0)), r"std must lie in 0\.\.1, above 0: got \(0\.2, 0\.0\)"),
        (((0.5,), (1.1,)), r"std must lie in 0\.\.1, above 0: got \(1\.1,\)"),
        (((127.0,), (0.2,)), r"mean must lie in 0\.\.1, where 1 is white: got \(127\.0,\)"),
        (((0.5,), (0.2,), -1), "crop_padding must be at least 0 and at most 4,096, got -1"),
        (((0.5,), (0.2,), 0, False, 0.0), "random_crop must be above 0 and at most 1, got 0"),
        (((0.5,), (0.2,), 0, False, 1, 1.5), "jitter must be at least 0 and at most 1, got 1.5"),
        (((0.5,), (0.2,), 0, False, 1, 0, 0.6), "hue must be at least 0 and at most 0.5, got 0.6"),
        (((0.5,), (0.2,), 0, False, 1, 0, 0, 9), "randaugment must be at least 0 and at most 8"),
        (((0.5,), (0.2,), 0, False, 1, 0, 0, 1, 31), "magnitude must be at least 0 and at most 30"),
    ],
)
def test_settings_that_cannot_be(arguments, message):
    with pytest.raises(UserError, match=message):
        Preprocess(*arguments)


def test_settings_are_described_as_release_0_2_did_unless_something_new_is_on():
    first = {"mean": [0.5], "std": [0.2], "crop_padding": 4, "flip": True}
    assert Preprocess((0.5,), (0.2,)).describe() == first
    changed = Preprocess((0.5,), (0.2,), jitter=0.4, randaugment=2)
    assert changed.describe() == {**first, "jitter": 0.4, "randaugment": 2}


# What release 0.2 did not have


@pytest.mark.parametrize("padding", [0, 2])
def test_shifts_and_flips_come_from_the_keys_of_release_0_2(padding):
    batch = images(batch=8)
    crop_key, flip_key = jax.random.split(jax.random.key(KEY))
    offsets = np.asarray(jax.random.randint(crop_key, (2, 8, 1), 0, 2 * padding + 1))[..., 0].T
    flips = np.asarray(jax.random.bernoulli(flip_key, 0.5, (8, 1, 1, 1))).ravel()
    found = augment(batch, crop_padding=padding, flip=True)
    for before, after, offset, flip in zip(batch, found, offsets, flips, strict=True):
        crop = possible_crops(before, padding)[tuple(offset)]
        np.testing.assert_array_equal(after, crop[:, ::-1] if flip else crop)


def ramps(batch, size):
    """Images whose channels hold the row and the column of each pixel."""
    rows, columns = np.mgrid[:size, :size]
    ramp = np.stack([rows, columns, np.full_like(rows, 9)], axis=-1).astype(np.float32)
    return np.repeat(ramp[None], batch, axis=0)


def test_resized_crops_have_the_area_and_the_aspect_that_were_asked_for():
    size, lowest = 32, 0.2
    crop = jax.jit(functools.partial(resized_crops, lowest=lowest))
    found = np.asarray(crop(jax.random.key(0), ramps(300, size)))
    np.testing.assert_allclose(found[..., 2], 9, atol=1e-4)  # what is constant stays
    middle = slice(8, 24)
    heights = np.diff(found[:, middle, 16, 0], axis=1)  # of a pixel of the result, in pixels before
    widths = np.diff(found[:, 16, middle, 1], axis=1)
    np.testing.assert_allclose(heights, heights[:, :1] + 0 * heights, atol=1e-3)
    height, width = heights.mean(1), widths.mean(1)  # of the crop, as shares of the image
    area, aspect = height * width, width / height
    assert area.min() > lowest - 1e-3 and area.max() < 1 + 1e-3
    assert 0.25 < np.quantile(area, 0.1) < 0.35 and 0.85 < np.quantile(area, 0.9) < 0.97
    assert aspect.min() > 3 / 4 - 1e-3 and aspect.max() < 4 / 3 + 1e-3
    assert aspect.min() < 0.8 and aspect.max() > 1.25
    # Corners: the first row that is read, from the top to as far as the crop fits.
    top = (found[:, 16, 16, 0] - (16 + 0.5 - size / 2) * height) - (size * height - 1) / 2
    assert top.min() > -1e-2 and (top + size * height).max() < size + 1e-2
    room = size * (1 - height)
    share = top[room > 2] / room[room > 2]
    assert abs(share.mean() - 0.5) < 0.1 and share.min() < 0.1 and share.max() > 0.9


def test_a_crop_of_everything_is_the_image():
    batch = images(height=16, width=16)
    found = np.asarray(jax.jit(resized_crops)(jax.random.key(0), batch, 0.9999))
    np.testing.assert_allclose(found, batch, atol=1.0)


compiled_jitter = jax.jit(jitter, static_argnums=(2, 3))


def test_jitter_of_no_strength_changes_nothing():
    batch = images()
    found = compiled_jitter(jax.random.key(0), batch, 0.0, 0.0)
    np.testing.assert_allclose(found, batch, atol=1e-4)


def test_jitter_scales_a_grey_image_and_keeps_it_grey():
    grey = np.full((200, 2, 2, 3), 100, np.uint8)
    found = np.asarray(compiled_jitter(jax.random.key(0), grey, 0.4, 0.3))
    np.testing.assert_allclose(found, found[:, :1, :1, :1] + 0 * found, atol=0.05)
    factors = found[:, 0, 0, 0] / 100
    assert 0.6 - 1e-3 < factors.min() < 0.65 and 1.35 < factors.max() < 1.4 + 1e-3
    assert abs(factors.mean() - 1) < 0.05


def test_the_hue_is_turned_and_nothing_else():
    batch = images(batch=20, height=2, width=2)
    found = np.asarray(compiled_jitter(jax.random.key(0), batch, 0.0, 0.2)) / 255
    for before, after in zip(batch / 255, found, strict=True):
        hsv = [colorsys.rgb_to_hsv(*pixel) for pixel in before.reshape(-1, 3)]
        turned = [colorsys.rgb_to_hsv(*pixel) for pixel in after.reshape(-1, 3)]
        turns = [(b[0] - a[0] + 0.5) % 1 - 0.5 for a, b in zip(hsv, turned, strict=True)]
        np.testing.assert_allclose(turns, turns[0], atol=2e-3)
        assert abs(turns[0]) < 0.2 + 1e-3
        np.testing.assert_allclose(np.array(turned)[:, 1:], np.array(hsv)[:, 1:], atol=1e-3)


FILL = np.array([10.0, 120.0, 200.0], np.float32)
OPERATION_IMAGES = images(batch=28, height=12, width=10)
jit_operations = jax.jit(apply_operations)


@functools.cache
def operated(strength):
    """Each operation at -strength and strength: {(name, sign): float32[h, w, c]}."""
    numbers = np.arange(28, dtype=np.int32) // 2
    signs = np.where(np.arange(28) % 2, 1.0, -1.0).astype(np.float32)
    batch = np.repeat(OPERATION_IMAGES[:1], 28, axis=0)
    found = np.asarray(jit_operations(batch, numbers, signs * np.float32(strength), fill=FILL))
    assert found.dtype == np.float32 and found.min() >= 0 and found.max() <= 255
    return {
        (OPERATIONS[i], sign): x for i, sign, x in zip(numbers, map(int, signs), found, strict=True)
    }


def enhanced(kind):
    def oracle(image, strength):
        return np.asarray(kind(Image.fromarray(image)).enhance(1 + 0.9 * strength), float)

    return oracle


def contrast(image, strength):
    mean = image.mean((0, 1))
    return np.clip(mean + (1 + 0.9 * strength) * (image - mean), 0, 255)


def pointwise(operation, argument=None):
    def oracle(image, strength):
        given = () if argument is None else (argument(abs(strength)),)
        return np.asarray(operation(Image.fromarray(image), *given), float)

    return oracle


def geometric(matrix, shift):
    """SciPy's warp of each channel about the middle, mean colour outside."""

    def oracle(image, strength):
        middle = (np.array(image.shape[:2]) - 1) / 2
        m, t = np.array(matrix(strength)), np.array(shift(strength)) * image.shape[:2]
        planes = [
            ndimage.affine_transform(
                image[..., c].astype(float), m, middle - m @ middle + t, order=1, cval=FILL[c]
            )
            for c in range(3)
        ]
        return np.stack(planes, axis=-1)

    return oracle


def turned(s):
    cos, sin = np.cos(s * np.pi / 6), np.sin(s * np.pi / 6)
    return [[cos, sin], [-sin, cos]]


def straight(_):
    return np.eye(2)


def nowhere(_):
    return (0, 0)


ORACLES = {
    "identity": lambda image, _: image.astype(float),
    "rotate": geometric(turned, nowhere),
    "shear_x": geometric(lambda s: [[1, 0], [0.3 * s, 1]], nowhere),
    "shear_y": geometric(lambda s: [[1, 0.3 * s], [0, 1]], nowhere),
    "translate_x": geometric(straight, lambda s: (0, 150 / 331 * s)),
    "translate_y": geometric(straight, lambda s: (150 / 331 * s, 0)),
    "brightness": enhanced(ImageEnhance.Brightness),
    "color": enhanced(ImageEnhance.Color),
    "sharpness": enhanced(ImageEnhance.Sharpness),
    "contrast": contrast,
    "posterize": pointwise(ImageOps.posterize, lambda s: 8 - round(4 * s)),
    "solarize": pointwise(ImageOps.solarize, lambda s: 256 * (1 - s)),
    "autocontrast": pointwise(ImageOps.autocontrast),
    "equalize": pointwise(ImageOps.equalize),
}


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_does_what_pillow_and_scipy_do(name, sign):
    image, strength = OPERATION_IMAGES[0], 0.7
    expected = ORACLES[name](image, sign * strength)
    exact = name in ("identity", "posterize", "solarize", "equalize", *GEOMETRIC)
    # Pillow cuts or rounds to whole numbers, the smoothed and the grey image as well.
    np.testing.assert_allclose(
        operated(strength)[name, sign], expected, atol=2e-3 if exact else 2.0
    )


@pytest.mark.parametrize("name", [n for n in OPERATIONS if n not in ("autocontrast", "equalize")])
def test_an_operation_of_no_strength_changes_nothing(name):
    found, exact = operated(0.0)[name, 1], name not in COLOR
    np.testing.assert_allclose(found, OPERATION_IMAGES[0], atol=0 if exact else 1e-3)


def test_operations_leave_an_image_of_one_colour():
    flat = np.broadcast_to(FILL.astype(np.uint8), (14, 6, 6, 3))
    operations = np.arange(14, dtype=np.int32)
    found = np.asarray(jit_operations(flat, operations, np.full(14, 0.5, np.float32), fill=FILL))
    for name in ("identity", *GEOMETRIC, "sharpness", "contrast", "autocontrast", "equalize"):
        np.testing.assert_allclose(found[OPERATIONS.index(name)], flat[0], atol=1e-3, err_msg=name)


def test_each_image_is_changed_on_its_own():
    operations = np.arange(28, dtype=np.int32) % 14
    strengths = np.linspace(-1, 1, 28, dtype=np.float32)
    together = np.asarray(jit_operations(OPERATION_IMAGES, operations, strengths, fill=FILL))
    backwards = jit_operations(OPERATION_IMAGES[::-1], operations[::-1], strengths[::-1], fill=FILL)
    np.testing.assert_array_equal(np.asarray(backwards)[::-1], together)


def test_randaugment_draws_one_of_the_operations_for_each_image():
    batch = np.repeat(OPERATION_IMAGES[:1], 200, axis=0)
    run = jax.jit(functools.partial(randaugment, count=1, magnitude=21))
    found = np.asarray(run(jax.random.key(0), batch, fill=FILL))
    known = operated(0.7)
    distances = np.stack([np.abs(found - x).max((1, 2, 3)) for x in known.values()])
    assert distances.min(0).max() < 1e-3
    drawn = {
        name
        for distance in distances.T
        for name, d in zip(known, distance, strict=True)
        if d < 1e-3
    }
    assert drawn == set(known)


EVERYTHING = {
    "crop_padding": 2,
    "flip": True,
    "random_crop": 0.4,
    "jitter": 0.4,
    "hue": 0.1,
    "randaugment": 1,
    "magnitude": 30,
}


def test_everything_at_once_follows_from_the_key():
    batch = images(height=8, width=8)
    expected = augment(batch, **EVERYTHING)
    np.testing.assert_array_equal(augment(batch, **EVERYTHING), expected)
    others = augment(batch, key=8, **EVERYTHING)
    assert (np.abs(others - expected).max((1, 2, 3)) > 1).all()


@pytest.mark.slow
def test_everything_at_once_is_the_same_on_eight_devices():
    batch = images(height=8, width=8)
    expected = augment(batch, **EVERYTHING)
    shared = NamedSharding(Mesh(np.array(jax.devices()), ("data",)), PartitionSpec("data"))
    found = augment(jax.device_put(batch, shared), **EVERYTHING)
    np.testing.assert_allclose(found, expected, atol=1e-2)


@pytest.mark.parametrize(
    ("shape", "options"),
    [((2, 7, 4, 3), {}), ((16, 8, 8, 3), EVERYTHING), ((2, 1, 5, 1), {"randaugment": 1})],
)
@settings(max_examples=10)
@given(data=st.data())
def test_images_keep_their_shape_and_their_range(shape, options, data):
    batch = data.draw(hypothesis.extra.numpy.arrays(np.uint8, shape))
    key = jax.random.key(data.draw(st.integers(0, 99)))
    made = preprocess(**options)
    if shape[-1] == 1:
        made = dataclasses.replace(made, mean=(0.5,), std=(0.2,))
    found = jit_augment(made, key, batch)
    assert found.shape == shape and found.dtype == (jnp.float32 if options else jnp.uint8)
    assert float(found.min()) >= 0 and float(found.max()) <= 255
    assert made.normalize(found).dtype == jnp.float32


def test_normalisation_takes_floats_as_it_takes_whole_numbers():
    floats = preprocess().normalize(images().astype(np.float32))
    np.testing.assert_array_equal(floats, preprocess().normalize(images()))
