"""Verification: decide if two images, each embedded by its own version, show the same class."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from compat_jax.errors import UserError
from compat_jax.retrieval.blocks import check_finite, check_sizes
from compat_jax.retrieval.labels import in_one_form

# Values of gallery features that `pair_scores` holds at a time.
VALUES = 1 << 22
_FOLDS = 10


class QueryPairs(NamedTuple):
    """Pairs of each query with gallery images, as many of its class as of others.

    Attributes:
      queries: int64[m], rows of the queries, in mixed order.
      genuine: int64[m, p], gallery rows of the query's class.
      impostor: int64[m, p], gallery rows of other classes.
    """

    queries: np.ndarray
    genuine: np.ndarray
    impostor: np.ndarray


def pair_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Compute the squared Euclidean distance of each pair of rows.

    Args:
      a: float[n, d], usually L2-normalised, so that distances lie in [0, 4].
      b: float[n, d].

    Returns:
      float64[n].

    Raises:
      UserError: the shapes differ.

    Source: `calculate_roc` in `src/cl2r/eval.py` of CompatibleLifelongRepresentation.
    """
    if a.shape != b.shape or a.ndim != 2:
        raise UserError(
            f"pairs need two arrays of the same shape [n, d], got {a.shape} and {b.shape}: "
            "index both with the pairs first"
        )
    difference = np.asarray(a, np.float64) - np.asarray(b, np.float64)
    return np.einsum("nd,nd->n", difference, difference)


def verification_accuracy(
    distances: np.ndarray,
    same: np.ndarray,
    folds: int = _FOLDS,
    thresholds: np.ndarray | None = None,
) -> float:
    """Compute the cross-validated accuracy of "same class if the distance is below a threshold".

    For each of `folds` contiguous folds, the threshold is the one that does best on the other folds
    (the lowest among equals); the accuracies on the folds are averaged. Pairs are not shuffled here;
    `make_pairs` returns them in mixed order.

    Args:
      distances: float[n], see `pair_distances`.
      same: bool[n], true for pairs of one class.
      folds: number of folds, 2..n.
      thresholds: float[m]; 0, 0.001, … 3.999 by default.

    Returns:
      The mean accuracy, in [0, 1].

    Raises:
      UserError: lengths differ, or there are fewer pairs than folds.

    Source: `verification` in `src/cl2r/eval.py`, taken there from insightface.
    """
    distances, same = _check_pairs(distances, same)
    parts, best, right = _best_thresholds(distances, same, folds, thresholds=thresholds)
    return float(np.mean(right[np.arange(folds), best] / [len(p) for p in parts]))


def right_decisions(
    distances: np.ndarray,
    same: np.ndarray,
    folds: int = _FOLDS,
    thresholds: np.ndarray | None = None,
) -> np.ndarray:
    """Tell for each pair whether `verification_accuracy` decides it rightly.

    Args:
      distances: float[n]; or float[m, p], whose rows of p pairs are never split between folds.
      same: bool of the same shape.
      folds: number of folds, 2..n (2..m).
      thresholds: see `verification_accuracy`.

    Returns:
      bool of the same shape. Its mean is the accuracy where the folds are of one size.

    Raises:
      UserError: see `verification_accuracy`.
    """
    distances, same = _check_pairs(distances, same, axes=2)
    parts, best, _ = _best_thresholds(distances, same, folds, thresholds=thresholds)
    thresholds = _THRESHOLDS if thresholds is None else np.asarray(thresholds)
    right = np.empty(distances.shape, bool)
    for part, threshold in zip(parts, thresholds[best], strict=True):
        right[part] = (distances[part] < threshold) == same[part]
    return right


_THRESHOLDS = np.arange(0, 4, 0.001)


def _best_thresholds(distances, same, folds: int, *, thresholds):
    """Rows of each fold, number of the threshold that does best outside it, right answers [folds, m]."""
    if not 2 <= folds <= len(distances):
        each = "pairs" if distances.ndim == 1 else "rows of pairs"
        raise UserError(
            f"folds must lie in 2..{len(distances)} (the number of {each}), got {folds}", "folds"
        )
    thresholds = _THRESHOLDS if thresholds is None else np.asarray(thresholds)
    parts = np.array_split(np.arange(len(distances)), folds)
    # Correct pairs at every threshold, per fold; the counts for training are all others.
    right = np.stack([_right_answers(distances[p], same[p], thresholds) for p in parts])
    return parts, np.argmax(right.sum(axis=0) - right, axis=1), right


def tar_at_far(
    distances: np.ndarray, same: np.ndarray, fars: Sequence[float] = (1e-4, 1e-3, 1e-2, 1e-1)
) -> np.ndarray:
    """Compute the true accept rate at each false accept rate.

    The threshold of each rate is the loosest that keeps the false accept rate within it.

    Args:
      distances: float[n], see `pair_distances`.
      same: bool[n], with at least one pair of each kind.
      fars: false accept rates, each in [0, 1].

    Returns:
      float64[len(fars)] in [0, 1].

    Raises:
      UserError: lengths differ, one kind of pair is missing, or a rate is out of range.
    """
    distances, same = _check_pairs(distances, same)
    genuine, impostor = distances[same], distances[~same]
    if not len(genuine) or not len(impostor):
        raise UserError(
            f"TAR at FAR needs pairs of both kinds, got {len(genuine)} of the same class and "
            f"{len(impostor)} of different classes"
        )
    return np.searchsorted(np.sort(genuine), accept_below(impostor, fars)) / len(genuine)


def accept_below(impostor: np.ndarray, fars: Sequence[float]) -> np.ndarray:
    """Return the loosest thresholds that keep false accepts within each rate.

    Args:
      impostor: float[n], distances of pairs of different classes, at least one.
      fars: false accept rates, each in [0, 1].

    Returns:
      float64[len(fars)]; pairs strictly below are accepted.

    Raises:
      UserError: a rate is out of range.
    """
    impostor, rates = np.sort(impostor), np.asarray(fars, np.float64)
    if not np.all((rates >= 0) & (rates <= 1)):
        raise UserError(f"false accept rates must lie in [0, 1], got {rates.tolist()}", "fars")
    # Accept strictly below the first impostor that is one too many; the small term undoes rounding
    # in products such as 0.07 * 100.
    allowed = np.floor(rates * len(impostor) * (1 + 1e-12)).astype(np.int64)
    return np.append(impostor, np.inf)[np.minimum(allowed, len(impostor))]


def query_pairs(
    labels_query: np.ndarray,
    labels_gallery: np.ndarray,
    own: np.ndarray | None = None,
    *,
    per_query: int = 10,
    seed: int = 0,
) -> QueryPairs:
    """Draw the same number of pairs of both kinds for every query, uniformly and with replacement.

    The draw depends on the labels only, so that versions are compared on the same pairs.

    Args:
      labels_query: int[q].
      labels_gallery: int[g].
      own: int[q], the gallery row of the same picture, which is not drawn as a match; -1 for none.
      per_query: pairs of each kind.
      seed: random seed.

    Returns:
      `QueryPairs` of the queries that have a match in the gallery.

    Raises:
      UserError: labels of different kinds, no query with a match, or a gallery of one class.
    """
    gallery = _Grouped(labels_query, labels_gallery, own=own)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(gallery.query_class))
    queries = order[gallery.partners(True)[order] > 0]
    if not len(queries):
        raise UserError("no query has an image of its class in the gallery: check the labels")
    if not gallery.partners(False)[queries].all():
        raise UserError("these labels have no pair of different classes: give labels that do")
    rows = np.repeat(queries, per_query)
    genuine, impostor = (
        gallery.draw(rows, same, rng=rng).reshape(-1, per_query) for same in (True, False)
    )
    return QueryPairs(queries, genuine, impostor)


def pair_scores(
    query: np.ndarray, gallery: np.ndarray, pairs: QueryPairs, far: float | None = None
) -> np.ndarray:
    """Score each query by the share of its pairs that are decided rightly.

    Args:
      query: float[q, d], L2-normalised, so that distances lie in [0, 4].
      gallery: float[g, d], L2-normalised.
      pairs: to decide, see `query_pairs`.
      far: None decides all pairs as in `verification_accuracy` with ten folds of queries; a false
        accept rate scores the genuine pairs that are accepted at it, as in `tar_at_far`.

    Returns:
      float64[q] in [0, 1], NaN for queries without pairs. The mean is the accuracy (for folds of one
      size), or the true accept rate.

    Raises:
      UserError: feature sizes that differ, values that are not finite, fewer than ten queries.
    """
    query, gallery = np.asarray(query, np.float32), np.asarray(gallery, np.float32)
    check_sizes(query, gallery)
    check_finite("query", query)
    check_finite("gallery", gallery)
    if far is None and len(pairs.queries) < _FOLDS:
        raise UserError(
            f"verification finds its threshold in {_FOLDS} folds of the queries, but only "
            f"{len(pairs.queries)} have an image of their class in the gallery: give {_FOLDS} or more, "
            "or choose tar@FAR",
            "query",
        )
    genuine = _distances(query, gallery, pairs.queries, rows=pairs.genuine)
    impostor = _distances(query, gallery, pairs.queries, rows=pairs.impostor)
    if far is None:
        distances = np.concatenate([genuine, impostor], axis=1)
        same = np.broadcast_to(np.arange(distances.shape[1]) < genuine.shape[1], distances.shape)
        right = right_decisions(distances, same, _FOLDS)
    else:
        right = genuine < accept_below(impostor.reshape(-1), [far])
    scores = np.full(len(query), np.nan)
    scores[pairs.queries] = right.mean(axis=1)
    return scores


def _distances(query, gallery, queries, *, rows):
    """float64[m, p], squared distances of each query to its gallery rows."""
    distances = np.empty(rows.shape)
    block = max(1, VALUES // (rows.shape[1] * query.shape[1]))
    for start in range(0, len(rows), block):
        part = slice(start, start + block)
        asking = np.repeat(query[queries[part]], rows.shape[1], axis=0)
        found = pair_distances(asking, gallery[rows[part].reshape(-1)])
        distances[part] = found.reshape(-1, rows.shape[1])
    return distances


def make_pairs(
    labels_query: np.ndarray,
    labels_gallery: np.ndarray,
    num_positive: int,
    num_negative: int,
    seed: int = 0,
    same_set: bool = False,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw random pairs of a query and a gallery image, in mixed order.

    Each kind is drawn uniformly, with replacement, from all pairs of that kind.

    Args:
      labels_query: int[q].
      labels_gallery: int[g].
      num_positive: number of pairs of the same class.
      num_negative: number of pairs of different classes.
      seed: random seed.
      same_set: query and gallery are the same images; no image is paired with itself.

    Returns:
      int64[n] query rows, int64[n] gallery rows, and bool[n], true for pairs of the same class.

    Raises:
      UserError: these labels have no pair of a kind that is asked for.
    """
    rng = np.random.default_rng(seed)
    draw = functools.partial(sample_pairs, labels_query, labels_gallery, rng=rng, same_set=same_set)
    positive = draw(True, count=num_positive)
    negative = draw(False, count=num_negative)
    order = rng.permutation(num_positive + num_negative)
    rows = np.concatenate([positive, negative], axis=1)[:, order]
    return rows[0], rows[1], order < num_positive


def sample_pairs(
    labels_query: np.ndarray,
    labels_gallery: np.ndarray,
    same: bool,
    count: int,
    rng: np.random.Generator,
    same_set: bool = False,
) -> np.ndarray:
    """Draw pairs of one kind, uniformly and with replacement, without listing all pairs.

    Args:
      labels_query: int[q].
      labels_gallery: int[g].
      same: True for pairs of the same class, False for pairs of different classes.
      count: number of pairs.
      rng: random generator.
      same_set: see `make_pairs`.

    Returns:
      int64[2, count], query rows and gallery rows.

    Raises:
      UserError: these labels have no such pair.
    """
    labels_query, labels_gallery = in_one_form(labels_query, labels_gallery)
    if count == 0:
        return np.zeros((2, 0), np.int64)
    own = np.arange(len(labels_query)) if same_set else None
    gallery = _Grouped(labels_query, labels_gallery, own=own)
    partners = gallery.partners(same)
    if partners.sum() == 0:
        kind = "the same class" if same else "different classes"
        raise UserError(f"these labels have no pair of {kind}: give labels that do, or ask for 0")
    query = rng.choice(len(partners), count, p=partners / partners.sum())
    return np.stack([query, gallery.draw(query, same, rng=rng)])


class _Grouped:
    """A gallery in the order of its classes, to draw partners of queries without listing pairs."""

    def __init__(self, labels_query, labels_gallery, own: np.ndarray | None = None):
        labels_query, labels_gallery = in_one_form(labels_query, labels_gallery)
        classes, gallery_class = np.unique(labels_gallery, return_inverse=True)
        self.order = np.argsort(gallery_class, kind="stable")
        self.sizes = np.bincount(gallery_class, minlength=len(classes) + 1)
        self.starts = np.cumsum(self.sizes) - self.sizes
        # A query class that the gallery lacks maps to an empty class after the last one.
        query_class = np.searchsorted(classes, labels_query)
        known = classes[np.minimum(query_class, len(classes) - 1)] == labels_query
        self.query_class = np.where(known, query_class, len(classes))
        self.own = None
        if own is not None:  # -1 also where the same picture has another label
            own = np.where(gallery_class[np.maximum(own, 0)] == self.query_class, own, -1)
            place = np.empty_like(self.order)
            place[self.order] = np.arange(len(self.order))
            self.own = np.where(own >= 0, place[np.maximum(own, 0)], -1)

    def partners(self, same: bool) -> np.ndarray:
        """int[q], the number of gallery images that a query can be paired with."""
        sizes = self.sizes[self.query_class]
        if not same:
            return len(self.order) - sizes
        return sizes if self.own is None else sizes - (self.own >= 0)

    def draw(self, query: np.ndarray, same: bool, *, rng: np.random.Generator) -> np.ndarray:
        """Draw a partner for each of some rows of the queries: int64, rows of the gallery."""
        draw = rng.integers(self.partners(same)[query])
        start, size = self.starts[self.query_class[query]], self.sizes[self.query_class[query]]
        if not same:
            return self.order[draw + np.where(draw >= start, size, 0)]  # skip the class
        if self.own is not None:
            own = self.own[query]
            draw += (own >= 0) & (draw >= own - start)  # skip the image itself
        return self.order[start + draw]


def _right_answers(distances: np.ndarray, same: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """Return int[m], the number of pairs that each threshold classifies correctly."""
    genuine, impostor = np.sort(distances[same]), np.sort(distances[~same])
    accepted = np.searchsorted(genuine, thresholds)
    return accepted + len(impostor) - np.searchsorted(impostor, thresholds)


def _check_pairs(
    distances: np.ndarray, same: np.ndarray, axes: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    distances, same = np.asarray(distances, np.float64), np.asarray(same)
    if same.dtype != bool and not np.isin(same, (0, 1)).all():
        raise UserError(
            f"same must be true or false (or 1 or 0) for each pair, got {np.unique(same)[:4].tolist()}"
        )
    same = same.astype(bool)
    if not 1 <= distances.ndim <= axes or distances.shape != same.shape:
        raise UserError(
            f"distances and same must be two lists of equal length, got shapes {distances.shape} "
            f"and {same.shape}"
        )
    if np.isnan(distances).any():
        raise UserError(
            f"distance {int(np.argmax(np.isnan(distances)))} is NaN: check the features"
        )
    return distances, same
