"""Retrieval metrics across versions: queries of one version against a gallery of another.

Features are used as they are; for cosine similarity, as in the reference, they must be
L2-normalised. Versions of unequal feature size are refused, and so are labels of different kinds
(numbers here, texts there). The functions that end in `_scores` return one value per query; the others
return the mean.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from compat_jax import hosts
from compat_jax.errors import UserError
from compat_jax.means import mean_score
from compat_jax.retrieval.blocks import SCORES, check_sizes
from compat_jax.retrieval.index import ExactIndex, VectorIndex
from compat_jax.retrieval.labels import in_one_form, labelled


class MeanAveragePrecision(NamedTuple):
    """Mean over the queries that have a match, and the number of queries left out without one."""

    value: float
    num_queries: int
    num_without_match: int


def neighbour_scores(
    query: np.ndarray,
    query_labels: np.ndarray,
    index: VectorIndex,
    *,
    gallery_labels: np.ndarray,
    max_rank: int,
    own: np.ndarray | None = None,
) -> np.ndarray:
    """Return for each query whether an image of its class is among its first 1, 2, … neighbours.

    Args:
      query: float[q, d].
      query_labels: int[q].
      index: of the gallery, with ids 0..n-1.
      gallery_labels: int[n].
      max_rank: neighbours to look at, 1..n (1..n-1 with `own`).
      own: int[q], the gallery row of the same picture, which is not its own neighbour; -1 for none.

    Returns:
      float64[q, max_rank] of 0 and 1, not falling along a row; NaN for queries without any match in
      the gallery.

    Raises:
      UserError: labels of different kinds, no query with a match, or see `exact.search`.
    """
    query, query_labels = labelled("query", query, query_labels)
    query_labels, gallery_labels = in_one_form(query_labels, gallery_labels)
    has_match = _has_match(query_labels, gallery_labels, own)
    neighbours = nearest_others(index, query, max_rank, own)
    hits = gallery_labels[neighbours] == query_labels[:, None]
    found = np.logical_or.accumulate(hits, axis=1).astype(np.float64)
    found[~has_match] = np.nan
    return found


def cumulative_matching_characteristic(
    query: np.ndarray,
    query_labels: np.ndarray,
    gallery: np.ndarray,
    gallery_labels: np.ndarray,
    max_rank: int = 10,
    same_set: bool = False,
    mesh: Mesh | None = None,
) -> np.ndarray:
    """Return the CMC: the share of queries with an image of their class among the first 1, 2, … ranks.

    Queries without any match in the gallery are left out.

    Args:
      query: float[q, d].
      query_labels: int[q].
      gallery: float[n, d].
      gallery_labels: int[n].
      max_rank: 1..n (1..n-1 with `same_set`).
      same_set: query and gallery are the same images, maybe of two versions, in the same order; an
        image is not its own neighbour.
      mesh: devices to spread the search over.

    Returns:
      float64[max_rank], not falling, in [0, 1].

    Raises:
      UserError: lengths that differ, labels of different kinds, no query with a match, or see
        `exact.search`.
    """
    gallery, gallery_labels = labelled("gallery", gallery, gallery_labels)
    index = ExactIndex(mesh=mesh)
    index.add(gallery)
    found = neighbour_scores(
        query,
        query_labels,
        index,
        gallery_labels=gallery_labels,
        max_rank=max_rank,
        own=_same_rows(query_labels, gallery_labels) if same_set else None,
    )
    return found[~np.isnan(found[:, 0])].mean(axis=0)


def recall_at_k(
    query: np.ndarray,
    query_labels: np.ndarray,
    gallery: np.ndarray,
    gallery_labels: np.ndarray,
    ks: Sequence[int] = (1, 5, 10),
    same_set: bool = False,
    mesh: Mesh | None = None,
) -> dict[int, float]:
    """Return the share of queries with an image of their class among the k nearest.

    Args:
      query: float[q, d].
      query_labels: int[q].
      gallery: float[n, d].
      gallery_labels: int[n].
      ks: neighbours to look at, each in 1..n (1..n-1 with `same_set`).
      same_set: see `cumulative_matching_characteristic`.
      mesh: devices to spread the search over.

    Returns:
      {k: recall in [0, 1]}; queries without any match in the gallery are left out.

    Raises:
      UserError: see `cumulative_matching_characteristic`.
    """
    if not ks or min(ks) < 1:
        raise UserError(f"ks must be one or more numbers >= 1, got {tuple(ks)}")
    curve = cumulative_matching_characteristic(
        query,
        query_labels,
        gallery,
        gallery_labels=gallery_labels,
        max_rank=max(ks),
        same_set=same_set,
        mesh=mesh,
    )
    return {k: float(curve[k - 1]) for k in ks}


def mean_average_precision(
    query: np.ndarray,
    query_labels: np.ndarray,
    gallery: np.ndarray,
    gallery_labels: np.ndarray,
    same_set: bool = False,
) -> MeanAveragePrecision:
    """Return the mAP over the full ranking of the gallery.

    Args:
      query: float[q, d].
      query_labels: int[q].
      gallery: float[n, d].
      gallery_labels: int[n].
      same_set: see `cumulative_matching_characteristic`.

    Returns:
      MeanAveragePrecision; queries without a match are left out of the mean and counted. Several
      processes (`jax.distributed`) share the queries.

    Raises:
      UserError: lengths or feature sizes that differ, labels of different kinds, or no query with a
        match.
    """
    own = _same_rows(query_labels, gallery_labels) if same_set else None
    precisions = average_precision_scores(
        query, query_labels, gallery, gallery_labels=gallery_labels, own=own
    )
    chosen = precisions[~np.isnan(precisions)]
    return MeanAveragePrecision(mean_score(chosen), len(chosen), len(precisions) - len(chosen))


def average_precision_scores(
    query: np.ndarray,
    query_labels: np.ndarray,
    gallery: np.ndarray,
    gallery_labels: np.ndarray,
    own: np.ndarray | None = None,
) -> np.ndarray:
    """Return the average precision of each query over the full ranking of the gallery.

    It is the mean, over the query's matches, of the share of matches among all images that score at
    least as high: independent of the order among ties, and equal to scikit-learn's
    `average_precision_score`.

    Args:
      query: float[q, d].
      query_labels: int[q].
      gallery: float[n, d].
      gallery_labels: int[n].
      own: int[q], the gallery row of the same picture, which is left out; -1 for none.

    Returns:
      float64[q], NaN for queries without a match.

    Raises:
      UserError: see `mean_average_precision`.
    """
    return _score_rankings(
        query,
        query_labels,
        gallery,
        gallery_labels=gallery_labels,
        own=own,
        score=_average_precision,
    )


def precision_at_r_scores(
    query: np.ndarray,
    query_labels: np.ndarray,
    gallery: np.ndarray,
    gallery_labels: np.ndarray,
    own: np.ndarray | None = None,
) -> np.ndarray:
    """Return MAP@R of each query, R being the number of its matches.

    It is (1/R) Σ_{i=1..R} P(i) rel(i), with P(i) the share of matches among the first i images and
    rel(i) whether the i-th is a match: 1 exactly where the R matches come first. Unlike average
    precision it ignores what follows. Of equal scores, the gallery's first comes first.

    Args:
      query: float[q, d].
      query_labels: int[q].
      gallery: float[n, d].
      gallery_labels: int[n].
      own: int[q], the gallery row of the same picture, which is left out; -1 for none.

    Returns:
      float64[q], NaN for queries without a match.

    Raises:
      UserError: see `mean_average_precision`.

    Source: Musgrave, Belongie, Lim, "A Metric Learning Reality Check", ECCV 2020.
    """
    return _score_rankings(
        query,
        query_labels,
        gallery,
        gallery_labels=gallery_labels,
        own=own,
        score=_precision_at_r,
    )


def _score_rankings(query, query_labels, gallery, *, gallery_labels, own, score):
    """Score each query by its scores of all gallery images; the processes share the queries."""
    query, query_labels = labelled("query", query, query_labels)
    gallery, gallery_labels = labelled("gallery", gallery, gallery_labels)
    query_labels, gallery_labels = in_one_form(query_labels, gallery_labels)
    check_sizes(query, gallery)
    has_match = _has_match(query_labels, gallery_labels, own)
    mine = np.flatnonzero(has_match)[jax.process_index() :: jax.process_count()]
    precisions = np.zeros(len(query))
    on_device = jax.device_put(gallery)
    for rows in np.array_split(mine, max(1, -(-len(mine) * len(gallery) // SCORES))):
        for row, scores in zip(rows, np.asarray(_scores(query[rows], on_device)), strict=True):
            match = gallery_labels == query_labels[row]
            if own is not None and own[row] >= 0:
                scores, match = np.delete(scores, own[row]), np.delete(match, own[row])
            precisions[row] = score(scores, match)
    precisions = hosts.sum_over_processes(precisions)
    precisions[~has_match] = np.nan
    return precisions


@jax.jit
def _scores(query, gallery):
    return jnp.dot(query, gallery.T, precision="highest")


def _average_precision(scores: np.ndarray, match: np.ndarray) -> float:
    """Mean precision at the matches, by two sorts (NumPy's is 15 times XLA's speed on CPU)."""
    everything, matches = np.sort(scores), np.sort(scores[match])
    at_least = len(everything) - np.searchsorted(everything, matches)
    matches_at_least = len(matches) - np.searchsorted(matches, matches)
    return float(np.mean(matches_at_least / at_least))


def _precision_at_r(scores: np.ndarray, match: np.ndarray) -> float:
    """MAP@R; only the images that can be among the first R are sorted."""
    r = int(match.sum())
    least = np.partition(scores, len(scores) - r)[len(scores) - r]
    near = np.flatnonzero(scores >= least)
    first = match[near[np.argsort(-scores[near], kind="stable")[:r]]]
    return float(np.sum(first * np.cumsum(first) / np.arange(1, r + 1)) / r)


def nearest_others(
    index: VectorIndex, query: np.ndarray, k: int, own: np.ndarray | None
) -> np.ndarray:
    """Return the k rows nearest to each query, its own picture left out.

    Args:
      index: of the gallery, with ids 0..n-1.
      query: float[q, d].
      k: neighbours, 1..n (1..n-1 with `own`).
      own: int[q], the gallery row of the same picture, -1 for none; None if no query is in the
        gallery.

    Returns:
      int64[q, k], the nearest first.

    Raises:
      UserError: k is out of range, or see `exact.search`.
    """
    if own is None:
        return index.search(query, k)[1]
    check_others(len(index), k)
    return drop_self(index.search(query, k + 1)[1], own)


def check_others(count: int, k: int = 1) -> None:
    """Refuse more neighbours than a gallery has beside the picture that asks.

    Args:
      count: rows of the gallery.
      k: neighbours.

    Raises:
      UserError: k is out of 1..count-1.
    """
    if count < 2:
        raise UserError("the gallery has no picture but the one that asks: give more", "gallery")
    if not 1 <= k < count:
        raise UserError(
            f"k={k} neighbours of a gallery of {count} rows that holds the picture that asks: choose "
            f"k in 1..{count - 1}",
            "k",
        )


def drop_self(neighbours: np.ndarray, own: np.ndarray) -> np.ndarray:
    """Leave each query's own picture out, or its last neighbour where it is not among them.

    Args:
      neighbours: int[q, k + 1], rows of the gallery.
      own: int[q], the gallery row of the same picture, -1 for none.

    Returns:
      int[q, k].
    """
    is_self = neighbours == own[:, None]
    is_self[~is_self.any(axis=1), -1] = True
    return neighbours[~is_self].reshape(len(neighbours), -1)


def _same_rows(query_labels, gallery_labels) -> np.ndarray:
    """Each query's own row, where query and gallery are the same images in the same order."""
    if not np.array_equal(query_labels, gallery_labels):
        raise UserError(
            "same_set=True takes the same images as query and gallery, but their labels differ: "
            "give both in one order, or same_set=False"
        )
    return np.arange(len(query_labels))


def _has_match(query_labels, gallery_labels, own: np.ndarray | None) -> np.ndarray:
    """Mark queries whose class has another image in the gallery than the query itself."""
    classes, sizes = np.unique(gallery_labels, return_counts=True)
    place = np.minimum(np.searchsorted(classes, query_labels), len(classes) - 1)
    count = np.where(classes[place] == query_labels, sizes[place], 0)
    if own is not None:
        count = count - ((own >= 0) & (gallery_labels[np.maximum(own, 0)] == query_labels))
    if not (count > 0).any():
        raise no_match()
    return count > 0


def no_match() -> UserError:
    """Make the error for queries that have nothing to find."""
    return UserError("no query has an image of its class in the gallery: check the labels")
