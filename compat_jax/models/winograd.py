"""Convolutions of 3x3 kernels by fewer products: Winograd's, and the Toeplitz form of 2x2 maps."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


@jax.custom_vjp
def winograd(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Compute a 3x3 convolution by F(2x2, 3x3): four outputs from 16 products instead of 36.

    Each of the 16 is a separate matmul, since XLA:CPU is slow at stacking.

    Args:
      x: float[batch, h, w, in], padded by one zero on each side.
      kernel: float[3, 3, in, out].

    Returns:
      float[batch, h, w, out].

    Source: Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016.
    """
    return _convolved(x, kernel)


def _forward(x, kernel):
    return _convolved(x, kernel), (x, kernel)


def _backward(saved, gradient):
    # Autodiff of the overlapping tiles is slow.
    x, kernel = saved
    return input_gradient(kernel, gradient), kernel_gradient(x, gradient)


def input_gradient(kernel: jax.Array, gradient: jax.Array) -> jax.Array:
    """Return the gradient of the inputs: a convolution with the kernel rotated by 180 degrees.

    Args:
      kernel: float[3, 3, in, out].
      gradient: float[batch, h, w, out].

    Returns:
      float[batch, h, w, in].
    """
    return _convolved(gradient, kernel[::-1, ::-1].swapaxes(2, 3))


@jax.jit
def kernel_gradient(x: jax.Array, gradient: jax.Array) -> jax.Array:
    """Return the gradient of the kernel by 16 matmuls.

    Args:
      x: float[batch, h, w, in].
      gradient: float[batch, h, w, out].

    Returns:
      float[3, 3, in, out].
    """
    inputs = _transformed(_TO_INPUT, _overlapping_tiles(x))
    outputs = _transformed(_transposed(_TO_OUTPUT), _tiles(gradient))
    products = _products([[a.T for a in row] for row in inputs], outputs)
    of_kernel = _transformed(_transposed(_TO_KERNEL), products, x.dtype)
    return jnp.stack([jnp.stack(row) for row in of_kernel])


winograd.defvjp(_forward, _backward)


@jax.jit  # traces equal layers once
def _convolved(x, kernel):
    batch, height, width, _ = x.shape
    inputs = _transformed(_TO_INPUT, _overlapping_tiles(x))
    products = _products(inputs, _transformed(_TO_KERNEL, list(map(list, kernel))))
    outputs = _transformed(_TO_OUTPUT, products, x.dtype)
    return _from_tiles(outputs, batch, (height, width))


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


@jax.jit
def toeplitz(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Compute a 3x3 convolution of a 2x2 map by nine matmuls instead of 16.

    With the taps (a, b, c), the two outputs along one axis are b x0 + c x1 and a x0 + b x1, which equal
    b (x0 + x1) + (c - b) x1 and b (x0 + x1) + (a - b) x0.

    Args:
      x: float[batch, 2, 2, in], padded by one zero on each side.
      kernel: float[3, 3, in, out].

    Returns:
      float[batch, 2, 2, out].
    """
    entries = [[x[:, i, j] for j in range(2)] for i in range(2)]
    inputs = _transformed(((1, 1), (0, 1), (1, 0)), entries)
    kernels = _transformed(((0, 1, 0), (0, -1, 1), (1, -1, 0)), list(map(list, kernel)))
    outputs = _transformed(((1, 1, 0), (1, 0, 1)), _products(inputs, kernels), x.dtype)
    return _from_tiles(outputs, len(x), (2, 2))
