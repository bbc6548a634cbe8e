"""Convolution in the form that is fastest on the platform.

On GPU and TPU that is the platform's own convolution. XLA:CPU's is good on some shapes, but on small
maps it is 5 to 15 times slower than a matmul that does the same work, its gradients run at a third of
the matmul's rate on many large ones, and the gradient of a grouped convolution takes 20 to 100 times as
long as that of its groups one by one. `cpu_form` chooses by shape and type: in bfloat16 on maps of 7
and from 13 pixels on for each pass by measured rates (`rates`), else by rule; the measurements are in
BUILD_NOTES.md. All forms compute the same sums and are differentiable.
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from compat_jax.models import forms, rates
from compat_jax.models.depthwise import depthwise
from compat_jax.models.forms import Geometry, Passes, out_size
from compat_jax.models.passes import by_passes
from compat_jax.models.winograd import toeplitz, winograd

Form = Literal["native", "im2col", "dense", "patches", "split", "depthwise", "winograd", "toeplitz"]


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
    best = cpu_form(inputs.shape, kernel.shape, geometry, inputs.dtype)
    if best == "native":
        return forms.native(inputs, kernel, geometry)

    def on_cpu(x, k):
        return _computed(x, k, geometry, best)

    def elsewhere(x, k):
        return forms.native(x, k, geometry)

    return lax.platform_dependent(inputs, kernel, cpu=on_cpu, default=elsewhere)


def cpu_form(
    shape: tuple[int, ...],
    kernel_shape: tuple[int, ...],
    geometry: Geometry,
    dtype: DTypeLike = jnp.float32,
) -> Form | Passes:
    """Choose the form that is fastest on CPU.

    Args:
      shape: (batch, height, width, in_channels).
      kernel_shape: (size, size, in_channels / groups, out_channels).
      geometry: stride, padding and groups.
      dtype: of the computation.

    Returns:
      The name of the form, or one for each pass.
    """
    measured = rates.fastest(shape, kernel_shape, geometry, dtype)
    if measured is not None:
        return measured
    size, out = kernel_shape[0], out_size(shape[1], kernel_shape[0], geometry)
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


def _computed(x, kernel, geometry, form: Form | Passes):
    if isinstance(form, Passes):
        return by_passes(x, kernel, geometry, form)
    return _FORMS[form](x, kernel, geometry)


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
    form = cpu_form(inputs[0].shape, kernels[0].shape, ungrouped, x.dtype)
    pairs = zip(inputs, kernels, strict=True)
    return jnp.concatenate([_computed(i, k, ungrouped, form) for i, k in pairs], axis=-1)


def _block_diagonal(kernel, parts, together):
    """Return the kernel of `parts` groups that equals one of `parts * together` groups."""
    k, _, c_in, c_out = kernel.shape
    blocks = kernel.reshape(k, k, 1, c_in, parts, together, -1)
    diagonal = jnp.eye(together, dtype=kernel.dtype).reshape(together, 1, 1, together, 1)
    return (blocks * diagonal).reshape(k, k, together * c_in, c_out)


_FORMS: dict[Form, Callable[[jax.Array, jax.Array, Geometry], jax.Array]] = {
    "native": forms.native,
    "im2col": forms.im2col,
    "dense": forms.dense,
    "patches": forms.patches,
    "split": _split,
    "depthwise": lambda x, kernel, _: depthwise(x, kernel),
    "winograd": lambda x, kernel, _: winograd(x, kernel),
    "toeplitz": lambda x, kernel, _: toeplitz(x, kernel),
}
