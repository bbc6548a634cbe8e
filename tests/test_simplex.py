"""Prototypes, logits in closed form and label orders of the d-Simplex."""

import functools
from pathlib import Path

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compat_jax import losses, simplex
from compat_jax.errors import UserError

GOLDEN = np.load(Path(__file__).parent / "golden" / "losses.npz")
BILLION = 10**9


def random_features(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


@functools.lru_cache
def matrix(num_prototypes):
    return np.asarray(jax.jit(simplex.prototypes, static_argnums=0)(num_prototypes))


def assert_close(actual, expected, tolerance=1e-5):
    """Within `tolerance` of the largest entry."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= tolerance * np.abs(expected).max()


# Prototypes


def test_the_triangle_by_hand():
    a, b = (np.sqrt(3) + 1) / np.sqrt(8), (np.sqrt(3) - 1) / np.sqrt(8)
    expected = [[a, -b], [-b, a], [-np.sqrt(0.5), -np.sqrt(0.5)]]
    np.testing.assert_allclose(simplex.prototypes(3), expected, atol=1e-7)


@pytest.mark.parametrize("num_prototypes", [2, 3, 10, 100])
def test_prototypes_of_the_reference(num_prototypes):
    np.testing.assert_allclose(
        simplex.prototypes(num_prototypes), GOLDEN[f"simplex/{num_prototypes}"], atol=1e-6
    )


def test_prototypes_of_the_reference_for_1024_classes():
    rows = simplex.prototypes(1024)[np.array([0, 511, 1023])]
    np.testing.assert_allclose(rows, GOLDEN["simplex/1024_rows_0_511_1023"], atol=1e-6)


@pytest.mark.parametrize("num_prototypes", [2, 3, 17, 100, 1024])
def test_gram_matrix(num_prototypes):
    rows = matrix(num_prototypes).astype(np.float64)
    gram = rows @ rows.T
    expected = np.full_like(gram, -1 / (num_prototypes - 1))
    np.fill_diagonal(expected, 1)
    np.testing.assert_allclose(gram, expected, atol=1e-6)


def test_gram_matrix_of_some_rows_of_4096():
    some = np.array([0, 1, 2048, 4094, 4095])
    expected = np.where(some[:, None] == np.arange(4096), 1, -1 / 4095)
    np.testing.assert_allclose(matrix(4096)[some] @ matrix(4096).T, expected, atol=1e-6)


@pytest.mark.parametrize("num_prototypes", [1, 0, -5])
def test_too_few_classes(num_prototypes):
    with pytest.raises(UserError, match=f"at least 2 classes, got num_prototypes={num_prototypes}"):
        simplex.prototypes(num_prototypes)


def test_features_of_size_zero():
    with pytest.raises(UserError, match="at least 2 classes, got num_prototypes=1"):
        simplex.logits(jnp.zeros((3, 0)))


# Logits


@hypothesis.settings(max_examples=5, deadline=None)
@hypothesis.example(num_prototypes=2, seed=0)
@hypothesis.example(num_prototypes=3, seed=0)
@hypothesis.example(num_prototypes=1024, seed=0)
@hypothesis.example(num_prototypes=4096, seed=0)
@hypothesis.given(st.integers(2, 4096), st.integers(0, 1000))
def test_logits_are_products_with_the_prototypes(num_prototypes, seed):
    features = random_features(4, num_prototypes - 1, seed=seed)
    assert_close(jax.jit(simplex.logits)(features), features @ matrix(num_prototypes).T)


class Logits(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_same_in_every_variant(self):
        features = random_features(5, 31)
        assert_close(self.variant(simplex.logits)(features), features @ matrix(32).T)


@pytest.mark.parametrize("shape", [(9,), (1, 9), (0, 9), (2, 3, 9), (2, 1, 3, 9)])
def test_any_leading_dimensions(shape):
    features = random_features(*shape)
    logits = simplex.logits(features)
    assert logits.shape == (*shape[:-1], 10) and logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, features @ matrix(10).T, atol=1e-5)


def test_split_logits_are_the_logits_in_two_pieces():
    features = random_features(2, 3, 9)
    body, last = simplex.split_logits(features)
    np.testing.assert_array_equal(simplex.logits(features)[..., :-1], body)
    np.testing.assert_array_equal(simplex.logits(features)[..., -1], last)


def test_gradient_is_the_product_with_the_prototypes():
    features, cotangent = random_features(4, 31), random_features(4, 32, seed=1)
    gradient = jax.jit(jax.grad(lambda x: (simplex.logits(x) * cotangent).sum()))(features)
    assert_close(gradient, cotangent @ matrix(32))


def test_sums_of_bfloat16_features_run_in_float32():
    """4,095 ones: a bfloat16 sum of them stops at 256."""
    features = jnp.ones((1, 4095), jnp.bfloat16)
    body, last = simplex.split_logits(features)
    assert body.dtype == last.dtype == jnp.float32
    np.testing.assert_allclose(last, [-np.sqrt(4095)], rtol=1e-6)
    assert simplex.logits(features).dtype == jnp.bfloat16


def test_bfloat16_features():
    features = jnp.asarray(random_features(4, 1023), jnp.bfloat16)
    expected = np.asarray(features, np.float32) @ matrix(1024).T
    body, last = simplex.split_logits(features)
    assert_close(body, expected[:, :-1])
    assert_close(last, expected[:, -1])
    assert_close(simplex.logits(features), expected, 2**-8)


def test_float64_features_stay_float64():
    with jax.enable_x64(True):
        features = jnp.asarray(np.random.default_rng(0).standard_normal((2, 9)))
        mean = (1 + (1 - np.sqrt(10)) / 9) / 10
        exact = np.vstack([np.eye(9) - mean, np.full((1, 9), -1.0)])
        exact /= np.linalg.norm(exact, axis=1, keepdims=True)
        assert simplex.logits(features).dtype == jnp.float64
        np.testing.assert_allclose(simplex.logits(features), features @ exact.T, atol=1e-14)


@hypothesis.settings(max_examples=20, deadline=None)
@hypothesis.given(st.lists(st.integers(0, 9), min_size=5, max_size=5))
def test_label_logit_is_one_of_the_logits(rows):
    features, rows = random_features(5, 9), np.array(rows, np.int32)
    expected = (features @ matrix(10).T)[np.arange(5), rows]
    np.testing.assert_allclose(simplex.label_logit(features, rows), expected, atol=1e-5)


# A million classes


def needed_bytes(function, *arguments):
    """Arguments, results and intermediates of the compiled function."""
    memory = jax.jit(function).lower(*arguments).compile().memory_analysis()
    return memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes


def mean_loss(features, rows):
    return losses.simplex_cross_entropy(features, rows).mean()


def test_logits_of_a_million_classes():
    num_prototypes = 1_000_000
    features = random_features(4, num_prototypes - 1)
    assert needed_bytes(simplex.logits, features) < BILLION / 10
    logits = np.asarray(jax.jit(simplex.logits)(features), np.float64)
    wide = features.astype(np.float64)
    np.testing.assert_allclose(logits[:, -1], -wide.sum(1) / np.sqrt(num_prototypes - 1), rtol=1e-4)
    # W.T W = K/(K-1) I, so the products have this length; and the prototypes sum to zero.
    length = np.linalg.norm(wide, axis=1) * np.sqrt(num_prototypes / (num_prototypes - 1))
    np.testing.assert_allclose(np.linalg.norm(logits, axis=1), length, rtol=1e-6)
    np.testing.assert_allclose(logits.sum(1) / length, 0, atol=1e-3)


def test_gradient_of_the_cross_entropy_of_a_million_classes():
    features, rows = random_features(4, 999_999), np.array([0, 7, 999_998, 999_999], np.int32)
    both = jax.value_and_grad(mean_loss)
    assert needed_bytes(both, features, rows) < BILLION / 10
    loss, gradient = jax.jit(both)(features, rows)
    assert loss == pytest.approx(np.log(1e6) + 0.5, abs=2)  # logits of variance 1
    # d loss / d z = (softmax - onehot) W / batch; the own prototype dominates it.
    own = np.asarray(gradient)[[0, 1, 2], rows[:3]]
    np.testing.assert_allclose(own, -0.25, atol=1e-3)
    np.testing.assert_allclose(np.linalg.norm(gradient, axis=1), 0.25, rtol=1e-2)


# Label orders


def test_orders_by_hand():
    labels = np.array([0, 1, 9], np.int32)
    np.testing.assert_array_equal(simplex.prototype_rows(labels, 10), [9, 8, 0])
    np.testing.assert_array_equal(simplex.prototype_rows(labels, 10, "descending"), [9, 8, 0])
    np.testing.assert_array_equal(simplex.prototype_rows(labels, 10, "ascending"), [0, 1, 9])


@hypothesis.given(st.integers(2, 5000), st.sampled_from(simplex.LABEL_ORDERS))
def test_orders_are_involutions_onto_all_rows(num_prototypes, order):
    labels = np.arange(num_prototypes)
    rows = simplex.prototype_rows(labels, num_prototypes, order)
    np.testing.assert_array_equal(np.sort(rows), labels)
    np.testing.assert_array_equal(simplex.prototype_rows(rows, num_prototypes, order), labels)


def test_unknown_order_names_the_nearest():
    with pytest.raises(UserError, match=r"unknown label order 'descend'\. Did you mean 'desc"):
        simplex.prototype_rows(np.array([0]), 10, "descend")
