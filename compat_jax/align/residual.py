"""A residual adapter: a small network on top of a rotation, trained in seconds."""

import functools
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from compat_jax import losses
from compat_jax.align.linear import rotation
from compat_jax.align.maps import Map, Pairs, applies
from compat_jax.fields import Rule

BASES = ("procrustes", "identity")


def adapter(
    pairs: Pairs,
    hidden: Annotated[int, Rule("units of the hidden layer", low=1)] = 256,
    epochs: Annotated[int, Rule("over the pairs", low=0)] = 20,
    batch_size: Annotated[int, Rule("pairs of a step", low=1)] = 256,
    lr: Annotated[float, Rule("learning rate of Adam, falling as a cosine", above=0)] = 1e-3,
    base: Annotated[str, Rule("map that it starts as", choices=BASES)] = "procrustes",
    seed: Annotated[int, Rule("of weights and order", low=0, high=2**32 - 1)] = 0,
) -> Map:
    """Fit scale * (new R + W2 gelu(new W1 + b1) + b2) by the mean of 1 - cos(mapped, old).

    W2, b2 are 0 and scale is 1 at the start, where the map is R alone: that of `procrustes`, or the
    identity (cut or zero-padded for unequal sizes). The weights kept are those of the epoch with the
    smallest loss over all pairs, the start included.

    Source: residual MLP with diagonal scaling as in Drift-Adapter, EMNLP 2025 (arXiv 2509.23471).
    """
    sizes = pairs.sizes
    matrix = rotation(pairs) if base == "procrustes" else np.eye(*sizes)
    rng = np.random.default_rng([seed, len(pairs.new)])
    drawn = rng.normal(size=(sizes[0], hidden)) / np.sqrt(sizes[0])
    params: Any = {
        "w1": drawn.astype(np.float32),
        "b1": np.zeros(hidden, np.float32),
        "w2": np.zeros((hidden, sizes[1]), np.float32),
        "b2": np.zeros(sizes[1], np.float32),
        "scale": np.ones(sizes[1], np.float32),
    }
    base_matrix = matrix.astype(np.float32)
    size = min(batch_size, len(pairs.new))
    steps = len(pairs.new) // size
    optimizer = optax.adam(optax.cosine_decay_schedule(lr, max(steps * epochs, 1)))
    new, old = jnp.asarray(pairs.new, np.float32), jnp.asarray(pairs.old, np.float32)
    state = optimizer.init(params)
    best, kept = float(_loss(params, base_matrix, (new, old))), params
    for _ in range(epochs):
        order = rng.permutation(len(new))[: steps * size].reshape(steps, size)
        params, state = _epoch(optimizer, (params, state), (base_matrix, new, old, order))
        loss = float(_loss(params, base_matrix, (new, old)))
        if loss < best:
            best, kept = loss, params
    arrays = {"matrix": base_matrix, **{k: np.asarray(v) for k, v in kept.items()}}
    settings = {"hidden": hidden, "epochs": epochs, "base": base, "seed": seed, "loss": best}
    return Map("adapter", *sizes, arrays=arrays, settings=settings)


def transform(params: Any, matrix: Any, new: Any) -> jax.Array:
    """Apply the adapter: float32[n, e] -> float32[n, d], not normalised."""
    inner = jax.nn.gelu(new @ params["w1"] + params["b1"])
    return params["scale"] * (new @ matrix + inner @ params["w2"] + params["b2"])


@jax.jit
def _loss(params, matrix, data):
    new, old = data
    return losses.feature_distillation(transform(params, matrix, new), old).mean()


@functools.partial(jax.jit, static_argnums=0)
def _epoch(optimizer, begun, fixed):
    """The steps of an epoch; fixed is (base matrix, new, old, int[steps, batch] order)."""
    matrix, new, old, order = fixed

    def step(carry, rows):
        params, state = carry
        grads = jax.grad(_loss)(params, matrix, (new[rows], old[rows]))
        with jax.numpy_dtype_promotion("standard"):  # optax raises b1 to an integer
            updates, state = optimizer.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, begun, order)[0]


def _apply(arrays, new, old):
    del old
    return transform(arrays, arrays["matrix"], new)


applies("adapter", _apply)
