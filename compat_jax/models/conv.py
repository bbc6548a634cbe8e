"""Convolution in the form that is fastest on the platform.

On GPU and TPU that is the platform's own convolution. XLA:CPU's is good on large maps, but on small
ones it is 5 to 15 times slower than a matmul that does the same work, and the gradient of a grouped
convolution takes 20 to 100 times as long as that of its groups one by one. `cpu_form` chooses by
shape; the measurements are in BUILD_NOTES.md. All forms compute the same sums and are differentiable.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Form = Literal["native", "im2col", "dense", "patches", "split", "depthwise", "winograd", "toeplitz"]


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


def conv(
    inputs: jax.Array,
    kernel: jax.Array,
    stride: int = 1,
    padding: int = 0,
    groups: int = 1,
    form: Form | None = None,
) -> jax.Array:
    """Compute a square, symmetric 2-D convolution (cross-correlation, as in deep learning).

    Args:
      inputs: float[batch, height, width, in_channels].
      kernel: float[size, size, in_channels / groups, out_channels].
      stride: step in both directions.
      padding: zeros on each side.
      groups: channel groups.
      form: form to compute it in; None chooses by platform and shape.

    Returns:
      float[batch, out_height, out_width, out_channels].
    """
    geometry = Geometry(stride, padding, groups)
    if form is not None:
        return _FORMS[form](inputs, kernel, geometry)
    best = cpu_form(inputs.shape, kernel.shape, geometry)
    if best == "native":
        return _native(inputs, kernel, geometry)

    def on_cpu(x, k):
        return _FORMS[best](x, k, geometry)

    def elsewhere(x, k):
        return _native(x, k, geometry)

    return lax.platform_dependent(inputs, kernel, cpu=on_cpu, default=elsewhere)


def cpu_form(shape: tuple[int, ...], kernel_shape: tuple[int, ...], geometry: Geometry) -> Form:
    """Choose the form that is fastest on CPU.

    Args:
      shape: (batch, height, width, in_channels).
      kernel_shape: (size, size, in_channels / groups, out_channels).
      geometry: stride, padding and groups.

    Returns:
      The name of the form.
    """
    size, out = kernel_shape[0], _out_size(shape[1], kernel_shape[0], geometry)
    if geometry.groups > 1:
        same_size = geometry.stride == 1 and 2 * geometry.padding == size - 1
        own_kernels = geometry.groups == shape[3] == kernel_shape[3]
        return "depthwise" if own_kernels and same_size else "split"
    if size == 1:
        return "im2col"
    if size == geometry.stride and not geometry.padding:
        return "patches"
    if shape[1] <= 2 and shape[2] <= 2:
        is_toeplitz = (size, geometry.stride, *shape[1:3]) == (3, 1, 2, 2)
        return "toeplitz" if is_toeplitz else "dense"
    if size == 3 and geometry.stride == 1 and shape[1] == shape[2] and shape[1] in (4, 8):
        return "winograd"
    return "im2col" if out <= 4 else "native"


def _native(x, kernel, geometry):
    return lax.conv_general_dilated(
        x,
        kernel,
        (geometry.stride, geometry.stride),
        [(geometry.padding, geometry.padding)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=geometry.groups,
    )


def _out_size(size, kernel_size, geometry):
    return (size + 2 * geometry.padding - kernel_size) // geometry.stride + 1


def _im2col(x, kernel, geometry):
    """Multiply the k*k shifted pictures, side by side as columns, by the kernel as one matrix."""
    stride, padding, _ = geometry
    k, _, c_in, c_out = kernel.shape
    batch, height, width, _ = x.shape
    out_h, out_w = (_out_size(s, k, geometry) for s in (height, width))
    if padding:
        x = jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    shifted = [
        lax.slice(
            x,
            (0, i, j, 0),
            (batch, i + stride * (out_h - 1) + 1, j + stride * (out_w - 1) + 1, c_in),
            (1, stride, stride, 1),
        )
        for i in range(k)
        for j in range(k)
    ]
    columns = jnp.concatenate(shifted, axis=-1) if k > 1 else shifted[0]
    flat = columns.reshape(batch * out_h * out_w, k * k * c_in)
    return (flat @ kernel.reshape(k * k * c_in, c_out)).reshape(batch, out_h, out_w, c_out)


def _dense(x, kernel, geometry):
    """Multiply all inputs by one matrix, for maps so small that most taps fall on padding."""
    stride, padding, _ = geometry
    k, _, c_in, c_out = kernel.shape
    batch, height, width, _ = x.shape
    out_h, out_w = (_out_size(s, k, geometry) for s in (height, width))
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


def _winograd(x, kernel, geometry):
    """Compute a 3x3 convolution by F(2x2, 3x3): four outputs from 16 products instead of 36.

    Each of the 16 is a separate matmul, since XLA:CPU is slow at stacking.

    Source: Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016.
    """
    del geometry
    return _winograd_conv(x, kernel)


@jax.custom_vjp
def _winograd_conv(x, kernel):
    return _winograd_forward(x, kernel)[0]


def _winograd_forward(x, kernel):
    return _by_winograd(x, kernel), (x, kernel)


def _winograd_backward(saved, gradient):
    # Autodiff of the overlapping tiles is slow. The gradient of the inputs is again a convolution,
    # with the kernel rotated by 180 degrees; the gradient of the kernel is 16 matmuls.
    x, kernel = saved
    of_x = _by_winograd(gradient, kernel[::-1, ::-1].swapaxes(2, 3))
    return of_x, _kernel_gradient(x, gradient)


@jax.jit  # traces equal layers once
def _by_winograd(x, kernel):
    batch, height, width, _ = x.shape
    inputs = _transformed(_TO_INPUT, _overlapping_tiles(x))
    products = _products(inputs, _transformed(_TO_KERNEL, list(map(list, kernel))))
    outputs = _transformed(_TO_OUTPUT, products, x.dtype)
    return _from_tiles(outputs, batch, (height, width))


@jax.jit
def _kernel_gradient(x, gradient):
    inputs = _transformed(_TO_INPUT, _overlapping_tiles(x))
    outputs = _transformed(_transposed(_TO_OUTPUT), _tiles(gradient))
    products = _products([[a.T for a in row] for row in inputs], outputs)
    of_kernel = _transformed(_transposed(_TO_KERNEL), products, x.dtype)
    return jnp.stack([jnp.stack(row) for row in of_kernel])


_winograd_conv.defvjp(_winograd_forward, _winograd_backward)

_TO_INPUT = ((1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, -1))
_TO_KERNEL = ((1, 0, 0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0, 0, 1))
_TO_OUTPUT = ((1, 1, 1, 0), (0, 1, -1, -1))


def _products(left, right):
    """Compute the matrix products of two grids of matrices, entry by entry, in float32."""

    def product(a, b):
        return jnp.dot(a, b, preferred_element_type=np.promote_types(a.dtype, np.float32))

    return [list(map(product, *pair)) for pair in zip(left, right, strict=True)]


def _transposed(matrix):
    return tuple(zip(*matrix, strict=True))


def _transformed(matrix, grid, dtype=None):
    """Compute matrix @ grid @ matrix.T for a grid whose entries are arrays.

    Sums are in float32 and rounded once to `dtype`, by default that of the entries: in bfloat16 each
    sum would be rounded, and slow on CPU.
    """
    dtype = dtype or grid[0][0].dtype
    wide = [[x.astype(np.promote_types(x.dtype, np.float32)) for x in row] for row in grid]

    def along_rows(rows):
        return [
            [_combined(weights, column) for column in zip(*rows, strict=True)] for weights in matrix
        ]

    both = _transposed(along_rows(_transposed(along_rows(wide))))
    return [[x.astype(dtype) for x in row] for row in both]


def _combined(weights, arrays):
    """Return the weighted sum of arrays, without multiplications by 0, 1 or -1."""
    total = None
    for weight, array in zip(weights, arrays, strict=True):
        if weight == 0:
            continue
        term = array if abs(weight) == 1 else abs(weight) * array
        if total is None:
            total = term if weight > 0 else -term
        else:
            total = total + term if weight > 0 else total - term
    return total


def _overlapping_tiles(x):
    """Return 4 x 4 arrays, entry (i, j) of all 4 x 4 tiles, 2 apart, of a zero-padded map."""
    batch, height, width, channels = x.shape
    rows, columns = (height + 1) // 2, (width + 1) // 2
    x = jnp.pad(x, ((0, 0), (1, 1 + height % 2), (1, 1 + width % 2), (0, 0)))

    def entry(i, j):
        stop = (batch, i + 2 * rows - 1, j + 2 * columns - 1, channels)
        return lax.slice(x, (0, i, j, 0), stop, (1, 2, 2, 1)).reshape(-1, channels)

    return [[entry(i, j) for j in range(4)] for i in range(4)]


def _tiles(x):
    """Return 2 x 2 arrays, entry (i, j) of all 2 x 2 tiles."""
    _, height, width, channels = x.shape
    x = jnp.pad(x, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)))
    return [[x[:, i::2, j::2].reshape(-1, channels) for j in range(2)] for i in range(2)]


def _from_tiles(grid, batch, shape):
    """Assemble the map of this (height, width) from its 2 x 2 tiles: the inverse of `_tiles`."""
    height, width = shape
    rows, columns = (height + 1) // 2, (width + 1) // 2
    parts = [[x.reshape(batch, rows, columns, -1) for x in line] for line in grid]
    x = jnp.stack([jnp.stack(line, axis=3) for line in parts], axis=2)
    return x.reshape(batch, 2 * rows, 2 * columns, -1)[:, :height, :width]


def _toeplitz(x, kernel, geometry):
    """Compute a 3x3 convolution of a 2x2 map by nine matmuls instead of 16.

    With the taps (a, b, c), the two outputs along one axis are b x0 + c x1 and a x0 + b x1, which equal
    b (x0 + x1) + (c - b) x1 and b (x0 + x1) + (a - b) x0.
    """
    del geometry
    return _by_toeplitz(x, kernel)


@jax.jit
def _by_toeplitz(x, kernel):
    entries = [[x[:, i, j] for j in range(2)] for i in range(2)]
    inputs = _transformed(((1, 1), (0, 1), (1, 0)), entries)
    kernels = _transformed(((0, 1, 0), (0, -1, 1), (1, -1, 0)), list(map(list, kernel)))
    outputs = _transformed(((1, 1, 0), (1, 0, 1)), _products(inputs, kernels), x.dtype)
    return _from_tiles(outputs, len(x), (2, 2))


def _patches(x, kernel, geometry):
    """Compute a convolution without overlap or padding, as a ViT's, by a reshape and one matmul."""
    k, _, c_in, c_out = kernel.shape
    out_h, out_w = x.shape[1] // geometry.stride, x.shape[2] // geometry.stride
    x = x[:, : out_h * k, : out_w * k].reshape(-1, out_h, k, out_w, k, c_in)
    flat = x.swapaxes(2, 3).reshape(-1, k * k * c_in)
    return (flat @ kernel.reshape(k * k * c_in, c_out)).reshape(-1, out_h, out_w, c_out)


def _split(x, kernel, geometry):
    """Compute each group, or a few neighbours zero-padded to one kernel, as its own convolution."""
    # More convolutions would compute less, but take minutes to compile in a deep network.
    groups = geometry.groups
    together = next(n for n in range(1, groups + 1) if groups % n == 0 and groups // n <= 8)
    parts = groups // together
    if together > 1:
        kernel = _block_diagonal(kernel, parts, together)
    inputs, kernels = (jnp.split(a, parts, axis=-1) for a in (x, kernel))
    ungrouped = Geometry(geometry.stride, geometry.padding)
    form = cpu_form(inputs[0].shape, kernels[0].shape, ungrouped)
    pairs = zip(inputs, kernels, strict=True)
    return jnp.concatenate([_FORMS[form](i, k, ungrouped) for i, k in pairs], axis=-1)


def _depthwise(x, kernel, geometry):
    """Convolve each channel with its own kernel, on a map that keeps its size."""
    del geometry
    return _by_depthwise(x, kernel)


@jax.custom_vjp
def _by_depthwise(x, kernel):
    """Add up the shifted maps, each times one tap: XLA fuses all into one pass.

    On CPU, 7x7 kernels, maps of 8x56x56x96 to 8x7x7x768: 12 to 15 times as fast as the native form.
    """
    height, width = x.shape[1:3]
    padded = _padded_for(x, kernel)
    taps = kernel[:, :, 0].astype(padded.dtype)
    k = len(kernel)
    total = sum(
        padded[:, i : i + height, j : j + width] * taps[i, j] for i in range(k) for j in range(k)
    )
    return total.astype(x.dtype)


def _depthwise_forward(x, kernel):
    return _by_depthwise(x, kernel), (x, kernel)


def _depthwise_backward(saved, gradient):
    """The gradients of map and kernel.

    That of the kernel goes through the map row by row, so that a row and its neighbours stay in the
    cache for all taps: 4 to 5 times as fast on CPU as one reduction for each tap.
    """
    x, kernel = saved
    k, width = len(kernel), x.shape[2]
    padded, rows = _padded_for(x, kernel), gradient.astype(np.promote_types(x.dtype, np.float32))

    def add_row(total, row):
        own = lax.dynamic_slice_in_dim(rows, row, 1, axis=1)
        around = lax.dynamic_slice_in_dim(padded, row, k, axis=1)
        taps = [(around[:, :, j : j + width] * own).sum((0, 2)) for j in range(k)]
        return total + jnp.stack(taps, axis=1), None

    zeros = jnp.zeros((k, k, x.shape[3]), rows.dtype)
    of_kernel, _ = lax.scan(add_row, zeros, jnp.arange(x.shape[1]))
    of_map = _by_depthwise(gradient, kernel[::-1, ::-1])
    return of_map, of_kernel[:, :, None].astype(kernel.dtype)


_by_depthwise.defvjp(_depthwise_forward, _depthwise_backward)


def _padded_for(x, kernel):
    """A map in float32 or wider, with the zeros that keep its size."""
    padding = len(kernel) // 2
    wide = x.astype(np.promote_types(x.dtype, np.float32))
    return jnp.pad(wide, ((0, 0), (padding, padding), (padding, padding), (0, 0)))


def _block_diagonal(kernel, parts, together):
    """Return the kernel of `parts` groups that equals one of `parts * together` groups."""
    k, _, c_in, c_out = kernel.shape
    blocks = kernel.reshape(k, k, 1, c_in, parts, together, -1)
    diagonal = jnp.eye(together, dtype=kernel.dtype).reshape(together, 1, 1, together, 1)
    return (blocks * diagonal).reshape(k, k, together * c_in, c_out)


_FORMS: dict[Form, Callable[[jax.Array, jax.Array, Geometry], jax.Array]] = {
    "native": _native,
    "im2col": _im2col,
    "dense": _dense,
    "patches": _patches,
    "split": _split,
    "depthwise": _depthwise,
    "winograd": _winograd,
    "toeplitz": _toeplitz,
}
