"""The probe of an index: how much of what an exact search finds it finds."""

from collections.abc import Callable

import numpy as np

from compat_jax.gallery.store import Found

LEAST_RECALL = 0.9  # of an index that stays in use
QUERIES, K = 50, 10


def probe(
    queries: np.ndarray,
    count: int,
    *,
    exact: Callable[[np.ndarray, int], Found],
    search: Callable[[np.ndarray, int], Found],
) -> float:
    """Return the share of the `K` best rows of an exact search that a search finds.

    Args:
      queries: float32[q, columns], `QUERIES` rows of the gallery; all, if it has fewer.
      count: number of its rows.
      exact: (queries, k) -> answers without the index.
      search: (queries, k) -> answers with it.
    """
    if not len(queries):
        return 1.0
    k = min(K, count)
    return recall(exact(queries, k).scores, search(queries, k).scores)


def recall(exact: np.ndarray, found: np.ndarray) -> float:
    """Return the share of answers that are as good as the exact ones.

    Scores are compared, not ids: of pictures that are there twice, either is right.

    Args:
      exact: float32[q, k], scores of an exact search.
      found: float32[q, k], scores of the search to judge.
    """
    worst = exact[:, -1:]
    return float((found >= worst - 1e-5 * np.maximum(1, np.abs(worst))).mean())


def too_little(place: str, share: float) -> str:
    """Return the beginning of the message for an index below `LEAST_RECALL`."""
    return (
        f"the index of {place} finds {share:.0%} of what an exact search finds, less than "
        f"{LEAST_RECALL:.0%}"
    )
