"""SLERP: a query between its old feature and its rotated new one."""

from typing import Annotated

import numpy as np

from compat_jax.align.linear import rotation
from compat_jax.align.maps import Map, Pairs, applies, normalized, unfit
from compat_jax.errors import UserError
from compat_jax.fields import Rule

FACTORS = tuple(round(0.1 * step, 1) for step in range(11))


def slerp(
    pairs: Pairs,
    factor: Annotated[
        float | None, Rule("share of the new feature; None to choose it by labels", low=0, high=1)
    ] = None,
    queries: Annotated[int, Rule("pictures of the choice that search", low=1)] = 1000,
) -> Map:
    """Put each query on the great circle from its old feature (0) to its rotated new one (1).

    A query needs both encoders. The rotation is that of `procrustes`; without a factor, it is the one of
    0, 0.1, ..., 1 with the best recall@1 among the pairs: queries search the old features of all
    other pictures. Of equal ones the largest counts.

    Args:
      pairs: features; with labels if the factor is to be chosen.
      factor: in [0, 1], or None.
      queries: the first so many pictures search.

    Raises:
      UserError: neither factor nor labels; no class with two pictures.

    Source: Shoemake 1985 for the path; the SVD map and the choice on a support set as published for
    queries between two encoders, whose authors find the same gain by mixing scores.
    """
    matrix = rotation(pairs)
    if factor is None:
        factor = _chosen(pairs, normalized(pairs.new @ matrix), queries)
    arrays = {"matrix": matrix.astype(np.float32), "factor": np.array(factor, np.float32)}
    settings = {"factor": float(factor)}
    return Map("slerp", *pairs.sizes, arrays=arrays, settings=settings)


def interpolate(start: np.ndarray, end: np.ndarray, factor: float) -> np.ndarray:
    """Interpolate along great circles: sin((1-a) t) / sin t start + sin(a t) / sin t end.

    Args:
      start: float[n, d], unit rows.
      end: float[n, d], unit rows.
      factor: a in [0, 1].

    Returns:
      float64[n, d], unit rows; for opposite ones, where no circle is determined, the nearer end.
    """
    first, second = _shares(np.sum(start * end, axis=1), factor)
    return normalized(first[:, None] * start + second[:, None] * end)


def _shares(cosine, factor):
    """Shares of start and end for unit vectors of these cosines: float64[n] each."""
    angle = np.arccos(np.clip(cosine.astype(np.float64), -1.0, 1.0))
    sine = np.sin(angle)
    is_arc = sine > 1e-6
    whole = np.where(is_arc, sine, 1.0)
    first = np.where(is_arc, np.sin((1.0 - factor) * angle) / whole, 1.0 - factor)
    second = np.where(is_arc, np.sin(factor * angle) / whole, factor)
    is_opposite = ~is_arc & (cosine < 0)
    first = np.where(is_opposite, float(factor < 0.5), first)
    return first, np.where(is_opposite, float(factor >= 0.5), second)


def _chosen(pairs, mapped, queries):
    """The factor of the best recall@1, the largest of equal ones."""
    labels = pairs.labels
    if labels is None:
        raise UserError(
            "give labels of the pairs, by which to choose the factor, or factor", "labels"
        )
    if reason := unfit("slerp", labels):
        raise UserError(f"{reason}; or give factor", "labels")
    rows = np.flatnonzero(_has_other(labels))[:queries]
    # Scores are linear in the query, so that two products serve all factors; lengths do not matter.
    old_scores, new_scores = pairs.old[rows] @ pairs.old.T, mapped[rows] @ pairs.old.T
    cosine = np.sum(pairs.old[rows] * mapped[rows], axis=1)
    itself = np.arange(len(rows)), rows
    best, chosen = -1.0, FACTORS[-1]
    for factor in FACTORS:
        first, second = _shares(cosine, factor)
        scores = first[:, None] * old_scores + second[:, None] * new_scores
        scores[itself] = -np.inf
        recall = np.mean(labels[scores.argmax(1)] == labels[rows])
        if recall >= best:
            best, chosen = recall, factor
    return chosen


def _has_other(labels: np.ndarray) -> np.ndarray:
    """Mark the pictures whose class has another one: bool[n]."""
    _, inverse, counts = np.unique(labels, return_inverse=True, return_counts=True)
    return counts[inverse] > 1


def _unfit(labels):
    if _has_other(labels).any():
        return ""
    return (
        "no class has two pictures among those that the map is fitted on, by which slerp chooses its "
        "factor: give two of a class"
    )


def _apply(arrays, new, old):
    if old is None:
        raise UserError(
            "slerp goes between two features of a query: give those of the old version too, "
            "map(features, old)",
            "old",
        )
    mapped = normalized(new @ arrays["matrix"])
    return interpolate(normalized(old), mapped, float(arrays["factor"]))


applies("slerp", _apply, needs_old=True, unfit=_unfit)
