"""How many operations a network needs, counted from its shapes."""

from typing import Any

import jax
import numpy as np


def forward_flops(network: Any, variables: Any, image_shape: tuple[int, int, int]) -> list[float]:
    """Operations of every convolution and matmul for one image, in order.

    A tap of a convolution that only ever sees padding is not counted: nobody has to compute it. On
    maps of one pixel that is eight of nine taps.

    Args:
      network: an Embedder.
      variables: of it, arrays or shapes.
      image_shape: (height, width, channels).

    Returns:
      Operations, two for each multiplication.
    """
    image = jax.ShapeDtypeStruct((1, *image_shape), np.float32)
    closed = jax.make_jaxpr(lambda v, x: network.apply(v, x, train=False))(variables, image)
    return list(_walk(closed.jaxpr))


def hoc_step_flops(forward: list[float]) -> float:
    """Operations of a HOC step for one image.

    Args:
      forward: see `forward_flops`.

    Returns:
      The frozen pass, the pass of the new network and its two gradients, but for that of the first
      layer's input.
    """
    return 4 * sum(forward) - forward[0]


def _walk(jaxpr):
    for equation in jaxpr.eqns:
        if equation.primitive.name == "conv_general_dilated":
            yield _convolution(equation)
        elif equation.primitive.name == "dot_general":
            yield _matmul(equation)
        elif "branches" in equation.params:  # the form for accelerators is the last one
            yield from _walk(equation.params["branches"][-1].jaxpr)
        else:
            for value in equation.params.values():
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    yield from _walk(inner)


def _convolution(equation):
    inputs, kernel = (v.aval.shape for v in equation.invars)
    strides, padding = equation.params["window_strides"], equation.params["padding"]
    taps = 1
    for size, width, stride, (low, high) in zip(
        inputs[1:3], kernel[:2], strides, padding, strict=True
    ):
        starts = np.arange(0, size + low + high - width + 1, stride) - low
        positions = starts[:, None] + np.arange(width)
        taps *= int(((positions >= 0) & (positions < size)).sum())
    return 2.0 * inputs[0] * taps * kernel[2] * kernel[3]


def _matmul(equation):
    (contracting, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return 2.0 * np.prod(equation.outvars[0].aval.shape) * np.prod([left[i] for i in contracting])
