"""Measures of growth: time and memory as something becomes ten and a hundred times as large."""

import dataclasses
import functools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from compat_jax import Session, Tasks, evaluate, losses, train
from compat_jax.retrieval import search
from launch.benchmarks import retrieval, work
from launch.benchmarks.sides import Context, program
from launch.benchmarks.timing import Growth, Result, Timing, alternate, peak_bytes, seconds_of

KINDS = ("images", "classes", "versions", "prototypes", "gallery_rows")
FACTORS = (1, 10, 100)
LIMIT = 1.05
# Memory that cross-entropy may take, in arrays of the features' size: two passes, one or two each.
_ARRAYS = 6
_REPEATED = 2.0  # seconds for which short actions are repeated, at most five times


class Loss(NamedTuple):
    """Time and memory, in bytes, of cross-entropy and its gradient over `count` prototypes."""

    count: int
    timing: Timing
    memory: int


def large_k(context: Context) -> Iterator[Result]:
    """Measure cross-entropy and its gradient for growing numbers of prototypes."""
    for loss in _losses_of(context.sizes):
        arrays = loss.memory / (4 * context.sizes.batch * loss.count)
        yield Result.of(
            "large_k",
            f"K = {loss.count}",
            loss.timing,
            value=1e3 * loss.timing.median,
            unit="ms",
            ratio=arrays,
            goal=f"at most {_ARRAYS} arrays of the features' size",
            met=arrays <= _ARRAYS,
            note="memory of scratch and results, as compiled",
        )


def _losses_of(sizes):
    return _losses(sizes.batch, sizes.large_k, sizes.repeats)


@functools.lru_cache  # of `large_k` and `scaling`, which show the same numbers
def _losses(batch, counts, repeats):
    function = jax.jit(
        jax.value_and_grad(lambda f, rows: losses.simplex_cross_entropy(f, rows).mean())
    )
    found = []
    for count in counts:
        features = jnp.ones((batch, count - 1)) * jnp.linspace(0.0, 1.0, batch)[:, None]
        rows = jnp.arange(batch) % count
        compiled = function.lower(features, rows).compile()
        memory = compiled.memory_analysis()
        work_of = seconds_of(lambda: compiled(features, rows))  # noqa: B023
        timing = alternate({"": work_of}, repeats)[""]
        found.append(Loss(count, timing, memory.temp_size_in_bytes + memory.output_size_in_bytes))
    return tuple(found)


def scaling(context: Context) -> Iterator[Result]:
    """Measure time and memory over two decades of images, classes, versions, K and gallery rows.

    Each point but those of the loss is measured in a process of its own, because the peak memory of a
    process never falls.
    """
    for kind in KINDS:
        if kind == "prototypes":
            points = [
                {"count": loss.count, "time": loss.timing.median, "memory": loss.memory}
                for loss in _losses_of(context.sizes)[-len(FACTORS) :]
            ]
        else:
            points = [
                json.loads(program(context, f"{kind}:{factor}").splitlines()[-1])
                for factor in FACTORS
            ]
        for what in ("time", "memory"):
            values = tuple((point["count"], point[what]) for point in points)
            yield grown(Growth(kind.replace("_", " "), what, values))


def grown(growth: Growth) -> Result:
    """Return the line of a growth, which is judged by its last decade: before it, fixed costs weigh."""
    (first, _), *_, (last, most) = growth.points
    value, unit = (most, "s") if growth.what == "time" else (most / 1e6, "MB")
    return Result(
        measure="scaling",
        what=f"{growth.of}, {first:,} to {last:,}: {growth.what}",
        value=value,
        unit=unit,
        ratio=growth.last,
        goal=f"exponent of the last decade at most {LIMIT}",
        met=growth.last <= LIMIT,
        note=f"fitted over all points: {growth.fitted:.2f}",
        growth=growth,
    )


def one_point(sizes: work.Sizes, kind: str, factor: int) -> dict[str, float]:
    """Measure one point of `scaling`, in a process that `scaling` starts.

    Args:
      sizes: sizes of the first point.
      kind: what grows, one of KINDS but "prototypes".
      factor: one of FACTORS.

    Returns:
      {"count": how many there are, "time": seconds of an epoch, an evaluation or a search, "memory":
      bytes by which the peak memory grew}.
    """
    first, action = {
        "images": (sizes.scaling.images[0], _more_images),
        "classes": (sizes.scaling.classes[0], _more_classes),
        "versions": (sizes.scaling.versions, _evaluation),
        "gallery_rows": (sizes.scaling.gallery[0], _search),
    }[kind]
    before = peak_bytes()
    seconds = action(sizes, factor * first)
    return {"count": factor * first, "time": seconds, "memory": max(peak_bytes() - before, 1)}


def _more_images(sizes, images):
    return _epoch(sizes, sizes.scaling.images[1], images)


def _more_classes(sizes, classes):
    return _epoch(sizes, classes, sizes.scaling.classes[1])


def _epoch(sizes, classes, images):
    """Train on all classes at once; return the seconds of an epoch."""
    backbone, pixels, epochs = sizes.scaling.trained
    small = dataclasses.replace(
        sizes, num_prototypes=max(2 * classes, 16), backbone=backbone, image=pixels
    )
    data = work.dataset(classes, images // classes, pixels)
    run = work.run(small, Tasks(initial=classes), epochs)
    with tempfile.TemporaryDirectory() as folder:
        train(run, data, folder, session=Session(mesh=work.mesh()))
        log = (Path(folder) / "log.jsonl").read_text().splitlines()
        rates = [json.loads(line)["images_per_second"] for line in log]
    return len(data) // small.batch * small.batch / statistics.median(rates[1:])


def _evaluation(sizes, count):
    """Evaluate a chain of `count` versions; return the seconds."""
    data = [
        work.dataset(10, max(n // 10, 1), sizes.image, seed=seed)
        for seed, n in enumerate(sizes.evaluated)
    ]
    chain, session = retrieval.Versions(count, work.version(sizes)), Session(mesh=work.mesh())
    evaluate(retrieval.Versions(1, chain.frozen), *data, session=session)  # compiles
    return _median(lambda: evaluate(chain, *data, session=session))


def _search(sizes, rows):
    """Search a gallery of `rows` rows; return the seconds of all queries."""
    _, size, queries, k = sizes.scaling.gallery
    rng = np.random.default_rng(0)
    query, gallery = (rng.standard_normal((n, size), np.float32) for n in (queries, rows))
    search(query, gallery, k)  # compiles
    return _median(lambda: search(query, gallery, k))


def _median(action: Callable[[], object]) -> float:
    seconds = []
    while not seconds or (len(seconds) < 5 and sum(seconds) < _REPEATED):
        began = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)
