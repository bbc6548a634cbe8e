"""RegNetY-400MF: bottleneck blocks of grouped convolutions with squeeze-and-excitation.

Module names follow the state dict of the reference, whose stages keep their blocks in a list called
`blocks` (`layer1_blocks_0` stands for `layer1.blocks.0`).
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from compat_jax.models.layers import (
    BatchNorm,
    Conv,
    global_average_pool,
    linear_init,
    squeeze_excite,
)


class SqueezeExcite(nn.Module):
    """Channels gated by their own averages.

    Source: `SE` in `src/iamcl2r/models/regnet.py`.
    """

    bottleneck: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """float[batch, h, w, c] -> the same shape."""

        def gate(features, name):
            return Conv(
                features, 1, use_bias=True, dtype=self.dtype, kernel_init=linear_init, name=name
            )

        return squeeze_excite(x, gate(self.bottleneck, "se1"), gate(x.shape[-1], "se2"))


class Block(nn.Module):
    """1x1, grouped 3x3, gate and 1x1, and a shortcut.

    The gate's bottleneck is a share of the block's *input* channels.

    Source: `Block` in `src/iamcl2r/models/regnet.py`, with its bottleneck ratio of 1.
    """

    features: int
    stride: int = 1
    group_width: int = 16
    se_ratio: float = 0.25
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """float[batch, h, w, c] -> float[batch, h/stride, w/stride, features]."""

        def conv(size, stride, groups, name):
            return Conv(
                self.features,
                size,
                stride,
                size // 2,
                groups,
                dtype=self.dtype,
                kernel_init=linear_init,
                name=name,
            )

        def norm(y, name):
            return BatchNorm(dtype=self.dtype, name=name)(y, train)

        groups = self.features // self.group_width
        out = nn.relu(norm(conv(1, 1, 1, "conv1")(x), "bn1"))
        out = nn.relu(norm(conv(3, self.stride, groups, "conv2")(out), "bn2"))
        bottleneck = round(x.shape[-1] * self.se_ratio)
        out = SqueezeExcite(bottleneck, self.dtype, name="se")(out)
        out = norm(conv(1, 1, 1, "conv3")(out), "bn3")
        if self.stride != 1 or x.shape[-1] != self.features:
            x = norm(conv(1, self.stride, 1, "shortcut_0")(x), "shortcut_1")
        return nn.relu(out + x)


class RegNet(nn.Module):
    """A RegNetY without its classifier: images to pooled features.

    Attributes:
      depths: blocks a stage.
      widths: features a stage, multiples of `group_width`.
      strides: of the first block of a stage.
      group_width: channels a group of the 3x3 convolutions.
      dtype: of the computation; parameters are float32.
    """

    depths: Sequence[int]
    widths: Sequence[int]
    strides: Sequence[int] = (1, 1, 2, 2)
    group_width: int = 16
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """float[batch, h, w, 3] -> float[batch, widths[-1]]."""
        stem = Conv(64, 3, 1, 1, dtype=self.dtype, kernel_init=linear_init, name="conv1")
        x = nn.relu(BatchNorm(dtype=self.dtype, name="bn1")(stem(x), train))
        stages = zip(self.depths, self.widths, self.strides, strict=True)
        for stage, (depth, width, first_stride) in enumerate(stages):
            for index in range(depth):
                stride = 1 if index else first_stride
                name = f"layer{stage + 1}_blocks_{index}"
                block = Block(width, stride, self.group_width, dtype=self.dtype, name=name)
                x = block(x, train)
        return global_average_pool(x)


def regnet_y_400mf(dtype: jnp.dtype = jnp.float32) -> RegNet:
    """The reference's RegNetY-400MF; 384 features."""
    return RegNet((1, 2, 7, 12), (32, 64, 160, 384), dtype=dtype)
