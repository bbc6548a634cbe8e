"""Compatibility metrics of a matrix of accuracies, and Definition 1 measured on features.

A compatibility matrix M is float[T, T]: M[t, k] is the accuracy of queries embedded by version t
against a gallery embedded by version k <= t. Entries above the diagonal are ignored. Accuracies are
returned in the unit of the matrix.
"""

from collections.abc import Sequence
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from compat_jax.errors import UserError, unknown
from compat_jax.retrieval.exact import check_finite
from compat_jax.retrieval.verification import sample_pairs

Tie = Literal["incompatible", "compatible"]
TIES = ("incompatible", "compatible")
Distance = Literal["cosine", "euclidean"]
DISTANCES = ("cosine", "euclidean")


class PairShares(NamedTuple):
    """Shares of pairs that satisfy Definition 1's inequalities.

    Attributes:
      same_class: share among pairs of one class, in [0, 1]; NaN without such a pair.
      other_class: share among pairs of different classes, in [0, 1]; NaN without such a pair.
      num_same: pairs of one class that were compared.
      num_other: pairs of different classes that were compared.
    """

    same_class: float
    other_class: float
    num_same: int
    num_other: int


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


class Gains(NamedTuple):
    """Gains in distance of the new version over the old one, for all pairs of images, in factors.

    The gain of the pair (i, j) is shift_i · old_j - offset_i. It is >= 0 exactly where
    d(new_i, old_j) <= d(old_i, old_j).

    Attributes:
      shift: float32[n, d], new minus old features.
      offset: float32[n]; 0 for the cosine distance.
      old: float32[n, d], old features.
    """

    shift: jax.Array | np.ndarray
    offset: jax.Array | np.ndarray
    old: jax.Array | np.ndarray


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


def definition_1_matrix(
    features: Sequence[np.ndarray],
    labels: np.ndarray,
    *,
    distance: Distance = "cosine",
    sample: int | None = None,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Measure Definition 1 for every pair of versions, on the same images.

    Args:
      features: float[n, d] of each version.
      labels: int[n].
      distance: see `definition_1`.
      sample: see `definition_1`.
      seed: see `definition_1`.

    Returns:
      float64[T, T] twice: at [t, k] the share of pairs of one class, and of pairs of different classes,
      that satisfy their inequality with t as the new version and k as the old one; NaN above the
      diagonal and between versions of unequal feature size, 1 on the diagonal.

    Raises:
      UserError: see `definition_1`.
    """
    shares = np.full((2, len(features), len(features)), np.nan)
    for t, new in enumerate(features):
        for k, old in enumerate(features[: t + 1]):
            if np.shape(new) == np.shape(old):
                found = definition_1(new, old, labels, distance=distance, sample=sample, seed=seed)
                shares[:, t, k] = found.same_class, found.other_class
    return shares[0], shares[1]


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
    """Measure how often Definition 1 of compatibility holds for pairs of images.

    For an ordered pair (i, j), i != j, of images embedded by both versions, the definition demands
    d(new_i, old_j) <= d(old_i, old_j) within a class and >= across classes; equality satisfies both.

    Args:
      new: float[n, d], features of the new version.
      old: float[n, d], features of the old version on the same images.
      labels: int[n].
      distance: "cosine" (the paper's; features are normalised here) or "euclidean".
      sample: number of pairs of each kind to draw, uniformly with replacement; None compares all
        n(n-1) pairs.
      seed: random seed of the sample.
      block: pairs are compared in squares with this side, so memory is O(block² + n d).

    Returns:
      `PairShares`: for each kind of pair, the share that satisfies its inequality and the number of
      pairs compared.

    Raises:
      UserError: feature sizes differ, a row is not finite, the labels have another length, the
        distance is unknown, or the sample is below 1.

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
    gains = Gains(shift, offset, old)
    if sample is None:
        return _all_pairs(gains, labels, min(block, len(new)))
    return _sampled_pairs(gains, labels, sample, seed=seed, block=block)


def _all_pairs(gains: Gains, labels: np.ndarray, block: int) -> PairShares:
    codes, sizes = np.unique(labels, return_inverse=True, return_counts=True)[1:]
    n = len(labels)
    padding = -n % block
    gains = Gains(*(np.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1)) for x in gains))
    codes = np.pad(codes.astype(np.int32), (0, padding), constant_values=-1)
    # A row's counts fit into an int32; their sum may not and is taken in int64 on the host.
    kept = np.asarray(count_kept(gains, codes, block=block))[:, :n].sum(1, np.int64)
    num_same = int(np.sum(sizes.astype(np.int64) * (sizes - 1)))
    return _shares(kept, (num_same, n * (n - 1) - num_same))


@partial(jax.jit, static_argnames="block")
def count_kept(gains: Gains, codes: jax.Array, *, block: int) -> jax.Array:
    """Count the pairs (i, j) that satisfy their inequality, for each image i.

    Args:
      gains: of n images; n is a multiple of `block`.
      codes: int32[n], class of each image, -1 for padding.
      block: pairs are compared in squares with this side, so memory is O(block² + n d).

    Returns:
      int32[2, n]: pairs with an image of the same class, and with an image of another class.
    """
    rows = jnp.arange(len(codes))
    blocks = jax.tree.map(lambda x: x.reshape(-1, block, *x.shape[1:]), (*gains, codes, rows))

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


def _sampled_pairs(gains: Gains, labels, sample: int, *, seed: int, block: int) -> PairShares:
    rng = np.random.default_rng(seed)
    num_labels = len(np.unique(labels))
    numbers, kept = [], []
    for same, exists in ((True, num_labels < len(labels)), (False, num_labels > 1)):
        count = sample if exists else 0
        i, j = sample_pairs(labels, labels, same, count=count, rng=rng, same_set=True)
        numbers.append(len(i))
        kept.append(0)
        for start in range(0, len(i), block):
            a, b = i[start : start + block], j[start : start + block]
            gain = np.einsum("nd,nd->n", gains.shift[a], gains.old[b], dtype=np.float64)
            gain -= gains.offset[a]
            kept[-1] += int(np.sum(gain >= 0 if same else gain <= 0))
    return _shares(kept, numbers)


def _shares(kept, numbers) -> PairShares:
    same, other = (int(k) / n if n else float("nan") for k, n in zip(kept, numbers, strict=True))
    num_same, num_other = numbers
    return PairShares(same, other, num_same=num_same, num_other=num_other)


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
