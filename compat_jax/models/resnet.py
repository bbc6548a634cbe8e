"""ResNets: the reference's ImageNet-style ones, and a small one for 24 to 32 pixels.

Module names follow PyTorch's state dicts (`layer1_0` for `layer1.0`), so that weights are converted
by name.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from compat_jax.errors import UserError
from compat_jax.models.layers import BatchNorm, Conv, global_average_pool, max_pool


class BasicBlock(nn.Module):
    """Residual block of two 3x3 convolutions.

    Attributes:
      features: output channels.
      stride: stride of the first convolution and of the shortcut.
      dtype: dtype of the computation; parameters are float32.

    Source: `BasicBlock` in `src/iamcl2r/models/resnet.py` (torchvision's).
    """

    features: int
    stride: int = 1
    dtype: DTypeLike = jnp.float32
    expansion = 1

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Map float[batch, h, w, c] to float[batch, h/stride, w/stride, features]."""
        out = Conv(self.features, 3, stride=self.stride, padding=1, dtype=self.dtype, name="conv1")(
            x
        )
        out = nn.relu(BatchNorm(dtype=self.dtype, name="bn1")(out, train))
        out = Conv(self.features, 3, padding=1, dtype=self.dtype, name="conv2")(out)
        out = BatchNorm(dtype=self.dtype, name="bn2")(out, train)
        return nn.relu(
            out + _shortcut(x, self.features, self.stride, dtype=self.dtype, train=train)
        )


class Bottleneck(nn.Module):
    """Residual block of 1x1, 3x3 and 1x1 convolutions.

    Attributes:
      features: channels of the 3x3 convolution, a quarter of the output channels.
      stride: stride of the 3x3 convolution and of the shortcut.
      dtype: dtype of the computation; parameters are float32.

    Source: `Bottleneck` in `src/iamcl2r/models/resnet.py` (torchvision's, stride on the 3x3).
    """

    features: int
    stride: int = 1
    dtype: DTypeLike = jnp.float32
    expansion = 4

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Map float[batch, h, w, c] to float[batch, h/stride, w/stride, 4 * features]."""
        out = Conv(self.features, 1, dtype=self.dtype, name="conv1")(x)
        out = nn.relu(BatchNorm(dtype=self.dtype, name="bn1")(out, train))
        out = Conv(self.features, 3, stride=self.stride, padding=1, dtype=self.dtype, name="conv2")(
            out
        )
        out = nn.relu(BatchNorm(dtype=self.dtype, name="bn2")(out, train))
        width = self.features * self.expansion
        out = Conv(width, 1, dtype=self.dtype, name="conv3")(out)
        out = BatchNorm(dtype=self.dtype, name="bn3")(out, train)
        return nn.relu(out + _shortcut(x, width, self.stride, dtype=self.dtype, train=train))


def _shortcut(x, features, stride, *, dtype, train):
    if stride == 1 and x.shape[-1] == features:
        return x
    x = Conv(features, 1, stride, dtype=dtype, name="downsample_0")(x)
    return BatchNorm(dtype=dtype, name="downsample_1")(x, train)


class ResNet(nn.Module):
    """Residual network without its classifier, from images to pooled features.

    Attributes:
      block: BasicBlock or Bottleneck.
      depths: number of blocks of each stage.
      widths: features of each stage, before the expansion by the block.
      stem: "imagenet" is a 7x7 convolution with stride 2 and a 3x3 max pool with stride 2; "small",
        for pictures of 24 to 32 pixels, is a 3x3 convolution with stride 2.
      dtype: dtype of the computation; parameters are float32.
    """

    block: type[BasicBlock] | type[Bottleneck] = BasicBlock
    depths: Sequence[int] = (2, 2, 2, 2)
    widths: Sequence[int] = (64, 128, 256, 512)
    stem: str = "imagenet"
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Map float[batch, h, w, 3] to float[batch, widths[-1] * expansion]."""
        size = 7 if self.stem == "imagenet" else 3
        stem = Conv(
            self.widths[0], size, stride=2, padding=size // 2, dtype=self.dtype, name="conv1"
        )
        x = stem(x)
        x = nn.relu(BatchNorm(dtype=self.dtype, name="bn1")(x, train))
        if self.stem == "imagenet":
            x = max_pool(x, 3, stride=2, padding=1)
        for stage, (depth, width) in enumerate(zip(self.depths, self.widths, strict=True)):
            for index in range(depth):
                stride = 2 if stage and not index else 1
                name = f"layer{stage + 1}_{index}"
                x = self.block(width, stride, self.dtype, name=name)(x, train)
        return global_average_pool(x)


def resnet18(dtype: DTypeLike = jnp.float32) -> ResNet:
    """Build the reference's ResNet-18, of 512 features."""
    return ResNet(BasicBlock, (2, 2, 2, 2), dtype=dtype)


def resnet50(dtype: DTypeLike = jnp.float32) -> ResNet:
    """Build the reference's ResNet-50, of 2048 features."""
    return ResNet(Bottleneck, (3, 4, 6, 3), dtype=dtype)


def resnet_small(dtype: DTypeLike = jnp.float32, width: int = 32) -> ResNet:
    """Build a ResNet of three one-block stages for pictures of 24 to 32 pixels.

    It trains in seconds on a laptop.

    Args:
      dtype: dtype of the computation; parameters are float32.
      width: a quarter of the number of features.

    Raises:
      UserError: `width` below 2.
    """
    if width < 2:
        raise UserError(f"width is {width}: use 2 or more", "width")
    # The first stage is narrow: its maps are the largest, and it would take half the time of a step.
    widths = (width // 2, 2 * width, 4 * width)
    return ResNet(BasicBlock, (1, 1, 1), widths, stem="small", dtype=dtype)
