"""Measures of growth: time and memory as something becomes ten times as large."""

import dataclasses
import json
import math
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp

from compat_jax import Session, Tasks, evaluate, losses, train
from launch.benchmarks import retrieval, work
from launch.benchmarks.sides import Context, program
from launch.benchmarks.timing import Result, alternate, peak_bytes, seconds_of

KINDS = ("classes", "images", "versions")
# Memory that cross-entropy may take, in arrays of the features' size: two passes, one or two each.
_ARRAYS = 6


def large_k(context: Context) -> Iterator[Result]:
    """Measure cross-entropy and its gradient for growing numbers of prototypes."""
    batch, counts = context.sizes.batch, context.sizes.large_k
    seconds, needed = [], []
    function = jax.jit(
        jax.value_and_grad(lambda f, rows: losses.simplex_cross_entropy(f, rows).mean())
    )
    for count in counts:
        features = jnp.ones((batch, count - 1)) * jnp.linspace(0.0, 1.0, batch)[:, None]
        rows = jnp.arange(batch) % count
        compiled = function.lower(features, rows).compile()
        memory = compiled.memory_analysis()
        needed.append(memory.temp_size_in_bytes + memory.output_size_in_bytes)
        work_of = seconds_of(lambda: compiled(features, rows))  # noqa: B023
        timing = alternate({"": work_of}, context.sizes.repeats)[""]
        seconds.append(timing.median)
        arrays = needed[-1] / (4 * batch * count)
        yield Result.of(
            "large_k",
            f"K = {count}",
            timing,
            value=1e3 * timing.median,
            unit="ms",
            ratio=arrays,
            goal=f"at most {_ARRAYS} arrays of the features' size",
            met=arrays <= _ARRAYS,
            note="memory of scratch and results, as compiled",
        )
    # Smaller ones fit into the caches, so that their times grow faster.
    factor = counts[-1] / counts[-2]
    for what, values, unit in (("time", seconds, "s"), ("memory", needed, "bytes")):
        name = f"{what}, K = {counts[-2]} to {counts[-1]}"
        yield _exponent("large_k", name, values[-2:], factor=factor, unit=unit)


def _exponent(measure, what, values, *, factor, unit):
    grown = math.log(values[-1] / values[0]) / math.log(factor)
    return Result(
        measure=measure,
        what=what,
        value=values[-1],
        unit=unit,
        ratio=grown,
        goal="exponent at most 1.05",
        met=grown <= 1.05,
    )


def scaling(context: Context) -> Iterator[Result]:
    """Measure time and peak memory for ten times as many classes, images or versions."""
    for kind in KINDS:
        small, large = (_in_a_program(context, kind, factor) for factor in (1, 10))
        for what, unit in (("seconds", "s"), ("bytes", "bytes")):
            values = [small[what], large[what]]
            yield _exponent("scaling", f"{kind} x 10, {what}", values, factor=10, unit=unit)


def _in_a_program(context, kind, factor):
    """Measure a point in a process of its own, because the peak memory of a process never falls."""
    return json.loads(program(context, f"{kind}:{factor}").splitlines()[-1])


def one_point(sizes: work.Sizes, kind: str, factor: int) -> dict[str, float]:
    """Measure one point of `scaling`, in a process that `scaling` starts.

    Args:
      sizes: sizes of the small side.
      kind: what grows, one of KINDS.
      factor: 1 or 10.

    Returns:
      {"seconds": time of an epoch or an evaluation, "bytes": growth of the peak memory}.
    """
    classes, images, versions = sizes.scaling
    if kind == "versions":
        action = _evaluation(sizes, versions * factor)
    else:
        action = _epoch(
            sizes,
            classes * (factor if kind == "classes" else 1),
            images * (factor if kind == "images" else 1),
        )
    before = peak_bytes()
    return {"seconds": action(), "bytes": max(peak_bytes() - before, 1)}


_SMALL = {"backbone": "resnet_small", "image": 8}


def _epoch(sizes, classes, images):
    small = dataclasses.replace(sizes, num_prototypes=max(2 * classes, 16), **_SMALL)

    def action():
        data = work.dataset(classes, images // classes, small.image)
        run = work.run(small, Tasks(initial=classes), 5)
        with tempfile.TemporaryDirectory() as folder:
            train(run, data, folder, session=Session(mesh=work.mesh()))
            log = (Path(folder) / "log.jsonl").read_text().splitlines()
            rates = [json.loads(line)["images_per_second"] for line in log]
        return len(data) // small.batch * small.batch / statistics.median(rates[1:])

    return action


def _evaluation(sizes, count):
    data = [
        work.dataset(10, max(n // 10, 1), sizes.image, seed=seed)
        for seed, n in enumerate(sizes.evaluated)
    ]
    chain, session = retrieval.Versions(count, work.version(sizes)), Session(mesh=work.mesh())

    def action():
        evaluate(retrieval.Versions(1, chain.frozen), *data, session=session)
        began = time.perf_counter()
        evaluate(chain, *data, session=session)
        return time.perf_counter() - began

    return action
