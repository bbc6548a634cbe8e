"""Normalisation and augmentation of images, inside the jitted step."""

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np

from compat_jax.data.augment_operations import MAX_MAGNITUDE, jitter, randaugment, resized_crops
from compat_jax.errors import UserError
from compat_jax.fields import Rule, check_fields

CIFAR100_MEAN, CIFAR100_STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)


@dataclasses.dataclass(frozen=True)
class Preprocess:
    """How uint8 images become the network's input; the defaults are the paper's for CIFAR-100.

    Attributes:
      mean: of each channel, in 0..1.
      std: of each channel, in 0..1, > 0.
      crop_padding: random crops of the original size after zero padding by this many pixels; 0 for
        none.
      flip: random horizontal flips.
      random_crop: smallest share of the area of a random part that is resized to the whole, in (0, 1];
        1 for none.
      jitter: random factors of brightness, contrast and saturation lie in [1 - jitter, 1 + jitter].
      hue: random turns of the hue lie in [-hue, hue]; 0.5 is the opposite colour.
      randaugment: random operations of RandAugment for each image; 0 for none.
      magnitude: of these operations, 0 to 30.

    Source: transforms in `src/iamcl2r/dataset/cifar.py` (padding 4, flip, CIFAR-100's mean and std).
    """

    mean: Annotated[tuple[float, ...], Rule("mean of each channel, in 0..1")] = CIFAR100_MEAN
    std: Annotated[tuple[float, ...], Rule("deviation of each channel, in 0..1")] = CIFAR100_STD
    crop_padding: Annotated[int, Rule("pixels of padding for random crops", low=0, high=4096)] = 4
    flip: Annotated[bool, Rule("whether to flip at random, left to right")] = True
    random_crop: Annotated[
        float,
        Rule("smallest share of the area of random resized crops; 1 for none", above=0, high=1),
    ] = 1.0
    jitter: Annotated[
        float, Rule("strength of random brightness, contrast and saturation", low=0, high=1)
    ] = 0.0
    hue: Annotated[float, Rule("largest random turn of the hue, of 1", low=0, high=0.5)] = 0.0
    randaugment: Annotated[
        int, Rule("RandAugment's random operations for each image; 0 for none", low=0, high=8)
    ] = 0
    magnitude: Annotated[
        int, Rule("strength of RandAugment's operations", low=0, high=MAX_MAGNITUDE)
    ] = 9

    def __post_init__(self):
        check_fields(self)
        if len(self.mean) != len(self.std) or not self.mean:
            raise UserError(
                f"mean and std need one number per channel: got {self.mean} and {self.std}", "mean"
            )
        if not all(0 <= m <= 1 for m in self.mean):
            raise UserError(f"mean must lie in 0..1, where 1 is white: got {self.mean}", "mean")
        if not all(0 < s <= 1 for s in self.std):
            raise UserError(f"std must lie in 0..1, above 0: got {self.std}", "std")

    def normalizes_like(self, mean: Sequence[float], std: Sequence[float]) -> bool:
        """Return whether mean and deviation are these, but for rounding."""
        pairs = ((self.mean, mean), (self.std, std))
        return all(len(a) == len(b) and np.allclose(a, b, rtol=0, atol=1e-6) for a, b in pairs)

    def describe(self) -> dict[str, Any]:
        """Return the settings as JSON values; what release 0.2 did not have is named where it is on."""
        found = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in _FIRST or value != field.default:
                found[field.name] = list(value) if isinstance(value, tuple) else value
        return found

    def normalize(self, images: jax.Array) -> jax.Array:
        """Normalise uint8 or float32[batch, h, w, c] in 0..255 to float32[batch, h, w, c].

        Raises:
          UserError: the number of channels differs from that of the means.
        """
        if images.shape[-1] != len(self.mean):
            raise UserError(
                f"mean and std have {len(self.mean)} numbers, the images have "
                f"{images.shape[-1]} channels: give one number per channel",
                "mean",
            )
        mean, std = (jnp.asarray(x, jnp.float32) for x in (self.mean, self.std))
        return images.astype(jnp.float32) * (1.0 / (255.0 * std)) - mean / std

    def augment(self, key: jax.Array, images: jax.Array) -> jax.Array:
        """Change images at random: shifts, resized crops, flips, RandAugment, jitter, in this order.

        Args:
          key: random key; the same key gives the same images.
          images: uint8[batch, h, w, c].

        Returns:
          The images, of the same shape: uint8 after shifts and flips alone, otherwise float32 in
          0..255. The padding of shifts is black, as in the reference; corners that a turned image
          leaves open have the mean colour.
        """
        crop_key, flip_key = jax.random.split(key)
        batch, height, width, _ = images.shape
        if self.crop_padding:
            pad = self.crop_padding
            padded = jnp.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
            offsets = jax.random.randint(crop_key, (2, batch, 1), 0, 2 * pad + 1)
            # Two gathers, rows then columns: one dynamic_slice an image is far slower on CPU.
            rows = offsets[0] + jnp.arange(height)
            columns = offsets[1] + jnp.arange(width)
            images = jnp.take_along_axis(padded, rows[:, :, None, None], axis=1)
            images = jnp.take_along_axis(images, columns[:, None, :, None], axis=2)
        if self.random_crop < 1:
            # `split` hands out what folding in 0 and 1 gives.
            images = resized_crops(jax.random.fold_in(key, 2), images, self.random_crop)
        if self.flip:
            flipped = jax.random.bernoulli(flip_key, 0.5, (batch, 1, 1, 1))
            images = jnp.where(flipped, images[:, :, ::-1], images)
        if self.randaugment:
            images = randaugment(
                jax.random.fold_in(key, 3),
                images,
                count=self.randaugment,
                magnitude=self.magnitude,
                fill=255 * jnp.asarray(self.mean, jnp.float32),
            )
        if self.jitter or self.hue:
            images = jitter(jax.random.fold_in(key, 4), images, self.jitter, self.hue)
        return images


# The fields of release 0.2, always named.
_FIRST = ("mean", "std", "crop_padding", "flip")
