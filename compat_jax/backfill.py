"""Backfill: retrieval while the images of a gallery are embedded again, some at a time."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from compat_jax.errors import UserError, unknown
from compat_jax.means import mean_score
from compat_jax.retrieval import metric as metrics
from compat_jax.retrieval.blocks import check_finite, check_sizes
from compat_jax.retrieval.index import ExactIndex
from compat_jax.retrieval.labels import in_one_form
from compat_jax.retrieval.metric import Metric, Queries
from compat_jax.retrieval.metrics import nearest_others
from compat_jax.retrieval.mixed import renewals
from compat_jax.retrieval.templates import class_templates

# Scores that `rank_gains` holds at a time.
_SCORES = 1 << 22
SHARES = tuple(n / 10 for n in range(11))


class Gallery(NamedTuple):
    """A gallery as two versions embed it.

    Attributes:
      old: float32[n, d], features of the old version, or a map of them into the new space.
      new: float32[n, d], features of the new version on the same images.
      labels: int[n].
    """

    old: np.ndarray
    new: np.ndarray
    labels: np.ndarray


@dataclasses.dataclass(frozen=True)
class Curve:
    """Retrieval against the share of the gallery that was embedded again.

    Attributes:
      order: name of the order, "given" for one of the caller's.
      metric: name of the metric.
      shares: float64[s], ascending from 0 to 1.
      values: float64[s], the metric at each share; the first is the cross-test, the last the new
        version's self-test.
      new_answers: float64[s], share of queries whose nearest image was embedded again; the rest are
        answered by the old version's features.
      scores: float64[s, q], score of each query; NaN where one was left out.
    """

    order: str
    metric: str
    shares: np.ndarray
    values: np.ndarray
    new_answers: np.ndarray
    scores: np.ndarray = dataclasses.field(repr=False)

    @classmethod
    def of(cls, order: str, metric: str, *, shares: Any, scores: Any, new_answers: Any) -> "Curve":
        """Make a curve of the scores at each share; its values are their means.

        Args:
          order: see `Curve`.
          metric: see `Curve`.
          shares: see `Curve`.
          scores: float[s, q], or a float[q] a share; NaN leaves a query out.
          new_answers: see `Curve`.
        """
        return cls(
            order,
            metric,
            shares=np.asarray(shares, np.float64),
            values=np.array([mean_score(cell) for cell in scores]),
            new_answers=np.asarray(new_answers),
            scores=np.stack(scores),
        )

    @property
    def area(self) -> float:
        """Area under the curve, by the trapezoidal rule: the mean value over a backfill."""
        return float(np.trapezoid(self.values, self.shares))

    def reached(self, level: float = 1.0) -> float:
        """Return the smallest of the shares at which the new version's level is reached.

        Args:
          level: part of the new version's own value, e.g. 0.99.

        Returns:
          A share in [0, 1] whose value is at least `level` times the last one. Larger shares may fall
          below it again.
        """
        return float(self.shares[np.argmax(self.values >= level * self.values[-1])])

    def summary(self) -> dict[str, Any]:
        """Return everything but the scores as JSON values."""
        return {
            "order": self.order,
            "metric": self.metric,
            "shares": self.shares.tolist(),
            "values": self.values.tolist(),
            "new_answers": self.new_answers.tolist(),
            "area": self.area,
            "reached": self.reached(),
            "reached_99": self.reached(0.99),
        }


def backfill(
    queries: Queries,
    gallery: Gallery,
    *,
    order: str | np.ndarray = "random",
    metric: Metric | str = "identification",
    shares: Sequence[float] = SHARES,
    seed: int = 0,
) -> Curve:
    """Measure retrieval at each share of the gallery that was embedded again.

    At share β, the first round(β n) images in the order have the new version's features, the others
    still the old ones. Every value is that of the mixed gallery; nothing is interpolated.

    Args:
      queries: of the new version.
      gallery: of both versions.
      order: a name, see `ranking`, or int[n], the rows of the gallery in the order in which they are
        embedded again.
      metric: a name, see `metrics.names()`, or a metric.
      shares: ascending, from 0 to 1.
      seed: of the random order.

    Returns:
      `Curve`.

    Raises:
      UserError: unknown order or metric, shares that are not ascending from 0 to 1, an order that is not
        a permutation, features of different sizes or not finite.

    Source: Jaeckle et al. 2023, "FastFill: Efficient Compatible Model Update"; the mean over β of the
      accuracy, M̃ there, is `Curve.area`.
    """
    metric = metrics.get(metric)
    queries, gallery = _checked(queries, gallery)
    old, new, labels = gallery
    points = _ascending(shares)
    if isinstance(order, str):
        name, rows = order, ranking(order, gallery, queries, seed=seed)
    else:
        name, rows = "given", np.asarray(order)
    if not np.array_equal(np.sort(rows), np.arange(len(old))):
        raise UserError(f"an order must list each of the {len(old)} images once", "order")
    mixed, scores, answers = old.copy(), [], []
    for renewed in renewals(rows, points):
        np.copyto(mixed, new, where=renewed[:, None])
        scores.append(metric.score_features(queries, mixed, labels))
        answers.append(renewed[_nearest(queries, mixed)].mean())
    return Curve.of(name, metric.name, shares=points, scores=scores, new_answers=answers)


ORDERS = ("farthest", "oracle", "random")


def ranking(
    order: str, gallery: Gallery, queries: Queries | None = None, *, seed: int = 0
) -> np.ndarray:
    """Rank the images of a gallery, those to embed again first.

    Args:
      order: "random"; "farthest", old features with the least cosine to their class's mean first, which
        takes no further network; "oracle", images first that gain most in the rankings, see
        `rank_gains`. The oracle looks at the queries' labels and at features that a backfill has yet to
        compute: it shows how much an order can bring, but is no proven maximum.
      gallery: of both versions.
      queries: of the new version, for the oracle.
      seed: of the random order.

    Returns:
      int64[n], rows of the gallery; of equal images the first comes first.

    Raises:
      UserError: unknown order, an oracle without queries.

    Source: "farthest" is the order of the paper on λ-orthogonality regularization, 2025.
    """
    if order not in ORDERS:
        raise unknown("order", order, ORDERS, "order")
    if order == "random":
        return np.random.default_rng(seed).permutation(len(gallery.old))
    if order == "farthest":
        means, classes = class_templates(gallery.old, gallery.labels)
        near = means[np.searchsorted(classes, gallery.labels)]
        lengths = np.linalg.norm(gallery.old, axis=1)
        cosines = np.einsum("nd,nd->n", gallery.old, near) / np.where(lengths == 0, 1, lengths)
        return np.argsort(cosines, kind="stable")
    if queries is None:
        raise UserError("the oracle ranks a gallery for queries: give them", "queries")
    return np.argsort(-rank_gains(gallery, queries), kind="stable")


def rank_gains(gallery: Gallery, queries: Queries) -> np.ndarray:
    """Measure what each image's new features would mend in the rankings of the queries.

    A match wins over the share of other images that score below it, another image over the share of
    matches that score as much or more, both in the new version's gallery. For one query, an image gains
    its win with new features less that with old ones, divided by the number of images of its kind, which
    is matches or others: so the gains of a kind add up to its mean. Gains are summed over the queries.

    Args:
      gallery: of both versions.
      queries: of the new version.

    Returns:
      float64[n]; queries without a match, or with nothing else, are left out.
    """
    gains = np.zeros(len(gallery.old))
    block = max(1, _SCORES // len(gains))
    for start in range(0, len(queries.labels), block):
        asking = queries.features[start : start + block]
        scores = asking @ gallery.old.T, asking @ gallery.new.T
        for i, (old, new) in enumerate(zip(*scores, strict=True), start):
            match = gallery.labels == queries.labels[i]
            kept = np.ones(len(match), bool)
            if queries.own is not None and queries.own[i] >= 0:
                kept[queries.own[i]] = False
            for mine, sign in ((match & kept, 1), (~match & kept, -1)):
                rest = np.sort(new[~mine & kept])
                if mine.any() and len(rest):
                    below = np.searchsorted(rest, new[mine]) - np.searchsorted(rest, old[mine])
                    gains[mine] += sign * below / (len(rest) * mine.sum())
    return gains


def _nearest(queries: Queries, features: np.ndarray) -> np.ndarray:
    """int64[q], the row of each query's nearest image but itself."""
    index = ExactIndex(queries.mesh)
    index.add(features)
    return nearest_others(index, queries.features, 1, queries.own)[:, 0]


def _ascending(shares: Sequence[float]) -> np.ndarray:
    points = np.asarray(shares, np.float64)
    if len(points) < 2 or points[0] != 0 or points[-1] != 1 or (np.diff(points) <= 0).any():
        raise UserError(f"shares must ascend from 0 to 1, got {list(shares)}", "shares")
    return points


def _checked(queries: Queries, gallery: Gallery) -> tuple[Queries, Gallery]:
    old, new = (np.asarray(part, np.float32) for part in gallery[:2])
    labels = np.asarray(gallery.labels)
    if old.shape != new.shape or labels.shape != old.shape[:1] or not len(old):
        raise UserError(
            "a backfill takes two versions' features [n, d] of the same images and n labels, got "
            f"{old.shape} (old), {new.shape} (new) and {labels.shape}: pad smaller features with "
            "zeros, or map them"
        )
    asking, labels = in_one_form(queries.labels, labels)
    check_sizes(queries.features, old)
    check_finite("old", old)
    check_finite("new", new)
    return queries._replace(labels=asking), Gallery(old, new, labels)
