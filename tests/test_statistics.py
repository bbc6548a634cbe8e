"""Intervals against loops over draws and normal theory; flips against counts of queries."""

import json

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from compat_jax import compatibility, statistics
from compat_jax.errors import UserError


def scores_of(size=3, queries=60, seed=0, binary=True):
    """Scores of a chain, {(t, k): float[queries]}, versions alike and getting better."""
    rng = np.random.default_rng(seed)
    hardness = rng.random(queries)
    found = {}
    for t in range(size):
        for k in range(t + 1):
            values = np.clip(1 - hardness + 0.05 * t + 0.2 * rng.random(queries), 0, 1)
            found[t, k] = (values > 0.5).astype(float) if binary else values
    return found


def matrix_of(scores, size, rows=slice(None)):
    matrix = np.zeros((size, size))
    for cell, values in scores.items():
        matrix[cell] = np.nanmean(values[rows])
    return matrix


def drawn_matrices(scores, size, resamples, seed):
    """The same draws as the library's, one by one."""
    rng = np.random.default_rng(seed)
    queries = len(next(iter(scores.values())))
    draws = [rng.integers(queries, size=queries) for _ in range(resamples)]
    return np.stack([matrix_of(scores, size, rows) for rows in draws])


# The bootstrap


@pytest.mark.parametrize("weights", [1, 60, 150, 1 << 20])
@pytest.mark.parametrize("binary", [True, False])
def test_means_are_those_of_one_draw_after_another(monkeypatch, binary, weights):
    monkeypatch.setattr(statistics, "WEIGHTS", weights)
    scores = np.stack(list(scores_of(binary=binary).values()))
    scores[2, :7] = np.nan
    got = statistics.resampled_means(scores, 50, seed=3)
    rng = np.random.default_rng(3)
    for means in got:
        rows = rng.integers(60, size=60)
        np.testing.assert_allclose(means, np.nanmean(scores[:, rows], axis=1), rtol=1e-14)


def test_the_interval_of_a_share_is_that_of_normal_theory():
    queries, share = 4000, 0.3
    scores = (np.arange(queries) < share * queries).astype(float)
    low, high = statistics.interval(statistics.resampled_means(scores[None], 4000))
    half = 1.959964 * np.sqrt(share * (1 - share) / queries)
    np.testing.assert_allclose([low[0], high[0]], [share - half, share + half], atol=0.1 * half)


def test_intervals_cover_the_truth_as_often_as_they_say():
    rng, hits = np.random.default_rng(0), 0
    for seed in range(300):
        sample = (rng.random(200) < 0.6).astype(float)
        low, high = statistics.interval(statistics.resampled_means(sample[None], 300, seed), 0.9)
        hits += low[0] <= 0.6 <= high[0]
    # 300 trials at 0.9: three standard deviations are 0.052.
    assert abs(hits / 300 - 0.9) < 0.052


def test_cells_share_their_draw():
    scores = np.stack([np.eye(40)[3], np.eye(40)[3], 1 - np.eye(40)[3]])
    means = statistics.resampled_means(scores, 200)
    np.testing.assert_array_equal(means[:, 0], means[:, 1])
    np.testing.assert_allclose(means[:, 0] + means[:, 2], 1, rtol=1e-15)


def test_an_interval_leaves_missing_draws_out():
    samples = np.array([[0.0, np.nan, np.nan], [1.0, 0.5, np.nan], [2.0, 0.7, np.nan]])
    low, high = statistics.interval(samples, 0.5)
    np.testing.assert_allclose(low, [0.5, 0.55, np.nan])
    np.testing.assert_allclose(high, [1.5, 0.65, np.nan])
    # One query of four has a score: about a third of the draws lack it.
    means = statistics.resampled_means(np.array([[np.nan, np.nan, 0.25, np.nan]]), 100)
    assert 0 < np.isnan(means).sum() < 100 and np.nanmax(means) == np.nanmin(means) == 0.25


# Intervals of a matrix


@pytest.mark.parametrize("binary", [True, False])
def test_figures_are_those_of_each_drawn_matrix(binary):
    size, resamples = 4, 120
    scores = scores_of(size, binary=binary)
    got = statistics.matrix_intervals(scores, size, resamples=resamples, seed=5)
    draws = drawn_matrices(scores, size, resamples, seed=5)
    lower = np.tril_indices(size)

    def quantiles(values):
        return np.quantile(values, [0.025, 0.975], axis=0)

    for interval, values in (
        (got.cells, draws),
        (got.differences, draws - np.diagonal(draws, axis1=1, axis2=2)[:, None]),
    ):
        for end, expected in zip(interval, quantiles(values), strict=True):
            np.testing.assert_allclose(end[lower], expected[lower], atol=1e-12)
            assert np.isnan(end[np.triu_indices(size, 1)]).all()
    for name in (
        "average_compatibility",
        "average_accuracy",
        "average_accuracy_per_step",
        "backward_compatibility",
        "forward_compatibility",
    ):
        values = [getattr(compatibility, name)(matrix) for matrix in draws]
        np.testing.assert_allclose(getattr(got, name), quantiles(values), atol=1e-12, err_msg=name)
    low, high = got.differences
    expected = [(t, k) for t in range(size) for k in range(t) if low[t, k] <= 0 <= high[t, k]]
    assert [tuple(cell) for cell in np.argwhere(got.within_noise)] == expected


def test_equal_versions_are_within_noise_and_far_ones_are_not():
    old = np.repeat([0.0, 1.0], 50)
    scores = {(0, 0): old, (1, 0): old, (1, 1): old, (2, 0): 1 - old * 0, (2, 1): old, (2, 2): old}
    got = statistics.matrix_intervals(scores, 3)
    assert got.within_noise.tolist() == [[False] * 3, [True, False, False], [False, True, False]]
    assert got.differences.low[1, 0] == got.differences.high[1, 0] == 0
    assert got.differences.low[2, 0] > 0.3


@pytest.mark.parametrize("queries", [15, 37, 200, 1000])
def test_versions_that_are_tied_in_every_draw_are_compatible_in_none(queries):
    rng = np.random.default_rng(queries)
    drawn = rng.integers(1, 10, queries)
    # 0.1, 0.2, ... by two roundings: sums of the one are not sums of the other.
    shares, again = drawn / 10, np.array([1 - (10 - n) / 10 for n in drawn])
    assert (shares != again).any()
    scores = {(t, k): again if t > k else shares for t in range(4) for k in range(t + 1)}
    found = statistics.matrix_intervals(scores, 4)
    assert found.average_compatibility == (0, 0) and found.within_noise.sum() == 6
    lower = np.tril_indices(4)
    assert not found.differences.low[lower].any() and not found.differences.high[lower].any()


def test_cells_without_scores_count_as_nothing():
    scores = scores_of(2)
    del scores[1, 0]
    got = statistics.matrix_intervals(scores, 2, resamples=40)
    assert np.isnan(got.cells.low[1, 0]) and not got.within_noise.any()
    assert got.average_compatibility == (0, 0)
    draws = drawn_matrices(scores, 2, 40, seed=0)
    aa = [compatibility.average_accuracy(matrix) for matrix in draws]
    np.testing.assert_allclose(got.average_accuracy, np.quantile(aa, [0.025, 0.975]), atol=1e-12)


def test_the_summary_is_json_and_the_same_again():
    scores = scores_of(3)
    text, again = (
        json.dumps(statistics.matrix_intervals(scores, 3).summary(), allow_nan=False)
        for _ in range(2)
    )
    assert text == again
    written = json.loads(text)
    assert written["level"] == 0.95 and written["resamples"] == 1000 and written["seed"] == 0
    assert written["cells"][0][0][1] is None and len(written["average_accuracy_per_step"][1]) == 3
    assert statistics.without_nan(np.nan) is None and statistics.without_nan(0.5) == 0.5


def test_a_single_version_has_intervals_too():
    got = statistics.matrix_intervals(scores_of(1), 1, resamples=30)
    assert got.average_compatibility == (1, 1) and got.backward_compatibility == (0, 0)
    np.testing.assert_allclose(got.average_accuracy, np.ravel(got.cells))


def test_bad_input_is_refused():
    with pytest.raises(UserError, match="need the scores of queries"):
        statistics.matrix_intervals({}, 2)
    with pytest.raises(UserError, match=r"scores \[cells, queries >= 1\], got \(2, 0\)"):
        statistics.resampled_means(np.zeros((2, 0)))
    with pytest.raises(UserError, match="at least 1, got 0"):
        statistics.resampled_means(np.zeros((2, 3)), 0)
    with pytest.raises(UserError, match="between 0 and 1, got 95"):
        statistics.interval(np.zeros(3), 95)
    labels = np.zeros(60, int)
    with pytest.raises(UserError, match=r"60}? queries, but 59 labels"):
        statistics.flips_by_class(scores_of(2), 2, labels=labels[1:], num_classes=1)
    with pytest.raises(UserError, match="labels run from 1 to 1, but there are 1 classes"):
        statistics.flips_by_class(scores_of(2), 2, labels=labels + 1, num_classes=1)
    with pytest.raises(UserError, match=r"labels must be whole numbers, .* got <U1"):
        statistics.flips_by_class(scores_of(2), 2, labels=labels.astype("U1"), num_classes=1)


# Flips


@hypothesis.given(st.integers(0, 2**31), st.booleans())
def test_gains_less_losses_are_the_difference(seed, binary):
    scores = scores_of(3, seed=seed, queries=30, binary=binary)
    got = statistics.flips(scores, 3)
    matrix, lower = matrix_of(scores, 3), np.tril_indices(3)
    expected = (matrix - np.diagonal(matrix))[lower]
    np.testing.assert_allclose((got.positive - got.negative)[lower], expected, atol=1e-15)
    assert np.isnan(got.positive[np.triu_indices(3, 1)]).all()
    assert not np.diagonal(got.positive).any() and not np.diagonal(got.negative).any()


def test_flips_count_queries():
    scores = scores_of(3)
    got = statistics.flips(scores, 3)
    for (t, k), new in scores.items():
        old = scores[k, k]
        won, lost = np.sum((old == 0) & (new == 1)), np.sum((old == 1) & (new == 0))
        assert (got.positive[t, k], got.negative[t, k]) == (won / 60, lost / 60)
        assert won - lost == new.sum() - old.sum()  # exact, in whole queries


def test_flips_by_class_say_who_loses():
    labels = np.array([0, 0, 0, 0, 1, 1, 3, 3])
    old = np.array([1, 1, 0, 0, 1, 1, np.nan, np.nan])
    new = np.array([1, 0, 1, 1, 0, 0, np.nan, np.nan])
    scores = {(0, 0): old, (1, 0): new, (1, 1): new}
    got = statistics.flips_by_class(scores, 2, labels=labels, num_classes=4)
    np.testing.assert_allclose(got.positive[1, 0], [2 / 4, 0, np.nan, np.nan])
    np.testing.assert_allclose(got.negative[1, 0], [1 / 4, 1, np.nan, np.nan])
    whole = statistics.flips(scores, 2)
    assert (whole.positive[1, 0], whole.negative[1, 0]) == (2 / 6, 3 / 6)


def test_pairs_that_cannot_be_compared_have_no_flips():
    scores = scores_of(2)
    del scores[1, 0]
    got = statistics.flips(scores, 2)
    assert np.isnan(got.positive[1, 0]) and got.negative[1, 1] == 0
