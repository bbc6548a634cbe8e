"""Intervals and flips of a compatibility matrix, from the score of each query in each cell."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from compat_jax.errors import UserError
from compat_jax.means import leveled, mean_score
from compat_jax.retrieval.labels import check_rows

Scores = Mapping[tuple[int, int], np.ndarray]
RESAMPLES = 1000
LEVEL = 0.95
# Query weights that `resampled_means` holds at a time.
WEIGHTS = 1 << 20


class Interval(NamedTuple):
    """Lower and upper end, numbers or arrays of one shape."""

    low: Any
    high: Any


class Flips(NamedTuple):
    """Flips of queries between an old version and a new one on the old gallery.

    Attributes:
      positive: float64[T, T, ...], at [t, k] the share of queries that version k gets wrong on its own
        gallery and version t gets right there; 0 on the diagonal, NaN above it and between versions
        of unequal feature size.
      negative: float64[T, T, ...], the share that k gets right and t wrong.
    """

    positive: np.ndarray
    negative: np.ndarray


@dataclasses.dataclass(frozen=True)
class MatrixIntervals:
    """Intervals of every figure of a compatibility matrix, by a paired bootstrap over queries.

    Attributes:
      cells: of each cell, float64[T, T]; NaN above the diagonal and in cells without scores.
      differences: of [t, k] - [k, k], float64[T, T]; NaN likewise.
      average_compatibility: of AC.
      average_accuracy: of AA.
      average_accuracy_per_step: of AA_τ, float64[T].
      backward_compatibility: of BC; 0 for a single version.
      forward_compatibility: of FC; 0 for a single version.
      level: coverage, e.g. 0.95.
      resamples: number of resamples.
      seed: random seed.
    """

    cells: Interval
    differences: Interval
    average_compatibility: Interval
    average_accuracy: Interval
    average_accuracy_per_step: Interval
    backward_compatibility: Interval
    forward_compatibility: Interval
    level: float = LEVEL
    resamples: int = RESAMPLES
    seed: int = 0

    @property
    def within_noise(self) -> np.ndarray:
        """bool[T, T], true at [t, k] with k < t if the interval of the difference holds 0."""
        low, high = self.differences
        return np.tril((low <= 0) & (high >= 0), -1)

    def summary(self) -> dict[str, Any]:
        """Return everything as JSON values; null where there is no number."""
        fields = dataclasses.asdict(self)
        result: dict[str, Any] = {name: fields[name] for name in ("level", "resamples", "seed")}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Interval):
                result[field.name] = [without_nan(end) for end in value]
        result["within_noise"] = np.argwhere(self.within_noise).tolist()
        return result


def resampled_means(scores: np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """Draw the queries again, with replacement, and average the scores of every cell.

    All cells share the draw, so that their differences are paired.

    Args:
      scores: float[c, q], the scores of the same queries in c cells; NaN leaves a query out of a cell.
      resamples: number of draws, at least 1.
      seed: random seed.

    Returns:
      float64[resamples, c]; NaN where a draw has no query with a score.

    Raises:
      UserError: no query, or fewer than 1 resample.

    Source: Efron 1979; paired as in Sakai 2006, "Evaluating evaluation metrics based on the bootstrap".
    """
    scores = np.asarray(scores, np.float64)
    if scores.ndim != 2 or not scores.shape[1]:
        raise UserError(f"a bootstrap takes scores [cells, queries >= 1], got {scores.shape}")
    if resamples < 1:
        raise UserError(f"resamples must be at least 1, got {resamples}", "resamples")
    queries = scores.shape[1]
    missing = np.isnan(scores)
    kept = np.where(missing, 0, scores).T
    # Sums of whole numbers are exact in float32, whatever the order, and take half the time.
    whole = np.abs(kept).max() * queries < 1 << 24 and np.array_equal(kept, np.rint(kept))
    kept = kept.astype(np.float32 if whole else np.float64)
    present = (~missing).astype(kept.dtype).T if missing.any() else None
    rng = np.random.default_rng(seed)
    means = np.empty((resamples, len(scores)))
    block = max(1, WEIGHTS // queries)
    for start in range(0, resamples, block):
        rows = min(block, resamples - start)
        drawn = rng.integers(queries, size=(rows, queries)) + queries * np.arange(rows)[:, None]
        counts = np.bincount(drawn.reshape(-1), minlength=rows * queries)
        weights = counts.astype(kept.dtype).reshape(rows, queries)
        means[start : start + rows] = weights @ kept
        if present is None:
            means[start : start + rows] /= queries
        else:
            total = weights @ present
            means[start : start + rows] /= np.where(total == 0, np.nan, total)
    return means


def interval(samples: np.ndarray, level: float = LEVEL) -> Interval:
    """Return the percentile interval of bootstrap samples.

    Args:
      samples: float[resamples, ...]; NaNs are left out, unless all are.
      level: coverage, between 0 and 1.

    Returns:
      `Interval` of float64[...].

    Raises:
      UserError: the level is out of range.
    """
    if not 0 < level < 1:
        raise UserError(f"level must lie between 0 and 1, got {level}", "level")
    samples = np.asarray(samples, np.float64)
    tails = [(1 - level) / 2, (1 + level) / 2]
    whole = ~np.isnan(samples).any(axis=0)
    ends = np.full((2, *samples.shape[1:]), np.nan)
    ends[:, whole] = np.quantile(samples[:, whole], tails, axis=0)
    for cell in np.argwhere(~whole & ~np.isnan(samples).all(axis=0)):
        place = (slice(None), *cell)
        ends[place] = np.nanquantile(samples[place], tails)
    return Interval(*ends)


def matrix_intervals(
    scores: Scores,
    size: int,
    *,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> MatrixIntervals:
    """Compute intervals of a compatibility matrix and its averages, by a paired bootstrap over queries.

    Args:
      scores: {(t, k): float[q]}, as in `Evaluation.scores`; a cell without scores counts as 0.
      size: number of versions, T.
      level: coverage.
      resamples: number of resamples.
      seed: random seed.

    Returns:
      `MatrixIntervals`. They tell how the figures vary with the choice of queries; another seed of
      training varies them more.

    Raises:
      UserError: no scores, see `resampled_means` and `interval`.
    """
    if not scores:
        raise UserError("intervals need the scores of queries: evaluate the chain first")
    cells = sorted(scores)
    means = resampled_means(np.stack([scores[cell] for cell in cells]), resamples, seed)
    rows, columns = np.transpose(cells)
    matrices = np.full((resamples, size, size), np.nan)
    matrices[:, rows, columns] = means
    own = np.diagonal(matrices, axis1=1, axis2=2)
    matrices = leveled(matrices, own[:, None])
    filled = np.where(np.isnan(matrices), 0, matrices)
    figures = {name: interval(value, level) for name, value in _figures(filled).items()}
    for name in figures.keys() - {"average_accuracy_per_step"}:
        figures[name] = Interval(*map(float, figures[name]))
    return MatrixIntervals(
        cells=interval(matrices, level),
        differences=interval(matrices - own[:, None], level),
        level=level,
        resamples=resamples,
        seed=seed,
        **figures,
    )


def _figures(matrices: np.ndarray) -> dict[str, np.ndarray]:
    """AC, AA, AA_τ, BC and FC of float[n, T, T], by the definitions in `compatibility`."""
    size = matrices.shape[1]
    own = np.diagonal(matrices, axis1=1, axis2=2)
    older = np.tri(size, k=-1, dtype=bool)
    better = (matrices > own[:, None])[:, older]
    steps = np.cumsum(np.tril(matrices).sum(axis=2), axis=1) / np.cumsum(np.arange(1, size + 1))
    alone = np.zeros(len(matrices))
    several = size > 1
    next_older = np.diagonal(matrices, offset=-1, axis1=1, axis2=2)
    return {
        "average_compatibility": better.mean(axis=1) if several else alone + 1,
        "average_accuracy": steps[:, -1],
        "average_accuracy_per_step": steps,
        "backward_compatibility": (
            (matrices[:, -1] - own)[:, :-1].mean(axis=1) if several else alone
        ),
        "forward_compatibility": (next_older - own[:, 1:]).mean(axis=1) if several else alone,
    }


def flips(scores: Scores, size: int) -> Flips:
    """Compute positive and negative flips of every pair of versions.

    With a score in 0..1 that is not a yes or no, such as average precision, they are the means of gains
    and of losses. In any case positive - negative = M[t, k] - M[k, k].

    Args:
      scores: {(t, k): float[q]}, see `matrix_intervals`; NaN leaves a query out.
      size: number of versions, T.

    Returns:
      `Flips` of float64[T, T].

    Source: positive and negative flip rates, Yan et al. 2021, "Positive-Congruent Training"; as a
      decomposition of ΔR@K, with queries of both versions on the old gallery.
    """
    return Flips(*_flips(scores, size, _mean))


def flips_by_class(scores: Scores, size: int, *, labels: np.ndarray, num_classes: int) -> Flips:
    """Compute the flips of the queries of each class: who gains and who loses by an update.

    Args:
      scores: see `flips`.
      size: number of versions, T.
      labels: int[q], class of each query, 0..num_classes-1.
      num_classes: C.

    Returns:
      `Flips` of float64[T, T, C]; NaN for a class without a query.

    Raises:
      UserError: labels of another length or out of range.
    """
    labels = np.asarray(labels)
    lengths = {len(cell) for cell in scores.values()}
    if lengths - {len(labels)}:
        raise UserError(f"scores of {lengths} queries, but {len(labels)} labels", "labels")
    if len(labels):
        check_rows(labels, num_classes, f"there are {num_classes} classes", "labels")

    def by_class(values):
        kept = ~np.isnan(values)
        sums = np.bincount(labels[kept], values[kept], minlength=num_classes)
        counts = np.bincount(labels[kept], minlength=num_classes)
        return sums / np.where(counts == 0, np.nan, counts)

    return Flips(*_flips(scores, size, by_class, shape=(num_classes,)))


def _mean(values: np.ndarray) -> float:
    return mean_score(values) + 0.0  # never -0


def _flips(scores: Scores, size: int, average, *, shape: tuple[int, ...] = ()) -> np.ndarray:
    rates = np.full((2, size, size, *shape), np.nan)
    for (t, k), new in scores.items():
        if (k, k) in scores:
            change = new - scores[k, k]
            rates[0, t, k] = average(np.maximum(change, 0))
            rates[1, t, k] = average(np.maximum(-change, 0))
    return rates


def without_nan(values: Any) -> Any:
    """Return numbers as JSON values, None for NaN.

    Args:
      values: float or float[...].

    Returns:
      A number or nested lists.
    """
    array = np.asarray(values, np.float64)
    numbers = array.astype(object)
    numbers[np.isnan(array)] = None
    return numbers.tolist() if array.ndim else numbers[()]
