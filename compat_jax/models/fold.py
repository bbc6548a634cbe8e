"""Fold the BatchNorms of a frozen network into the convolutions before them."""

import collections
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from compat_jax.models.layers import BatchNorm, Conv

_MARK = "fold "  # begins the names of arrays that `_pairs` follows


class _Call(NamedTuple):
    """A call of a layer while a network is traced; `epsilon` of a norm in evaluation mode, else None."""

    path: tuple[str, ...]
    is_conv: bool
    epsilon: float | None


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
    of anything else, as in networks that normalise before the convolution, stays as it is; so does one
    whose convolution has another reader, and a layer that is called twice or over stacked variables.

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
    for conv, norm, epsilon in _pairs(network, tuple(image_shape)):
        layer, own, running = _at(params, conv), _at(params, norm), _at(stats, norm)
        if layer["kernel"].ndim != 4:  # of several layers, stacked by a lifted scan or vmap
            continue
        factor = own.pop("scale") / (running.pop("var") + epsilon) ** 0.5
        own["bias"] = own["bias"] - running.pop("mean") * factor
        for name in layer:  # output channels are the last axis of both kernel and bias
            layer[name] = put(layer[name] * factor)
    return {"params": params, "batch_stats": _without_empty(stats)}


@functools.lru_cache(maxsize=64)
def _pairs(network, image_shape):
    """Return the paths of each convolution and of the norm that alone reads it, and its epsilon."""
    calls: dict[str, _Call] = {}

    def marked(x, call):
        mark = f"{_MARK}{len(calls)}"
        calls[mark] = call
        return checkpoint_name(x, mark)

    def watch(call, arguments, keywords, context):
        module, is_call = context.module, context.method_name == "__call__"
        # No subclass: it may do more to its input or result.
        if is_call and type(module) is Conv:
            return marked(call(*arguments, **keywords), _Call(module.path, True, None))
        if is_call and type(module) is BatchNorm:
            x, train = _inputs(*arguments, **keywords)
            epsilon = None if train else module.epsilon
            return call(marked(x, _Call(module.path, False, epsilon)), train)
        return call(*arguments, **keywords)

    def run(key, image):
        with nn.intercept_methods(watch):
            return network.init_with_output(key, image, train=False)

    traced = jax.make_jaxpr(run)(jax.random.key(0), jnp.zeros((1, *image_shape)))
    times = collections.Counter(call.path for call in calls.values())
    found = [(calls[mark], calls[reader]) for mark, reader in _read_once(traced.jaxpr)]
    return tuple(
        (conv.path, norm.path, norm.epsilon)
        for conv, norm in found
        if conv.is_conv and norm.epsilon is not None and times[conv.path] == times[norm.path] == 1
    )


def _inputs(x, train):
    """The arguments of `BatchNorm`, by place or by name."""
    return x, train


def _read_once(program: Any) -> Iterator[tuple[str, str]]:
    """Yield the marks of two arrays of a jaxpr where the second is all that is made of the first."""
    readers = collections.defaultdict(list)
    for equation in program.eqns:
        for variable in equation.invars:
            readers[id(variable)].append(_mark(equation))
        for value in equation.params.values():
            for part in value if isinstance(value, list | tuple) else [value]:
                inner = getattr(part, "jaxpr", part)
                if hasattr(inner, "eqns"):
                    yield from _read_once(inner)
    for variable in program.outvars:
        readers[id(variable)].append("")
    for equation in program.eqns:
        if mark := _mark(equation):
            reading = readers[id(equation.outvars[0])]
            if len(reading) == 1 and reading[0]:
                yield mark, reading[0]


def _mark(equation: Any) -> str:
    """The mark that an equation of a jaxpr puts on an array; "" for other equations."""
    name = equation.params.get("name")
    return name if isinstance(name, str) and name.startswith(_MARK) else ""


def _copy(tree):
    return {k: _copy(v) for k, v in tree.items()} if isinstance(tree, Mapping) else tree


def _at(tree, path):
    return functools.reduce(lambda t, name: t[name], path, tree)


def _without_empty(tree):
    cut = {k: _without_empty(v) if isinstance(v, dict) else v for k, v in tree.items()}
    return {k: v for k, v in cut.items() if not (isinstance(v, dict) and not v)}
