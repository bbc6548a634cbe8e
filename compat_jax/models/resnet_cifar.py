"""ResNet-32 for CIFAR, the backbone of CL2R.

Module names follow CL2R's state dict (`stage_1_0` for `stage_1.0`).
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from compat_jax.models.layers import BatchNorm, Conv, global_average_pool
from compat_jax.models.rematerialize import block


class BasicBlock(nn.Module):
    """Residual block of two 3x3 convolutions, with a shortcut without weights.

    Where the map shrinks, the shortcut takes every second pixel and pads the new channels with zeros
    ("option A" of He et al. 2016).

    Attributes:
      features: output channels.
      stride: stride of the first convolution and of the shortcut.
      dtype: dtype of the computation; parameters are float32.

    Source: `ResNetBasicblock` and `DownsampleA` in CL2R's `src/cl2r/model.py`.
    """

    features: int
    stride: int = 1
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Map float[batch, h, w, c] to float[batch, h/stride, w/stride, features]."""
        out = Conv(
            self.features, 3, stride=self.stride, padding=1, dtype=self.dtype, name="conv_a"
        )(x)
        out = nn.relu(BatchNorm(dtype=self.dtype, name="bn_a")(out, train))
        out = Conv(self.features, 3, padding=1, dtype=self.dtype, name="conv_b")(out)
        out = BatchNorm(dtype=self.dtype, name="bn_b")(out, train)
        x = x[:, :: self.stride, :: self.stride]
        new_channels = self.features - x.shape[-1]
        return nn.relu(out + jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, new_channels))))


class CifarResNet(nn.Module):
    """Three-stage residual network without its classifier, from images to pooled features.

    The whole last map is averaged; CL2R averages 8x8 windows, which is the same at its 32 pixels.

    Attributes:
      depth: number of blocks of each stage; 5 for ResNet-32.
      widths: features of each stage.
      dtype: dtype of the computation; parameters are float32.
    """

    depth: int = 5
    widths: Sequence[int] = (16, 32, 64)
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Map float[batch, h, w, 3] to float[batch, widths[-1]]."""
        x = Conv(self.widths[0], 3, padding=1, dtype=self.dtype, name="conv_1_3x3")(x)
        x = nn.relu(BatchNorm(dtype=self.dtype, name="bn_1")(x, train))
        for stage, width in enumerate(self.widths):
            for index in range(self.depth):
                stride = 2 if stage and not index else 1
                name = f"stage_{stage + 1}_{index}"
                x = block(BasicBlock, 2)(width, stride, self.dtype, name=name)(x, train)
        return global_average_pool(x)


def resnet32_cifar(dtype: DTypeLike = jnp.float32) -> CifarResNet:
    """Build CL2R's ResNet-32, of 64 features."""
    return CifarResNet(dtype=dtype)
