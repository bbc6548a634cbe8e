"""The dense layer of tokens: Flax's variables and numbers, gradients that are summed in float32."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compat_jax.models.dense import TokenDense, attention_scores, matmul


def normal(shape, seed, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32), dtype)


def test_its_variables_and_values_are_those_of_flax():
    x = normal((2, 5, 3), 0)
    ours, theirs = TokenDense(4), nn.Dense(4)
    variables = ours.init(jax.random.key(1), x)
    jax.tree.map(np.testing.assert_array_equal, variables, theirs.init(jax.random.key(1), x))
    expected = theirs.apply(variables, x)
    np.testing.assert_allclose(ours.apply(variables, x), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("places", [(50,), (7, 8)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-6), (jnp.bfloat16, 2**-8)])
def test_gradients_are_those_of_the_product_in_float64(dtype, tolerance, places):
    shapes = (3, *places, 4), (4, 6), (3, *places, 6)
    x, kernel, upstream = (normal(shape, seed, dtype) for seed, shape in enumerate(shapes))

    @jax.jit
    def all_of_them(x, kernel, upstream):
        value, pull_back = jax.vjp(matmul, x, kernel)
        return value, *pull_back(upstream)

    wide = [np.asarray(a, np.float64) for a in (x, kernel, upstream)]
    expected = (
        wide[0] @ wide[1],
        wide[2] @ wide[1].T,
        wide[0].reshape(-1, 4).T @ wide[2].reshape(-1, 6),
    )
    for found, wanted in zip(all_of_them(x, kernel, upstream), expected, strict=True):
        assert found.dtype == dtype
        difference = np.abs(np.asarray(found, np.float64) - wanted).max()
        assert difference <= tolerance * np.abs(wanted).max()


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-6), (jnp.bfloat16, 2**-8)])
def test_scores_of_an_attention_and_their_gradients_are_those_in_float64(dtype, tolerance):
    query, key = (normal((2, 5, 3, 8), seed, dtype) for seed in range(2))
    upstream = normal((2, 3, 5, 5), 2)

    @jax.jit
    def all_of_them(query, key, upstream):
        value, pull_back = jax.vjp(attention_scores, query, key)
        return value, *pull_back(upstream)

    query64, key64, upstream64 = (np.asarray(a, np.float64) for a in (query, key, upstream))
    expected = (
        np.einsum("bqhd,bkhd->bhqk", query64, key64),
        np.einsum("bhqk,bkhd->bqhd", upstream64, key64),
        np.einsum("bhqk,bqhd->bkhd", upstream64, query64),
    )
    found = all_of_them(query, key, upstream)
    assert [a.dtype for a in found] == [jnp.float32, dtype, dtype]
    for ours, wanted in zip(found, expected, strict=True):
        difference = np.abs(np.asarray(ours, np.float64) - wanted).max()
        assert difference <= tolerance * np.abs(wanted).max()


def test_no_product_of_an_attention_is_wide_where_its_input_is_not():
    query = normal((2, 5, 3, 8), 0, jnp.bfloat16)
    gradient = jax.jit(jax.grad(lambda q, k: attention_scores(q, k).sum(), (0, 1)))
    text = gradient.trace(query, query).lower(lowering_platforms=("tpu",)).as_text()
    products = re.findall(r"stablehlo.dot_general.* : \((.*)\) ->", text)
    assert len(products) >= 2 and not any("f32" in operands for operands in products)


def test_other_platforms_have_no_product_more():
    x, kernel = normal((2, 5, 3), 0, jnp.bfloat16), normal((3, 4), 1, jnp.bfloat16)
    plain = jax.jit(jax.grad(lambda k: (x @ k).sum()))
    ours = jax.jit(jax.grad(lambda k: matmul(x, k).sum()))

    def products(function):
        text = function.trace(kernel).lower(lowering_platforms=("tpu",)).as_text()
        return text.count("stablehlo.dot_general")

    assert products(ours) == products(plain)
