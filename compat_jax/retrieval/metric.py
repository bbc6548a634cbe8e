"""Metrics of a pair of versions, by name, with a score for every query."""

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np
from jax.sharding import Mesh

from compat_jax.errors import UserError, unknown
from compat_jax.retrieval.index import ExactIndex
from compat_jax.retrieval.labels import in_one_form
from compat_jax.retrieval.metrics import (
    average_precision_scores,
    neighbour_scores,
    precision_at_r_scores,
)
from compat_jax.retrieval.templates import (
    class_templates,
    template_scores,
    template_scores_without_self,
)
from compat_jax.retrieval.verification import pair_scores, query_pairs

Prepared = tuple[np.ndarray, ...]

# By which a share may leave 0..1: a cosine or a mean in float32 may round beyond 1.
_ROUNDING = 1e-5


class Queries(NamedTuple):
    """Queries of one version.

    Attributes:
      features: float32[q, d], L2-normalised.
      labels: int[q].
      own: int[q], the gallery row of the same picture, -1 for none; None if no query is in the
        gallery.
      mesh: devices.
    """

    features: np.ndarray
    labels: np.ndarray
    own: np.ndarray | None = None
    mesh: Mesh | None = None


def everything(features: np.ndarray, labels: np.ndarray) -> Prepared:
    """Keep all features and labels of a gallery."""
    return features, labels


@dataclasses.dataclass(frozen=True)
class Metric:
    """A retrieval metric.

    Attributes:
      name: by which programs and results refer to it; metrics of equal names must be equal. A cache
        keeps scores of the library's own metrics only: those of yours are computed each time, so that
        you may change the function.
      unit: of its values, for pictures, e.g. "% of queries identified"; values are shares in 0..1,
        shown times 100.
      score: (queries, prepared galleries) -> float[galleries, queries], one score per query; NaN leaves
        a query out. The metric of a pair is the mean.
      prepare: (features float32[n, d], labels int[n]) -> arrays to keep of a gallery instead of all
        features; the first has d columns. Used where no query is in the gallery, else `everything`.
    """

    name: str
    unit: str
    score: Callable[[Queries, Sequence[Prepared]], np.ndarray]
    prepare: Callable[[np.ndarray, np.ndarray], Prepared] = everything

    def checked(self, queries: Queries, galleries: Sequence[Prepared]) -> np.ndarray:
        """Return `score`, if it is one score for each gallery and query.

        Returns:
          float[galleries, queries] in 0..1, NaN where a query is left out.

        Raises:
          UserError: another shape, values out of range, or no query with a score.
        """
        found = np.asarray(self.score(queries, galleries))
        wanted = (len(galleries), len(queries.labels))
        if found.shape != wanted or found.dtype.kind not in "biuf":
            raise UserError(
                f"metric {self.name!r} returns {found.dtype} {list(found.shape)} for {wanted[0]} "
                f"galleries and {wanted[1]} queries: return one score for each gallery and query, "
                f"float{list(wanted)}",
                "metric",
            )
        outside = found[(found < -_ROUNDING) | (found > 1 + _ROUNDING)]
        if outside.size:
            raise UserError(
                f"metric {self.name!r} returns {outside.flat[0]:g}: scores are shares from 0 to 1, "
                "shown times 100; NaN leaves a query out",
                "metric",
            )
        unscored = np.isnan(found).all(axis=1)
        if found.shape[1] and unscored.any():
            raise UserError(
                f"metric {self.name!r} returns NaN, which leaves a query out, for all {wanted[1]} "
                f"queries in gallery {int(unscored.argmax())} of {wanted[0]}: score those that count, "
                "with 0 where nothing was found",
                "metric",
            )
        return found

    def score_features(
        self, queries: Queries, features: np.ndarray, labels: np.ndarray
    ) -> np.ndarray:
        """Score queries in one gallery, float32[n, d] with labels int[n].

        Returns:
          float[queries], see `score`.

        Raises:
          UserError: see `checked`; labels of different kinds.
        """
        asking, labels = in_one_form(queries.labels, labels)
        queries = queries._replace(labels=asking)
        prepare = self.prepare if queries.own is None else everything
        return self.checked(queries, [prepare(features, labels)])[0]


def _identification(queries: Queries, galleries: Sequence[Prepared]) -> np.ndarray:
    if queries.own is not None:
        return np.stack(
            [
                template_scores_without_self(
                    queries.features,
                    queries.labels,
                    features,
                    gallery_labels=labels,
                    own=queries.own,
                )
                for features, labels in galleries
            ]
        )
    # Few templates: not worth spreading over devices; the queries are shared by the hosts.
    templates, classes = zip(*galleries, strict=True)
    return template_scores(queries.features, queries.labels, templates, classes=classes[0])


def _ranking(score: Callable[..., np.ndarray], queries: Queries, galleries: Sequence[Prepared]):
    """Score the whole ranking of each gallery."""
    return np.stack(
        [
            score(
                queries.features,
                queries.labels,
                features,
                gallery_labels=labels,
                own=queries.own,
            )
            for features, labels in galleries
        ]
    )


def _pairs(far: float | None, queries: Queries, galleries: Sequence[Prepared]) -> np.ndarray:
    """Score pairs, the same in every gallery."""
    pairs = query_pairs(queries.labels, galleries[0][1], queries.own)
    return np.stack([pair_scores(queries.features, g[0], pairs, far=far) for g in galleries])


@functools.cache
def tar(far: str) -> Metric:
    """Make the metric tar@far: pairs of one class accepted at a false accept rate, e.g. "0.001"."""
    unit = f"% of pairs of a class accepted, {100 * float(far):g} % of others"
    return Metric(f"tar@{far}", unit, functools.partial(_pairs, float(far)))


@functools.cache
def cmc(rank: int) -> Metric:
    """Make the metric cmc@rank: recall@k under the name that re-identification gives it."""
    return dataclasses.replace(recall(rank), name=f"cmc@{rank}")


@functools.cache
def recall(k: int) -> Metric:
    """Make the metric recall@k: whether an image of the query's class is among the k nearest."""

    def score(queries: Queries, galleries: Sequence[Prepared]) -> np.ndarray:
        rows = []
        for features, labels in galleries:
            index = ExactIndex(queries.mesh)
            index.add(features)
            found = neighbour_scores(
                queries.features,
                queries.labels,
                index,
                gallery_labels=labels,
                max_rank=k,
                own=queries.own,
            )
            rows.append(found[:, -1])
        return np.stack(rows)

    return Metric(f"recall@{k}", f"% of queries with a match in the first {k}", score)


_METRICS: dict[str, Metric] = {}


def register(metric: Metric) -> Metric:
    """Make a metric known by its name.

    Raises:
      UserError: another metric has this name, or the library has one for a number, such as "recall@7".
    """
    there = _of_name(metric.name)
    if there is not None and there is not metric:
        raise UserError(
            f"there is another metric called {metric.name!r}: choose another name", "metric"
        )
    return _METRICS.setdefault(metric.name, metric)


def names() -> tuple[str, ...]:
    """Return the names of all registered metrics, sorted."""
    return tuple(sorted(_METRICS))


def get(metric: Metric | str) -> Metric:
    """Return the metric of a name; "recall@K", "cmc@K" and "tar@FAR" for any K and rate.

    Raises:
      UserError: unknown name, with the valid ones.
    """
    if isinstance(metric, Metric):
        return metric
    found = _of_name(metric)
    if found is None:
        raise unknown("metric", metric, _METRICS, "metric")
    return found


def chosen(metrics: Sequence[Metric | str] | Metric | str) -> list[Metric]:
    """Return the metrics that were asked for, each once.

    Args:
      metrics: names or metrics, or a single one.

    Raises:
      UserError: unknown name, none at all, or two metrics of one name, by which results are told apart.
    """
    several = [metrics] if isinstance(metrics, str | Metric) else metrics
    found: dict[str, Metric] = {}
    for metric in map(get, several):
        if found.setdefault(metric.name, metric) != metric:
            raise UserError(
                f"two different metrics are called {metric.name!r}, and results are told apart by "
                "name: rename one",
                "metrics",
            )
    if not found:
        raise UserError("no metric: name at least one", "metrics")
    return list(found.values())


def _of_name(name: str) -> Metric | None:
    """Return the one metric that a name stands for."""
    return _METRICS.get(name) or _numbered(name)


def _numbered(name: str) -> Metric | None:
    """Return the library's metric of a name with a number, always the same object."""
    if match := re.fullmatch(r"(recall|cmc)@([1-9][0-9]{0,5})", name):
        return {"recall": recall, "cmc": cmc}[match[1]](int(match[2]))
    if match := re.fullmatch(r"tar@(0\.[0-9]{1,9}|[1-9]e-[1-9])", name):
        return tar(match[1])
    return None


def is_own(metric: Metric) -> bool:
    """Return whether a metric is the library's own, so that its name says all about it."""
    return metric is (_OWN.get(metric.name) or _numbered(metric.name))


def judges(metric: Metric) -> Literal["classes", "images", "features"]:
    """Return what a metric goes by: scores of the gallery's classes, of its images, or features alone.

    Metrics of pairs of pictures go by features, and so do those of the user's, whatever their names.
    """
    if not is_own(metric) or _is_of_pairs(metric):
        return "features"
    return "classes" if metric is identification else "images"


def _is_of_pairs(metric: Metric) -> bool:
    return isinstance(metric.score, functools.partial) and metric.score.func is _pairs


identification = register(
    Metric("identification", "% of queries identified", _identification, prepare=class_templates)
)
mean_average_precision = register(
    Metric(
        "map",
        "mean average precision, %",
        functools.partial(_ranking, average_precision_scores),
    )
)
mean_average_precision_at_r = register(
    Metric("map@r", "mAP@R, %", functools.partial(_ranking, precision_at_r_scores))
)
for _k in (1, 5, 10):
    register(recall(_k))
verification = register(
    Metric("verification", "% of pairs decided rightly", functools.partial(_pairs, None))
)
for _far in ("0.01", "0.001"):
    register(tar(_far))
_OWN = dict(_METRICS)
