"""Count the FLOP of the matrix products and convolutions of a compiled program."""

import json
import re
from collections.abc import Mapping

import numpy as np

from compat_jax.hlo.text import Array, Computation, Instruction, Module

# cuDNN's and cuBLAS's names, as XLA:GPU calls them.
_FORWARD = ("__cudnn$convForward", "__cudnn$convBiasActivationForward", "__cudnn$convForwardGraph")
_MATMULS = ("__cublas$gemm", "__cublas$lt$matmul", "__cublas$lt$matmul$f8")


def count(module: Module, computation: Computation, instruction: Instruction) -> dict[str, float]:
    """Count the FLOP of an instruction, with those of the computations that it fuses.

    A multiplication and its addition are two. Elementwise work and reductions are not counted: what
    they take is their memory traffic. Products with the zeros of padding and dilation are not
    counted, because they need not be computed.

    Args:
      module: the program.
      computation: that the instruction belongs to.
      instruction: of any kind.

    Returns:
      {type of the factors: FLOP}; "f32!" is float32 that was asked for at its full precision.
    """
    inputs = [_result(computation, name) for name in instruction.operands]
    flops = _own(instruction, inputs)
    if flops:
        kind = inputs[0].element
        precise = "operand_precision={highest" in instruction.attributes
        return {kind + "!" * (kind == "f32" and precise): flops}
    total: dict[str, float] = {}
    for name in instruction.called if instruction.fuses else ():
        fused = module.computations[name]
        for inner in fused.instructions.values():
            add(total, count(module, fused, inner))
    return total


def add(total: dict[str, float], flops: Mapping[str, float], times: int = 1) -> None:
    """Add FLOP to a total, type by type."""
    for kind, number in flops.items():
        total[kind] = total.get(kind, 0.0) + times * number


def _result(computation, name):
    instruction = computation.instructions.get(name)
    if instruction is None or not instruction.arrays:
        return Array("token", ())
    return instruction.arrays[0]


def _own(instruction, inputs):
    opcode, target, arrays = instruction.opcode, instruction.target, instruction.arrays
    if opcode == "dot":
        axes = _axes(instruction.attributes, "lhs_contracting_dims")
        return _matmul(arrays[0], inputs[0], axes)
    if opcode == "convolution" or target in _FORWARD:
        return _convolution(instruction.attributes, inputs[0], inputs[1], out=arrays[0])
    if target == "__cudnn$convBackwardInput":
        return _convolution(instruction.attributes, arrays[0], inputs[1], out=inputs[0])
    if target == "__cudnn$convBackwardFilter":
        return _convolution(instruction.attributes, inputs[0], arrays[0], out=inputs[1])
    if target in _MATMULS:
        found = re.search(r"backend_config=(\{.*\})", instruction.attributes)
        settings = json.loads(found[1])["gemm_backend_config"] if found else {}
        axes = settings.get("dot_dimension_numbers", {}).get("lhs_contracting_dimensions", [])
        return _matmul(arrays[0], inputs[0], [int(axis) for axis in axes])
    return 0.0


def _axes(attributes, name):
    found = re.search(rf"{name}=\{{([\d,]*)\}}", attributes)
    return [int(axis) for axis in found[1].split(",") if axis] if found else []


def _matmul(out, left, axes):
    return 2.0 * out.elements * float(np.prod([left.dimensions[axis] for axis in axes]))


def _convolution(attributes, inputs, kernel, out):
    """Count a convolution's FLOP from its dimension labels, e.g. b01f_01io->b01f, and its window."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", attributes)
    if not labels:
        return 0.0
    sizes = [
        dict(zip(names, array.dimensions, strict=True))
        for names, array in zip(labels.groups(), (inputs, kernel, out), strict=True)
    ]
    found = re.search(r"window=\{([^}]*)\}", attributes)
    window = dict(part.split("=") for part in found[1].split()) if found else {}
    spatial = sorted(label for label in sizes[0] if label.isdigit())
    total = 2.0 * sizes[0]["b"] * sizes[0]["f"] * sizes[1]["o"]
    for name in ("feature_group_count", "batch_group_count"):
        groups = re.search(rf"\b{name}=(\d+)", attributes)
        total /= int(groups[1]) if groups else 1
    for place, axis in enumerate(spatial):
        total *= _products([size[axis] for size in sizes], _along(window, place))
    return total


def _along(window, place):
    """Return stride, padding and dilations of a window along one axis."""

    def number(name, default):
        return int(window[name].split("x")[place]) if name in window else default

    pad = window["pad"].split("x")[place].split("_")[0] if "pad" in window else "0"
    return number("stride", 1), int(pad), number("lhs_dilate", 1), number("rhs_dilate", 1)


def _products(sizes, window):
    """Count the pairs of output position and tap along one axis that meet an element of the input."""
    size, taps, positions = sizes
    stride, padding, dilation, spread = window
    at = np.arange(positions)[:, None] * stride - padding + np.arange(taps) * spread
    inside = (at >= 0) & (at <= (size - 1) * dilation) & (at % dilation == 0)
    return int(inside.sum())
