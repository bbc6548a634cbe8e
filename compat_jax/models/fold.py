"""Fold the BatchNorms of a frozen network into the convolutions before them."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from compat_jax.models.layers import BatchNorm, Conv

EPSILON = BatchNorm.epsilon


def fold_batch_norm(
    network: nn.Module,
    variables: Mapping[str, Any],
    image_shape: tuple[int, int, int],
    put: Callable[[Any], Any] = lambda array: array,
) -> dict[str, Any]:
    """Return variables that compute the same in evaluation mode, with fewer normalisations.

    In evaluation mode, a BatchNorm of a `Conv`'s output is a factor and a shift per channel. The
    factor is multiplied into the kernel, the shift becomes the bias, and the other variables of the
    BatchNorm are left out, which is how `BatchNorm` knows that it only has a bias to add. A BatchNorm
    of anything else, as in networks that normalise before the convolution, stays as it is.

    Args:
      network: an Embedder or a backbone.
      variables: {"params", "batch_stats"} of the network; arrays or tracers. Not changed.
      image_shape: (height, width, channels).
      put: takes each array that was made, as it is made, e.g. to a device: so that no second copy of a
        network lies in memory.

    Returns:
      Variables for `network.apply(variables, images, train=False)`.
    """
    params, stats = (_copy(variables.get(part, {})) for part in ("params", "batch_stats"))
    for conv, norm in _pairs(network, tuple(image_shape)):
        layer, own, running = _at(params, conv), _at(params, norm), _at(stats, norm)
        factor = own.pop("scale") / (running.pop("var") + EPSILON) ** 0.5
        own["bias"] = own["bias"] - running.pop("mean") * factor
        for name in layer:  # output channels are the last axis of both kernel and bias
            layer[name] = put(layer[name] * factor)
    return {"params": params, "batch_stats": _without_empty(stats)}


@functools.lru_cache(maxsize=64)
def _pairs(network, image_shape):
    """Return the paths of each convolution whose output a BatchNorm normalises, and of that norm."""
    outputs: dict[int, tuple[tuple[str, ...], Any]] = {}
    pairs = []

    def watch(call, arguments, keywords, context):
        module, is_call = context.module, context.method_name == "__call__"
        if is_call and isinstance(module, BatchNorm) and id(arguments[0]) in outputs:
            pairs.append((outputs[id(arguments[0])][0], module.path))
        result = call(*arguments, **keywords)
        if is_call and isinstance(module, Conv):
            outputs[id(result)] = module.path, result  # held, so that its id is not reused
        return result

    def run(key, image):
        with nn.intercept_methods(watch):
            return network.init(key, image, train=False)

    jax.eval_shape(run, jax.random.key(0), jnp.zeros((1, *image_shape)))
    return tuple(pairs)


def _copy(tree):
    return {k: _copy(v) for k, v in tree.items()} if isinstance(tree, Mapping) else tree


def _at(tree, path):
    return functools.reduce(lambda t, name: t[name], path, tree)


def _without_empty(tree):
    cut = {k: _without_empty(v) if isinstance(v, dict) else v for k, v in tree.items()}
    return {k: v for k, v in cut.items() if not (isinstance(v, dict) and not v)}
