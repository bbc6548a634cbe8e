"""Layers of the backbones. Where Flax and PyTorch differ, they follow PyTorch."""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from compat_jax.models.conv import conv
from compat_jax.models.rematerialize import product

# PyTorch's kaiming_normal_(mode="fan_out", nonlinearity="relu").
kaiming_fan_out = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
# PyTorch's default of nn.Linear and nn.Conv2d: uniform in +-1/sqrt(fan_in).
linear_init = nn.initializers.variance_scaling(1.0 / 3.0, "fan_in", "uniform")


class Conv(nn.Module):
    """Square 2-D convolution with symmetric padding, computed by `conv`.

    Attributes:
      features: output channels.
      size: side of the kernel.
      stride: step in both directions.
      padding: zeros on each side.
      groups: channel groups.
      use_bias: add a bias.
      dtype: dtype of the computation; parameters are float32.
      kernel_init: initializer of the kernel.
    """

    features: int
    size: int
    stride: int = 1
    padding: int = 0
    groups: int = 1
    use_bias: bool = False
    dtype: jax.typing.DTypeLike = jnp.float32
    kernel_init: nn.initializers.Initializer = kaiming_fan_out

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map float[batch, h, w, in] to float[batch, h', w', features]."""
        shape = (self.size, self.size, x.shape[-1] // self.groups, self.features)
        kernel = self.param("kernel", self.kernel_init, shape)
        out = conv(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            stride=self.stride,
            padding=self.padding,
            groups=self.groups,
        )
        out = product(out)
        if self.use_bias:
            out += self.param("bias", nn.initializers.zeros, (self.features,)).astype(self.dtype)
        return out


class BatchNorm(nn.Module):
    """Batch normalisation as PyTorch computes it.

    It normalises by the biased variance of the batch and keeps a running mean of the *unbiased*
    variance, where flax.linen.BatchNorm keeps the biased one. Under `jit`, with the batch sharded over
    devices, the statistics are those of the global batch. Variables have Flax's names: scale and bias
    in "params", mean and var in "batch_stats". Without a scale, only the bias is added: the rest has
    been folded into the kernel before it, see `models.fold`.

    Attributes:
      momentum: weight of the old running value (1 minus PyTorch's momentum).
      epsilon: added to the variance.
      dtype: dtype of the result; statistics are float32 or wider.
    """

    momentum: float = 0.9
    epsilon: float = 1e-5
    dtype: jax.typing.DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Normalise float[..., channels]; the shape stays the same."""
        shape = (x.shape[-1],)
        bias = self.param("bias", nn.initializers.zeros, shape)
        if not self.is_initializing() and not self.has_variable("params", "scale"):
            return x + bias.astype(x.dtype)  # folded, see above
        scale = self.param("scale", nn.initializers.ones, shape)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, shape)
        running_var = self.variable("batch_stats", "var", jnp.ones, shape)
        # In float32 also for bfloat16 maps: subtracting the mean would leave few significant bits.
        wide = x.astype(np.promote_types(x.dtype, np.float32))
        if train:
            axes = tuple(range(x.ndim - 1))
            mean = wide.mean(axes)
            # E[x^2] - E[x]^2 reads the map once; rounding can make it negative, hence the maximum.
            var = jnp.maximum((wide * wide).mean(axes) - mean * mean, 0.0)
            if not self.is_initializing():
                count = x.size // x.shape[-1]
                unbiased = var * (count / max(count - 1, 1))
                keep = self.momentum
                running_mean.value = keep * running_mean.value + (1 - keep) * mean
                running_var.value = keep * running_var.value + (1 - keep) * unbiased
        else:
            mean, var = running_mean.value, running_var.value
        factor = scale * lax.rsqrt(var + self.epsilon)
        shift = bias - mean * factor
        return (wide * factor.astype(wide.dtype) + shift.astype(wide.dtype)).astype(self.dtype)


def layer_norm(x: jax.Array, dtype: jax.typing.DTypeLike, name: str) -> jax.Array:
    """Normalise over the last axis, with parameters of the module that calls.

    Args:
      x: float[..., channels].
      dtype: of the result.
      name: of the parameters.

    Returns:
      The normalised array, of the same shape.
    """
    # In float32 and with the two-pass variance, as in PyTorch: the one-pass form loses precision.
    wide = x.astype(np.promote_types(x.dtype, np.float32))
    norm = nn.LayerNorm(epsilon=1e-6, use_fast_variance=False, name=name)
    return norm(wide).astype(dtype)


def max_pool(
    x: jax.Array, size: int, stride: int, padding: int, form: str | None = None
) -> jax.Array:
    """Compute the maximum over windows.

    On TPU by the platform's own operation, elsewhere as a maximum of shifted slices: reduce_window and
    its gradient are slow on CPU, while on a v6e the slices would take a sixth of a ResNet-50's step.
    Where maxima tie, the first receives the whole gradient on TPU, as in PyTorch; elsewhere they share
    it.

    Args:
      x: float[batch, h, w, c].
      size: side of the window.
      stride: step in both directions.
      padding: pixels of -infinity on each side.
      form: "native" or "slices"; None chooses by platform.

    Returns:
      float[batch, h', w', c].
    """

    def native(x):
        return nn.max_pool(x, (size, size), (stride, stride), [(padding, padding)] * 2)

    def slices(x):
        return _max_of_slices(x, size, stride, padding)

    if form is not None:
        return {"native": native, "slices": slices}[form](x)
    return lax.platform_dependent(x, tpu=native, default=slices)


def _max_of_slices(x, size, stride, padding):
    pads = ((0, 0), (padding, padding), (padding, padding), (0, 0))
    # In float32 also if x is bfloat16: XLA:CPU's gradient would take ten times as long.
    wide = x.astype(np.promote_types(x.dtype, np.float32))
    padded = jnp.pad(wide, pads, constant_values=-jnp.inf)
    batch, height, width, channels = padded.shape
    out_h, out_w = ((s - size) // stride + 1 for s in (height, width))
    windows = (
        lax.slice(
            padded,
            (0, i, j, 0),
            (batch, i + stride * (out_h - 1) + 1, j + stride * (out_w - 1) + 1, channels),
            (1, stride, stride, 1),
        )
        for i in range(size)
        for j in range(size)
    )
    return functools.reduce(jnp.maximum, windows).astype(x.dtype)


def global_average_pool(x: jax.Array) -> jax.Array:
    """Average over height and width: float[batch, h, w, c] to float[batch, c]."""
    return x.mean((1, 2))


def squeeze_excite(
    x: jax.Array,
    reduce: Callable[[jax.Array], jax.Array],
    expand: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """Multiply each channel by a gate in (0, 1) computed from the averages of all channels.

    Args:
      x: float[batch, h, w, c].
      reduce: layer from float[batch, 1, 1, c] to fewer channels.
      expand: layer from those channels back to c.

    Returns:
      float[batch, h, w, c].

    Source: Hu, Shen, Sun, "Squeeze-and-Excitation Networks", CVPR 2018.
    """
    averages = x.mean((1, 2), keepdims=True)
    return x * nn.sigmoid(expand(nn.relu(reduce(averages))))
