"""Measures of retrieval: features of a frozen version, a whole evaluation, exact search."""

import time
from collections.abc import Iterator
from unittest import mock

import jax
import numpy as np

from compat_jax import evaluation
from compat_jax.benchmarks import work
from compat_jax.benchmarks.flops import forward_flops
from compat_jax.benchmarks.sides import Context, best_reference, on_accelerator, reference_sides
from compat_jax.benchmarks.timing import Result, alternate
from compat_jax.chain import Record, Version
from compat_jax.interop.reference_speed import Unavailable
from compat_jax.retrieval import extract, search


def features(context: Context) -> Iterator[Result]:
    """Images a second of a frozen version, beside the reference's."""
    sizes = context.sizes
    images = work.dataset(10, sizes.features // 10 + 1, sizes.image).images[: sizes.features]
    frozen = version(sizes)
    sides = {f"jax {d}": _extraction(frozen, images, d, sizes) for d in context.dtypes}
    settings = {"batch": sizes.feature_batch, "num_classes": sizes.num_prototypes, "seed": 0}
    others, refused = reference_sides(context, "features", count=sizes.features, **settings)
    timings = alternate({**sides, **others}, sizes.repeats)
    needed = sizes.features * sum(
        forward_flops(frozen.embedder("float32"), frozen.variables, frozen.record.image_shape)
    )
    eager, best = timings.get("torch eager"), best_reference(timings)
    for name, timing in timings.items():
        ratio, goal, met, note = None, None, None, ""
        if name in sides and eager is not None:
            ratio = eager.median / timing.median
            note = f"{best.median / timing.median:.2f} of the best of torch"
            if name == "jax float32":
                goal, met = "at least 1.3 of torch eager", ratio >= 1.3
        yield Result(
            "features",
            name,
            sizes.features / timing.median,
            "images/s",
            timing.spread,
            len(timing.seconds),
            needed / timing.median,
            ratio,
            goal,
            met,
            note,
        )
    yield from refused


def version(sizes: work.Sizes, number: int = 0) -> Version:
    """A version that was never trained."""
    shape = (sizes.image, sizes.image, 3)
    training = work.Training.create(sizes, "float32", 1)
    variables = jax.tree.map(np.asarray, training.trainer.stored(training.previous))
    record = Record(
        method="hoc",
        backbone=sizes.backbone,
        backbone_arguments={},
        image_shape=shape,
        mean=work.PREPROCESS.mean,
        std=work.PREPROCESS.std,
        feature_size=sizes.num_prototypes - 1,
        num_prototypes=sizes.num_prototypes,
        label_order="descending",
        head_classes=None,
        task=number,
        classes_seen=100,
        parent=None,
        replaced_by=None,
        data_fingerprint="0" * 64,
        seed=0,
        config={},
    )
    return Version(number, record, variables, f"{number:064d}")


def _extraction(frozen, images, dtype, sizes):
    def timed():
        began = time.perf_counter()
        extract(frozen, images, work.mesh(), sizes.feature_batch, dtype)
        return time.perf_counter() - began

    return timed


class Versions:
    """Stands for a chain whose versions are in memory: opening one costs nothing."""

    def __init__(self, count, frozen):
        self.count, self.frozen = count, frozen

    def require(self):
        """Nothing to check."""
        return self

    def numbers(self):
        """All versions."""
        return list(range(self.count))

    def open(self, number):
        """A version of its own number."""
        return Version(number, self.frozen.record, self.frozen.variables, f"{number:064d}")


def evaluate(context: Context) -> Iterator[Result]:
    """The matrix of a chain: extractions, and what the search adds to them."""
    sizes = context.sizes
    queries, gallery = (
        work.dataset(10, n // 10 + 1, sizes.image, seed).per_class(max(n // 10, 1))
        for seed, n in enumerate(sizes.evaluated)
    )
    chain = Versions(sizes.versions, version(sizes))
    inside = []

    def counted(*arguments):
        began = time.perf_counter()
        result = extract(*arguments)
        inside.append(time.perf_counter() - began)
        return result

    with mock.patch.object(evaluation, "extract", counted):
        evaluation.evaluate(Versions(1, chain.frozen), queries, gallery, mesh=work.mesh())
        inside.clear()
        began = time.perf_counter()
        evaluation.evaluate(chain, queries, gallery, mesh=work.mesh())
        seconds = time.perf_counter() - began
    wanted = 2 * sizes.versions
    yield Result(
        "evaluation",
        f"extractions for {sizes.versions} versions",
        len(inside),
        "",
        ratio=len(inside) / wanted,
        goal=f"{wanted}",
        met=len(inside) == wanted,
        note=f"the reference extracts {sizes.versions * (sizes.versions + 3) // 2} times",
    )
    share = 1 - sum(inside) / seconds
    yield Result(
        "evaluation",
        f"{len(queries)} x {len(gallery)} pictures",
        seconds,
        "s",
        ratio=share,
        goal="at most 0.05 of it outside the extractions",
        met=share <= 0.05,
        note="both sides grow with the pictures; versions in memory",
    )


def nearest(context: Context) -> Iterator[Result]:
    """Exact search, beside FAISS on the same cores."""
    queries, for_faiss, rows, size, k = context.sizes.search
    rng = np.random.default_rng(0)
    gallery = rng.standard_normal((rows, size), np.float32)
    query = rng.standard_normal((queries, size), np.float32)
    search(query[:256], gallery, k)  # compiles
    sides = {f"jax, {queries} queries": lambda: _seconds(search, query, gallery, k)}
    refused = None
    try:
        name = f"FAISS IndexFlatIP, {for_faiss} queries"
        sides[name] = context.worker.prepare(
            "search", "search", queries=for_faiss, rows=rows, size=size, k=k, seed=0
        )
    except Unavailable as error:
        refused = Result("search", "FAISS", float("nan"), "", note=f"not run: {error}")
    timings = alternate(sides, 1 if context.sizes.search[2] > 10**5 else 2, 0)
    context.worker.forget("search")
    ours, theirs = [*timings.values(), None][:2]
    for name, timing in timings.items():
        count = queries if timing is ours else for_faiss
        ratio = None
        if timing is ours and theirs is not None:
            ratio = (ours.median / queries) / (theirs.median / for_faiss)
        yield Result(
            "search",
            name,
            1e3 * timing.median / count,
            "ms/query",
            timing.spread,
            len(timing.seconds),
            2.0 * count * rows * size / timing.median,
            ratio,
            None if ratio is None else "at most 0.5 of FAISS, a query",
            None if ratio is None else ratio <= 0.5,
        )
    if refused is not None:
        yield refused
    if on_accelerator():
        yield _approximate(query, gallery, k)


def _seconds(function, *arguments, **keywords):
    began = time.perf_counter()
    function(*arguments, **keywords)
    return time.perf_counter() - began


def _approximate(query, gallery, k):
    """`approx_max_k` with the recall that it reaches here."""
    search(query[:256], gallery, k, approx_recall=0.95)
    taken = _seconds(search, query, gallery, k, approx_recall=0.95)
    exact = search(query[:1000], gallery, k)[1]
    found = search(query[:1000], gallery, k, approx_recall=0.95)[1]
    recall = np.mean([len({*a} & {*b}) / k for a, b in zip(exact, found, strict=True)])
    return Result(
        "search",
        "jax, approx_recall=0.95",
        1e3 * taken / len(query),
        "ms/query",
        note=f"recall {recall:.3f}",
    )
