"""Convolution in the form that the platform does fast.

On GPU and TPU that is the platform's own convolution. XLA:CPU's is good on large maps but 5 to 15
times too slow on small ones, where a matmul does the same work, and the gradient of a grouped one is
20 to 100 times slower than that of its groups one by one: `_cpu_form` chooses by shape (the
measurements are in BUILD_NOTES.md). All forms compute the same sums; autodiff handles each.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

Form = Literal["native", "im2col", "dense", "patches", "split"]


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
        return "dense"
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
}
