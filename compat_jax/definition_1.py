"""Definition 1 of compatibility, measured on the features of two versions."""

from collections.abc import Sequence
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from compat_jax.errors import UserError, unknown
from compat_jax.retrieval.blocks import check_finite
from compat_jax.retrieval.verification import sample_pairs

Distance = Literal["cosine", "euclidean"]


DISTANCES = ("cosine", "euclidean")
# Between one direction computed twice in float32, of up to some thousand numbers.
_ROUNDING = 1e-6


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
      that satisfy their inequality with t as the new version and k as the old one: 1 on the diagonal;
      NaN above it, between versions of unequal feature size, and where no such pair exists.

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
    d(new_i, old_j) <= d(old_i, old_j) within a class and >= across classes; equality satisfies both, and
    directions that differ by less than the rounding of float32 are equal.

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
    if distance == "cosine":  # directions that differ by no more than their rounding are the same
        shift[np.linalg.norm(shift, axis=1) <= _ROUNDING] = 0
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
