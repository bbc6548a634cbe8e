"""Compatibility metrics of a matrix of accuracies.

A compatibility matrix M is float[T, T]: M[t, k] is the accuracy of queries embedded by version t
against a gallery embedded by version k <= t. Entries above the diagonal are ignored. Accuracies are
returned in the unit of the matrix.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from compat_jax.errors import UserError, unknown

Tie = Literal["incompatible", "compatible"]
TIES = ("incompatible", "compatible")


class Upgrade(NamedTuple):
    """The scores of an upgrade relative to retraining from nothing, in [0, 1]; 0.5 is parity.

    Attributes:
      up: P_up, the new version on its own gallery.
      comp: P_comp, the new version on the old gallery.
      one: P_1, the harmonic mean of both.
    """

    up: np.ndarray
    comp: np.ndarray
    one: np.ndarray


def compatible_pairs(matrix: np.ndarray, tie: Tie = "incompatible") -> np.ndarray:
    """Mark the pairs of versions that meet the empirical compatibility criterion.

    Version t is compatible with k if queries embedded by t do better on the gallery of k than queries
    embedded by k itself.

    Args:
      matrix: float[T, T], a compatibility matrix.
      tie: how M[t, k] == M[k, k] counts; "incompatible" is the choice of the reference, "compatible"
        that of CL2R.

    Returns:
      bool[T, T], true at [t, k] with k < t if M[t, k] > M[k, k]; false on and above the diagonal.

    Raises:
      UserError: the matrix is not square or has a NaN in the lower triangle, or `tie` is unknown.

    Source: Shen et al. 2020; `create_position_matrix` in `src/iamcl2r/compatibility_metrics.py`.
    """
    matrix = _check_matrix(matrix)
    if tie not in TIES:
        raise unknown("tie", tie, TIES)
    diagonal = np.diagonal(matrix)
    passes = matrix >= diagonal if tie == "compatible" else matrix > diagonal
    return np.tril(passes, k=-1)


def average_compatibility(matrix: np.ndarray, tie: Tie = "incompatible") -> float:
    """Compute AC, the share of pairs of versions that meet the empirical criterion.

    Args:
      matrix: float[T, T], a compatibility matrix.
      tie: see `compatible_pairs`.

    Returns:
      The share in [0, 1]; 1 for a single version, as in the reference.

    Raises:
      UserError: see `compatible_pairs`.

    Source: AC of the paper; `average_compatibility` in `src/iamcl2r/compatibility_metrics.py`.
    """
    return float(average_compatibility_per_step(matrix, tie)[-1])


def average_compatibility_per_step(matrix: np.ndarray, tie: Tie = "incompatible") -> np.ndarray:
    """Compute AC of the first 1, 2, … T versions.

    Args:
      matrix: float[T, T], a compatibility matrix.
      tie: see `compatible_pairs`.

    Returns:
      float64[T] in [0, 1]; the first is 1. (The reference's `AC_per_task` starts at the second.)

    Raises:
      UserError: see `compatible_pairs`.
    """
    passed = np.cumsum(compatible_pairs(matrix, tie).sum(axis=1))
    versions = np.arange(1, len(passed) + 1)
    pairs = versions * (versions - 1) // 2
    return np.where(pairs == 0, 1.0, passed / np.maximum(pairs, 1))


def average_accuracy(matrix: np.ndarray) -> float:
    """Compute AA, the mean of the lower triangle including the diagonal.

    An accuracy of exactly 0 counts as 0, where the reference takes it as missing. The reference also
    multiplies by 100.

    Args:
      matrix: float[T, T], a compatibility matrix.

    Returns:
      The mean, in the unit of the matrix.

    Raises:
      UserError: the matrix is not square or has a NaN in the lower triangle.

    Source: AA of the paper; `average_accuracy` in `src/iamcl2r/compatibility_metrics.py`.
    """
    return float(average_accuracy_per_step(matrix)[-1])


def average_accuracy_per_step(matrix: np.ndarray) -> np.ndarray:
    """Compute AA of the first 1, 2, … T versions, the paper's AA_τ.

    Args:
      matrix: float[T, T], a compatibility matrix.

    Returns:
      float64[T] in the unit of the matrix.

    Raises:
      UserError: see `average_accuracy`.
    """
    matrix = _check_matrix(matrix)
    cells = np.cumsum(np.arange(1, len(matrix) + 1))
    return np.cumsum(np.tril(matrix).sum(axis=1)) / cells


def backward_compatibility(matrix: np.ndarray) -> float:
    """Compute BC, the gain of the last version over its predecessors on their own galleries.

    Args:
      matrix: float[T, T], a compatibility matrix.

    Returns:
      The mean over k < T of M[T, k] - M[k, k], in the unit of the matrix; 0 for a single version,
      which has no predecessor (CL2R divides by zero there).

    Raises:
      UserError: see `average_accuracy`.

    Source: `backward_compatibility` in `src/cl2r/metrics.py`.
    """
    matrix = _check_matrix(matrix)
    gains = (matrix[-1] - np.diagonal(matrix))[:-1]
    return float(gains.mean()) if len(gains) else 0.0


def forward_compatibility(matrix: np.ndarray) -> float:
    """Compute FC, how each version does on its predecessor's gallery relative to its own gallery.

    Args:
      matrix: float[T, T], a compatibility matrix.

    Returns:
      The mean over t > 1 of M[t, t-1] - M[t, t], in the unit of the matrix; 0 for a single version.

    Raises:
      UserError: see `average_accuracy`.

    Source: `forward_compatibility` in `src/cl2r/metrics.py`.
    """
    matrix = _check_matrix(matrix)
    gains = np.diagonal(matrix, offset=-1) - np.diagonal(matrix)[1:]
    return float(gains.mean()) if len(gains) else 0.0


def update_gain(cross: np.ndarray, old: np.ndarray, independent: np.ndarray) -> np.ndarray:
    """Compute the share of an upgrade's gain that is had without embedding the gallery again.

    It is (M(new, old) - M(old, old)) / (M* - M(old, old)), where M* is the accuracy on its own gallery
    of a version that was trained on the same data without regard to compatibility: 0 if the old
    gallery gains nothing, 1 if it does as well as a new one would.

    Args:
      cross: float[...], M(new, old).
      old: float[...], M(old, old).
      independent: float[...], M*.

    Returns:
      float64[...]; NaN where M* is not above M(old, old): there was nothing to gain.

    Source: update gain of Shen et al. 2020, "Towards Backward-Compatible Representation Learning".
    """
    cross, old, independent = (np.asarray(x, np.float64) for x in (cross, old, independent))
    possible = np.where(independent > old, independent - old, np.nan)
    return (cross - old) / possible


def upgrade_scores(
    old: np.ndarray, independent: np.ndarray, new: np.ndarray, cross: np.ndarray
) -> Upgrade:
    """Compute AdvBCT's P_up, P_comp and P_1 of an upgrade, averaged over test sets.

    With s the logistic function and M* the accuracy of the independent version:
    P_up = mean s((M(new, new) - M*) / M*),
    P_comp = mean s((M(new, old) - M(old, old)) / (M* - M(old, old)))
    and P_1 = the mean over test sets of the harmonic mean of both.

    Args:
      old: float[sets, ...], M(old, old) on each test set, in any unit.
      independent: float[sets, ...], M*, above 0.
      new: float[sets, ...], M(new, new).
      cross: float[sets, ...], M(new, old).

    Returns:
      `Upgrade` of float64[...]; `comp` and `one` are NaN where M* is not above M(old, old).

    Raises:
      UserError: shapes that differ, no test set, M* not above 0.

    Source: Pan et al., "Boundary-Aware Backward-Compatible Representation via Adversarial Learning",
      CVPR 2023; the formulas agree with the results that its repository prints.
    """
    old, independent, new, cross = (
        np.asarray(x, np.float64) for x in (old, independent, new, cross)
    )
    shapes = {x.shape for x in (old, independent, new, cross)}
    if len(shapes) > 1 or not old.ndim or not len(old):
        raise UserError(
            f"an upgrade's accuracies are four arrays [test sets, ...] of one shape, got {shapes}"
        )
    if not (independent > 0).all():
        raise UserError("the independent version's accuracies must be above 0", "independent")
    up = _logistic((new - independent) / independent)
    comp = _logistic(update_gain(cross, old, independent))
    one = 2 * up * comp / (up + comp)
    return Upgrade(*(x.mean(axis=0) for x in (up, comp, one)))


def update_gains(matrix: np.ndarray, independent: np.ndarray) -> np.ndarray:
    """Compute the update gain of every pair of versions.

    Args:
      matrix: float[T, T], a compatibility matrix.
      independent: float[T], self-test of a version that was trained independently on the data of each.

    Returns:
      float64[T, T], see `update_gain`; NaN on and above the diagonal.

    Raises:
      UserError: the matrix is not square or has a NaN, another number of independent versions.
    """
    matrix, pairs, independent = _check_independent([matrix], [independent])
    gains = update_gain(matrix[0], np.diagonal(matrix[0]), independent[0][:, None])
    return np.where(pairs, gains, np.nan)


def upgrade_matrices(matrices: Sequence[np.ndarray], independent: np.ndarray) -> Upgrade:
    """Compute P_up, P_comp and P_1 of every pair of versions.

    Args:
      matrices: float[T, T] of each test set.
      independent: float[sets, T], self-tests of versions that were trained independently.

    Returns:
      `Upgrade` of float64[T, T], see `upgrade_scores`; NaN on and above the diagonal.

    Raises:
      UserError: see `update_gains`.
    """
    matrices, pairs, independent = _check_independent(matrices, independent)
    own = np.diagonal(matrices, axis1=1, axis2=2)
    old, new, rows = np.broadcast_arrays(own[:, None], own[:, :, None], independent[:, :, None])
    scores = upgrade_scores(old, rows, new, cross=np.where(pairs, matrices, old))
    return Upgrade(*(np.where(pairs, x, np.nan) for x in scores))


def _check_independent(matrices, independent):
    matrices = np.stack([_check_matrix(m) for m in matrices])
    independent = np.asarray(independent, np.float64)
    if independent.shape != matrices.shape[:2]:
        raise UserError(
            f"matrices {matrices.shape[1:]} of {len(matrices)} test sets need independent accuracies "
            f"of shape {matrices.shape[:2]}, got {independent.shape}",
            "independent",
        )
    return matrices, np.tri(matrices.shape[1], k=-1, dtype=bool), independent


def _logistic(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(0.5 * x))  # overflows nowhere


def _check_matrix(matrix: np.ndarray) -> np.ndarray:
    matrix = np.asarray(matrix, np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not len(matrix):
        raise UserError(
            f"a compatibility matrix is square (versions x versions), got shape {matrix.shape}"
        )
    missing = np.argwhere(np.tril(np.isnan(matrix)))
    if len(missing):
        t, k = missing[0].tolist()
        raise UserError(
            f"compatibility matrix has NaN at [{t}, {k}]: evaluate queries of version {t} against "
            f"the gallery of version {k} first"
        )
    return matrix
