"""Compatibility in numbers: from a matrix of accuracies, and Definition 1 measured on features.

A compatibility matrix M is float[T, T]: M[t, k] is the accuracy of queries embedded by version t
against a gallery embedded by version k <= t. Only the lower triangle is read; what stands above the
diagonal is ignored. Results are in the matrix's own unit.
"""

from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from compat_jax.errors import UserError, unknown
from compat_jax.retrieval.search import check_finite
from compat_jax.retrieval.verification import sample_pairs

Tie = Literal["incompatible", "compatible"]
TIES = ("incompatible", "compatible")
Distance = Literal["cosine", "euclidean"]
DISTANCES = ("cosine", "euclidean")


class PairShares(NamedTuple):
    """Shares of pairs that keep Definition 1's inequalities, NaN where there is no such pair."""

    same_class: float
    other_class: float
    num_same: int
    num_other: int


def compatible_pairs(matrix: np.ndarray, tie: Tie = "incompatible") -> np.ndarray:
    """Which cells meet the empirical criterion: new queries do better on the old gallery than old.

    Args:
      matrix: float[T, T], a compatibility matrix.
      tie: what M[t, k] == M[k, k] counts as; "incompatible" is the reference's choice, "compatible"
        that of CL2R.

    Returns:
      bool[T, T], true at [t, k], k < t, where M[t, k] > M[k, k]; false on and above the diagonal.

    Raises:
      UserError: a matrix that is not square or has a NaN in the lower triangle; unknown `tie`.

    Source: Shen et al. 2020; `create_position_matrix` in `src/iamcl2r/compatibility_metrics.py`.
    """
    matrix = _check_matrix(matrix)
    if tie not in TIES:
        raise unknown("tie", tie, TIES)
    diagonal = np.diagonal(matrix)
    passes = matrix >= diagonal if tie == "compatible" else matrix > diagonal
    return np.tril(passes, k=-1)


def average_compatibility(matrix: np.ndarray, tie: Tie = "incompatible") -> float:
    """AC: the share of pairs of versions that meet the empirical criterion.

    Args:
      matrix: float[T, T], a compatibility matrix.
      tie: see `compatible_pairs`.

    Returns:
      A float in [0, 1]; 1 for a single version, as in the reference.

    Raises:
      UserError: see `compatible_pairs`.

    Source: AC of the paper; `average_compatibility` in `src/iamcl2r/compatibility_metrics.py`.
    """
    return float(average_compatibility_per_step(matrix, tie)[-1])


def average_compatibility_per_step(matrix: np.ndarray, tie: Tie = "incompatible") -> np.ndarray:
    """AC of the first 1, 2, … T versions.

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
    """AA: the mean of the lower triangle with its diagonal.

    An accuracy of exactly 0 counts as 0; the reference takes it as missing and multiplies by 100.

    Args:
      matrix: float[T, T], a compatibility matrix.

    Returns:
      A float in the matrix's unit.

    Raises:
      UserError: a matrix that is not square or has a NaN in the lower triangle.

    Source: AA of the paper; `average_accuracy` in `src/iamcl2r/compatibility_metrics.py`.
    """
    return float(average_accuracy_per_step(matrix)[-1])


def average_accuracy_per_step(matrix: np.ndarray) -> np.ndarray:
    """AA of the first 1, 2, … T versions, the paper's AA_τ.

    Args:
      matrix: float[T, T], a compatibility matrix.

    Returns:
      float64[T] in the matrix's unit.

    Raises:
      UserError: see `average_accuracy`.
    """
    matrix = _check_matrix(matrix)
    cells = np.cumsum(np.arange(1, len(matrix) + 1))
    return np.cumsum(np.tril(matrix).sum(axis=1)) / cells


def backward_compatibility(matrix: np.ndarray) -> float:
    """BC: what the last version gains on the galleries of its predecessors over themselves.

    Args:
      matrix: float[T, T], a compatibility matrix.

    Returns:
      mean over k < T of M[T, k] - M[k, k], in the matrix's unit; 0 for a single version, which has
      nothing to be compared with (CL2R divides by zero there).

    Raises:
      UserError: see `average_accuracy`.

    Source: `backward_compatibility` in `src/cl2r/metrics.py`.
    """
    matrix = _check_matrix(matrix)
    gains = (matrix[-1] - np.diagonal(matrix))[:-1]
    return float(gains.mean()) if len(gains) else 0.0


def forward_compatibility(matrix: np.ndarray) -> float:
    """FC: what each version loses on its predecessor's gallery against its own.

    Args:
      matrix: float[T, T], a compatibility matrix.

    Returns:
      mean over t > 1 of M[t, t-1] - M[t, t], in the matrix's unit; 0 for a single version.

    Raises:
      UserError: see `average_accuracy`.

    Source: `forward_compatibility` in `src/cl2r/metrics.py`.
    """
    matrix = _check_matrix(matrix)
    gains = np.diagonal(matrix, offset=-1) - np.diagonal(matrix)[1:]
    return float(gains.mean()) if len(gains) else 0.0


def definition_1(
    new: np.ndarray,
    old: np.ndarray,
    labels: np.ndarray,
    *,
    distance: Distance = "cosine",
    sample: int | None = None,
    seed: int = 0,
    block: int = 2048,
) -> PairShares:
    """Measure Definition 1: how often does the new version pull together and push apart as it must?

    For ordered pairs (i, j), i != j, of images embedded by both versions, the inequality is
    d(new_i, old_j) <= d(old_i, old_j) within a class and >= across classes; equality keeps both.

    Args:
      new: float[n, d], features of the new version.
      old: float[n, d], features of the old version on the same images.
      labels: int[n].
      distance: "cosine", the paper's (features are normalised here), or "euclidean".
      sample: None for all n(n-1) pairs, else that many pairs of each kind, drawn uniformly with
        replacement.
      seed: of the sample.
      block: pairs are compared in squares of this side, so memory is O(block² + n d).

    Returns:
      PairShares: of each kind, the share of pairs that keep their inequality, and the pairs tried.

    Raises:
      UserError: versions of unequal feature size, a row that is not finite, labels of another
        length, unknown distance, a sample below 1.

    Source: Definition 1 of the paper, cosine distance as in its Theorem 1.
    """
    new, old, labels = _check_features(new, old, labels)
    if distance not in DISTANCES:
        raise unknown("distance", distance, DISTANCES)
    if sample is not None and sample < 1:
        raise UserError(f"sample must be at least 1 pair of each kind, or None, got {sample}")
    if distance == "cosine":
        new, old = _unit(new), _unit(old)
    # d(new_i, old_j) <= d(old_i, old_j) is (new_i - old_i) · old_j >= offset_i: one product instead
    # of two, exact where both versions agree on an image. On the sphere the offset is 0.
    shift = new - old
    offset = np.zeros(len(new), np.float32)
    if distance == "euclidean":
        offset = 0.5 * np.einsum("nd,nd->n", shift, new + old, dtype=np.float32)
    if sample is None:
        return _all_pairs(shift, offset, old, labels, min(block, len(new)))
    return _sampled_pairs(shift, offset, old, labels, sample, seed, block)


def _all_pairs(shift, offset, old, labels, block: int) -> PairShares:
    codes, sizes = np.unique(labels, return_inverse=True, return_counts=True)[1:]
    n = len(labels)
    padding = -n % block
    shift, old = (np.pad(x, ((0, padding), (0, 0))) for x in (shift, old))
    offset = np.pad(offset, (0, padding))
    codes = np.pad(codes.astype(np.int32), (0, padding), constant_values=-1)
    # Counts are an int32 a row; their sum may exceed it and is taken in int64 on the host.
    kept = np.asarray(_count_kept(shift, offset, old, codes, block=block))[:, :n].sum(1, np.int64)
    num_same = int(np.sum(sizes.astype(np.int64) * (sizes - 1)))
    num_other = n * (n - 1) - num_same
    return PairShares(*_share(kept, (num_same, num_other)), num_same, num_other)


@partial(jax.jit, static_argnames="block")
def _count_kept(shift, offset, old, codes, *, block: int) -> jax.Array:
    """int32[2, n]: of the pairs (i, j) of i's own class, and of others, those that keep theirs."""
    rows = jnp.arange(len(codes))
    blocks = jax.tree.map(
        lambda x: x.reshape(-1, block, *x.shape[1:]), (shift, offset, old, codes, rows)
    )

    def against_all(new_block):
        shift_i, offset_i, _, codes_i, rows_i = new_block

        def against(counts, old_block):
            _, _, old_j, codes_j, rows_j = old_block
            gain = jnp.dot(shift_i, old_j.T, precision="highest") - offset_i[:, None]
            same = (codes_i[:, None] == codes_j[None]) & (rows_i[:, None] != rows_j[None])
            other = (codes_i[:, None] != codes_j[None]) & (codes_j >= 0)[None]
            kept = jnp.stack([same & (gain >= 0), other & (gain <= 0)])
            return counts + kept.sum(axis=-1, dtype=jnp.int32), None

        return jax.lax.scan(against, jnp.zeros((2, block), jnp.int32), blocks)[0]

    counts = jax.lax.map(against_all, blocks)
    return counts.transpose(1, 0, 2).reshape(2, -1)


def _sampled_pairs(shift, offset, old, labels, sample: int, seed: int, block: int) -> PairShares:
    rng = np.random.default_rng(seed)
    num_classes = len(np.unique(labels))
    numbers, kept = [], []
    for same, exists in ((True, num_classes < len(labels)), (False, num_classes > 1)):
        i, j = sample_pairs(labels, labels, same, sample if exists else 0, rng, same_set=True)
        count = 0
        for start in range(0, len(i), block):
            a, b = i[start : start + block], j[start : start + block]
            gain = np.einsum("nd,nd->n", shift[a], old[b], dtype=np.float64) - offset[a]
            count += int(np.sum(gain >= 0 if same else gain <= 0))
        numbers.append(len(i))
        kept.append(count)
    return PairShares(*_share(kept, numbers), *numbers)


def _share(kept, numbers) -> list[float]:
    return [int(k) / n if n else float("nan") for k, n in zip(kept, numbers, strict=True)]


def _unit(features: np.ndarray) -> np.ndarray:
    norm = np.sqrt(np.einsum("nd,nd->n", features, features))[:, None]
    return features / np.where(norm == 0, 1, norm)


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


def _check_features(new, old, labels) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    new, old, labels = np.asarray(new, np.float32), np.asarray(old, np.float32), np.asarray(labels)
    if new.ndim != 2 or new.shape != old.shape:
        raise UserError(
            f"Definition 1 compares features [n, d] of the same images, got {new.shape} (new) and "
            f"{old.shape} (old): versions of unequal feature size cannot be compared"
        )
    if labels.shape != (len(new),) or not len(new):
        raise UserError(f"{len(new)} features need as many labels (>= 1), got shape {labels.shape}")
    check_finite("new", new)
    check_finite("old", old)
    return new, old, labels
