"""Measures of growth: time and memory when something becomes ten times as large."""

import dataclasses
import json
import math
import re
import resource
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp

from compat_jax import evaluation, losses
from compat_jax.benchmarks import retrieval, work
from compat_jax.benchmarks.sides import Context, program
from compat_jax.benchmarks.timing import Result, alternate, seconds_of
from compat_jax.chain import Chain
from compat_jax.data.tasks import TaskSequence
from compat_jax.train import loop
from compat_jax.train.progress import Progress

KINDS = ("classes", "images", "versions")
# Scratch and results, in arrays of the features' size: two passes, each with one or two.
_ARRAYS = 6


def large_k(context: Context) -> Iterator[Result]:
    """Logits, cross-entropy and gradient for ever more prototypes."""
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
        yield Result(
            "large_k",
            f"K = {count}",
            1e3 * timing.median,
            "ms",
            timing.spread,
            len(timing.seconds),
            None,
            arrays,
            f"at most {_ARRAYS} arrays of the features' size",
            arrays <= _ARRAYS,
            "compiled memory analysis: scratch and results",
        )
    for what, values, unit in (("time", seconds, "s"), ("memory", needed, "bytes")):
        # Of smaller ones everything fits into the caches.
        name = f"{what}, last step of K"
        yield _exponent("large_k", name, values[-2:], counts[-1] / counts[-2], unit)


def _exponent(measure, what, values, factor, unit):
    grown = math.log(values[-1] / values[0]) / math.log(factor)
    return Result(
        measure,
        what,
        values[-1],
        unit,
        ratio=grown,
        goal="exponent at most 1.05",
        met=grown <= 1.05,
    )


def scaling(context: Context) -> Iterator[Result]:
    """Time and peak memory when classes, images or versions become ten times as many."""
    for kind in KINDS:
        small, large = (_in_a_program(context, kind, factor) for factor in (1, 10))
        for what, unit in (("seconds", "s"), ("bytes", "bytes")):
            values = [small[what], large[what]]
            yield _exponent("scaling", f"{kind} x 10, {what}", values, 10, unit)


def _in_a_program(context, kind, factor):
    """Peak memory only ever grows within a program: each point has its own."""
    return json.loads(program(context, f"{kind}:{factor}").splitlines()[-1])


def one_point(sizes: work.Sizes, kind: str, factor: int) -> dict[str, float]:
    """What a program that `scaling` starts does.

    Args:
      sizes: of the small side.
      kind: one of KINDS.
      factor: 1 or 10.

    Returns:
      {"seconds": of an epoch or an evaluation, "bytes": peak memory beyond that of the start}.
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
    before = _peak()
    return {"seconds": action(), "bytes": max(_peak() - before, 1)}


def _peak():
    """Bytes; on Linux those of this program, where getrusage starts from its parent's."""
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * int(re.search(r"VmHWM:\s*(\d+) kB", status.read_text())[1])
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


_SMALL = {"backbone": "resnet_small", "image": 8}


def _epoch(sizes, classes, images):
    small = dataclasses.replace(sizes, num_prototypes=max(2 * classes, 16), **_SMALL)

    def action():
        data = work.dataset(classes, images // classes, small.image)
        run = work.run(small, "hoc", "float32", TaskSequence(classes, classes, 1), 5)
        with tempfile.TemporaryDirectory() as folder:
            log = Path(folder) / "log"
            loop.train(
                run, data, Chain(f"{folder}/c"), Progress(f"{folder}/p"), work.mesh(), log=log
            )
            rates = [json.loads(line)["images_per_second"] for line in log.read_text().splitlines()]
        return len(data) // small.batch * small.batch / statistics.median(rates[1:])

    return action


def _evaluation(sizes, count):
    data = [
        work.dataset(10, max(n // 10, 1), sizes.image, seed)
        for seed, n in enumerate(sizes.evaluated)
    ]
    chain = retrieval.Versions(count, retrieval.version(sizes))

    def action():
        evaluation.evaluate(retrieval.Versions(1, chain.frozen), *data, mesh=work.mesh())
        began = time.perf_counter()
        evaluation.evaluate(chain, *data, mesh=work.mesh())
        return time.perf_counter() - began

    return action
