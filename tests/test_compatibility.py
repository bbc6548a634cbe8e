"""AC, AA, BC and FC of matrices."""

from pathlib import Path

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest

from compat_jax import compatibility as c
from compat_jax.errors import UserError

GOLDEN = np.load(Path(__file__).parent / "golden" / "metrics.npz")
# Released with the paper's code: HOC, 7 tasks, CIFAR-100 tasks, CIFAR-10 retrieval, ResNet-18.
RELEASED_ROWS = [
    [0.58892],
    [0.597, 0.6156],
    [0.6305, 0.65276, 0.69314],
    [0.63336, 0.65298, 0.70626, 0.72374],
    [0.65006, 0.67872, 0.70754, 0.72114, 0.73828],
    [0.6408, 0.67188, 0.71166, 0.72712, 0.74704, 0.76194],
    [0.6314, 0.6635, 0.72096, 0.73496, 0.75232, 0.76652, 0.77164],
]
RELEASED = np.array([row + [0.0] * (7 - len(row)) for row in RELEASED_ROWS])
# Rounded to two digits, so that ties are common.
MATRICES = st.integers(1, 8).flatmap(
    lambda n: hnp.arrays(np.float64, (n, n), elements=st.integers(0, 100).map(lambda x: x / 100))
)
TIES = st.sampled_from(c.TIES)
# A busy machine is no failure.
UNHURRIED = hypothesis.settings(deadline=None)


def test_released_matrix_of_the_paper():
    assert c.average_compatibility(RELEASED) == pytest.approx(20 / 21, abs=1e-12)
    assert 100 * c.average_accuracy(RELEASED) == pytest.approx(68.899, abs=1e-3)
    failing = np.argwhere(np.tril(~c.compatible_pairs(RELEASED), -1))
    assert failing.tolist() == [[4, 3]]


@pytest.mark.parametrize("i", range(4))
def test_reference_answers(i):
    matrix = GOLDEN[f"{i}/matrix"]
    np.testing.assert_allclose(c.average_compatibility(matrix), GOLDEN[f"{i}/ac"], rtol=1e-14)
    np.testing.assert_allclose(100 * c.average_accuracy(matrix), GOLDEN[f"{i}/aa"], rtol=1e-14)
    np.testing.assert_allclose(
        100 * c.average_accuracy_per_step(matrix), GOLDEN[f"{i}/aa_per_task"], rtol=1e-13
    )


def test_a_matrix_by_hand():
    matrix = [[0.5, 9, 9], [0.6, 0.5, 9], [0.4, 0.5, 0.8]]
    assert c.average_compatibility(matrix) == pytest.approx(1 / 3)
    assert c.average_compatibility(matrix, tie="compatible") == pytest.approx(2 / 3)
    np.testing.assert_allclose(c.average_compatibility_per_step(matrix), [1, 1, 1 / 3])
    np.testing.assert_allclose(c.average_accuracy_per_step(matrix), [0.5, 1.6 / 3, 3.3 / 6])
    assert c.backward_compatibility(matrix) == pytest.approx((-0.1 + 0.0) / 2)
    assert c.forward_compatibility(matrix) == pytest.approx((0.1 - 0.3) / 2)


def test_a_single_version():
    assert c.average_compatibility([[0.3]]) == 1.0
    assert c.average_accuracy([[0.3]]) == 0.3
    assert c.backward_compatibility([[0.3]]) == 0.0
    assert c.forward_compatibility([[0.3]]) == 0.0


def test_an_accuracy_of_zero_counts():
    assert c.average_accuracy([[0.0, 0.0], [0.0, 0.9]]) == pytest.approx(0.3)


def test_what_stands_above_the_diagonal_is_not_read():
    matrix = RELEASED.copy()
    matrix[np.triu_indices(7, 1)] = np.nan
    assert c.average_compatibility(matrix) == c.average_compatibility(RELEASED)
    assert c.average_accuracy(matrix) == c.average_accuracy(RELEASED)
    assert c.backward_compatibility(matrix) == c.backward_compatibility(RELEASED)
    assert c.forward_compatibility(matrix) == c.forward_compatibility(RELEASED)


@UNHURRIED
@hypothesis.given(MATRICES, TIES)
def test_ac_counts_what_its_definition_says(matrix, tie):
    versions = len(matrix)
    pairs = [(t, k) for t in range(versions) for k in range(t)]
    margin = 0 if tie == "incompatible" else -1e-9
    passed = [(t, k) for t, k in pairs if matrix[t, k] > matrix[k, k] + margin]
    expected = len(passed) / len(pairs) if pairs else 1.0
    assert c.average_compatibility(matrix, tie) == pytest.approx(expected, abs=1e-12)
    assert [tuple(cell) for cell in np.argwhere(c.compatible_pairs(matrix, tie))] == passed


@UNHURRIED
@hypothesis.given(MATRICES, TIES)
def test_ac_depends_on_the_order_of_accuracies_only(matrix, tie):
    assert c.average_compatibility(np.exp(3 * matrix), tie) == c.average_compatibility(matrix, tie)


@UNHURRIED
@hypothesis.given(MATRICES)
def test_ties_can_only_help(matrix):
    strict, loose = (c.average_compatibility(matrix, tie) for tie in c.TIES)
    assert 0 <= strict <= loose <= 1


@UNHURRIED
@hypothesis.given(MATRICES)
def test_aa_is_a_mean(matrix):
    triangle = matrix[np.tril_indices(len(matrix))]
    aa = c.average_accuracy(matrix)
    assert triangle.min() - 1e-12 <= aa <= triangle.max() + 1e-12
    assert c.average_accuracy(100 * matrix) == pytest.approx(100 * aa, abs=1e-9)


@UNHURRIED
@hypothesis.given(MATRICES, TIES)
def test_steps_are_the_metric_of_the_first_versions(matrix, tie):
    ac, aa = c.average_compatibility_per_step(matrix, tie), c.average_accuracy_per_step(matrix)
    for t in range(1, len(matrix) + 1):
        assert ac[t - 1] == c.average_compatibility(matrix[:t, :t], tie)
        assert aa[t - 1] == pytest.approx(c.average_accuracy(matrix[:t, :t]), abs=1e-12)


@UNHURRIED
@hypothesis.given(MATRICES)
def test_bc_and_fc_ignore_a_common_gain(matrix):
    for metric in (c.backward_compatibility, c.forward_compatibility):
        assert metric(matrix + 0.5) == pytest.approx(metric(matrix), abs=1e-12)


@pytest.mark.parametrize("matrix", [np.zeros((2, 3)), np.zeros(3), np.zeros((0, 0))])
def test_refuses_what_is_not_square(matrix):
    with pytest.raises(UserError, match="square"):
        c.average_accuracy(matrix)


def test_refuses_a_missing_accuracy():
    with pytest.raises(UserError, match=r"NaN at \[1, 0\].*queries of version 1"):
        c.average_compatibility([[0.5, np.nan], [np.nan, 0.5]])


def test_refuses_an_unknown_tie():
    with pytest.raises(UserError, match="Did you mean 'compatible'"):
        c.average_compatibility(RELEASED, tie="compatibel")


# Upgrades relative to an independent version


# AdvBCT's results on three landmark test sets, extended data, in per cent.
OLD, INDEPENDENT = (75.45, 49.15, 10.03), (81.15, 63.85, 16.48)
NEW, CROSS = (82.78, 62.13, 15.71), (78.55, 52.31, 11.49)


@pytest.mark.parametrize("unit", [1, 0.01])
def test_p_up_p_comp_and_p_1_as_advbct_printed_them(unit):
    four = (unit * np.array(x) for x in (OLD, INDEPENDENT, NEW, CROSS))
    got = c.upgrade_scores(*four)
    assert [round(100 * float(x), 2) for x in got] == [49.55, 58.09, 53.45]


def test_parity_is_a_half():
    got = c.upgrade_scores(OLD, INDEPENDENT, INDEPENDENT, cross=OLD)
    np.testing.assert_allclose(got, 0.5)
    assert c.upgrade_scores([1e-3], [1e-3 + 1e-9], [1.0], cross=[1.0]) == pytest.approx((1, 1, 1))


def test_update_gain_is_a_share_of_what_could_be_gained():
    gains = c.update_gain([0.5, 0.8, 0.65, 0.4, 0.7], 0.5, [0.8, 0.8, 0.8, 0.8, 0.5])
    np.testing.assert_allclose(gains, [0, 1, 0.5, -1 / 3, np.nan])


def test_upgrades_of_a_chain_are_those_of_its_pairs():
    matrices = np.stack([RELEASED[:4, :4], RELEASED[3:, 3:]])
    independent = np.array([[0.6, 0.65, 0.72, 0.78], [0.7, 0.72, 0.74, 0.8]])
    got = c.upgrade_matrices(matrices, independent)
    gains = [c.update_gains(m, i) for m, i in zip(matrices, independent, strict=True)]
    for t in range(4):
        for k in range(4):
            cells = [part[t, k] for part in (*got, *gains)]
            if k >= t:
                assert np.isnan(cells).all()
                continue
            old, new, cross = matrices[:, k, k], matrices[:, t, t], matrices[:, t, k]
            expected = c.upgrade_scores(old, independent[:, t], new, cross=cross)
            np.testing.assert_allclose(cells[:3], expected)
            shares = (cross - old) / (independent[:, t] - old)
            np.testing.assert_allclose(cells[3:], np.where(independent[:, t] > old, shares, np.nan))


def test_upgrades_refuse_bad_input():
    with pytest.raises(UserError, match="four arrays"):
        c.upgrade_scores(OLD, INDEPENDENT[:2], NEW, cross=CROSS)
    with pytest.raises(UserError, match="must be above 0"):
        c.upgrade_scores([0.1], [0.0], [0.2], cross=[0.2])
    with pytest.raises(UserError, match=r"independent accuracies of shape \(1, 7\), got \(1, 6\)"):
        c.update_gains(RELEASED, np.ones(6))
