"""The optimiser against PyTorch's update written out, and the cosine against its numbers."""

from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from compat_jax.errors import UserError
from compat_jax.training.optimizer import Sgd, learning_rate, make_optimizer

GOLDEN = np.load(Path(__file__).parent / "golden" / "losses.npz")
SHAPES = {
    "conv": {"kernel": (3, 3, 2, 4), "bias": (4,)},
    "norm": {"scale": (4,), "bias": (4,)},
    "projection": {"kernel": (4, 7)},
}
KERNELS = [("conv", "kernel"), ("projection", "kernel")]


def random_tree(seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: rng.standard_normal(shape, np.float32),
        SHAPES,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def torch_sgd(params, gradients, rates, momentum, decay, is_decayed):
    """torch.optim.SGD in float64: decay joins the gradient, the rate stays out of the buffer."""
    params = jax.tree.map(lambda x: x.astype(np.float64), params)
    buffer = None
    for gradient, rate in zip(gradients, rates, strict=True):
        for layer, weights in params.items():
            for name in weights:
                if is_decayed(layer, name):
                    gradient[layer][name] = gradient[layer][name] + decay * weights[name]
        step = gradient
        buffer = (
            step if buffer is None else jax.tree.map(lambda b, s: momentum * b + s, buffer, step)
        )
        params = jax.tree.map(lambda p, b, rate=rate: p - rate * b, params, buffer)
    return params


@pytest.mark.parametrize(
    ("decay", "is_decayed"),
    [
        ("package", lambda layer, name: (layer, name) in KERNELS),
        ("notebook", lambda layer, name: True),
    ],
)
def test_five_steps_as_pytorch(decay, is_decayed):
    settings = Sgd(lr=0.1, min_lr=0.01, momentum=0.9, weight_decay=0.05, decay=decay)
    optimizer = make_optimizer(settings)
    epochs = [0, 0, 1, 1, 2]
    rates = [0.1, 0.1, 0.0775, 0.0775, 0.0325]  # the cosine over three epochs
    params = random_tree(0)
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for i, epoch in enumerate(epochs):
        gradient = random_tree(1 + i)
        updates, state = update(gradient, state, params, epoch=np.int32(epoch), epochs=np.int32(3))
        params = optax.apply_updates(params, updates)
    gradients = [random_tree(1 + i) for i in range(5)]
    expected = torch_sgd(random_tree(0), gradients, rates, 0.9, 0.05, is_decayed)
    jax.tree.map(lambda p, e: np.testing.assert_allclose(p, e, atol=2e-6), params, expected)


def test_package_leaves_vectors_out_of_the_decay():
    optimizer = make_optimizer(Sgd(lr=1.0, weight_decay=0.5, schedule="constant"))
    params = random_tree(0)
    nothing = jax.tree.map(np.zeros_like, params)
    updates, _ = optimizer.update(nothing, optimizer.init(params), params, epoch=0, epochs=1)
    for layer, weights in updates.items():
        for name, update in weights.items():
            decay = 0.5 if (layer, name) in KERNELS else 0.0
            np.testing.assert_allclose(update, -decay * params[layer][name])


def test_a_transformation_of_optax_is_taken_as_it_is():
    theirs = optax.sgd(0.01, momentum=0.9, nesterov=True)
    params, gradient = random_tree(0), random_tree(1)
    ours = make_optimizer(theirs)
    expected, _ = theirs.update(gradient, theirs.init(params), params)
    updates, _ = ours.update(gradient, ours.init(params), params, epoch=1, epochs=3)
    chex.assert_trees_all_equal(updates, expected)


def test_cosine_of_the_reference():
    settings = Sgd(lr=0.001, min_lr=1e-5)
    rates = jax.jit(lambda e: learning_rate(settings, e, jnp.int32(70)))(jnp.arange(70))
    assert rates.dtype == jnp.float32
    np.testing.assert_allclose(rates, GOLDEN["lr/70_epochs"], rtol=1e-5)


def test_cosine_by_hand():
    settings = Sgd(lr=0.3, min_lr=0.1)
    rates = [float(learning_rate(settings, epoch, 4)) for epoch in range(5)]
    half = 0.1 * np.sqrt(0.5)
    np.testing.assert_allclose(rates, [0.3, 0.2 + half, 0.2, 0.2 - half, 0.1], rtol=1e-6)


def test_constant_rate():
    settings = Sgd(lr=0.3, schedule="constant")
    assert float(learning_rate(settings, jnp.int32(3), jnp.int32(4))) == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lr": 0.0}, "optimizer.lr must be above 0, got 0.0"),
        (
            {"lr": 0.1, "min_lr": 0.2},
            r"optimizer.min_lr must lie in \[0, optimizer.lr=0.1\], got 0.2",
        ),
        ({"min_lr": -1.0}, "optimizer.min_lr must be at least 0, got -1.0"),
        ({"momentum": 1.0}, r"optimizer.momentum must be at least 0 and below 1, got 1.0"),
        ({"weight_decay": -0.1}, "optimizer.weight_decay must be at least 0, got -0.1"),
        ({"decay": "packages"}, "unknown optimizer.decay 'packages'. Did you mean 'package'"),
        ({"schedule": "cosin"}, "unknown optimizer.schedule 'cosin'. Did you mean 'cosine'"),
    ],
)
def test_settings_that_cannot_be(fields, message):
    with pytest.raises(UserError, match=message) as caught:
        Sgd(**fields)
    assert caught.value.argument == f"optimizer.{list(fields)[-1]}"
