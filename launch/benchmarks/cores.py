"""Measures of one machine's cores and memory: several processes, several devices, rematerialisation."""

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from compat_jax import models
from launch.benchmarks.sides import Context, on_accelerator
from launch.benchmarks.timing import Result, alternate, peak_bytes, reset_peak
from launch.benchmarks.work import Sizes
from launch.reference.clone_speed import Unavailable, Worker

_PARTS = 2  # processes, or devices
_NAME = "work"
_PROGRAM, _TORCH = "launch.benchmarks.own_side", "launch.benchmarks.torch_photos"


class _Work(NamedTuple):
    kind: str
    sizes: Sizes
    dtype: str

    def settings(self, parts: int = 1) -> dict[str, Any]:
        """The sizes of this work, or of a part of its pictures."""
        names = ("backbone", "image", "batch", "num_prototypes", "feature_batch")
        return {
            **{name: getattr(self.sizes, name) for name in names},
            "features": max(self.sizes.features // parts, 1),
            "dtype": self.dtype,
        }

    @property
    def images(self) -> int:
        """Of a repetition."""
        whole = max(self.sizes.features // _PARTS, 1) * _PARTS
        return self.sizes.batch if self.kind == "step" else whole

    def __str__(self):
        return f"{self.kind}, {self.sizes.backbone}, {self.sizes.image} px, {self.dtype}"


def processes(context: Context) -> Iterator[Result]:
    """Measure features and a step on all cores: by one process, by two with half of them each, by two
    devices of one process.
    """
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if on_accelerator() or len(cores) < _PARTS:
        yield Result.not_run("processes", "", "only on a CPU of two or more cores, on Linux")
        return
    for one in _works(context):
        with contextlib.ExitStack() as stack:
            try:
                sides = _sides(one, cores, stack)
            except Unavailable as error:
                yield Result.not_run("processes", str(one), error)
                continue
            timings = alternate(sides, context.sizes.photos.repeats)
        alone = timings["one process"].median
        for name, timing in timings.items():
            yield Result.of(
                "processes",
                f"{one}: {name}",
                timing,
                value=one.images / timing.median,
                unit="images/s",
                ratio=alone / timing.median,
                note="" if name == "one process" else "ratio to the rate of one process",
            )


def _works(context):
    small, real = context.sizes, context.sizes.of_photos()
    real = dataclasses.replace(real, features=real.photos.features, feature_batch=real.batch)
    for sizes, dtype in ((small, context.dtypes[0]), (real, context.photo_dtypes[-1])):
        yield _Work("features", sizes, dtype)
    yield _Work("step", small, context.dtypes[0])


def _sides(one: _Work, cores: Sequence[int], stack) -> dict[str, Callable[[], float]]:
    def started(count, **options):
        workers = [
            stack.enter_context(
                contextlib.closing(
                    Worker(program=_PROGRAM, **{k: v[i] for k, v in options.items()})
                )
            )
            for i in range(count)
        ]
        for worker in workers:
            worker.prepare(_NAME, one.kind, **one.settings(count))
        return _together(workers)

    devices = {"JAX_NUM_CPU_DEVICES": str(_PARTS)}
    sides = {
        "one process": started(1),
        f"one process, {_PARTS} devices": started(1, environment=[devices]),
    }
    if one.kind == "features":  # a training on several hosts is one program on all of them
        shares = [cores[i::_PARTS] for i in range(_PARTS)]
        sides[f"{_PARTS} processes, a share of the cores each"] = started(_PARTS, cores=shares)
    return sides


def _together(workers):
    """A function that lets all workers do a repetition at once and returns the seconds."""

    def repeat():
        began = time.perf_counter()
        for worker in workers:
            worker.send(repeat=_NAME)
        for worker in workers:
            worker.receive()
        return time.perf_counter() - began

    return repeat


def step_memory(context: Context) -> Iterator[Result]:
    """Measure peak memory and time of a training step by what its backward pass computes again."""
    if on_accelerator():
        yield Result.not_run("step_memory", "", "memory of the device is what launch.plan tells")
        return
    sizes, dtype = context.sizes.of_photos(), context.photo_dtypes[-1]
    ours = _Work("step", sizes, dtype).settings()
    torch = {name: ours[name] for name in ("backbone", "image", "batch", "num_prototypes")}
    sides = {
        f"jax {dtype}, remat={remat}": (_PROGRAM, {**ours, "remat": remat})
        for remat in models.REMAT
    } | {
        f"torch {variant}": (_TORCH, {**torch, "variant": variant})
        for variant in context.photo_variants
        if variant in ("eager", "channels_last_bf16")
    }
    first = 0.0
    for name, (program, settings) in sides.items():
        try:
            peak, seconds = _peak(program, settings, repeats=context.sizes.photos.repeats)
        except (Unavailable, OSError) as error:
            yield Result.not_run("step_memory", name, error)
            continue
        first = first or peak
        yield Result(
            measure="step_memory",
            what=f"{name}, {sizes.backbone}, {sizes.image} px, batch {sizes.batch}",
            value=peak / 1e6,
            unit="MB",
            ratio=peak / first,
            repeats=context.sizes.photos.repeats,
            note=f"peak of the process while it steps, {1e3 * seconds:.0f} ms a step",
        )


def _peak(program: str, settings: Mapping[str, Any], *, repeats: int) -> tuple[float, float]:
    """The peak memory of a process in bytes, and the median of its steps in seconds."""
    with contextlib.closing(Worker(program=program)) as worker:
        step = worker.prepare(_NAME, "step", **settings)
        step()
        reset_peak(worker.pid)  # what compiling took
        timing = alternate({_NAME: step}, repeats, 0)[_NAME]
        return peak_bytes(worker.pid), timing.median
