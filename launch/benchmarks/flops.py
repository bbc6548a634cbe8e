"""Count the operations of a network from its shapes."""

from typing import Any

import jax
import numpy as np


def forward_flops(network: Any, variables: Any, image_shape: tuple[int, int, int]) -> list[float]:
    """Count the operations of every convolution and matmul for one image, in order.

    Products with padding are not counted, because they need not be computed: on maps of one pixel
    those are eight of the nine taps of a 3 x 3 kernel.

    Args:
      network: an Embedder.
      variables: its variables, as arrays or shapes.
      image_shape: (height, width, channels).

    Returns:
      Operations, two for each multiplication.
    """
    image = jax.ShapeDtypeStruct((1, *image_shape), np.float32)
    closed = jax.make_jaxpr(lambda v, x: network.apply(v, x, train=False))(variables, image)
    return list(_walk(closed.jaxpr))


def hoc_step_flops(forward: list[float]) -> float:
    """Count the operations of a HOC step for one image.

    They are the pass of the frozen network, the pass of the new one and its two gradients, without
    the gradient of the first layer's input.

    Args:
      forward: see `forward_flops`.
    """
    return 4 * sum(forward) - forward[0]


def _walk(jaxpr):
    for equation in jaxpr.eqns:
        if equation.primitive.name == "conv_general_dilated":
            yield _convolution(equation)
        elif equation.primitive.name == "dot_general":
            yield _matmul(equation)
        elif "branches" in equation.params:  # the last one is the form for accelerators
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
