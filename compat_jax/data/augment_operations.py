"""Random changes of whole batches of images on the device: resized crops, colour jitter, RandAugment.

Images are float32[batch, h, w, c] in 0..255, and each image has draws of its own.
"""

import contextlib
from collections.abc import Iterator

import dm_pix as pix
import jax
import jax.numpy as jnp
from jax import lax

# The operations of RandAugment by name, in the order in which they are numbered.
GEOMETRIC = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")
COLOR = (
    "brightness",
    "color",
    "contrast",
    "sharpness",
    "posterize",
    "solarize",
    "autocontrast",
    "equalize",
)
OPERATIONS = ("identity", *GEOMETRIC, *COLOR)
MAX_MAGNITUDE = 30


def resized_crops(key: jax.Array, images: jax.Array, lowest: float) -> jax.Array:
    """Cut a random part out of each image and resize it to the whole image's size.

    The share of the area is uniform in [lowest, 1]; the aspect, relative to the image's own, is
    log-uniform in 3/4..4/3, as far as a part of that area fits.

    Args:
      key: random key.
      images: uint8 or float32[batch, h, w, c].
      lowest: smallest share of the area, in (0, 1].

    Returns:
      float32[batch, h, w, c], resized bilinearly.

    Source: Szegedy et al., Going Deeper with Convolutions, CVPR 2015, section 6.
    """
    batch, height, width, _ = images.shape
    keys = jax.random.split(key, 3)
    area = jax.random.uniform(keys[0], (batch,), minval=lowest, maxval=1.0)
    narrow, wide = jnp.maximum(area, 3 / 4), jnp.minimum(1 / area, 4 / 3)
    position = jax.random.uniform(keys[1], (batch,))
    aspect = narrow * (wide / narrow) ** position
    share = jnp.minimum(jnp.sqrt(jnp.stack([area / aspect, area * aspect], axis=1)), 1.0)
    room = (1 - share) * jnp.asarray([height, width], jnp.float32)
    corner = room * jax.random.uniform(keys[2], (batch, 2))

    def crop(image, scale, corner):
        # Resized by two products with matrices of weights, without gathers.
        return jax.image.scale_and_translate(
            image, image.shape, (0, 1), scale, -corner * scale, "linear", antialias=True
        )

    return jax.vmap(crop)(images.astype(jnp.float32), 1 / share, corner)


def jitter(key: jax.Array, images: jax.Array, strength: float, hue: float) -> jax.Array:
    """Change brightness, contrast, saturation and hue at random, in this order.

    Args:
      key: random key.
      images: uint8 or float32[batch, h, w, c].
      strength: the first three factors are uniform in [1 - strength, 1 + strength].
      hue: the turn of the hue is uniform in [-hue, hue], 0.5 being the opposite colour. Images of
        one channel have neither saturation nor hue to change.

    Returns:
      float32[batch, h, w, c] in 0..255.

    Source: Howard, Some Improvements on Deep Convolutional Neural Network Based Image Classification,
    2013, section 2.
    """
    batch, channels = images.shape[0], images.shape[-1]
    keys = jax.random.split(key)
    low, high = 1 - strength, 1 + strength
    images = images.astype(jnp.float32) / 255
    if strength:
        factors = jax.random.uniform(keys[0], (3, batch, 1, 1, 1), minval=low, maxval=high)
        for change, factor in zip((_brightness, _contrast, _saturation), factors, strict=True):
            images = change(images, factor)
    if hue and channels == 3:
        turns = jax.random.uniform(keys[1], (batch, 1, 1), minval=-hue, maxval=hue)
        with _pix():
            images = pix.adjust_hue(images, turns)
    return jnp.clip(images * 255, 0.0, 255.0)


def randaugment(
    key: jax.Array, images: jax.Array, *, count: int, magnitude: int, fill: jax.Array
) -> jax.Array:
    """Apply `count` operations, drawn uniformly for each image with replacement.

    Args:
      key: random key.
      images: uint8 or float32[batch, h, w, c].
      count: operations an image.
      magnitude: of all operations, 0..30.
      fill: float32[c] in 0..255, the colour of corners that a turned image leaves open.

    Returns:
      float32[batch, h, w, c] in 0..255.

    Source: Cubuk et al., RandAugment, CVPR workshops 2020; the ranges are those of AutoAugment (Cubuk
    et al., CVPR 2019, table 6).
    """
    for part in jax.random.split(key, count):
        draws, signs = jax.random.split(part)
        operations = jax.random.randint(draws, images.shape[:1], 0, len(OPERATIONS))
        sign = jax.random.rademacher(signs, images.shape[:1], jnp.float32)
        strengths = sign * (magnitude / MAX_MAGNITUDE)
        images = apply_operations(images, operations, strengths, fill=fill)
    return images


def apply_operations(
    images: jax.Array, operations: jax.Array, strengths: jax.Array, *, fill: jax.Array
) -> jax.Array:
    """Apply one operation of RandAugment to each image.

    At strength 1, images are turned by 30 degrees, sheared by 0.3, shifted by 0.45 of the side; factors
    of brightness, color, contrast and sharpness are 1.9 (0.1 at -1); 4 bits are left; everything is
    inverted. Signs count for these geometric operations and factors only. Strength 0 changes
    nothing, but for autocontrast and equalize, which have no strength.

    Args:
      images: uint8 or float32[batch, h, w, c].
      operations: int[batch], positions in `OPERATIONS`.
      strengths: float32[batch] in -1..1.
      fill: see `randaugment`.

    Returns:
      float32[batch, h, w, c] in 0..255.
    """
    # A branch for each image would compute all of them anyway (a mapped `switch` is a `select`). The
    # geometric operations share one warp, and those of colour are fused into one pass.
    images = warp(images.astype(jnp.float32), _shifts(images.shape, operations, strengths), fill)
    # Without the barrier XLA gathers again for each of the operations below.
    images = lax.optimization_barrier(images)
    scaled = images / 255
    factor = 1 + 0.9 * strengths[:, None, None, None]
    strength = jnp.abs(strengths)[:, None, None, None]
    with _pix():
        solarized = pix.solarize(scaled, (1 - strength) * (256 / 255))
    changed = {
        "brightness": _brightness(scaled, factor),
        "color": _saturation(scaled, factor),
        "contrast": _contrast(scaled, factor),
        "sharpness": _sharpness(scaled, factor),
        "posterize": _posterize(scaled, strength),
        "solarize": solarized,
        "autocontrast": _autocontrast(scaled),
        "equalize": _equalize(scaled),
    }
    for name, result in changed.items():
        chosen = (operations == OPERATIONS.index(name))[:, None, None, None]
        images = jnp.where(chosen, jnp.clip(result * 255, 0.0, 255.0), images)
    return lax.optimization_barrier(images)


def warp(images: jax.Array, coordinates: jax.Array, fill: jax.Array) -> jax.Array:
    """Read each image at other positions, bilinearly.

    Args:
      images: float32[batch, h, w, c].
      coordinates: float32[batch, 2, h, w], row and column that each pixel is read from.
      fill: float32[c], the value of pixels read from outside.

    Returns:
      float32[batch, h, w, c].
    """

    # Flat gathers of whole pixels: on the CPU 2 to 15 times faster than dm-pix's interpolation, which
    # gathers each channel.
    batch, height, width, channels = images.shape
    pixels = images.reshape(batch, height * width, channels)
    lower = jnp.floor(coordinates).astype(jnp.int32)
    weights = coordinates - lower.astype(jnp.float32)

    def at(row, column):
        rows = jnp.clip(lower[:, 0] + row, 0, height - 1)
        places = rows * width + jnp.clip(lower[:, 1] + column, 0, width - 1)
        places = places.reshape(batch, height * width, 1)
        return jnp.take_along_axis(pixels, places, axis=1).reshape(images.shape)

    below, right = weights[:, 0, ..., None], weights[:, 1, ..., None]
    upper_row = at(0, 0) * (1 - right) + at(0, 1) * right
    lower_row = at(1, 0) * (1 - right) + at(1, 1) * right
    last = jnp.asarray([height - 1, width - 1], jnp.float32)[:, None, None]
    is_inside = ((coordinates >= 0) & (coordinates <= last)).all(1)[..., None]
    return jnp.where(is_inside, upper_row * (1 - below) + lower_row * below, fill)


def _shifts(shape, operations, strengths):
    """Where the geometric operations read each pixel, float32[batch, 2, h, w].

    Sums, since a product with matrices would be rounded to few bits on accelerators.
    """
    _, height, width, _ = shape

    def amount(name, most):
        chosen = operations == OPERATIONS.index(name)
        return jnp.where(chosen, most * strengths, 0.0)[:, None, None]

    middle_y, middle_x = (height - 1) / 2, (width - 1) / 2
    y = (jnp.arange(height, dtype=jnp.float32) - middle_y)[None, :, None]
    x = (jnp.arange(width, dtype=jnp.float32) - middle_x)[None, None, :]
    angle = amount("rotate", jnp.pi / 6)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    rows = cos * y + (sin + amount("shear_y", 0.3)) * x
    columns = (amount("shear_x", 0.3) - sin) * y + cos * x
    rows += middle_y + amount("translate_y", 150 / 331 * height)
    columns += middle_x + amount("translate_x", 150 / 331 * width)
    return jnp.stack([rows, columns], axis=1)


def _brightness(images, factor):
    return jnp.clip(images * factor, 0.0, 1.0)


def _contrast(images, factor):
    with _pix():
        return jnp.clip(pix.adjust_contrast(images, factor), 0.0, 1.0)


def _saturation(images, factor):
    """Mix with the grey image; images of one channel stay."""
    if images.shape[-1] != 3:
        return images
    with _pix():
        grey = pix.rgb_to_grayscale(images)
    return jnp.clip(grey + factor * (images - grey), 0.0, 1.0)


def _sharpness(images, factor):
    """Mix with the smoothed image (weights 1, the centre 5, of 13); the border stays."""
    height, width = images.shape[1:3]
    rows, columns = jnp.arange(height)[:, None, None], jnp.arange(width)[None, :, None]
    is_border = (rows % max(height - 1, 1) == 0) | (columns % max(width - 1, 1) == 0)
    window = (1, 3, 3, 1)
    total = lax.reduce_window(images, 0.0, lax.add, window, (1, 1, 1, 1), "SAME")
    smooth = (total + 4 * images) / 13
    return jnp.where(is_border, images, jnp.clip(smooth + factor * (images - smooth), 0.0, 1.0))


def _posterize(images, strength):
    """Keep the upper 8 to 4 bits of each value."""
    step = jnp.exp2(jnp.round(4 * strength))
    return jnp.floor(jnp.round(images * 255) / step) * step / 255


def _autocontrast(images):
    """Stretch each channel to black and white; a channel of one value stays."""
    low = images.min((1, 2), keepdims=True)
    span = images.max((1, 2), keepdims=True) - low
    return jnp.where(span > 0, (images - low) / jnp.where(span > 0, span, 1.0), images)


def _equalize(images):
    """Spread each channel's values such that all are about equally frequent."""
    batch, height, width, channels = images.shape
    values = jnp.round(images * 255).astype(jnp.int32)
    # One flat histogram for all images and channels: on the CPU 2 to 3 times faster than one for each.
    places = values + jnp.arange(batch * channels).reshape(batch, 1, 1, channels) * 256
    counts = jnp.zeros(batch * channels * 256, jnp.int32).at[places.reshape(-1)].add(1)
    counts = counts.reshape(batch, channels, 256)
    # The last value that occurs does not count, so that it becomes white.
    highest = values.max((1, 2))[..., None]
    step = (height * width - jnp.take_along_axis(counts, highest, axis=-1)) // 255
    below = jnp.cumsum(counts, axis=-1) - counts
    spread = jnp.clip((below + step // 2) // jnp.maximum(step, 1), 0, 255)
    table = jnp.where(step > 0, spread, jnp.arange(256)).astype(jnp.float32) / 255
    # Without the barrier XLA makes the table anew for each pixel that is looked up.
    table = lax.optimization_barrier(table).swapaxes(1, 2)
    flat = values.reshape(batch, height * width, channels)
    return jnp.take_along_axis(table, flat, axis=1).reshape(images.shape)


@contextlib.contextmanager
def _pix() -> Iterator[None]:
    """Let dm-pix mix whole numbers and floats, and have its products exact on accelerators."""
    with jax.numpy_dtype_promotion("standard"), jax.default_matmul_precision("highest"):
        yield
