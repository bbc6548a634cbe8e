"""Convolution in all its forms, pooling, and BatchNorm as PyTorch computes it."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compat_jax.mesh import along_data, make_mesh
from compat_jax.models import layers
from compat_jax.models.conv import conv

# input shape, kernel side, outputs, stride, padding, groups, the forms that can compute it
CASES = [
    ((2, 5, 6, 3), 3, 4, 1, 1, 1, ("native", "im2col", "dense")),
    ((2, 6, 7, 3), 3, 4, 2, 1, 1, ("native", "im2col", "dense")),
    ((2, 1, 1, 3), 3, 4, 1, 1, 1, ("native", "im2col", "dense")),
    ((2, 2, 2, 3), 3, 4, 2, 1, 1, ("native", "im2col", "dense")),
    ((2, 4, 5, 3), 5, 4, 2, 2, 1, ("native", "im2col", "dense")),
    ((2, 5, 5, 3), 1, 4, 2, 0, 1, ("native", "im2col", "dense")),
    ((2, 9, 8, 3), 4, 4, 4, 0, 1, ("native", "im2col", "patches")),
    ((2, 6, 4, 3), 3, 4, 1, 1, 1, ("native", "winograd")),
    ((2, 5, 7, 3), 3, 4, 1, 1, 1, ("native", "winograd")),
    ((2, 2, 2, 3), 3, 4, 1, 1, 1, ("native", "dense", "toeplitz")),
    ((2, 6, 6, 4), 3, 6, 2, 1, 2, ("native", "split")),
    ((2, 2, 2, 4), 3, 4, 1, 1, 4, ("native", "split")),
    ((2, 4, 3, 3), 5, 3, 1, 2, 3, ("native", "depthwise")),
]


def arrays(shape, size, out, *, groups=1):
    rng = np.random.default_rng(0)
    kernel = rng.standard_normal((size, size, shape[-1] // groups, out), np.float32)
    return rng.standard_normal(shape, np.float32), kernel


def convolve_by_loops(x, kernel, *, stride=1, padding=0, groups=1):
    """Convolve by the definition, output by output, in float64."""
    size, _, c_in, c_out = kernel.shape
    x = np.pad(x.astype(np.float64), ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    height, width = ((s - size) // stride + 1 for s in x.shape[1:3])
    result = np.zeros((len(x), height, width, c_out))
    for p, q, o in np.ndindex(height, width, c_out):
        first = o // (c_out // groups) * c_in
        top, left = p * stride, q * stride
        window = x[:, top : top + size, left : left + size, first : first + c_in]
        result[:, p, q, o] = (window * kernel[..., o]).sum(axis=(1, 2, 3))
    return result


def assert_close(actual, expected, tolerance=1e-5):
    """Within `tolerance` of the largest entry."""
    assert actual.shape == expected.shape
    assert np.abs(np.asarray(actual) - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize("case", CASES)
def test_every_form_computes_the_convolution(case):
    shape, size, out, stride, padding, groups, forms = case
    geometry = {"stride": stride, "padding": padding, "groups": groups}
    x, kernel = arrays(shape, size, out, groups=groups)
    expected = convolve_by_loops(x, kernel, **geometry)
    weights = np.random.default_rng(1).standard_normal(expected.shape, np.float32)

    @jax.jit
    def values_and_gradients(x, kernel):
        results = {}
        for form in (*forms, None):
            function = lambda a, b, form=form: conv(a, b, form=form, **geometry)  # noqa: E731
            value, pull_back = jax.vjp(function, x, kernel)
            results[form or "chosen"] = (value, *pull_back(jnp.asarray(weights)))
        return results

    # Linear in both arguments: the derivative along any direction is another convolution.
    dx, dk = x[::-1, ::-1], kernel[::-1, :, :, ::-1]
    along_dx = (convolve_by_loops(dx, kernel, **geometry) * weights).sum()
    along_dk = (convolve_by_loops(x, dk, **geometry) * weights).sum()
    for value, of_x, of_kernel in values_and_gradients(x, kernel).values():
        assert_close(value, expected)
        np.testing.assert_allclose((of_x * dx).sum(), along_dx, rtol=1e-4, atol=1e-3)
        np.testing.assert_allclose((of_kernel * dk).sum(), along_dk, rtol=1e-4, atol=1e-3)


# The chosen form, as seen in the program that is lowered for a platform


def convolutions_in(platform, shape, size, **geometry):
    """Count the convolution operations of the program for a platform."""
    x, kernel = arrays(shape, size, 4, groups=geometry.get("groups", 1))
    run = jax.jit(lambda a, b: conv(a, b, **geometry))
    return (
        run.trace(x, kernel)
        .lower(lowering_platforms=(platform,))
        .as_text()
        .count("stablehlo.convolution")
    )


SMALL_MAPS = [
    {"shape": (2, 4, 4, 4), "size": 3, "padding": 1},
    {"shape": (2, 2, 2, 4), "size": 3, "padding": 1},
    {"shape": (2, 1, 1, 4), "size": 3, "padding": 1},
    {"shape": (2, 8, 8, 4), "size": 1},
    {"shape": (2, 8, 8, 4), "size": 4, "stride": 4},
]


@pytest.mark.parametrize("arguments", SMALL_MAPS)
def test_small_maps_are_matmuls_on_cpu_alone(arguments):
    assert convolutions_in("cpu", **arguments) == 0
    assert convolutions_in("cuda", **arguments) == 1
    assert convolutions_in("tpu", **arguments) == 1


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_large_maps_are_convolutions_everywhere(platform):
    assert convolutions_in(platform, (2, 16, 16, 4), 3, padding=1) == 1


def test_groups_are_split_on_cpu_alone():
    arguments = {"shape": (2, 16, 16, 4), "size": 3, "padding": 1, "groups": 2}
    assert convolutions_in("cpu", **arguments) == 2
    assert convolutions_in("tpu", **arguments) == 1


def test_layer_computes_in_bfloat16_with_float32_parameters():
    layer = layers.Conv(4, 3, padding=1, use_bias=True, dtype=jnp.bfloat16)
    x, kernel = arrays((2, 4, 4, 3), 3, 4)
    variables = {"params": {"kernel": kernel, "bias": np.zeros(4, np.float32)}}
    created = jax.eval_shape(layer.init, jax.random.key(0), x)
    chex.assert_trees_all_equal_shapes_and_dtypes(created, variables)
    result = jax.jit(layer.apply)(variables, x)
    assert result.dtype == jnp.bfloat16
    assert_close(result.astype(jnp.float32), convolve_by_loops(x, kernel, padding=1), 0.02)


# Pooling


@pytest.mark.parametrize(
    ("shape", "size", "stride", "padding"),
    [((2, 8, 8, 3), 3, 2, 1), ((2, 7, 5, 3), 2, 2, 0), ((1, 3, 3, 2), 3, 1, 1)],
)
def test_max_pool(shape, size, stride, padding):
    x = np.random.default_rng(0).standard_normal(shape, np.float32) - 5  # zeros would win
    border = ((0, 0), (padding, padding), (padding, padding), (0, 0))
    padded = np.pad(x, border, constant_values=-np.inf)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (size, size), axis=(1, 2))
    expected = windows[:, ::stride, ::stride].max(axis=(-2, -1))
    for form in (None, "native", "slices"):
        found = layers.max_pool(x, size, stride, padding, form=form)
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("form", [None, "native", "slices"])
def test_gradient_of_max_pool_goes_to_the_maximum(form):
    x = np.array([[1, 2], [4, 3]], np.float32).reshape(1, 2, 2, 1)
    gradient = jax.grad(lambda a: layers.max_pool(a, 2, 2, 0, form=form).sum())(x)
    np.testing.assert_array_equal(gradient.reshape(2, 2), [[0, 0], [1, 0]])


def test_gradients_of_max_pool_are_the_same_where_no_maxima_tie():
    rng = np.random.default_rng(1)
    x, weights = (rng.standard_normal(s, np.float32) for s in ((2, 9, 9, 3), (2, 5, 5, 3)))

    def gradient(form):
        return jax.grad(lambda a: (weights * layers.max_pool(a, 3, 2, 1, form=form)).sum())(x)

    np.testing.assert_allclose(gradient("native"), gradient("slices"), rtol=1e-6)


def test_global_average_pool():
    x = np.arange(8, dtype=np.float32).reshape(1, 2, 2, 2)
    np.testing.assert_allclose(layers.global_average_pool(x), [[3, 4]])


# BatchNorm


def batch_norm(shape=(8, 3, 3, 4)):
    rng = np.random.default_rng(0)
    x = 2 * rng.standard_normal(shape, np.float32) + rng.standard_normal(shape[-1:], np.float32)
    variables = {
        "params": {
            "scale": rng.uniform(0.5, 1.5, 4).astype(np.float32),
            "bias": rng.standard_normal(4, np.float32),
        },
        "batch_stats": {
            "mean": rng.standard_normal(4, np.float32),
            "var": rng.uniform(0.5, 1.5, 4).astype(np.float32),
        },
    }
    return x, variables


def normalised(x, variables, *, mean, var):
    scale, bias = variables["params"]["scale"], variables["params"]["bias"]
    return (x - mean) / np.sqrt(var + 1e-5) * scale + bias


def train(x, variables, **options):
    layer = layers.BatchNorm(**options)
    run = jax.jit(lambda v, a: layer.apply(v, a, train=True, mutable=["batch_stats"]))
    result, updated = run(variables, x)
    return result, updated["batch_stats"]


def test_batch_norm_in_training_as_pytorch():
    """Normalises by the biased variance, remembers the unbiased one, a tenth of it a step."""
    x, variables = batch_norm()
    result, stats = train(x, variables)
    wide = x.astype(np.float64).reshape(-1, 4)
    mean, old = wide.mean(0), variables["batch_stats"]
    expected = normalised(x, variables, mean=mean, var=wide.var(0))
    np.testing.assert_allclose(result, expected, atol=1e-5)
    np.testing.assert_allclose(stats["mean"], 0.9 * old["mean"] + 0.1 * mean, atol=1e-6)
    unbiased = wide.var(0, ddof=1)
    np.testing.assert_allclose(stats["var"], 0.9 * old["var"] + 0.1 * unbiased, atol=1e-6)


def test_batch_norm_in_evaluation_uses_what_it_remembers():
    x, variables = batch_norm()
    stats = variables["batch_stats"]
    result = layers.BatchNorm().apply(variables, x, train=False)
    expected = normalised(x, variables, mean=stats["mean"], var=stats["var"])
    np.testing.assert_allclose(result, expected, atol=1e-5)


def test_batch_norm_of_features_and_another_momentum():
    x, variables = batch_norm((6, 4))
    _, stats = train(x, variables, momentum=0.5)
    old = variables["batch_stats"]["mean"]
    np.testing.assert_allclose(stats["mean"], 0.5 * old + 0.5 * x.mean(0), atol=1e-6)


def test_batch_norm_of_a_single_value_is_finite():
    x, variables = batch_norm((1, 1, 1, 4))
    result, stats = train(x, variables)
    np.testing.assert_allclose(result[0, 0, 0], variables["params"]["bias"], atol=1e-3)
    chex.assert_tree_all_finite(stats)


def test_batch_norm_starts_as_the_identity():
    x, _ = batch_norm()
    variables = layers.BatchNorm().init(jax.random.key(0), x, train=True)
    assert set(variables["params"]) == {"scale", "bias"}
    np.testing.assert_array_equal(variables["batch_stats"]["mean"], np.zeros(4))
    np.testing.assert_array_equal(variables["batch_stats"]["var"], np.ones(4))
    np.testing.assert_allclose(layers.BatchNorm().apply(variables, x, train=False), x, rtol=1e-4)


def test_batch_norm_in_bfloat16_keeps_float32_statistics():
    x, variables = batch_norm()
    result, stats = train(jnp.asarray(x, jnp.bfloat16), variables, dtype=jnp.bfloat16)
    reference, expected = train(x, variables)
    assert result.dtype == jnp.bfloat16
    np.testing.assert_allclose(result.astype(jnp.float32), reference, atol=0.05)
    assert stats["mean"].dtype == stats["var"].dtype == jnp.float32
    np.testing.assert_allclose(stats["var"], expected["var"], rtol=1e-2)


def test_batch_norm_in_bfloat16_far_from_zero():
    """A mean of 30 deviations: the difference is taken in float32, or nothing would be left."""
    x, variables = batch_norm()
    x = jnp.asarray(x + 60, jnp.bfloat16)
    result, _ = train(x, variables, dtype=jnp.bfloat16)
    reference, _ = train(x.astype(jnp.float32), variables)
    np.testing.assert_allclose(result.astype(jnp.float32), reference, rtol=2**-7, atol=1e-2)


def test_batch_norm_of_a_batch_split_over_devices_sees_all_of_it():
    x, variables = batch_norm()
    result, stats = train(jax.device_put(x, along_data(make_mesh("data:8"))), variables)
    expected, expected_stats = train(x, variables)
    np.testing.assert_allclose(result, expected, atol=1e-6)
    chex.assert_trees_all_close(stats, expected_stats, atol=1e-6)


def test_squeeze_excite_by_hand():
    """Gates of 1/2 where the layers give 0."""
    x, _ = batch_norm()
    result = layers.squeeze_excite(x, lambda a: a[..., :1], lambda a: jnp.zeros((8, 1, 1, 4)))
    np.testing.assert_allclose(result, x / 2, rtol=1e-6)
