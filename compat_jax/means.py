"""Means of scores, and cells of a matrix, that rounding does not decide."""

import itertools
import math

import numpy as np
import numpy.typing as npt

# Means of scores in 0..1 that differ by less have the same value: sums of some million scores round by
# less, and means of yes or no, or of pairs decided rightly, differ by far more or not at all.
ROUNDING = 1e-12


def mean_score(scores: npt.ArrayLike) -> float:
    """Return the mean of scores, NaN left out: of an exact sum, so that their order does not matter.

    Args:
      scores: float[q].

    Returns:
      A float; NaN where no score is left.
    """
    values = np.asarray(scores, np.float64)
    kept = values[~np.isnan(values)].tolist()
    if not kept:
        return math.nan
    near = math.fsum(kept) / len(kept)
    rest = math.fsum(itertools.chain(kept, itertools.repeat(-near, len(kept)))) / len(kept)
    return near + rest  # undoes the division's rounding: equal scores have their value as mean


def leveled(means: np.ndarray, own: np.ndarray) -> np.ndarray:
    """Return means of scores, those that differ by rounding alone from another mean made equal to it.

    Scores that are equal as fractions, such as 1/10 + 2/10 and 3/10 + 0, have sums that round to
    different numbers. A tie must be one before it is counted.

    Args:
      means: float[...].
      own: float[...], what they are compared with, of a shape that broadcasts.

    Returns:
      float[...] of the shape of `means`.
    """
    return np.where(np.abs(means - own) < ROUNDING, own, means)
