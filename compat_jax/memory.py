"""Memory that a program needs, against what there is: an error in time instead of a killed process."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from compat_jax.errors import UserError

_CONTROL_GROUPS = Path("/sys/fs/cgroup")


def free_bytes(proc: Path = Path("/proc"), groups: Path = _CONTROL_GROUPS) -> int | None:
    """Return how much memory this process may still take, swap space included.

    Args:
      proc: where Linux says it of the machine.
      groups: where it says it of the container (control groups of version 2).

    Returns:
      Bytes; None where the system does not say.
    """
    try:
        lines = dict(line.split(":") for line in (proc / "meminfo").read_text().splitlines())
        kilobytes = (int(lines[name].split()[0]) for name in ("MemAvailable", "SwapFree"))
        free = 1024 * sum(kilobytes)
        own = (proc / "self/cgroup").read_text().rpartition("::/")[2].strip()
    except (OSError, ValueError, KeyError):
        return None
    with contextlib.suppress(OSError, ValueError):  # no limit reads "max"
        group = groups / own
        limit, used = (int((group / f"memory.{x}").read_text()) for x in ("max", "current"))
        cached = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        free = min(free, limit - used + int(cached.get("inactive_file", 0)))
    return free


def check(compiled: jax.stages.Compiled, devices: int, batch_size: int, free: int | None) -> None:
    """Refuse a training step that does not fit, before the system kills the program without a word.

    Args:
      compiled: the step.
      devices: that run it and share the memory.
      batch_size: of the step.
      free: bytes that may still be taken; None where nobody knows, which passes.

    Raises:
      UserError: with the batch size that should fit.
    """
    analysis: Any = compiled.memory_analysis()
    needed = analysis.temp_size_in_bytes * devices
    if free is None or needed <= free:
        return
    fits = int(0.8 * free / needed * batch_size)
    smaller = f"batch_size={1 << (fits.bit_length() - 1)}" if fits else "smaller pictures"
    raise UserError(
        f"a training step takes {_said(needed)} of scratch memory, and {_said(free)} are free: "
        f"{smaller} should fit, and remat='blocks' takes less",
        "batch_size",
    )


@contextlib.contextmanager
def shortage(remedy: str) -> Iterator[None]:
    """Turn a device's "out of memory" into one line.

    Args:
      remedy: what to do.

    Raises:
      UserError: the device had too little memory.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        said = str(error).splitlines()[0].partition("RESOURCE_EXHAUSTED: ")[2]
        raise UserError(
            f"the device's memory is full ({said:.200}): {remedy}", "batch_size"
        ) from error


def _said(count: int) -> str:
    return f"{count / 2**30:.1f} GB" if count >= 1 << 30 else f"{count / 2**20:.0f} MB"
