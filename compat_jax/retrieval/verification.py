"""Verification: decide if two images, each embedded by its own version, show the same class."""

import functools
from collections.abc import Sequence

import numpy as np

from compat_jax.errors import UserError
from compat_jax.retrieval.labels import check_labels


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
    folds: int = 10,
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
    if not 2 <= folds <= len(distances):
        raise UserError(
            f"folds must lie in 2..{len(distances)} (the number of pairs), got {folds}", "folds"
        )
    thresholds = np.arange(0, 4, 0.001) if thresholds is None else np.asarray(thresholds)
    parts = np.array_split(np.arange(len(distances)), folds)
    # Correct pairs at every threshold, per fold; the counts for training are all others.
    right = np.stack([_right_answers(distances[p], same[p], thresholds) for p in parts])
    best = np.argmax(right.sum(axis=0) - right, axis=1)
    return float(np.mean(right[np.arange(folds), best] / [len(p) for p in parts]))


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
    genuine, impostor = distances[same], np.sort(distances[~same])
    if not len(genuine) or not len(impostor):
        raise UserError(
            f"TAR at FAR needs pairs of both kinds, got {len(genuine)} of the same class and "
            f"{len(impostor)} of different classes"
        )
    rates = np.asarray(fars, np.float64)
    if not np.all((rates >= 0) & (rates <= 1)):
        raise UserError(f"false accept rates must lie in [0, 1], got {rates.tolist()}", "fars")
    # Accept strictly below the first impostor that is one too many; the small term undoes rounding
    # in products such as 0.07 * 100.
    allowed = np.floor(rates * len(impostor) * (1 + 1e-12)).astype(np.int64)
    threshold = np.append(impostor, np.inf)[np.minimum(allowed, len(impostor))]
    return np.searchsorted(np.sort(genuine), threshold) / len(genuine)


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
    check_labels(labels_query, labels_gallery)
    if count == 0:
        return np.zeros((2, 0), np.int64)
    classes, gallery_class = np.unique(labels_gallery, return_inverse=True)
    order = np.argsort(gallery_class, kind="stable")
    sizes = np.bincount(gallery_class, minlength=len(classes) + 1)
    starts = np.cumsum(sizes) - sizes
    # A query class that the gallery lacks maps to an empty class after the last one.
    query_class = np.searchsorted(classes, labels_query)
    known = classes[np.minimum(query_class, len(classes) - 1)] == np.asarray(labels_query)
    query_class = np.where(known, query_class, len(classes))
    partners = sizes[query_class] - same_set if same else len(order) - sizes[query_class]
    if partners.sum() == 0:
        kind = "the same class" if same else "different classes"
        raise UserError(f"these labels have no pair of {kind}: give labels that do, or ask for 0")
    query = rng.choice(len(partners), count, p=partners / partners.sum())
    draw = rng.integers(partners[query])
    start, size = starts[query_class[query]], sizes[query_class[query]]
    if same:
        if same_set:
            place = np.empty_like(order)
            place[order] = np.arange(len(order))
            draw += draw >= place[query] - start  # skip the image itself
        return np.stack([query, order[start + draw]])
    draw += np.where(draw >= start, size, 0)  # skip the class
    return np.stack([query, order[draw]])


def _right_answers(distances: np.ndarray, same: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """Return int[m], the number of pairs that each threshold classifies correctly."""
    genuine, impostor = np.sort(distances[same]), np.sort(distances[~same])
    accepted = np.searchsorted(genuine, thresholds)
    return accepted + len(impostor) - np.searchsorted(impostor, thresholds)


def _check_pairs(distances: np.ndarray, same: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    distances, same = np.asarray(distances, np.float64), np.asarray(same)
    if same.dtype != bool and not np.isin(same, (0, 1)).all():
        raise UserError(
            f"same must be true or false (or 1 or 0) for each pair, got {np.unique(same)[:4].tolist()}"
        )
    same = same.astype(bool)
    if distances.ndim != 1 or distances.shape != same.shape:
        raise UserError(
            f"distances and same must be two lists of equal length, got shapes {distances.shape} "
            f"and {same.shape}"
        )
    if np.isnan(distances).any():
        raise UserError(
            f"distance {int(np.argmax(np.isnan(distances)))} is NaN: check the features"
        )
    return distances, same
