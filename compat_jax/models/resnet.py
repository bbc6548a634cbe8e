"""ResNets: the reference's ImageNet-style ones and a small one for 24 to 32 pixels.

Module names follow PyTorch's state dicts (`layer1_0` stands for `layer1.0`), so that weights move
between the two by name.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from compat_jax.models.layers import BatchNorm, Conv, global_average_pool, max_pool


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut.

    Source: `BasicBlock` in `src/iamcl2r/models/resnet.py` (torchvision's).
    """

    features: int
    stride: int = 1
    dtype: jnp.dtype = jnp.float32
    expansion = 1

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """float[batch, h, w, c] -> float[batch, h/stride, w/stride, features]."""
        out = Conv(self.features, 3, self.stride, 1, dtype=self.dtype, name="conv1")(x)
        out = nn.relu(BatchNorm(dtype=self.dtype, name="bn1")(out, train))
        out = Conv(self.features, 3, 1, 1, dtype=self.dtype, name="conv2")(out)
        out = BatchNorm(dtype=self.dtype, name="bn2")(out, train)
        return nn.relu(out + _shortcut(x, self.features, self.stride, self.dtype, train))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions and a shortcut; four times `features` come out.

    Source: `Bottleneck` in `src/iamcl2r/models/resnet.py` (torchvision's, stride on the 3x3).
    """

    features: int
    stride: int = 1
    dtype: jnp.dtype = jnp.float32
    expansion = 4

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """float[batch, h, w, c] -> float[batch, h/stride, w/stride, 4 * features]."""
        out = Conv(self.features, 1, dtype=self.dtype, name="conv1")(x)
        out = nn.relu(BatchNorm(dtype=self.dtype, name="bn1")(out, train))
        out = Conv(self.features, 3, self.stride, 1, dtype=self.dtype, name="conv2")(out)
        out = nn.relu(BatchNorm(dtype=self.dtype, name="bn2")(out, train))
        width = self.features * self.expansion
        out = Conv(width, 1, dtype=self.dtype, name="conv3")(out)
        out = BatchNorm(dtype=self.dtype, name="bn3")(out, train)
        return nn.relu(out + _shortcut(x, width, self.stride, self.dtype, train))


def _shortcut(x, features, stride, dtype, train):
    if stride == 1 and x.shape[-1] == features:
        return x
    x = Conv(features, 1, stride, dtype=dtype, name="downsample_0")(x)
    return BatchNorm(dtype=dtype, name="downsample_1")(x, train)


class ResNet(nn.Module):
    """A residual network without its classifier: images to pooled features.

    Attributes:
      block: BasicBlock or Bottleneck.
      depths: blocks a stage.
      widths: features a stage, before the block's expansion.
      stem: "imagenet" is 7x7 stride 2 and a 3x3 stride-2 max pool, "small" is 3x3 stride 2, for
        pictures of 24 to 32 pixels.
      dtype: of the computation; parameters are float32.
    """

    block: type[nn.Module] = BasicBlock
    depths: Sequence[int] = (2, 2, 2, 2)
    widths: Sequence[int] = (64, 128, 256, 512)
    stem: str = "imagenet"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """float[batch, h, w, 3] -> float[batch, widths[-1] * expansion]."""
        size = 7 if self.stem == "imagenet" else 3
        x = Conv(self.widths[0], size, 2, size // 2, dtype=self.dtype, name="conv1")(x)
        x = nn.relu(BatchNorm(dtype=self.dtype, name="bn1")(x, train))
        if self.stem == "imagenet":
            x = max_pool(x, 3, 2, 1)
        for stage, (depth, width) in enumerate(zip(self.depths, self.widths, strict=True)):
            for index in range(depth):
                stride = 2 if stage and not index else 1
                name = f"layer{stage + 1}_{index}"
                x = self.block(width, stride, self.dtype, name=name)(x, train)
        return global_average_pool(x)


def resnet18(dtype: jnp.dtype = jnp.float32) -> ResNet:
    """The reference's ResNet-18; 512 features."""
    return ResNet(BasicBlock, (2, 2, 2, 2), dtype=dtype)


def resnet50(dtype: jnp.dtype = jnp.float32) -> ResNet:
    """The reference's ResNet-50; 2048 features."""
    return ResNet(Bottleneck, (3, 4, 6, 3), dtype=dtype)


def resnet_small(dtype: jnp.dtype = jnp.float32, width: int = 32) -> ResNet:
    """Three stages of one block for 24 to 32 pixels; 4 * width features; seconds on a laptop.

    The first stage, whose maps are the largest, is narrow: it would take half the time of a step.
    """
    return ResNet(BasicBlock, (1, 1, 1), (width // 2, 2 * width, 4 * width), "small", dtype)
