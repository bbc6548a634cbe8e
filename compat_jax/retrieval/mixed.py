"""Search in a gallery of which a part was embedded again: the scores of both parts, and their metrics.

Scores of all images by both versions are computed once for a block of queries; every share of the
gallery is then a choice between them. Metrics take such scores as they take features: queries that are
unit vectors have the columns of the scores as inner products.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from compat_jax.retrieval.metric import Metric, Queries, cmc, judges, recall
from compat_jax.retrieval.metrics import no_match
from compat_jax.retrieval.templates import names_right

_BLOCK, _SCORES = 256, 1 << 24  # queries, and scores, at a time
_BELOW = 4.0  # puts cosines of one kind below all cosines of another


class Both(NamedTuple):
    """Features of the same images by two versions, L2-normalised.

    Attributes:
      old: float32[n, d].
      new: float32[n, e].
      labels: int[n].
      own: int[n], of queries: the gallery row of the same picture, -1 for none; None if no query is in
        the gallery.
    """

    old: np.ndarray
    new: np.ndarray
    labels: np.ndarray
    own: np.ndarray | None = None


class Measured(NamedTuple):
    """Scores by a metric at each share.

    Attributes:
      scores: float64[s, q], score of each query; NaN where one was left out.
      renewed_answers: float64[s], share of queries whose first answer was embedded again.
    """

    scores: np.ndarray
    renewed_answers: np.ndarray


class Searcher(Protocol):
    """A way to search; `take` chooses the queries that the others are about."""

    queries: Both
    gallery: Both

    def take(self, rows: np.ndarray) -> None:
        """Score some queries against all images, int[b]."""

    def images(self, renewed: np.ndarray) -> np.ndarray:
        """Return the scores of images, float32[b, n], once those of bool[n] were embedded again."""

    def classes(self, renewed: np.ndarray) -> np.ndarray:
        """Return the scores of the gallery's classes, ascending, float64[b, c], likewise."""


def judges_scores(metric: Metric) -> bool:
    """Return whether a metric goes by scores of images or classes; others go by features."""
    return judges(metric) != "features"


def renewals(order: np.ndarray, shares: Sequence[float] | np.ndarray) -> np.ndarray:
    """Return which images were embedded again at each share β: the first round(β n) of the order.

    Args:
      order: int[n], the rows of the gallery in the order in which they are embedded again.
      shares: in [0, 1].

    Returns:
      bool[s, n].
    """
    masks = np.zeros((len(shares), len(order)), bool)
    for mask, share in zip(masks, shares, strict=True):
        mask[order[: round(share * len(order))]] = True
    return masks


def measure(
    searcher: Searcher, metrics: Sequence[Metric], order: np.ndarray, shares: Sequence[float]
) -> dict[str, Measured]:
    """Measure metrics at each share of the gallery that was embedded again.

    Args:
      searcher: with its queries and gallery.
      metrics: see `judges_scores`.
      order: int[n], the rows of the gallery in the order in which they are embedded again.
      shares: in [0, 1].

    Returns:
      {name of the metric: what it gives}.

    Raises:
      UserError: no query has an image of its class in the gallery, and a metric needs one.
    """
    labels, masks = searcher.queries.labels, renewals(order, shares)
    scores = {metric.name: np.full((len(shares), len(labels)), np.nan) for metric in metrics}
    answers = np.zeros(len(shares))
    size = min(_BLOCK, max(1, _SCORES // len(order)))
    for start in range(0, len(labels), size):
        rows = np.arange(start, min(start + size, len(labels)))
        searcher.take(rows)
        for place, renewed in enumerate(masks):
            found = searcher.images(renewed)
            answers[place] += renewed[found.argmax(axis=1)].sum()
            for metric in metrics:
                scores[metric.name][place, rows] = (
                    _identified(searcher, rows, renewed)
                    if judges(metric) == "classes"
                    else _ranked(metric, searcher, rows, found)
                )
    if any(np.isnan(found).all() for found in scores.values()):
        raise no_match()
    return {name: Measured(found, answers / len(labels)) for name, found in scores.items()}


def _identified(searcher, rows, renewed):
    classes = np.unique(searcher.gallery.labels)
    right = names_right(searcher.classes(renewed), classes, searcher.queries.labels[rows])
    return right.astype(np.float64)


def _ranked(metric, searcher, rows, found):
    labels, answers = searcher.queries.labels[rows], searcher.gallery.labels
    own = None if searcher.queries.own is None else searcher.queries.own[rows]
    matches = answers[None] == labels[:, None]
    if own is not None:
        at = np.flatnonzero(own >= 0)
        matches[at, own[at]] = False
    has_match = matches.any(axis=1)
    if not has_match.any():
        return np.full(len(rows), np.nan)
    if metric in (recall(1), cmc(1)):
        hits = np.take_along_axis(matches, found.argmax(axis=1)[:, None], 1)[:, 0]
        return np.where(has_match, hits, np.nan)
    units, columns = np.eye(len(rows), dtype=np.float32), np.ascontiguousarray(found.T)
    return metric.checked(Queries(units, labels, own), [(columns, answers)])[0]


class _Scores:
    """Scores of a block of queries by both versions."""

    def __init__(self, queries: Both, gallery: Both):
        self.queries, self.gallery = queries, gallery
        self.names, self.codes = np.unique(gallery.labels, return_inverse=True)
        self.rows = np.zeros(0, np.int64)
        self.own = np.zeros((2, 0), np.int64)  # places of the block's own pictures: query, image
        self.old = self.new = np.zeros((0, 0), np.float32)

    def take(self, rows: np.ndarray) -> None:
        """See `Searcher`."""
        self.rows = rows
        self.old = self.queries.old[rows] @ self.gallery.old.T
        self.new = self.queries.new[rows] @ self.gallery.new.T
        if self.queries.own is not None:
            at = np.flatnonzero(self.queries.own[rows] >= 0)
            self.own = np.stack([at, self.queries.own[rows][at]])

    def without_own(self, scores: np.ndarray) -> np.ndarray:
        """Put each query's own picture behind all others, in place."""
        scores[tuple(self.own)] = -2 * _BELOW
        return scores


class Swap(_Scores):
    """Old features compare with one kind of queries, features embedded again with the new version's.

    Args:
      queries: `old` has the new version's queries for the old space: mapped into it, or as they are.
      gallery: of both versions.
      one_space: whether a class's mean is taken over old and new features alike; else its score is the
        cosine to the mean of its old ones and that of its new ones, weighted by their numbers.
    """

    def __init__(self, queries: Both, gallery: Both, one_space: bool):
        super().__init__(queries, gallery)
        self.one_space = one_space
        self._sums: dict[bytes, tuple[np.ndarray, list[np.ndarray]]] = {}

    def images(self, renewed: np.ndarray) -> np.ndarray:
        """See `Searcher`."""
        return self.without_own(np.where(renewed, self.new, self.old))

    def classes(self, renewed: np.ndarray) -> np.ndarray:
        """See `Searcher`; a query's own picture is left out of its class."""
        old, new = self.gallery[:2]
        if self.one_space:
            features = np.where(renewed[:, None], new, old)
            scores = np.where(renewed, self.new, self.old)
            key = renewed.tobytes()
            parts = [self._cosines(features, scores, np.ones(len(renewed), bool), key=key)]
        else:
            parts = [
                self._cosines(*part, key=part[-1].tobytes() + name)
                for name, part in (
                    (b"old", (old, self.old, ~renewed)),
                    (b"new", (new, self.new, renewed)),
                )
            ]
        total = sum(sizes for _, sizes in parts)
        found = sum(cosines * sizes for cosines, sizes in parts) / _nonzero(total)
        return np.where(total > 0, found, -np.inf)

    def _cosines(self, features, scores, kept, *, key):
        """float64[b, c] cosines to the means of each class's images among `kept`, and their numbers."""
        if key not in self._sums:  # the same for all blocks of queries
            rows, ones = features[kept].astype(np.float64), np.ones(int(kept.sum()))
            self._sums[key] = _by_class(self.codes[kept], rows, ones)
        codes, (sums, sizes) = self._sums[key]
        inner = _by_class(self.codes[kept], scores.T[kept].astype(np.float64))[1][0]
        shape = len(self.rows), len(self.names)
        found, numbers = np.zeros(shape), np.zeros(shape)
        found[:, codes] = inner.T / _nonzero(_norms(sums))
        numbers[:, codes] = sizes
        at, image = self.own[:, kept[self.own[1]]]
        place = np.searchsorted(codes, self.codes[image])
        rest = _norms(sums[place] - features[image])
        found[at, codes[place]] = (inner[place, at] - scores[at, image]) / _nonzero(rest)
        numbers[at, codes[place]] -= 1
        return found, numbers


class Rescoring(_Scores):
    """An old index proposes images, and the new version ranks them by its own features.

    Images that were embedded again are searched by the new version itself; of the others, the
    `candidates` nearest by the old version's own query are embedded on demand. Both kinds are ranked by
    the new version; what was not proposed follows, in the old version's order. A class is the mean of
    its images that have new features; a class without any is no answer.

    Args:
      queries: of both versions.
      gallery: of both versions.
      candidates: images proposed to a query, at least 1.
    """

    def __init__(self, queries: Both, gallery: Both, candidates: int):
        super().__init__(queries, gallery)
        self.candidates = candidates
        self.proposed = np.zeros(len(gallery.labels), bool)  # to any query so far

    def images(self, renewed: np.ndarray) -> np.ndarray:
        """See `Searcher`."""
        seen = np.repeat(renewed[None], len(self.rows), axis=0)
        for place, near in enumerate(self._proposals(renewed)):
            seen[place, near] = True
            self.proposed[near] = True
        return self.without_own(np.where(seen, self.new, self.old - _BELOW))

    def classes(self, renewed: np.ndarray) -> np.ndarray:
        """See `Searcher`."""
        sums = np.zeros((len(self.names), self.gallery.new.shape[1]))
        codes, (some,) = _by_class(
            self.codes[renewed], self.gallery.new[renewed].astype(np.float64)
        )
        sums[codes] = some
        asking = self.queries.new[self.rows].astype(np.float64)
        counts = np.bincount(self.codes[renewed], minlength=len(sums))
        found = np.where(counts > 0, asking @ (sums / _nonzero(_norms(sums))[:, None]).T, -np.inf)
        own = np.full(len(self.rows), -1)
        own[self.own[0]] = self.own[1]
        for place, near in enumerate(self._proposals(renewed)):
            signs = np.ones(len(near), np.int64)
            if own[place] >= 0 and renewed[own[place]]:
                near, signs = np.append(near, own[place]), np.append(signs, -1)
            rows = self.gallery.new[near].astype(np.float64) * signs[:, None]
            codes, (more, sizes) = _by_class(self.codes[near], rows, signs)
            whole = sums[codes] + more
            cosines = whole @ asking[place] / _nonzero(_norms(whole))
            found[place, codes] = np.where(counts[codes] + sizes > 0, cosines, -np.inf)
        return found

    def _proposals(self, renewed) -> Iterator[np.ndarray]:
        """Yield the rows of the images proposed to each query of the block."""
        scores = np.where(renewed, -np.inf, self.old)
        scores[tuple(self.own)] = -np.inf
        count = min(self.candidates, int((~renewed).sum()))
        if not count:
            yield from np.zeros((len(scores), 0), np.int64)
            return
        nearest = np.argpartition(-scores, count - 1, axis=1)[:, :count]
        for place, near in enumerate(nearest):
            yield near[np.isfinite(scores[place, near])]


def _by_class(codes: np.ndarray, *parts: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """The classes that occur, int[m], and sums over each of them."""
    order = np.argsort(codes, kind="stable")
    found, starts = np.unique(codes[order], return_index=True)
    if not len(codes):
        return found, [part[:0] for part in parts]
    return found, [np.add.reduceat(part[order], starts, axis=0) for part in parts]


def _norms(rows):
    return np.linalg.norm(rows, axis=1)


def _nonzero(lengths):
    return np.where(lengths == 0, 1.0, lengths)
