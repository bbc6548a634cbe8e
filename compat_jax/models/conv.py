"""Convolution in the form that the platform does fast.

On GPU and TPU that is the platform's own convolution. XLA:CPU's is good on large maps but 5 to 15
times too slow on small ones, where a matmul does the same work, and the gradient of a grouped one is
20 to 100 times slower than that of its groups one by one: `_cpu_form` chooses by shape (the
measurements are in BUILD_NOTES.md). All forms compute the same sums; autodiff handles each.
"""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Form = Literal["native", "im2col", "dense", "patches", "split", "winograd", "toeplitz"]


def conv(
    inputs: jax.Array,
    kernel: jax.Array,
    stride: int = 1,
    padding: int = 0,
    groups: int = 1,
    form: Form | None = None,
) -> jax.Array:
    """2-D convolution (cross-correlation, as in every deep-learning library), square and symmetric.

    Args:
      inputs: float[batch, height, width, in_channels].
      kernel: float[size, size, in_channels / groups, out_channels].
      stride: in both directions.
      padding: zeros on each side.
      groups: channel groups.
      form: how to compute it; None lets the platform and the shape decide.

    Returns:
      float[batch, out_height, out_width, out_channels].
    """
    if form is not None:
        return _FORMS[form](inputs, kernel, stride, padding, groups)
    cpu_form = _cpu_form(inputs.shape, kernel.shape, stride, padding, groups)
    if cpu_form == "native":
        return _native(inputs, kernel, stride, padding, groups)

    def on_cpu(x, k):
        return _FORMS[cpu_form](x, k, stride, padding, groups)

    def elsewhere(x, k):
        return _native(x, k, stride, padding, groups)

    return lax.platform_dependent(inputs, kernel, cpu=on_cpu, default=elsewhere)


def _cpu_form(shape, kernel_shape, stride, padding, groups) -> Form:
    size, out = kernel_shape[0], (shape[1] + 2 * padding - kernel_shape[0]) // stride + 1
    if groups > 1:
        return "split"
    if size == 1:
        return "im2col"
    if size == stride and not padding:
        return "patches"
    if shape[1] <= 2 and shape[2] <= 2:
        return "toeplitz" if (size, stride, *shape[1:3]) == (3, 1, 2, 2) else "dense"
    if size == 3 and stride == 1 and shape[1] == shape[2] and shape[1] in (4, 8):
        return "winograd"
    return "im2col" if out <= 4 else "native"


def _native(x, kernel, stride, padding, groups):
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        [(padding, padding)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def _out_size(size, kernel, stride, padding):
    return (size + 2 * padding - kernel) // stride + 1


def _im2col(x, kernel, stride, padding, groups):
    """The k*k shifted pictures side by side as columns, times the kernel as one matrix."""
    del groups
    k, _, c_in, c_out = kernel.shape
    batch, height, width, _ = x.shape
    out_h, out_w = (_out_size(s, k, stride, padding) for s in (height, width))
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


def _dense(x, kernel, stride, padding, groups):
    """One matrix from all inputs to all outputs: for maps so small that most taps are padding."""
    del groups
    k, _, c_in, c_out = kernel.shape
    batch, height, width, _ = x.shape
    out_h, out_w = (_out_size(s, k, stride, padding) for s in (height, width))
    # Tap (i, j) of output (p, q) reads input (p*stride - padding + i, ...): slice the kernel so
    # that row (y, x) of the matrix holds the tap each output applies there, or zero.
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


def _winograd(x, kernel, stride, padding, groups):
    """F(2x2, 3x3): four outputs from 16 products, where the sum over taps has 36.

    Each of the 16 is a matmul of its own, since XLA:CPU is slow at stacking. See Lavin and Gray, "Fast
    Algorithms for Convolutional Neural Networks", CVPR 2016.
    """
    del stride, padding, groups
    return _winograd_conv(x, kernel)


@jax.custom_vjp
def _winograd_conv(x, kernel):
    return _winograd_forward(x, kernel)[0]


def _winograd_forward(x, kernel):
    return _by_winograd(x, kernel), (x, kernel)


def _winograd_backward(saved, gradient):
    # What autodiff makes of the overlapping tiles is slow. The gradient of the inputs is a convolution
    # again, with the kernel turned round; that of the kernel is 16 matmuls.
    x, kernel = saved
    of_x = _by_winograd(gradient, kernel[::-1, ::-1].swapaxes(2, 3))
    return of_x, _kernel_gradient(x, gradient)


@jax.jit  # so that equal layers are traced once
def _by_winograd(x, kernel):
    batch, height, width, _ = x.shape
    inputs = _transformed(_TO_INPUT, _overlapping_tiles(x))
    products = _products(inputs, _transformed(_TO_KERNEL, list(map(list, kernel))))
    outputs = _transformed(_TO_OUTPUT, products, x.dtype)
    return _from_tiles(outputs, batch, height, width)


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
    """The matrix products of two grids, entry by entry, in float32."""

    def product(a, b):
        return jnp.dot(a, b, preferred_element_type=np.promote_types(a.dtype, np.float32))

    return [list(map(product, *pair)) for pair in zip(left, right, strict=True)]


def _transposed(matrix):
    return tuple(zip(*matrix, strict=True))


def _transformed(matrix, grid, dtype=None):
    """matrix @ grid @ matrix.T, where the entries of the grid are arrays; of their dtype by default.

    Sums are in float32, rounded once: in bfloat16 each would be rounded, and is slow on CPU.
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
    """The weighted sum, without a multiplication by 0, 1 or -1."""
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
    """Entry (i, j) of every 4 x 4 tile, tiles 2 apart on a map with a border of zeros: 4 x 4 arrays."""
    batch, height, width, channels = x.shape
    rows, columns = (height + 1) // 2, (width + 1) // 2
    x = jnp.pad(x, ((0, 0), (1, 1 + height % 2), (1, 1 + width % 2), (0, 0)))

    def entry(i, j):
        stop = (batch, i + 2 * rows - 1, j + 2 * columns - 1, channels)
        return lax.slice(x, (0, i, j, 0), stop, (1, 2, 2, 1)).reshape(-1, channels)

    return [[entry(i, j) for j in range(4)] for i in range(4)]


def _tiles(x):
    """Entry (i, j) of every 2 x 2 tile: 2 x 2 arrays."""
    _, height, width, channels = x.shape
    x = jnp.pad(x, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)))
    return [[x[:, i::2, j::2].reshape(-1, channels) for j in range(2)] for i in range(2)]


def _from_tiles(grid, batch, height, width):
    """The map that `_tiles` takes apart."""
    rows, columns = (height + 1) // 2, (width + 1) // 2
    parts = [[x.reshape(batch, rows, columns, -1) for x in line] for line in grid]
    x = jnp.stack([jnp.stack(line, axis=3) for line in parts], axis=2)
    return x.reshape(batch, 2 * rows, 2 * columns, -1)[:, :height, :width]


def _toeplitz(x, kernel, stride, padding, groups):
    """A 3x3 convolution of a 2x2 map: nine matmuls instead of 16.

    Along one axis the two outputs are b x0 + c x1 and a x0 + b x1 with the taps (a, b, c), hence
    b (x0 + x1) + (c - b) x1 and b (x0 + x1) + (a - b) x0.
    """
    del stride, padding, groups
    return _by_toeplitz(x, kernel)


@jax.jit
def _by_toeplitz(x, kernel):
    entries = [[x[:, i, j] for j in range(2)] for i in range(2)]
    inputs = _transformed(((1, 1), (0, 1), (1, 0)), entries)
    kernels = _transformed(((0, 1, 0), (0, -1, 1), (1, -1, 0)), list(map(list, kernel)))
    outputs = _transformed(((1, 1, 0), (1, 0, 1)), _products(inputs, kernels), x.dtype)
    return _from_tiles(outputs, len(x), 2, 2)


def _patches(x, kernel, stride, padding, groups):
    """Windows that neither overlap nor touch the border, as a ViT's: a reshape and one matmul."""
    del padding, groups
    k, _, c_in, c_out = kernel.shape
    out_h, out_w = x.shape[1] // stride, x.shape[2] // stride
    x = x[:, : out_h * k, : out_w * k].reshape(-1, out_h, k, out_w, k, c_in)
    flat = x.swapaxes(2, 3).reshape(-1, k * k * c_in)
    return (flat @ kernel.reshape(k * k * c_in, c_out)).reshape(-1, out_h, out_w, c_out)


def _split(x, kernel, stride, padding, groups):
    """Each group, or a few neighbours filled up with zeros, as a convolution of its own."""
    # More convolutions would compute less, but take minutes to compile in a deep network.
    together = next(n for n in range(1, groups + 1) if groups % n == 0 and groups // n <= 8)
    parts = groups // together
    if together > 1:
        kernel = _block_diagonal(kernel, parts, together)
    inputs, kernels = (jnp.split(a, parts, axis=-1) for a in (x, kernel))
    form = _cpu_form(inputs[0].shape, kernels[0].shape, stride, padding, 1)
    pairs = zip(inputs, kernels, strict=True)
    return jnp.concatenate([_FORMS[form](i, k, stride, padding, 1) for i, k in pairs], axis=-1)


def _block_diagonal(kernel, parts, together):
    """The kernel of `parts` groups that does what one of `parts * together` groups does."""
    k, _, c_in, c_out = kernel.shape
    blocks = kernel.reshape(k, k, 1, c_in, parts, together, -1)
    diagonal = jnp.eye(together, dtype=kernel.dtype).reshape(together, 1, 1, together, 1)
    return (blocks * diagonal).reshape(k, k, together * c_in, c_out)


_FORMS = {
    "native": _native,
    "im2col": _im2col,
    "dense": _dense,
    "patches": _patches,
    "split": _split,
    "winograd": _winograd,
    "toeplitz": _toeplitz,
}
