"""The settings of all measures, and the sides that run in other processes."""

import contextlib
import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from launch.benchmarks.timing import Result, Timing
from launch.benchmarks.work import Sizes
from launch.reference.clone_speed import Unavailable, Worker

# Of PyTorch without the reference. "best" is compiled, channels last, in bfloat16; compiling a network
# of real picture size takes minutes, so that it is compiled in this form only.
PHOTO_VARIANTS = ("eager", "channels_last", "bf16", "channels_last_bf16", "best")

Sides = dict[str, Callable[[], float]]


class Places(NamedTuple):
    """Folders and addresses that measures use.

    Attributes:
      clone: folder of a clone of the reference; None to measure our side only, and at real picture
        sizes beside torchvision.
      gallery_url: address of Qdrant to measure a gallery in as well, e.g. qdrant:http://localhost:6333;
        None for none.
      rates: file to write the measured rates of convolutions to; None for none.
    """

    clone: str | None = None
    gallery_url: str | None = None
    rates: str | None = None


NOWHERE = Places()


@dataclasses.dataclass(frozen=True)
class Context:
    """The settings of all measures.

    Attributes:
      sizes: sizes of the workloads.
      sizes_name: their name, for programs that a measure starts.
      dtypes: dtypes to compute in.
      variants: variants of PyTorch to measure.
      worker: the process that runs the reference and FAISS.
      photo_dtypes: dtypes to compute in at real picture sizes.
      photo_variants: variants of PyTorch to measure there.
      places: folders and addresses.
    """

    sizes: Sizes
    sizes_name: str
    dtypes: Sequence[str]
    variants: Sequence[str]
    worker: Worker
    photo_dtypes: Sequence[str] = ("float32",)
    photo_variants: Sequence[str] = PHOTO_VARIANTS
    places: Places = NOWHERE


def reference_sides(context: Context, measure: str, **settings: Any) -> tuple[Sides, list[Result]]:
    """Prepare the reference in all its variants.

    Args:
      context: the settings of all measures.
      measure: "step" or "features".
      **settings: arguments of that work.

    Returns:
      {name: function that does a repetition and returns its seconds}, empty without a clone; and a
      line for each variant that cannot run here.
    """
    sides, refused = {}, []
    if context.places.clone is None:
        return sides, refused
    for variant in context.variants:
        name = f"torch {variant}"
        try:
            sides[name] = context.worker.prepare(
                f"{measure} {variant}", measure, variant=variant, **settings
            )
        except Unavailable as error:
            refused.append(Result.not_run(measure, name, error))
    return sides, refused


@contextlib.contextmanager
def torch_sides(
    context: Context, measure: str, work: str, *, variants: Sequence[str], **settings: Any
) -> Iterator[tuple[Sides, list[Result]]]:
    """Prepare PyTorch's own form of a work, without the reference, in a process of its own.

    Args:
      context: the settings of all measures.
      measure: name of the measure.
      work: "step", "features" or "picture", see `torch_photos`.
      variants: variants of PyTorch.
      **settings: arguments of that work.

    Yields:
      {name: function that does a repetition and returns its seconds}, and a line for each variant
      that cannot run here; the process ends with the context.
    """
    sides, refused = {}, []
    if not variants:
        yield sides, refused
        return
    with contextlib.closing(Worker(program="launch.benchmarks.torch_photos")) as worker:
        for variant in variants:
            name = f"torch {variant}"
            try:
                sides[name] = worker.prepare(name, work, variant=variant, **settings)
            except Unavailable as error:
                refused.append(Result.not_run(measure, name, error))
        yield sides, refused


def program(context: Context, part: str, **environment: str) -> str:
    """Run `launch.benchmark --part=...` in a separate process and return its output.

    Args:
      context: the settings of all measures.
      part: value of --part.
      **environment: further environment variables.

    Raises:
      Unavailable: it fails, e.g. because only one process may use the accelerator.
    """
    command = [sys.executable, "-m", "launch.benchmark", f"--part={part}"]
    photos = context.sizes.photos
    done = subprocess.run(
        [
            *command,
            f"--sizes={context.sizes_name}",
            f"--size={photos.image}",
            f"--batch={photos.batch}",
        ],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # this process holds most of a GPU's memory
            **environment,
        },
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise Unavailable((done.stderr.strip().splitlines() or ["no message"])[-1][:200])
    return done.stdout


def best_reference(timings: Mapping[str, Timing]) -> Timing | None:
    """Return the timing of the fastest variant of PyTorch; None if there is none."""
    theirs = [timing for name, timing in timings.items() if name.startswith("torch")]
    return min(theirs, key=lambda timing: timing.median, default=None)


def on_accelerator() -> bool:
    """Return whether JAX computes on a GPU or TPU."""
    return jax.default_backend() != "cpu"
