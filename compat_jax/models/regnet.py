"""RegNetY-400MF: bottleneck blocks of grouped convolutions with squeeze-and-excitation.

Module names follow the state dict of the reference, whose stages keep their blocks in a list called
`blocks` (`layer1_blocks_0` for `layer1.blocks.0`).
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from compat_jax.models.layers import (
    BatchNorm,
    Conv,
    global_average_pool,
    linear_init,
    squeeze_excite,
)
from compat_jax.models.rematerialize import block


class SqueezeExcite(nn.Module):
    """Gate channels by their own averages.

    Attributes:
      bottleneck: channels between the two layers of the gate.
      dtype: dtype of the computation; parameters are float32.

    Source: `SE` in `src/iamcl2r/models/regnet.py`.
    """

    bottleneck: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Gate float[batch, h, w, c]; the shape stays the same."""

        def gate(features, name):
            return Conv(
                features, 1, use_bias=True, dtype=self.dtype, kernel_init=linear_init, name=name
            )

        return squeeze_excite(x, gate(self.bottleneck, "se1"), gate(x.shape[-1], "se2"))


class Block(nn.Module):
    """Residual block of a 1x1, a grouped 3x3 and a 1x1 convolution, with gated channels.

    Attributes:
      features: output channels, a multiple of `group_width`.
      stride: stride of the 3x3 convolution and of the shortcut.
      group_width: channels of each group of the 3x3 convolution.
      se_ratio: the gate's bottleneck as a share of the block's *input* channels.
      dtype: dtype of the computation; parameters are float32.

    Source: `Block` in `src/iamcl2r/models/regnet.py`, with its bottleneck ratio of 1.
    """

    features: int
    stride: int = 1
    group_width: int = 16
    se_ratio: float = 0.25
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Map float[batch, h, w, c] to float[batch, h/stride, w/stride, features]."""

        def conv(size, name, stride=1, groups=1):
            return Conv(
                self.features,
                size,
                stride=stride,
                padding=size // 2,
                groups=groups,
                dtype=self.dtype,
                kernel_init=linear_init,
                name=name,
            )

        def norm(y, name):
            return BatchNorm(dtype=self.dtype, name=name)(y, train)

        groups = self.features // self.group_width
        out = nn.relu(norm(conv(1, "conv1")(x), "bn1"))
        out = nn.relu(norm(conv(3, "conv2", stride=self.stride, groups=groups)(out), "bn2"))
        bottleneck = round(x.shape[-1] * self.se_ratio)
        out = SqueezeExcite(bottleneck, self.dtype, name="se")(out)
        out = norm(conv(1, "conv3")(out), "bn3")
        if self.stride != 1 or x.shape[-1] != self.features:
            x = norm(conv(1, "shortcut_0", stride=self.stride)(x), "shortcut_1")
        return nn.relu(out + x)


class RegNet(nn.Module):
    """RegNetY without its classifier, from images to pooled features.

    Attributes:
      depths: number of blocks of each stage.
      widths: features of each stage, multiples of `group_width`.
      strides: stride of the first block of each stage.
      group_width: channels of each group of the 3x3 convolutions.
      dtype: dtype of the computation; parameters are float32.
    """

    depths: Sequence[int]
    widths: Sequence[int]
    strides: Sequence[int] = (1, 1, 2, 2)
    group_width: int = 16
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Map float[batch, h, w, 3] to float[batch, widths[-1]]."""
        stem = Conv(64, 3, padding=1, dtype=self.dtype, kernel_init=linear_init, name="conv1")
        x = nn.relu(BatchNorm(dtype=self.dtype, name="bn1")(stem(x), train))
        stages = zip(self.depths, self.widths, self.strides, strict=True)
        for stage, (depth, width, first_stride) in enumerate(stages):
            for index in range(depth):
                stride = 1 if index else first_stride
                name = f"layer{stage + 1}_blocks_{index}"
                kind = block(Block, 2)
                x = kind(width, stride, self.group_width, dtype=self.dtype, name=name)(x, train)
        return global_average_pool(x)


def regnet_y_400mf(dtype: DTypeLike = jnp.float32) -> RegNet:
    """Build the reference's RegNetY-400MF, of 384 features."""
    return RegNet((1, 2, 7, 12), (32, 64, 160, 384), dtype=dtype)
