"""A convolution whose passes are computed in a form each: values and both gradients."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from compat_jax.models import forms
from compat_jax.models.forms import Geometry, Passes
from compat_jax.models.winograd import input_gradient, kernel_gradient, winograd


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def by_passes(x: jax.Array, kernel: jax.Array, geometry: Geometry, passes: Passes) -> jax.Array:
    """Convolve, each pass in its own form.

    Args:
      x: float[batch, h, w, in].
      kernel: float[k, k, in, out].
      geometry: stride and padding, without groups.
      passes: forms that can compute this geometry, see `FORWARD`, `OF_INPUTS` and `OF_KERNEL`.

    Returns:
      float[batch, h', w', out].
    """
    return FORWARD[passes.forward](x, kernel, geometry)


def _forward(x, kernel, geometry, passes):
    return by_passes(x, kernel, geometry, passes), (x, kernel)


def _backward(geometry, passes, saved, gradient):
    x, kernel = saved
    return (
        OF_INPUTS[passes.of_inputs](x, kernel, geometry, gradient),
        OF_KERNEL[passes.of_kernel](x, kernel, geometry, gradient),
    )


by_passes.defvjp(_forward, _backward)


def _derived(form, number):
    """Return the gradient of an argument as autodiff derives it from a form."""

    def gradient_of(x, kernel, geometry, gradient):
        arguments = [x, kernel]

        def of_one(value):
            return form(*arguments[:number], value, *arguments[number + 1 :], geometry)

        return jax.vjp(of_one, arguments[number])[1](gradient)[0]

    return gradient_of


def _inputs_by_matmul(x, kernel, geometry, gradient):
    """Multiply by the transposed kernel of 1x1, and put zeros between the rows that a stride skipped."""
    of_seen = jnp.einsum("bhwo,io->bhwi", gradient, kernel[0, 0])
    if geometry.stride == 1:
        return of_seen
    between = [(0, 0, 0), *_gaps(x.shape[1:3], of_seen.shape[1:3], geometry.stride), (0, 0, 0)]
    return lax.pad(of_seen, jnp.zeros((), of_seen.dtype), between)


def _gaps(sizes, seen, stride):
    return [(0, s - (n - 1) * stride - 1, stride - 1) for s, n in zip(sizes, seen, strict=True)]


def _kernel_by_columns(x, kernel, geometry, gradient):
    """One product of all columns with the gradient; for a kernel of 1x1 the map itself."""
    return _summed(forms.columns(x, len(kernel), geometry), gradient).reshape(kernel.shape)


def _kernel_by_taps(x, kernel, geometry, gradient):
    """One product a tap."""
    taps = [_summed(part, gradient) for part in forms.shifted(x, len(kernel), geometry)]
    return jnp.stack(taps).reshape(kernel.shape)


def _summed(left, right):
    """Return the sum of left[b, h, w, i] right[b, h, w, o] over b, h and w.

    Batch and positions stay two axes: contracted as one, XLA:CPU leaves the path of its fast matmul.
    """
    left, right = (a.reshape(len(a), -1, a.shape[-1]) for a in (left, right))
    wide = np.promote_types(left.dtype, np.float32)
    total = jnp.einsum("bti,bto->io", left, right, preferred_element_type=wide)
    return total.astype(left.dtype)


Gradient = Callable[[jax.Array, jax.Array, Geometry, jax.Array], jax.Array]

FORWARD: dict[str, Callable[[jax.Array, jax.Array, Geometry], jax.Array]] = {
    "native": forms.native,
    "im2col": forms.im2col,
    "winograd": lambda x, kernel, _: winograd(x, kernel),
}
OF_INPUTS: dict[str, Gradient] = {
    "native": _derived(forms.native, 0),
    "im2col": _derived(forms.im2col, 0),
    "matmul": _inputs_by_matmul,
    "winograd": lambda x, kernel, _, gradient: input_gradient(kernel, gradient),
}
OF_KERNEL: dict[str, Gradient] = {
    "native": _derived(forms.native, 1),
    "im2col": _derived(forms.im2col, 1),
    "columns": _kernel_by_columns,
    "taps": _kernel_by_taps,
    "winograd": lambda x, kernel, _, gradient: kernel_gradient(x, gradient),
}
