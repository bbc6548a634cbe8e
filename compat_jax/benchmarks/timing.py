"""Repetitions, their median and spread, and the two sides by turns."""

import dataclasses
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp

_MATMUL_SIZE = {"cpu": 2048, "gpu": 8192, "tpu": 8192}


@dataclasses.dataclass(frozen=True)
class Result:
    """One line of the table.

    Attributes:
      measure: what was measured, a name in MEASURES.
      what: which side or part of it.
      value: median of the repetitions.
      unit: of the value.
      spread: half of what lies between the quartiles, as a share of the median; None for a count.
      repeats: how many repetitions.
      flops: needed operations a second; None where they are not the point.
      ratio: the number that the goal is about.
      goal: in words; None for a line that is only reported.
      met: whether the goal is met.
      note: what must be known to read the line.
    """

    measure: str
    what: str
    value: float
    unit: str
    spread: float | None = None
    repeats: int = 1
    flops: float | None = None
    ratio: float | None = None
    goal: str | None = None
    met: bool | None = None
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of repetitions: float each."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Half of what lies between the quartiles, as a share of the median."""
        if len(self.seconds) < 2:
            return 0.0
        first, _, third = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return (third - first) / 2 / self.median


def seconds_of(work: Callable[[], Any]) -> Callable[[], float]:
    """`work`, whose result is waited for, as a function that gives the seconds it took."""

    def timed():
        began = time.perf_counter()
        jax.block_until_ready(work())
        return time.perf_counter() - began

    return timed


def alternate(
    sides: Mapping[str, Callable[[], float]], repeats: int, warm_up: int = 2
) -> dict[str, Timing]:
    """Time several sides by turns, A B A B, so that drift of the machine touches all alike.

    Args:
      sides: functions that do one repetition and give its seconds.
      repeats: of each side.
      warm_up: repetitions before those.

    Returns:
      A Timing a side.
    """
    seconds = {name: [] for name in sides}
    for turn in range(warm_up + repeats):
        for name, side in sides.items():
            taken = side()
            if turn >= warm_up:
                seconds[name].append(taken)
    return {name: Timing(tuple(taken)) for name, taken in seconds.items()}


def matmul_flops(dtype: str, repeats: int = 7) -> float:
    """Operations a second of a large square matmul: what the device can do."""
    size = _MATMUL_SIZE[jax.default_backend()]
    factor = jnp.full((size, size), 1.0 / size, dtype)
    times = jax.jit(jnp.matmul)
    timing = alternate({"matmul": seconds_of(lambda: times(factor, factor))}, repeats)
    return 2 * size**3 / timing["matmul"].median


def machine() -> dict[str, Any]:
    """Hardware and versions, for the head of a table."""
    packages = ("jax", "jaxlib", "flax", "optax", "numpy", "torch", "faiss-cpu")
    device = jax.devices()[0]
    return {
        "device": f"{len(jax.devices())} x {device.device_kind} ({device.platform})",
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in packages},
    }


def _processor():
    try:
        with open("/proc/cpuinfo") as file:
            lines = file.read().splitlines()
    except OSError:
        return platform.processor()
    return next((x.partition(": ")[2] for x in lines if x.startswith("model name")), "unknown")


def _version(package):
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
