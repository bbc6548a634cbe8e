"""ConvNeXt: stages of depthwise 7x7 convolutions, each followed by an MLP on the channels.

Module names follow timm's state dicts (`stages_0_blocks_1` for `stages.0.blocks.1`), so that its
weights are imported by name.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from compat_jax.models.layers import Conv, global_average_pool, layer_norm
from compat_jax.models.rematerialize import block
from compat_jax.models.vit import Mlp

_truncated = nn.initializers.truncated_normal(0.02)


def _conv(features, size, *, dtype, name, **geometry):
    return Conv(
        features, size, **geometry, use_bias=True, dtype=dtype, kernel_init=_truncated, name=name
    )


class Block(nn.Module):
    """Residual depthwise convolution, norm and MLP, scaled for each channel.

    Attributes:
      dtype: dtype of the computation; parameters are float32.

    Source: `ConvNeXtBlock` of timm and `CNBlock` of torchvision.
    """

    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map float[batch, h, w, c] to the same shape."""
        width = x.shape[-1]
        depthwise = _conv(width, 7, padding=3, groups=width, dtype=self.dtype, name="conv_dw")
        out = layer_norm(depthwise(x), self.dtype, "norm")
        out = Mlp(4 * width, self.dtype, name="mlp")(out)
        gamma = self.param("gamma", nn.initializers.constant(1e-6), (width,))
        return x + out * gamma.astype(self.dtype)


class ConvNeXt(nn.Module):
    """ConvNeXt without its classifier, from images to normalised pooled features.

    Attributes:
      depths: number of blocks of each stage.
      widths: features of each stage.
      dtype: dtype of the computation; parameters are float32.

    Source: Liu et al., "A ConvNet for the 2020s", CVPR 2022, with the layer-norm epsilon of 1e-6 that
    timm and torchvision have.
    """

    depths: Sequence[int] = (3, 3, 9, 3)
    widths: Sequence[int] = (96, 192, 384, 768)
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Map float[batch, h, w, 3] to float[batch, widths[-1]]; h and w are 32 or more."""
        del train  # no layer behaves differently in training
        x = _conv(self.widths[0], 4, stride=4, dtype=self.dtype, name="stem_0")(x)
        x = layer_norm(x, self.dtype, "stem_1")
        for stage, (depth, width) in enumerate(zip(self.depths, self.widths, strict=True)):
            name = f"stages_{stage}"
            if stage:
                x = layer_norm(x, self.dtype, f"{name}_downsample_0")
                down = _conv(width, 2, stride=2, dtype=self.dtype, name=f"{name}_downsample_1")
                x = down(x)
            for index in range(depth):
                x = block(Block)(self.dtype, name=f"{name}_blocks_{index}")(x)
        return layer_norm(global_average_pool(x), self.dtype, "head_norm")


def convnext_tiny(dtype: DTypeLike = jnp.float32) -> ConvNeXt:
    """Build ConvNeXt-T, of 768 features."""
    return ConvNeXt(dtype=dtype)


def convnext_small(dtype: DTypeLike = jnp.float32) -> ConvNeXt:
    """Build ConvNeXt-S, of 768 features."""
    return ConvNeXt((3, 3, 27, 3), dtype=dtype)


def convnext_base(dtype: DTypeLike = jnp.float32) -> ConvNeXt:
    """Build ConvNeXt-B, of 1024 features."""
    return ConvNeXt((3, 3, 27, 3), (128, 256, 512, 1024), dtype=dtype)
