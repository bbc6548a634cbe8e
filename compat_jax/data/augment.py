"""Normalisation and augmentation of uint8 images, inside the jitted step."""

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp

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

    Source: transforms in `src/iamcl2r/dataset/cifar.py` (padding 4, flip, CIFAR-100's mean and std).
    """

    mean: Annotated[tuple[float, ...], Rule("mean of each channel, in 0..1")] = CIFAR100_MEAN
    std: Annotated[tuple[float, ...], Rule("deviation of each channel, in 0..1")] = CIFAR100_STD
    crop_padding: Annotated[int, Rule("pixels of padding for random crops", low=0, high=4096)] = 4
    flip: Annotated[bool, Rule("whether to flip at random, left to right")] = True

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

    def normalize(self, images: jax.Array) -> jax.Array:
        """Normalise uint8[batch, h, w, c] to float32[batch, h, w, c].

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
        """Crop and flip uint8[batch, h, w, c] at random; padding is black, as in the reference."""
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
        if self.flip:
            flipped = jax.random.bernoulli(flip_key, 0.5, (batch, 1, 1, 1))
            images = jnp.where(flipped, images[:, :, ::-1], images)
        return images
