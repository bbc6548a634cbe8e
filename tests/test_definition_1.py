"""Definition 1 counted on features, against float64."""

import numpy as np
import pytest

from compat_jax import definition_1 as c
from compat_jax.errors import UserError


def features_of_two_versions(n=97, d=8, classes=5, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    centres = rng.standard_normal((classes, d))
    old = (centres[labels] + rng.standard_normal((n, d))).astype(np.float32)
    new = (centres[labels] + 0.5 * rng.standard_normal((n, d))).astype(np.float32)
    return new, old, labels


def oracle_definition_1(new, old, labels, distance):
    new, old = new.astype(np.float64), old.astype(np.float64)
    if distance == "cosine":
        new, old = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (new, old))
        across, within = 1 - new @ old.T, 1 - old @ old.T
    else:
        across, within = (np.linalg.norm(x[:, None] - old[None], axis=-1) for x in (new, old))
    same = labels[:, None] == labels[None, :]
    other = ~same
    np.fill_diagonal(same, False)
    return (
        (across <= within)[same].mean(),
        (across >= within)[other].mean(),
        same.sum(),
        other.sum(),
    )


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
@pytest.mark.parametrize("block", [1, 16, 97, 4096])
def test_definition_1_against_float64(distance, block):
    new, old, labels = features_of_two_versions()
    if block == 1:
        new, old, labels = new[:7], old[:7], labels[:7]
    got = c.definition_1(new, old, labels, distance=distance, block=block)
    same_class, other_class, num_same, num_other = oracle_definition_1(
        new, old, labels, distance=distance
    )
    assert (got.num_same, got.num_other) == (num_same, num_other)
    assert got.same_class == pytest.approx(same_class, abs=1e-12)
    assert got.other_class == pytest.approx(other_class, abs=1e-12)


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
def test_a_version_is_compatible_with_itself(distance):
    _, old, labels = features_of_two_versions()
    assert c.definition_1(old, old, labels, distance=distance)[:2] == (1.0, 1.0)


def test_cosine_does_not_see_lengths():
    new, old, labels = features_of_two_versions()
    scaled = c.definition_1(new * np.float32(4), old * np.float32(0.25), labels)
    assert scaled == c.definition_1(new, old, labels)
    for twice in (old / np.linalg.norm(old, axis=1, keepdims=True), old * np.float32(3)):
        assert c.definition_1(twice, old, labels)[:2] == (1.0, 1.0)


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
def test_a_sample_estimates_the_shares(distance):
    new, old, labels = features_of_two_versions()
    exact = c.definition_1(new, old, labels, distance=distance)
    got = c.definition_1(new, old, labels, distance=distance, sample=20_000, seed=1, block=999)
    assert got[2:] == (20_000, 20_000)
    # Five standard errors of a share over 20,000 draws are at most 0.018.
    np.testing.assert_allclose(got[:2], exact[:2], atol=0.018)
    assert got == c.definition_1(new, old, labels, distance=distance, sample=20_000, seed=1)


def test_no_pair_of_a_kind_is_nan():
    new, old, _ = features_of_two_versions(n=6)
    for sample in (None, 50):
        one_class = c.definition_1(new, old, np.zeros(6, int), sample=sample)
        assert np.isnan(one_class.other_class) and one_class.num_other == 0
        all_distinct = c.definition_1(new, old, np.arange(6), sample=sample)
        assert np.isnan(all_distinct.same_class) and all_distinct.num_same == 0


def test_definition_1_never_holds_all_pairs():
    """Doubling the images doubles the scratch memory of the compiled program at most."""
    sizes = []
    for n in (1024, 2048):
        shift = np.zeros((n, 4), np.float32)
        gains = c.Gains(shift, shift[:, 0], shift)
        lowered = c.count_kept.lower(gains, np.zeros(n, np.int32), block=128)
        sizes.append(lowered.compile().memory_analysis().temp_size_in_bytes)
    assert sizes[1] <= 2 * sizes[0]
    assert sizes[1] < 4 * 2048 * 2048 / 4


def test_definition_1_of_a_chain_is_that_of_its_pairs():
    new, old, labels = features_of_two_versions(n=31)
    wide = np.ones((31, 9), np.float32)
    same_class, other_class = c.definition_1_matrix([old, new, wide], labels)
    pair = c.definition_1(new, old, labels)
    nan = np.nan
    np.testing.assert_array_equal(same_class, [[1, nan, nan], [pair[0], 1, nan], [nan, nan, 1]])
    np.testing.assert_array_equal(other_class, [[1, nan, nan], [pair[1], 1, nan], [nan, nan, 1]])


def test_definition_1_refuses_bad_input():
    new, old, labels = features_of_two_versions(n=6)
    with pytest.raises(UserError, match="unequal feature size"):
        c.definition_1(new[:, :4], old, labels)
    with pytest.raises(UserError, match="6 features need as many labels"):
        c.definition_1(new, old, labels[:5])
    with pytest.raises(UserError, match="Did you mean 'cosine'"):
        c.definition_1(new, old, labels, distance="cosin")
    with pytest.raises(UserError, match=r"old features .* row 2"):
        c.definition_1(new, np.where(np.arange(6)[:, None] == 2, np.nan, old), labels)
    with pytest.raises(UserError, match="at least 1 pair"):
        c.definition_1(new, old, labels, sample=0)
