"""What every measure is given, and the sides that are not ours."""

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from compat_jax.benchmarks.timing import Result, Timing
from compat_jax.benchmarks.work import Sizes
from compat_jax.interop.reference_speed import Unavailable, Worker


@dataclasses.dataclass(frozen=True)
class Context:
    """What every measure is given.

    Attributes:
      sizes: how much of everything.
      sizes_name: of them, for programs that are started.
      dtypes: of the computation.
      clone: folder of the reference; None without.
      variants: of PyTorch that are measured.
      worker: the process of the reference and of FAISS.
    """

    sizes: Sizes
    sizes_name: str
    dtypes: Sequence[str]
    clone: str | None
    variants: Sequence[str]
    worker: Worker


def reference_sides(
    context: Context, measure: str, **settings: Any
) -> tuple[dict[str, Callable[[], float]], list[Result]]:
    """The reference in all its variants.

    Args:
      context: with or without a clone.
      measure: "step" or "features".
      **settings: of that work.

    Returns:
      Functions that do a repetition and give its seconds, and a line for each variant that does not
      work here.
    """
    sides, refused = {}, []
    if context.clone is None:
        return sides, refused
    for variant in context.variants:
        name = f"torch {variant}"
        try:
            sides[name] = context.worker.prepare(
                f"{measure} {variant}", measure, variant=variant, **settings
            )
        except Unavailable as error:
            refused.append(Result(measure, name, float("nan"), "", note=f"not run: {error}"))
    return sides, refused


def program(context: Context, part: str, **environment: str) -> str:
    """What `launch.benchmark --part=...` prints, in a process of its own.

    Raises:
      Unavailable: it fails, e.g. because only one process may use the accelerator.
    """
    command = [sys.executable, "-m", "launch.benchmark", f"--part={part}"]
    done = subprocess.run(
        [*command, f"--sizes={context.sizes_name}"],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # most of a GPU's memory is taken by now
            **environment,
        },
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise Unavailable((done.stderr.strip().splitlines() or ["no word"])[-1][:200])
    return done.stdout


def best_reference(timings: Mapping[str, Timing]) -> Timing | None:
    """The fastest of PyTorch's variants; None without any."""
    ours = [timing for name, timing in timings.items() if name.startswith("torch")]
    return min(ours, key=lambda timing: timing.median, default=None)


def on_accelerator() -> bool:
    """Whether JAX computes on a GPU or TPU."""
    return jax.default_backend() != "cpu"
