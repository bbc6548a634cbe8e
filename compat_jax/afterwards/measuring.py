"""Measure the ways to upgrade on features."""

import functools
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from compat_jax import align
from compat_jax.afterwards.plan import FORWARD, NAIVE, REINDEX, RESCORING, WAYS, Plan
from compat_jax.afterwards.results import Cost, Way
from compat_jax.backfill import Curve, Gallery, backfill, ranking
from compat_jax.retrieval import mixed
from compat_jax.retrieval.metric import Metric, Queries
from compat_jax.retrieval.mixed import Both

_FLOAT = 4  # bytes


class Spaces(NamedTuple):
    """Features that the ways are measured on.

    Attributes:
      queries: by both versions.
      gallery: by both versions.
      pairs: to fit maps on, with labels; maps are left out where these are too few.
      mesh: devices.
      fitted: int[p], rows of the gallery that the pairs are; None for other pictures.
    """

    queries: Both
    gallery: Both
    pairs: align.Pairs
    mesh: Any = None
    fitted: np.ndarray | None = None


def measure(
    spaces: Spaces, metrics: Sequence[Metric], plan: Plan, *, seconds_an_image: float = 0.0
) -> Iterator[Way]:
    """Measure all ways on features.

    Args:
      spaces: queries and gallery by both versions, and pairs to fit maps on.
      metrics: to measure.
      plan: shares, order and candidates.
      seconds_an_image: to embed one by the new version.

    Yields:
      A `Way` each, in the order of `WAYS`, but for those that are `left_out`.
    """
    queries, gallery, pairs, *_ = spaces
    count, run = len(gallery.labels), functools.partial(_swapped, spaces, metrics, plan)
    chosen = set(plan.ways) - left_out(spaces, plan).keys()
    if NAIVE in chosen:
        yield Way(NAIVE, run(None), Cost())
    # Gallery images have their old features already.
    images = len(pairs.new) * (1 if plan.pictures is None else 2)
    for kind in filter(chosen.__contains__, align.KINDS):
        began = time.perf_counter()
        found = align.fit(pairs.old, pairs.new, kind, labels=pairs.labels)
        fitting = time.perf_counter() - began
        needs_old = align.needs_old(kind)
        mapped = found.map(queries.new, queries.old if needs_old else None)
        cost = Cost(
            pairs=len(pairs.new),
            images=images,
            networks=2 if needs_old else 1,
            fit_seconds=fitting,
            seconds=fitting + images * seconds_an_image,
            bytes=sum(array.nbytes for array in found.arrays.values()),
        )
        yield Way(kind, run(mapped), cost, dict(found.settings))
    if FORWARD in chosen:
        yield _forward(spaces, metrics, plan, images * seconds_an_image)
    if RESCORING in chosen:
        yield _rescoring(spaces, metrics, plan)
    if REINDEX in chosen:
        bytes_ = gallery.new.size * _FLOAT
        cost = Cost(images=count, seconds=count * seconds_an_image, bytes=bytes_)
        yield Way(REINDEX, _reindexed(spaces, metrics, plan), cost)


def left_out(spaces: Spaces, plan: Plan) -> dict[str, str]:
    """Say which ways of a plan cannot be measured.

    Args:
      spaces: queries and gallery by both versions, and pairs to fit maps on.
      plan: the ways.

    Returns:
      {name of the way: why}, in the order of `WAYS`.
    """
    sizes = [part.shape[1] for part in spaces.queries[:2]]
    labels = spaces.pairs.labels
    reasons = {kind: align.unfit(kind, labels) for kind in align.KINDS}
    reasons[FORWARD] = align.unfit("ridge", labels)
    if sizes[0] != sizes[1]:
        reasons[NAIVE] = (
            f"the versions' features have different sizes, {sizes[0]} and {sizes[1]}, and compare by "
            "maps only"
        )
    return {way: reasons[way] for way in WAYS if way in plan.ways and reasons.get(way)}


def _swapped(spaces: Spaces, metrics, plan: Plan, mapped: np.ndarray | None) -> dict[str, Curve]:
    """Measure old rows with mapped queries, and rows embedded again with new ones."""
    queries, gallery, *_ = spaces
    asking = queries._replace(old=queries.new if mapped is None else mapped)
    searcher = mixed.Swap(asking, gallery, one_space=mapped is None)
    curves = _searched(searcher, metrics, plan)
    others = [metric for metric in metrics if metric.name not in curves]
    return {**curves, **_concatenated(spaces, others, plan, mapped)}


def _searched(searcher: mixed.Searcher, metrics, plan: Plan) -> dict[str, Curve]:
    """Curves of the metrics that judge scores."""
    judging = list(filter(mixed.judges_scores, metrics))
    order = ranking("random", Gallery(*searcher.gallery[:3]), seed=plan.seed)
    found = mixed.measure(searcher, judging, order, plan.shares)
    return {
        name: Curve.of("random", name, shares=plan.shares, scores=scores, new_answers=renewed)
        for name, (scores, renewed) in found.items()
    }


def _concatenated(spaces: Spaces, metrics, plan: Plan, mapped) -> dict[str, Curve]:
    """Curves of any metric: queries [mapped, new] and rows [old, 0] or [0, new] have the inner products
    of `Swap.images`, but for a factor that all share."""
    queries, gallery, _, mesh, *_ = spaces
    rows, new = Gallery(*gallery[:3]), queries.new
    if mapped is not None:
        wide = gallery.old.shape[1], gallery.new.shape[1]
        rows = Gallery(
            np.pad(gallery.old, ((0, 0), (0, wide[1]))),
            np.pad(gallery.new, ((0, 0), (wide[0], 0))),
            gallery.labels,
        )
        new = (np.hstack([mapped, new]) / np.sqrt(2)).astype(np.float32)
    asking = Queries(new, queries.labels, queries.own, mesh)
    return {
        metric.name: backfill(asking, rows, metric=metric, shares=plan.shares, seed=plan.seed)
        for metric in metrics
    }


def _forward(spaces: Spaces, metrics, plan: Plan, embedding: float) -> Way:
    """Take the old rows to the new space by a ridge map; the pairs' rows have their new features."""
    queries, gallery, pairs, *_ = spaces
    began = time.perf_counter()
    found = align.fit(pairs.new, pairs.old, "ridge", labels=pairs.labels)
    rows = found.map(gallery.old)
    fitting = time.perf_counter() - began
    if spaces.fitted is not None:
        rows[spaces.fitted] = gallery.new[spaces.fitted]
    moved = spaces._replace(
        queries=queries._replace(old=queries.new), gallery=gallery._replace(old=rows)
    )
    cost = Cost(
        pairs=len(pairs.new),
        images=len(pairs.new) * (1 if plan.pictures is None else 2),
        fit_seconds=fitting,
        seconds=fitting + embedding,
        bytes=rows.size * _FLOAT,
    )
    return Way(FORWARD, _swapped(moved, metrics, plan, None), cost, dict(found.settings))


def _rescoring(spaces: Spaces, metrics, plan: Plan) -> Way:
    queries, gallery, *_ = spaces
    searcher = mixed.Rescoring(queries, gallery, plan.candidates)
    curves = _searched(searcher, metrics, plan)
    cost = Cost(
        images_a_query=min(plan.candidates, len(gallery.labels)),
        networks=2,
        bytes=int(searcher.proposed.sum()) * gallery.new.shape[1] * _FLOAT,
    )
    return Way(RESCORING, curves, cost)


def _reindexed(spaces: Spaces, metrics, plan: Plan) -> dict[str, Curve]:
    """The old version answers until all is embedded again."""
    queries, gallery, _, mesh, *_ = spaces
    shares = [*plan.shares, 1.0]
    curves = {}
    for metric in metrics:
        before, after = (
            metric.score_features(
                Queries(asking, queries.labels, queries.own, mesh), answering, gallery.labels
            )
            for asking, answering in ((queries.old, gallery.old), (queries.new, gallery.new))
        )
        curves[metric.name] = Curve.of(
            "random",
            metric.name,
            shares=shares,
            scores=[before] * len(plan.shares) + [after],
            new_answers=[0.0] * len(plan.shares) + [1.0],
        )
    return curves
