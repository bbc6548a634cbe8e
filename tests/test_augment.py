"""Random crops, flips and normalisation of uint8 images."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compat_jax.data.augment import Preprocess
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
    ],
)
def test_settings_that_cannot_be(arguments, message):
    with pytest.raises(UserError, match=message):
        Preprocess(*arguments)
