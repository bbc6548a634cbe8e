"""Which form of a convolution is fastest in which pass on CPU, by measured times.

`rates.json` beside this module has the milliseconds of every form and pass for the convolutions of a
ResNet-50 at 224 pixels in bfloat16; in float32 the forms that are faster one by one made a whole step no
faster. `python -m launch.benchmark --only=forms --rates=FILE` measures them anew on
another processor; with $COMPAT_JAX_RATES=FILE they are read from there.
"""

import functools
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jax.typing import DTypeLike

from compat_jax.errors import UserError
from compat_jax.models.forms import Geometry, Passes
from compat_jax.models.passes import FORWARD, OF_INPUTS, OF_KERNEL

VARIABLE = "COMPAT_JAX_RATES"
# Smaller maps take the form that `conv.cpu_form` has by rule, unless that very side was measured.
SMALLEST = 13
_FARTHEST = 1.0  # octaves between a shape and the measured one, in each of side and channels


class Measured(NamedTuple):
    """A convolution that was measured.

    Attributes:
      dtype: name of the type.
      side: of the map.
      inputs: channels.
      outputs: channels.
      kernel: side of the kernel.
      stride: step.
      milliseconds: {pass: {form: time}}.
    """

    dtype: str
    side: int
    inputs: int
    outputs: int
    kernel: int
    stride: int
    milliseconds: Mapping[str, Mapping[str, float]]


def fastest(
    shape: tuple[int, ...], kernel_shape: tuple[int, ...], geometry: Geometry, dtype: DTypeLike
) -> Passes | None:
    """Return the fastest form of each pass, by the nearest convolution that was measured.

    Args:
      shape: (batch, height, width, in_channels).
      kernel_shape: (size, size, in_channels, out_channels).
      geometry: stride, padding and groups.
      dtype: of the computation.

    Returns:
      None where nothing near was measured: another kernel, stride, padding or type, groups, a map that
      is not square or smaller than `SMALLEST` and than all measured ones, or channels of another order
      of magnitude; and where the platform's own form is the fastest in all passes.
    """
    size, stride = kernel_shape[0], geometry.stride
    if geometry.groups > 1 or shape[1] != shape[2] or geometry.padding != (size - 1) // 2:
        return None
    wanted = (shape[1], *kernel_shape[2:])
    near = [
        (distance, one)
        for one in measured(os.environ.get(VARIABLE))
        if (one.dtype, one.kernel, one.stride) == (np.dtype(dtype).name, size, stride)
        and (wanted[0] >= SMALLEST or wanted[0] == one.side)
        and (distance := _octaves(wanted, (one.side, one.inputs, one.outputs))) is not None
    ]
    if not near:
        return None
    times = min(near, key=lambda pair: pair[0])[1].milliseconds
    found = Passes(*(min(times[name], key=times[name].__getitem__) for name in Passes._fields))
    return None if set(found) == {"native"} else found


def _octaves(wanted: tuple[int, ...], measured: tuple[int, ...]) -> float | None:
    """Return how far two shapes lie apart; None for too far."""
    apart = [abs(math.log2(a / b)) for a, b in zip(wanted, measured, strict=True)]
    return sum(apart) if max(apart) <= _FARTHEST else None


@functools.cache
def measured(path: str | None = None) -> tuple[Measured, ...]:
    """Read a table of rates.

    Args:
      path: of the file; None for the one of this package.

    Raises:
      UserError: a file that cannot be read, or is no such table.
    """
    file = Path(path) if path else Path(__file__).with_name("rates.json")
    try:
        return tuple(_row(each) for each in json.loads(file.read_text())["shapes"])
    except OSError as error:
        raise UserError(f"{VARIABLE}: {file} cannot be read ({error.strerror or error})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{VARIABLE}: {file} is no table that launch.benchmark --rates wrote ({error!r:.80})"
        ) from error


def dumped(rows: Iterable[Measured], **facts: Any) -> str:
    """Return a table of rates as the JSON text that `measured` reads, a line a row.

    Args:
      rows: what was measured.
      **facts: on what; for people.
    """
    lines = [json.dumps(_content(row)) for row in rows]
    head = ",\n".join(f" {json.dumps(name)}: {json.dumps(fact)}" for name, fact in facts.items())
    return "{\n" + head + ',\n "shapes": [\n  ' + ",\n  ".join(lines) + "\n ]\n}\n"


def _content(row: Measured) -> dict[str, Any]:
    shape = {name: value for name, value in row._asdict().items() if name != "milliseconds"}
    return {**shape, **row.milliseconds}


def _row(content: Mapping[str, Any]) -> Measured:
    times = {name: dict(content[name]) for name in Passes._fields}
    known = {"forward": set(FORWARD), "of_inputs": set(OF_INPUTS), "of_kernel": set(OF_KERNEL)}
    for name in Passes._fields:
        if not times[name] or not set(times[name]) <= known[name]:
            raise ValueError(f"forms {sorted(times[name])} of {name}")
    shape = {name: content[name] for name in Measured._fields[1:-1]}
    if not all(type(number) is int and number > 0 for number in shape.values()):
        raise ValueError(f"shape {shape}")
    return Measured(dtype=content["dtype"], milliseconds=times, **shape)
