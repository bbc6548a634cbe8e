"""Means of scores: of the exact sum, and tied where only rounding parts them."""

from fractions import Fraction

import hypothesis
import hypothesis.strategies as st
import numpy as np

from compat_jax.means import ROUNDING, leveled, mean_score

PARTS = st.lists(st.integers(0, 20), min_size=1, max_size=200)


@hypothesis.given(PARTS, st.randoms(use_true_random=False))
def test_the_order_of_scores_does_not_matter(parts, random):
    scores = np.array(parts) / 20
    mixed = scores.tolist()
    random.shuffle(mixed)
    assert mean_score(mixed) == mean_score(scores)
    exact = sum(map(Fraction, scores.tolist())) / len(scores)
    assert mean_score(scores) == float(exact)
    assert mean_score(np.full(len(scores), scores[0])) == scores[0]
    assert mean_score([*mixed, np.nan]) == mean_score(scores)
    assert np.isnan(mean_score([np.nan])) and np.isnan(mean_score([]))


@hypothesis.given(PARTS, PARTS)
def test_means_are_tied_if_and_only_if_their_fractions_are(first, second):
    size = min(len(first), len(second))
    one, other = (np.array([mean_score(np.array(p[:size]) / 20)]) for p in (first, second))
    tied = sum(first[:size]) == sum(second[:size])
    assert (leveled(one, other) == other).all() == tied
    assert tied or leveled(one, other) == one


def test_each_mean_is_leveled_with_its_own():
    matrix = np.array([[0.3, 0.0], [0.1 + 0.2, 0.6]])
    assert matrix[1, 0] > matrix[0, 0]
    assert leveled(matrix, np.diagonal(matrix)).tolist() == [[0.3, 0.0], [0.3, 0.6]]
    np.testing.assert_array_equal(
        leveled(np.array([np.nan, 0.5]), np.array([0.5, np.nan])), [np.nan, 0.5]
    )
    assert ROUNDING < 1e-9  # a query in a thousand million
