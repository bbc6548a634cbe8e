"""Products of tokens whose gradients stay in bfloat16, and on the fast path of XLA:CPU."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from compat_jax.models.rematerialize import product


class TokenDense(nn.Module):
    """A dense layer with a bias, with the variables of `flax.linen.Dense`.

    Attributes:
      features: numbers of a token afterwards.
      dtype: dtype of the computation; parameters are float32.
      kernel_init: initializer of the kernel.
    """

    features: int
    dtype: DTypeLike = jnp.float32
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map float[batch, ..., in] to float[batch, ..., features]."""
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        x, kernel, bias = (a.astype(self.dtype) for a in (x, kernel, bias))
        return product(matmul(x, kernel)) + bias


def matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Multiply tokens by a matrix.

    Args:
      x: float[batch, ..., in], tokens or the places of a map.
      kernel: float[in, out].

    Returns:
      float[batch, ..., out].
    """
    if x.dtype != jnp.bfloat16:
        return _product(x, kernel)
    return lax.platform_dependent(x, kernel, cpu=_on_cpu, default=_product)


def attention_scores(query: jax.Array, key: jax.Array) -> jax.Array:
    """Multiply the queries of an attention with its keys.

    The scores of bfloat16 are float32, as the softmax after them needs. Their gradients are rounded to
    bfloat16 before they are multiplied, since autodiff would multiply them in float32 at half the rate.

    Args:
      query: float[batch, tokens, heads, channels].
      key: float[batch, tokens, heads, channels].

    Returns:
      float[batch, heads, tokens, tokens], float32 or wider.
    """
    return _rounded_scores(query, key) if query.dtype == jnp.bfloat16 else _scores(query, key)


def _scores(query, key):
    wide = np.promote_types(query.dtype, np.float32)
    return jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=wide)


_rounded_scores = jax.custom_vjp(_scores)


def _scores_forward(query, key):
    return _scores(query, key), (query, key)


def _scores_backward(saved, gradient):
    query, key = saved
    rounded = gradient.astype(query.dtype)
    of_query = jnp.einsum("bhqk,bkhd->bqhd", rounded, key)
    return of_query, jnp.einsum("bhqk,bqhd->bkhd", rounded, query)


_rounded_scores.defvjp(_scores_forward, _scores_backward)


def _product(x, kernel):
    return lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))


# As autodiff writes it, XLA:CPU computes the gradient of the kernel at 3 to 5 GFLOP/s instead of 100.
@jax.custom_vjp
def _on_cpu(x, kernel):
    return _product(x, kernel)


def _forward(x, kernel):
    return _product(x, kernel), (x, kernel)


def _backward(saved, gradient):
    x, kernel = saved
    left, right = (a.reshape(len(a), -1, a.shape[-1]) for a in (x, gradient))
    of_kernel = jnp.einsum("bti,bto->io", left, right, preferred_element_type=jnp.float32)
    of_x = lax.dot_general(gradient, kernel, (((x.ndim - 1,), (1,)), ((), ())))
    return of_x, of_kernel.astype(kernel.dtype)


_on_cpu.defvjp(_forward, _backward)
