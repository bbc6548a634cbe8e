"""Weights of the golden values, drawn again from the names of the tensors."""

import functools
import zlib

import jax
import numpy as np

from compat_jax import simplex
from compat_jax.interop.weights import from_torch, to_torch
from compat_jax.models import Embedder


def draw(tag: str, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Draw tensor `name` of the network `tag`, float32[shape] in PyTorch's layout."""
    rng = np.random.default_rng(zlib.crc32(f"{tag}/{name}".encode()))
    if name.endswith("running_var"):
        return rng.uniform(0.5, 1.5, shape).astype(np.float32)
    if name.endswith(("running_mean", "bias")):
        return (0.1 * rng.normal(size=shape)).astype(np.float32)
    if len(shape) == 1:
        return rng.uniform(0.5, 1.5, shape).astype(np.float32)
    return (rng.normal(size=shape) * np.sqrt(2 / np.prod(shape[1:]))).astype(np.float32)


def zero_variables(embedder: Embedder, image_shape=(32, 32, 3)) -> dict:
    """Return {"params", "batch_stats"} of zeros: names and shapes without an initialisation."""
    shapes = _shapes(embedder, image_shape)
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    return {"params": zeros["params"], "batch_stats": zeros.get("batch_stats", {})}


@functools.lru_cache(maxsize=32)
def _shapes(embedder, image_shape):
    images = jax.ShapeDtypeStruct((1, *image_shape), np.float32)
    return dict(jax.eval_shape(lambda x: embedder.init(jax.random.key(0), x), images))


def reference_state(
    embedder: Embedder, tag: str, *, bare: bool = False, image_shape=(32, 32, 3)
) -> dict[str, np.ndarray]:
    """Draw the state dict of a network of the golden values; `bare` names lack `backbone.`."""
    state = {}
    for name, array in to_torch(zero_variables(embedder, image_shape)).items():
        name = name.removeprefix("backbone.") if bare else name
        if name == "fc2.weight":
            state[name] = np.asarray(simplex.prototypes(array.shape[0]))
        elif name.endswith("num_batches_tracked"):
            state[name] = array
        else:
            state[name] = draw(tag, name, array.shape)
    return state


def reference_variables(
    embedder: Embedder, tag: str, *, bare: bool = False, image_shape=(32, 32, 3)
) -> dict:
    """Draw the variables of a network of the golden values."""
    state = reference_state(embedder, tag, bare=bare, image_shape=image_shape)
    return from_torch(state, zero_variables(embedder, image_shape))
