"""A backbone that compiles in no time: one layer on the pixels, with BatchNorm."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from compat_jax import models
from compat_jax.models.layers import BatchNorm, linear_init


class Flat(nn.Module):
    """float[batch, h, w, c] -> float[batch, 16]."""

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        pixels = images.reshape(len(images), -1)
        layer = nn.Dense(16, use_bias=False, dtype=self.dtype, kernel_init=linear_init)
        return nn.relu(BatchNorm(name="norm", dtype=self.dtype)(layer(pixels), train))


models.register("flat", Flat)
