"""Retrieval metrics across versions: queries of one version against a gallery of another.

Features are taken as they come; for cosine similarity, as in the reference, they must be
L2-normalised. Versions of unequal feature size are refused.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from compat_jax import hosts
from compat_jax.errors import UserError
from compat_jax.retrieval.search import check_finite, check_sizes, search

# Scores that `mean_average_precision` holds at a time.
SCORES = 1 << 24


class MeanAveragePrecision(NamedTuple):
    """The mean over the queries that have a match, and how many were left out for want of one."""

    value: float
    num_queries: int
    num_without_match: int


def class_templates(gallery: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One feature a class: the mean of its images' features, L2-normalised.

    Args:
      gallery: float[n, d].
      labels: int[n].

    Returns:
      float32[c, d] templates and the c class numbers, ascending.

    Raises:
      UserError: labels of another length than the features, or none.

    Source: `image2template_feature` in `src/iamcl2r/performance_metrics.py`.
    """
    gallery, labels = _check_labels("gallery", gallery, labels)
    classes, codes, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    order = np.argsort(codes, kind="stable")
    starts = np.cumsum(sizes) - sizes
    sums = np.add.reduceat(gallery[order], starts, axis=0, dtype=np.float64)
    # The norm of the sum is that of the mean but for the class's size, which cancels.
    norms = np.linalg.norm(sums, axis=1, keepdims=True)
    return (sums / np.where(norms == 0, 1, norms)).astype(np.float32), classes


def identification(
    query: np.ndarray,
    query_labels: np.ndarray,
    gallery: np.ndarray,
    gallery_labels: np.ndarray,
) -> float:
    """Share of queries whose nearest class template, by inner product, is that of their class.

    Args:
      query: float[q, d], L2-normalised (the length of a query does not matter here).
      query_labels: int[q].
      gallery: float[n, d], L2-normalised; the lengths weigh the images within a template.
      gallery_labels: int[n].

    Returns:
      A float in [0, 1]. A query whose class the gallery lacks counts as wrong.

    Raises:
      UserError: lengths that differ, or see `search`.

    Source: the protocol's 1:N search; `identification` in `src/iamcl2r/performance_metrics.py`,
      with the class that it names rather than its place among the templates, which is the same
      when classes are numbered 0, 1, ….
    """
    templates, classes = class_templates(gallery, gallery_labels)
    return float(template_accuracies(query, query_labels, [templates], classes)[0])


def template_accuracies(
    query: np.ndarray,
    query_labels: np.ndarray,
    templates: Sequence[np.ndarray],
    classes: np.ndarray,
) -> np.ndarray:
    """`identification` of the same queries in the galleries of several versions, by one matmul.

    Args:
      query: float[q, d], L2-normalised.
      query_labels: int[q].
      templates: float32[c, d] for each version, of `class_templates`.
      classes: int[c], the classes of the templates, the same in every version.

    Returns:
      float64[versions], each in [0, 1]. Several processes (`jax.distributed`) share the queries.

    Raises:
      UserError: lengths or feature sizes that differ, an empty set, values that are not finite.
    """
    query, query_labels = _check_labels("query", query, query_labels)
    check_sizes(query, templates[0])
    check_finite("query", query)
    # Filled up to a power of two: a chain that grows compiles few programs.
    filled = np.zeros((1 << (len(templates) - 1).bit_length(), *templates[0].shape), np.float32)
    filled[: len(templates)] = templates
    on_device = jax.device_put(filled.reshape(-1, filled.shape[-1]))
    size = min(len(query), max(1, SCORES // len(on_device)))
    hits = np.zeros(len(templates))
    for start in range(size * jax.process_index(), len(query), size * jax.process_count()):
        rows, labels = query[start : start + size], query_labels[start : start + size]
        missing = size - len(rows)
        rows = np.pad(rows, ((0, missing), (0, 0))) if missing else rows
        nearest = np.asarray(_nearest_templates(rows, on_device, len(filled)))
        found = classes[nearest[: len(labels), : len(templates)]]
        hits += (found == labels[:, None]).sum(axis=0)
    return hosts.total(hits) / len(query)


@partial(jax.jit, static_argnames="versions")
def _nearest_templates(query, templates, versions):
    """int32[q, versions]: the nearest of each version's templates."""
    scores = jnp.dot(query, templates.T, precision="highest")
    return scores.reshape(len(query), versions, -1).argmax(axis=-1).astype(jnp.int32)


def cumulative_matching_characteristic(
    query: np.ndarray,
    query_labels: np.ndarray,
    gallery: np.ndarray,
    gallery_labels: np.ndarray,
    max_rank: int = 10,
    same_set: bool = False,
    mesh: Mesh | None = None,
) -> np.ndarray:
    """CMC: share of queries with an image of their class among the first 1, 2, … neighbours.

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
      UserError: lengths that differ, no query with a match, or see `search`.
    """
    query, query_labels = _check_labels("query", query, query_labels)
    gallery, gallery_labels = _check_labels("gallery", gallery, gallery_labels)
    has_match = _has_match(query_labels, gallery_labels, same_set)
    neighbours = search(query, gallery, max_rank + same_set, mesh=mesh)[1]
    if same_set:
        neighbours = _drop_self(neighbours)
    hits = gallery_labels[neighbours] == query_labels[:, None]
    return np.logical_or.accumulate(hits, axis=1)[has_match].mean(axis=0)


def recall_at_k(
    query: np.ndarray,
    query_labels: np.ndarray,
    gallery: np.ndarray,
    gallery_labels: np.ndarray,
    ks: Sequence[int] = (1, 5, 10),
    same_set: bool = False,
    mesh: Mesh | None = None,
) -> dict[int, float]:
    """Share of queries with an image of their class among the k nearest, as in metric learning.

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
        query, query_labels, gallery, gallery_labels, max(ks), same_set, mesh
    )
    return {k: float(curve[k - 1]) for k in ks}


def mean_average_precision(
    query: np.ndarray,
    query_labels: np.ndarray,
    gallery: np.ndarray,
    gallery_labels: np.ndarray,
    same_set: bool = False,
) -> MeanAveragePrecision:
    """mAP over the full ranking of the gallery.

    The average precision of a query is the mean, over its matches, of the share of matches among
    all images that score at least as high: independent of the order among ties, and what
    scikit-learn's `average_precision_score` gives.

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
      UserError: lengths or feature sizes that differ, or no query with a match.
    """
    query, query_labels = _check_labels("query", query, query_labels)
    gallery, gallery_labels = _check_labels("gallery", gallery, gallery_labels)
    check_sizes(query, gallery)
    has_match = _has_match(query_labels, gallery_labels, same_set)
    chosen = np.flatnonzero(has_match)
    own = chosen[jax.process_index() :: jax.process_count()]
    precisions = np.zeros(len(query))
    on_device = jax.device_put(gallery)
    for rows in np.array_split(own, max(1, -(-len(own) * len(gallery) // SCORES))):
        for row, scores in zip(rows, np.asarray(_scores(query[rows], on_device)), strict=True):
            match = gallery_labels == query_labels[row]
            if same_set:
                scores, match = np.delete(scores, row), np.delete(match, row)
            precisions[row] = _average_precision(scores, match)
    value = float(hosts.total(precisions)[chosen].mean())
    return MeanAveragePrecision(value, len(chosen), len(query) - len(chosen))


@jax.jit
def _scores(query, gallery):
    return jnp.dot(query, gallery.T, precision="highest")


def _average_precision(scores: np.ndarray, match: np.ndarray) -> float:
    """Mean precision at the matches, by two sorts (NumPy's is 15 times XLA's speed on CPU)."""
    everything, matches = np.sort(scores), np.sort(scores[match])
    at_least = len(everything) - np.searchsorted(everything, matches)
    matches_at_least = len(matches) - np.searchsorted(matches, matches)
    return float(np.mean(matches_at_least / at_least))


def _drop_self(neighbours: np.ndarray) -> np.ndarray:
    """Leave each row's own number out, or its last neighbour where it is not there."""
    is_self = neighbours == np.arange(len(neighbours))[:, None]
    is_self[~is_self.any(axis=1), -1] = True
    return neighbours[~is_self].reshape(len(neighbours), -1)


def _has_match(query_labels: np.ndarray, gallery_labels: np.ndarray, same_set: bool) -> np.ndarray:
    """bool[q]: has the gallery an image of the query's class (another one, for same_set)?"""
    if same_set and not np.array_equal(query_labels, gallery_labels):
        raise UserError(
            "same_set=True takes the same images as query and gallery, but their labels differ: "
            "give both in one order, or same_set=False"
        )
    classes, sizes = np.unique(gallery_labels, return_counts=True)
    has_match = np.isin(query_labels, classes[sizes > same_set])
    if not has_match.any():
        raise UserError("no query has an image of its class in the gallery: check the labels")
    return has_match


def _check_labels(name: str, features, labels) -> tuple[np.ndarray, np.ndarray]:
    features, labels = np.asarray(features, np.float32), np.asarray(labels)
    if not len(features) or labels.shape != features.shape[:1]:
        raise UserError(
            f"{name}: {len(features)} features need as many labels (at least one), got labels of "
            f"shape {labels.shape}"
        )
    check_finite(name, features)
    return features, labels
