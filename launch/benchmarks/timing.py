"""Time repetitions, alternating between the sides; median and spread."""

import dataclasses
import math
import os
import platform
import re
import resource
import statistics
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

_MATMUL_SIZE = {"cpu": 2048, "gpu": 8192, "tpu": 8192}


@dataclasses.dataclass(frozen=True)
class Growth:
    """How a time or a memory grows with something.

    Attributes:
      of: what grows, e.g. "images".
      what: "time", in seconds, or "memory", in bytes.
      points: (how many, how much) of each measured point, from few to many; at least two.
    """

    of: str
    what: str
    points: tuple[tuple[float, float], ...]

    @property
    def fitted(self) -> float:
        """Exponent of the power law through all points, by least squares of the logarithms."""
        counts, values = ([math.log(n) for n in part] for part in zip(*self.points, strict=True))
        return statistics.linear_regression(counts, values).slope

    @property
    def last(self) -> float:
        """Exponent between the last two points, where fixed costs weigh least."""
        return dataclasses.replace(self, points=self.points[-2:]).fitted


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """One line of the table.

    Attributes:
      measure: a name in MEASURES.
      what: the side or the part that was measured.
      value: median of the repetitions; NaN if the measure could not run.
      unit: unit of the value.
      spread: half the interquartile range as a share of the median; None for a count.
      repeats: number of repetitions.
      flops: required operations divided by the time; None if there are none to count.
      ratio: the number that the goal limits.
      goal: the goal in words; None if the line is only reported.
      met: True if the goal is met; None if there is none.
      note: remark on how to read the line.
      growth: the points behind an exponent; None for all other lines.
    """

    measure: str
    what: str
    value: float
    unit: str = ""
    spread: float | None = None
    repeats: int = 1
    flops: float | None = None
    ratio: float | None = None
    goal: str | None = None
    met: bool | None = None
    note: str = ""
    growth: Growth | None = None

    @classmethod
    def of(cls, measure: str, what: str, timing: "Timing", **fields: Any) -> "Result":
        """Make a line of a timing, whose median is the value unless `fields` has another."""
        measured = {"value": timing.median, "unit": "s"}
        repeated = {"spread": timing.spread, "repeats": len(timing.seconds)}
        return cls(measure=measure, what=what, **{**measured, **repeated, **fields})

    @classmethod
    def not_run(cls, measure: str, what: str, reason: object) -> "Result":
        """Make the line of a measure that could not run."""
        return cls(measure=measure, what=what, value=math.nan, note=f"not run: {reason}")


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of each repetition."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median, in seconds."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Half the interquartile range, as a share of the median."""
        if len(self.seconds) < 2:
            return 0.0
        first, _, third = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return (third - first) / 2 / self.median


def seconds_of(work: Callable[[], Any]) -> Callable[[], float]:
    """Return a function that does `work`, waits for its result and returns the seconds."""

    def timed():
        began = time.perf_counter()
        jax.block_until_ready(work())
        return time.perf_counter() - began

    return timed


def alternate(
    sides: Mapping[str, Callable[[], float]], repeats: int, warm_up: int = 2, settle: bool = False
) -> dict[str, Timing]:
    """Time several sides alternately, A B A B, so that drift of the machine affects all equally.

    While one side works, another's caches go cold, and a virtual machine may hand memory that it gave
    back to the host, from where it returns slowly. Work that follows on itself, such as training, meets
    neither: with `settle` each turn begins with a repetition that is not counted.

    Args:
      sides: functions that do one repetition and return its seconds, by name.
      repeats: timed repetitions of each side.
      warm_up: repetitions before those.
      settle: whether a turn begins with one more, not timed.

    Returns:
      {name: Timing}.
    """
    seconds = {name: [] for name in sides}
    for turn in range(warm_up + repeats):
        for name, side in sides.items():
            if settle and turn >= warm_up:
                side()
            taken = side()
            if turn >= warm_up:
                seconds[name].append(taken)
    return {name: Timing(tuple(taken)) for name, taken in seconds.items()}


def matmul_flops(dtype: str, repeats: int = 7) -> float:
    """Measure the operations a second of a large square matmul, as a bound of the device."""
    size = _MATMUL_SIZE[jax.default_backend()]
    factor = jnp.full((size, size), 1.0 / size, dtype)
    times = jax.jit(jnp.matmul)
    timing = alternate({"matmul": seconds_of(lambda: times(factor, factor))}, repeats)
    return 2 * size**3 / timing["matmul"].median


def reset_peak(process: int) -> None:
    """Let the peak memory of a process begin anew, from what it holds now.

    Args:
      process: its number.

    Raises:
      OSError: not on Linux, or the process is another user's.
    """
    Path(f"/proc/{process}/clear_refs").write_text("5")


def peak_bytes(process: int | None = None) -> int:
    """Return the peak resident memory of a process in bytes.

    On Linux not from getrusage, which starts from the peak of the parent process.

    Args:
      process: its number; None for this one, the only one elsewhere.
    """
    status = Path(f"/proc/{process or 'self'}/status")
    if status.exists():
        return 1024 * int(re.search(r"VmHWM:\s*(\d+) kB", status.read_text())[1])
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def resident_bytes() -> tuple[int, int] | None:
    """Return the resident memory of this process, and how much of it are pages of files, in bytes.

    None where the system does not tell them apart (all but Linux).
    """
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    found = dict(re.findall(r"(VmRSS|RssFile):\s*(\d+) kB", status.read_text()))
    return 1024 * int(found["VmRSS"]), 1024 * int(found["RssFile"])


def machine() -> dict[str, Any]:
    """Describe the hardware and the versions, for the head of the table."""
    packages = (
        "jax",
        "jaxlib",
        "flax",
        "optax",
        "numpy",
        "grain",
        "pillow",
        "torch",
        "torchvision",
        "faiss-cpu",
        "lancedb",
        "qdrant-edge-py",
    )
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
