"""Forms of a convolution that are one product or the platform's own: all compute the same sums."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Geometry(NamedTuple):
    """Stride, padding and groups of a convolution.

    Attributes:
      stride: step in both directions.
      padding: zeros on each side.
      groups: channel groups.
    """

    stride: int = 1
    padding: int = 0
    groups: int = 1


class Passes(NamedTuple):
    """The form of each pass of a convolution.

    Attributes:
      forward: of the values.
      of_inputs: of the gradient of the inputs.
      of_kernel: of the gradient of the kernel.
    """

    forward: str
    of_inputs: str
    of_kernel: str


def native(x: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
    """Convolve by the platform's own operation; arguments as `conv.conv`'s, also below."""
    return lax.conv_general_dilated(
        x,
        kernel,
        (geometry.stride, geometry.stride),
        [(geometry.padding, geometry.padding)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=geometry.groups,
    )


def out_size(size: int, kernel_size: int, geometry: Geometry) -> int:
    """Return the side of the result for a map of side `size`."""
    return (size + 2 * geometry.padding - kernel_size) // geometry.stride + 1


def shifted(x: jax.Array, kernel_size: int, geometry: Geometry) -> list[jax.Array]:
    """Return the map as each tap of a kernel sees it, tap by tap, row by row.

    Args:
      x: float[batch, h, w, channels].
      kernel_size: side of the kernel.
      geometry: stride and padding.

    Returns:
      k*k arrays float[batch, h', w', channels].
    """
    stride, padding, _ = geometry
    batch, height, width, channels = x.shape
    out_h, out_w = (out_size(s, kernel_size, geometry) for s in (height, width))
    if padding:
        x = jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    return [
        lax.slice(
            x,
            (0, i, j, 0),
            (batch, i + stride * (out_h - 1) + 1, j + stride * (out_w - 1) + 1, channels),
            (1, stride, stride, 1),
        )
        for i in range(kernel_size)
        for j in range(kernel_size)
    ]


def columns(x: jax.Array, kernel_size: int, geometry: Geometry) -> jax.Array:
    """Return the k*k shifted maps side by side, float[batch, h', w', k*k*channels]; see `shifted`."""
    parts = shifted(x, kernel_size, geometry)
    return jnp.concatenate(parts, axis=-1) if len(parts) > 1 else parts[0]


def im2col(x: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
    """Multiply the k*k shifted pictures, side by side as columns, by the kernel as one matrix."""
    k, _, c_in, c_out = kernel.shape
    beside = columns(x, k, geometry)
    flat = beside.reshape(-1, k * k * c_in)
    return (flat @ kernel.reshape(k * k * c_in, c_out)).reshape(*beside.shape[:3], c_out)


def dense(x: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
    """Multiply all inputs by one matrix, for maps so small that most taps fall on padding."""
    stride, padding, _ = geometry
    k, _, c_in, c_out = kernel.shape
    batch, height, width, _ = x.shape
    out_h, out_w = (out_size(s, k, geometry) for s in (height, width))
    # Tap (i, j) of output (p, q) reads input (p*stride - padding + i, ...): slice the kernel so
    # that row (y, x) of the matrix holds the tap that each output applies there, or zero.
    pad_h, pad_w = (out_h * stride, height + padding), (out_w * stride, width + padding)
    padded = jnp.pad(kernel, (pad_h, pad_w, (0, 0), (0, 0)))
    rows = []
    for p in range(out_h):
        for q in range(out_w):
            top = pad_h[0] + padding - p * stride
            left = pad_w[0] + padding - q * stride
            rows.append(padded[top : top + height, left : left + width])
    matrix = jnp.stack(rows, axis=3)  # [height, width, c_in, outputs, c_out]
    flat = x.reshape(batch, height * width * c_in)
    out = flat @ matrix.reshape(height * width * c_in, out_h * out_w * c_out)
    return out.reshape(batch, out_h, out_w, c_out)


def patches(x: jax.Array, kernel: jax.Array, geometry: Geometry) -> jax.Array:
    """Compute a convolution without overlap or padding, as a ViT's, by a reshape and one matmul."""
    k, _, c_in, c_out = kernel.shape
    out_h, out_w = x.shape[1] // geometry.stride, x.shape[2] // geometry.stride
    x = x[:, : out_h * k, : out_w * k].reshape(-1, out_h, k, out_w, k, c_in)
    flat = x.swapaxes(2, 3).reshape(-1, k * k * c_in)
    return (flat @ kernel.reshape(k * k * c_in, c_out)).reshape(-1, out_h, out_w, c_out)
