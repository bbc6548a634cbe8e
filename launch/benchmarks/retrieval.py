"""Measures of retrieval: features of a frozen version, a whole evaluation, exact search."""

import dataclasses
import time
from collections.abc import Iterator
from unittest import mock

import numpy as np

from compat_jax import Session, Version, embed, evaluation
from compat_jax.retrieval import SearchOptions, search
from compat_jax.retrieval.exact import Prepared
from launch.benchmarks import work
from launch.benchmarks.flops import forward_flops
from launch.benchmarks.sides import Context, best_reference, on_accelerator, reference_sides
from launch.benchmarks.timing import Result, alternate
from launch.reference.clone_speed import Unavailable


def features(context: Context) -> Iterator[Result]:
    """Measure the images per second of a frozen version, beside the reference."""
    sizes = context.sizes
    images = work.dataset(10, sizes.features // 10 + 1, sizes.image).images[: sizes.features]
    frozen = work.version(sizes)
    sides = {
        f"jax {dtype}": _extraction(frozen, images, dtype=dtype, batch_size=sizes.feature_batch)
        for dtype in context.dtypes
    }
    settings = {"batch": sizes.feature_batch, "num_classes": sizes.num_prototypes, "seed": 0}
    others, refused = reference_sides(context, "features", count=sizes.features, **settings)
    timings = alternate({**sides, **others}, sizes.repeats, settle=True)
    needed = sizes.features * sum(
        forward_flops(frozen.embedder("float32"), frozen.variables, frozen.record.image_shape)
    )
    eager, best = timings.get("torch eager"), best_reference(timings)
    for name, timing in timings.items():
        ratio, goal, met, note = None, None, None, ""
        if name in sides and eager is not None:
            ratio = eager.median / timing.median
            note = f"{best.median / timing.median:.2f} of the fastest variant of torch"
            if name == "jax float32":
                goal, met = "at least 1.3 of torch eager", ratio >= 1.3
        yield Result.of(
            "features",
            name,
            timing,
            value=sizes.features / timing.median,
            unit="images/s",
            flops=needed / timing.median,
            ratio=ratio,
            goal=goal,
            met=met,
            note=note,
        )
    yield from refused


def _extraction(frozen, images, **settings):
    return lambda: _seconds(lambda: embed(frozen, images, mesh=work.mesh(), **settings))


class Versions:
    """Stand in for a chain whose versions are in memory, so that opening one costs nothing.

    Args:
      count: number of versions.
      frozen: the version that each of them is a copy of.
    """

    def __init__(self, count: int, frozen: Version):
        self.count, self.frozen = count, frozen

    def require_whole(self) -> "Versions":
        """Return itself."""
        return self

    def numbers(self) -> list[int]:
        """Return the numbers of the versions."""
        return list(range(self.count))

    def open(self, number: int) -> Version:
        """Return the version under another number and digest."""
        return dataclasses.replace(self.frozen, number=number, sha256=f"{number:064d}")


def evaluate(context: Context) -> Iterator[Result]:
    """Measure the evaluation of a chain: the extractions, and the time outside them."""
    sizes = context.sizes
    queries, gallery = (
        work.dataset(10, max(n // 10, 1), sizes.image, seed=seed)
        for seed, n in enumerate(sizes.evaluated)
    )
    chain, session = Versions(sizes.versions, work.version(sizes)), Session(mesh=work.mesh())
    inside = []

    def counted(*arguments, **settings):
        began = time.perf_counter()
        result = embed(*arguments, **settings)
        inside.append(time.perf_counter() - began)
        return result

    with mock.patch.object(evaluation, "embed", counted):
        evaluation.evaluate(Versions(1, chain.frozen), queries, gallery, session=session)
        inside.clear()
        began = time.perf_counter()
        evaluation.evaluate(chain, queries, gallery, session=session)
        seconds = time.perf_counter() - began
    wanted = 2 * sizes.versions
    yield Result(
        measure="evaluation",
        what=f"extractions for {sizes.versions} versions",
        value=len(inside),
        ratio=len(inside) / wanted,
        goal=f"{wanted}",
        met=len(inside) == wanted,
        note=f"the reference extracts {sizes.versions * (sizes.versions + 3) // 2} times",
    )
    share = 1 - sum(inside) / seconds
    yield Result(
        measure="evaluation",
        what=f"{len(queries)} queries, {len(gallery)} gallery images",
        value=seconds,
        unit="s",
        ratio=share,
        goal="at most 0.05 of the time outside the extractions",
        met=share <= 0.05,
        note="versions held in memory",
    )


def nearest(context: Context) -> Iterator[Result]:
    """Measure exact search, beside FAISS on the same cores; both hold the gallery already."""
    queries, for_faiss, rows, size, k = context.sizes.search
    rng = np.random.default_rng(0)
    gallery = rng.standard_normal((rows, size), np.float32)
    query = rng.standard_normal((queries, size), np.float32)
    placed = Prepared(gallery)
    full = rows > 10**5
    yield from _beside_faiss(context, placed, query, for_faiss=for_faiss, repeats=1 if full else 2)
    for few in context.sizes.few_queries:
        yield from _beside_faiss(
            context, placed, query[:few], for_faiss=few, repeats=context.sizes.repeats
        )
    if on_accelerator():
        yield _approximate(query, gallery, k)


def _beside_faiss(context, placed, query, *, for_faiss: int, repeats: int):
    """Measure searches of one number of queries, FAISS's with a number of its own."""
    _, _, rows, size, k = context.sizes.search
    placed.search(query[:256], k)  # compiles
    ours = f"jax, {_queries(len(query))}"
    theirs = f"FAISS IndexFlatIP, {_queries(for_faiss)}"
    counts = {ours: len(query), theirs: for_faiss}
    sides = {ours: lambda: _seconds(lambda: placed.search(query, k))}
    refused = None
    try:
        sides[theirs] = context.worker.prepare(
            "search", "search", queries=for_faiss, rows=rows, size=size, k=k, seed=0
        )
    except Unavailable as error:
        refused = Result.not_run("search", theirs, error)
    timings = alternate(sides, repeats, 0)
    context.worker.forget("search")
    a_query = {name: timing.median / counts[name] for name, timing in timings.items()}
    for name, timing in timings.items():
        judged = name == ours and theirs in a_query
        ratio = a_query[ours] / a_query[theirs] if judged else None
        yield Result.of(
            "search",
            name,
            timing,
            value=1e3 * a_query[name],
            unit="ms/query",
            flops=2.0 * rows * size / a_query[name],
            ratio=ratio,
            goal=None if ratio is None else "at most 0.5 of FAISS",
            met=None if ratio is None else ratio <= 0.5,
        )
    if refused is not None:
        yield refused


def _queries(count: int) -> str:
    return "1 query" if count == 1 else f"{count} queries"


def _seconds(function):
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def _approximate(query, gallery, k):
    """Measure `approx_max_k` and the recall that it reaches."""
    options = SearchOptions(approx_recall=0.95)
    search(query[:256], gallery, k, options=options)
    taken = _seconds(lambda: search(query, gallery, k, options=options))
    exact = search(query[:1000], gallery, k)[1]
    found = search(query[:1000], gallery, k, options=options)[1]
    recall = np.mean([len({*a} & {*b}) / k for a, b in zip(exact, found, strict=True)])
    return Result(
        measure="search",
        what="jax, approx_recall=0.95",
        value=1e3 * taken / len(query),
        unit="ms/query",
        note=f"recall {recall:.3f}",
    )
