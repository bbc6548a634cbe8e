"""SENet-18: pre-activation residual blocks with squeeze-and-excitation.

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


class PreActBlock(nn.Module):
    """Residual block of twice norm, activation and 3x3 convolution, with gated channels.

    Attributes:
      features: output channels.
      stride: stride of the first convolution and of the shortcut.
      dtype: dtype of the computation; parameters are float32.

    Source: `PreActBlock` in `src/iamcl2r/models/senet.py`.
    """

    features: int
    stride: int = 1
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Map float[batch, h, w, c] to float[batch, h/stride, w/stride, features]."""

        def conv(size, stride, name):
            return Conv(
                self.features,
                size,
                stride=stride,
                padding=size // 2,
                dtype=self.dtype,
                kernel_init=linear_init,
                name=name,
            )

        def gate(features, name):
            return Conv(
                features, 1, use_bias=True, dtype=self.dtype, kernel_init=linear_init, name=name
            )

        out = nn.relu(BatchNorm(dtype=self.dtype, name="bn1")(x, train))
        shortcut = x
        if self.stride != 1 or x.shape[-1] != self.features:
            shortcut = conv(1, self.stride, "shortcut_0")(out)
        out = conv(3, self.stride, "conv1")(out)
        out = nn.relu(BatchNorm(dtype=self.dtype, name="bn2")(out, train))
        out = conv(3, 1, "conv2")(out)
        out = squeeze_excite(out, gate(self.features // 16, "fc1"), gate(self.features, "fc2"))
        return out + shortcut


class SENet(nn.Module):
    """Squeeze-and-excitation network without its classifier, from images to pooled features.

    The whole last map is averaged; the reference averages 4x4 windows, which is the same at its 32
    pixels, and at other sizes fails or changes the feature size.

    Attributes:
      depths: number of blocks of each stage.
      widths: features of each stage.
      dtype: dtype of the computation; parameters are float32.
    """

    depths: Sequence[int] = (2, 2, 2, 2)
    widths: Sequence[int] = (64, 128, 256, 512)
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Map float[batch, h, w, 3] to float[batch, widths[-1]]."""
        stem = Conv(64, 3, padding=1, dtype=self.dtype, kernel_init=linear_init, name="conv1")
        x = nn.relu(BatchNorm(dtype=self.dtype, name="bn1")(stem(x), train))
        for stage, (depth, width) in enumerate(zip(self.depths, self.widths, strict=True)):
            for index in range(depth):
                stride = 2 if stage and not index else 1
                name = f"layer{stage + 1}_blocks_{index}"
                x = block(PreActBlock, 2)(width, stride, self.dtype, name=name)(x, train)
        return global_average_pool(x)


def senet18(dtype: DTypeLike = jnp.float32) -> SENet:
    """Build the reference's SENet-18, of 512 features."""
    return SENet(dtype=dtype)
