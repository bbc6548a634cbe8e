"""ResNets: torchvision's ImageNet-style ones, timm's d variants, and a small one for 24 to 32 pixels.

Module names follow PyTorch's state dicts (`layer1_0` for `layer1.0`), so that weights are converted
by name.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from compat_jax.errors import UserError
from compat_jax.models.layers import BatchNorm, Conv, global_average_pool, max_pool
from compat_jax.models.rematerialize import block


class BasicBlock(nn.Module):
    """Residual block of two 3x3 convolutions.

    Attributes:
      features: output channels.
      stride: stride of the first convolution and of the shortcut.
      dtype: dtype of the computation; parameters are float32.
      average_down: shrink the shortcut by averages of 2x2 windows, as in the d variants.

    Source: `BasicBlock` in `src/iamcl2r/models/resnet.py` (torchvision's).
    """

    features: int
    stride: int = 1
    dtype: DTypeLike = jnp.float32
    average_down: bool = False
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
        return nn.relu(out + _shortcut(self, x, self.features, train))


class Bottleneck(nn.Module):
    """Residual block of 1x1, 3x3 and 1x1 convolutions.

    Attributes:
      features: channels of the 3x3 convolution, a quarter of the output channels.
      stride: stride of the 3x3 convolution and of the shortcut.
      dtype: dtype of the computation; parameters are float32.
      average_down: shrink the shortcut by averages of 2x2 windows, as in the d variants.

    Source: `Bottleneck` in `src/iamcl2r/models/resnet.py` (torchvision's, stride on the 3x3).
    """

    features: int
    stride: int = 1
    dtype: DTypeLike = jnp.float32
    average_down: bool = False
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
        return nn.relu(out + _shortcut(self, x, width, train))


def _shortcut(block, x, width, train):
    """The input of a block in the shape of its output."""
    stride, dtype = block.stride, block.dtype
    if stride == 1 and x.shape[-1] == width:
        return x
    first = 0
    if block.average_down:  # number 0 is the average, which has no weights
        x, stride, first = average_pool_2(x) if stride == 2 else x, 1, 1
    x = Conv(width, 1, stride, dtype=dtype, name=f"downsample_{first}")(x)
    return BatchNorm(dtype=dtype, name=f"downsample_{first + 1}")(x, train)


def average_pool_2(x: jax.Array) -> jax.Array:
    """Average windows of 2x2 pixels; at odd edges, the pixels that are there.

    Args:
      x: float[batch, h, w, c].

    Returns:
      float[batch, ceil(h / 2), ceil(w / 2), c].

    Source: `AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False)` of PyTorch.
    """
    _, height, width, _ = x.shape
    odd = (height % 2, width % 2)
    padded = jnp.pad(x, ((0, 0), (0, odd[0]), (0, odd[1]), (0, 0)))
    total = (
        padded[:, ::2, ::2] + padded[:, 1::2, ::2] + padded[:, ::2, 1::2] + padded[:, 1::2, 1::2]
    )
    rows, columns = (
        np.minimum(2, size - 2 * np.arange((size + 1) // 2)) for size in (height, width)
    )
    count = np.outer(rows, columns).astype(np.float32)
    return total / jnp.asarray(count[..., None], x.dtype)


class ResNet(nn.Module):
    """Residual network without its classifier, from images to pooled features.

    Attributes:
      block: BasicBlock or Bottleneck.
      depths: number of blocks of each stage.
      widths: features of each stage, before the expansion by the block.
      stem: "imagenet" is a 7x7 convolution with stride 2 and a 3x3 max pool with stride 2; "deep" has
        three 3x3 convolutions instead of the 7x7 one; "small", for pictures of 24 to 32 pixels, is a
        3x3 convolution with stride 2.
      dtype: dtype of the computation; parameters are float32.
      average_down: shrink the shortcuts by averages of 2x2 windows, as in the d variants.

    Source: He et al. 2016; "deep" and `average_down` from He et al., "Bag of tricks for image
    classification with convolutional neural networks", CVPR 2019 (ResNet-D).
    """

    block: type[BasicBlock] | type[Bottleneck] = BasicBlock
    depths: Sequence[int] = (2, 2, 2, 2)
    widths: Sequence[int] = (64, 128, 256, 512)
    stem: str = "imagenet"
    dtype: DTypeLike = jnp.float32
    average_down: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Map float[batch, h, w, 3] to float[batch, widths[-1] * expansion]."""
        x = self._stem(x, train)
        x = nn.relu(BatchNorm(dtype=self.dtype, name="bn1")(x, train))
        if self.stem != "small":
            x = max_pool(x, 3, stride=2, padding=1)
        for stage, (depth, width) in enumerate(zip(self.depths, self.widths, strict=True)):
            for index in range(depth):
                stride = 2 if stage and not index else 1
                name = f"layer{stage + 1}_{index}"
                kind = block(self.block, 2)
                x = kind(width, stride, self.dtype, self.average_down, name=name)(x, train)
        return global_average_pool(x)

    def _stem(self, x, train):
        """The first convolution, or three of them, of which the last is not yet normalised."""
        width = self.widths[0]

        def conv(features, size, stride, name):
            return Conv(
                features, size, stride, padding=size // 2, dtype=self.dtype, name=f"conv1{name}"
            )

        if self.stem != "deep":
            return conv(width, 7 if self.stem == "imagenet" else 3, 2, "")(x)
        for number, stride in ((0, 2), (3, 1)):  # numbers of timm's modules, activations included
            x = conv(width // 2, 3, stride, f"_{number}")(x)
            x = nn.relu(BatchNorm(dtype=self.dtype, name=f"conv1_{number + 1}")(x, train))
        return conv(width, 3, 1, "_6")(x)


def resnet18(dtype: DTypeLike = jnp.float32) -> ResNet:
    """Build the reference's ResNet-18, of 512 features."""
    return ResNet(BasicBlock, (2, 2, 2, 2), dtype=dtype)


def resnet34(dtype: DTypeLike = jnp.float32) -> ResNet:
    """Build torchvision's ResNet-34, of 512 features."""
    return ResNet(BasicBlock, (3, 4, 6, 3), dtype=dtype)


def resnet50(dtype: DTypeLike = jnp.float32) -> ResNet:
    """Build the reference's ResNet-50, of 2048 features."""
    return ResNet(Bottleneck, (3, 4, 6, 3), dtype=dtype)


def resnet101(dtype: DTypeLike = jnp.float32) -> ResNet:
    """Build torchvision's ResNet-101, of 2048 features."""
    return ResNet(Bottleneck, (3, 4, 23, 3), dtype=dtype)


def resnet152(dtype: DTypeLike = jnp.float32) -> ResNet:
    """Build torchvision's ResNet-152, of 2048 features."""
    return ResNet(Bottleneck, (3, 8, 36, 3), dtype=dtype)


def _resnet_d(block, depths, dtype):
    return ResNet(block, depths, stem="deep", dtype=dtype, average_down=True)


def resnet18d(dtype: DTypeLike = jnp.float32) -> ResNet:
    """Build timm's ResNet-18-D, of 512 features."""
    return _resnet_d(BasicBlock, (2, 2, 2, 2), dtype)


def resnet34d(dtype: DTypeLike = jnp.float32) -> ResNet:
    """Build timm's ResNet-34-D, of 512 features."""
    return _resnet_d(BasicBlock, (3, 4, 6, 3), dtype)


def resnet50d(dtype: DTypeLike = jnp.float32) -> ResNet:
    """Build timm's ResNet-50-D, of 2048 features."""
    return _resnet_d(Bottleneck, (3, 4, 6, 3), dtype)


def resnet101d(dtype: DTypeLike = jnp.float32) -> ResNet:
    """Build timm's ResNet-101-D, of 2048 features."""
    return _resnet_d(Bottleneck, (3, 4, 23, 3), dtype)


def resnet152d(dtype: DTypeLike = jnp.float32) -> ResNet:
    """Build timm's ResNet-152-D, of 2048 features."""
    return _resnet_d(Bottleneck, (3, 8, 36, 3), dtype)


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
