"""Memory that a program needs, against what there is: an error in time instead of a killed process."""

import contextlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import jax
from jax.sharding import Mesh

from compat_jax.errors import UserError

_CONTROL_GROUPS = Path("/sys/fs/cgroup")
_SPARE = 0.8  # gradients do not shrink with the batch


def free_bytes(proc: Path = Path("/proc"), groups: Path = _CONTROL_GROUPS) -> int | None:
    """Return how much memory this process may still take, swap space included.

    Args:
      proc: where Linux says it of the machine.
      groups: where it says it of containers: control groups, of version 1 or 2.

    Returns:
      Bytes, the least of the machine's and of those of every group around the process; what the kernel
      keeps of files counts as free. None where the system does not say.
    """
    try:
        lines = dict(line.split(":") for line in (proc / "meminfo").read_text().splitlines())
        free = 1024 * sum(int(lines[name].split()[0]) for name in ("MemAvailable", "SwapFree"))
    except (OSError, ValueError, KeyError):
        return None
    for group in _groups(proc / "self" / "cgroup", groups):
        for limit, used in (("max", "current"), ("limit_in_bytes", "usage_in_bytes")):
            with contextlib.suppress(OSError, ValueError):  # no such file, or the limit reads "max"
                most, taken = (int((group / f"memory.{x}").read_text()) for x in (limit, used))
                free = min(free, most - taken + _kept(group))
    return free


def _groups(table: Path, root: Path) -> Iterator[Path]:
    """The folders of the control groups that a process is in, up to the root."""
    try:
        lines = table.read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        _, kinds, own = line.split(":", 2)
        if not kinds or "memory" in kinds.split(","):
            base = root / "memory" if kinds else root
            for part in PurePosixPath(own.lstrip("/") or ".", "x").parents:
                yield base / part


def _kept(group: Path) -> int:
    """The bytes of a group that the kernel gives back when asked: what it keeps of files."""
    found = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    own = "total_" if "total_active_file" in found else ""
    names = (f"{own}active_file", f"{own}inactive_file", "slab_reclaimable")
    return sum(int(found.get(name, 0)) for name in names)


def check(
    compiled: jax.stages.Compiled, mesh: Mesh, batch_size: int, free: int | None, remat: str
) -> None:
    """Refuse a training step that does not fit, before the system kills the program without a word.

    Args:
      compiled: the step.
      mesh: devices that run it and share the memory.
      batch_size: of the step.
      free: bytes that may still be taken; None where nobody knows, which passes.
      remat: see `Run`.

    Raises:
      UserError: with a batch size to try, a power of two times the size of the data axis.
    """
    analysis: Any = compiled.memory_analysis()
    needed = analysis.temp_size_in_bytes * mesh.size
    if free is None or needed <= free:
        return
    fits = int(_SPARE * free / needed * batch_size / mesh.shape["data"])
    less = [f"batch_size={mesh.shape['data'] << (fits.bit_length() - 1)}"] if fits else []
    less += ["smaller pictures"] + ["remat='blocks'"] * (remat == "none")
    raise UserError(
        f"a training step takes {_said(needed)} of scratch memory, and {_said(free)} are free: try "
        f"{' or '.join(less)}",
        "batch_size",
    )


@contextlib.contextmanager
def shortage(remedy: str, argument: str = "batch_size") -> Iterator[None]:
    """Turn a device's "out of memory" into one line.

    Args:
      remedy: what to do.
      argument: of the error.

    Raises:
      UserError: the device had too little memory.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        said = str(error).splitlines()[0].partition("RESOURCE_EXHAUSTED: ")[2]
        raise UserError(f"the device's memory is full ({said:.200}): {remedy}", argument) from error


def _said(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
