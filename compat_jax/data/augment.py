"""Normalisation and augmentation of uint8 images, inside the jitted step."""

import dataclasses

import jax
import jax.numpy as jnp

from compat_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Preprocess:
    """How uint8 images become the network's input.

    Attributes:
      mean: of each channel, in 0..1.
      std: of each channel, in 0..1, > 0.
      crop_padding: random crops of the original size after zero padding by this many pixels; 0 for
        none.
      flip: random horizontal flips.

    Source: transforms in `src/iamcl2r/dataset/cifar.py` (padding 4, flip, CIFAR-100's mean and std).
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_padding: int = 0
    flip: bool = False

    def __post_init__(self):
        if len(self.mean) != len(self.std) or min(self.std) <= 0:
            raise UserError(
                f"data.mean and data.std need one number a channel, std > 0: "
                f"got {self.mean} and {self.std}"
            )
        if self.crop_padding < 0:
            raise UserError(f"data.crop_padding must not be negative, got {self.crop_padding}")

    def normalize(self, images: jax.Array) -> jax.Array:
        """uint8[batch, h, w, c] -> float32[batch, h, w, c].

        Raises:
          UserError: another number of channels than of means.
        """
        if images.shape[-1] != len(self.mean):
            raise UserError(
                f"data.mean and data.std have {len(self.mean)} numbers, the images have "
                f"{images.shape[-1]} channels: give one number a channel"
            )
        mean, std = (jnp.asarray(x, jnp.float32) for x in (self.mean, self.std))
        return images.astype(jnp.float32) * (1.0 / (255.0 * std)) - mean / std

    def augment(self, key: jax.Array, images: jax.Array) -> jax.Array:
        """Random crop and flip of uint8[batch, h, w, c]; padding is black, as in the reference."""
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
