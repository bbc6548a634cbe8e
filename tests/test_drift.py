"""Angles and neural collapse against their definitions in float64."""

import numpy as np
import pytest

from compat_jax import drift, simplex
from compat_jax.errors import UserError


def features(n=80, d=6, classes=5, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.append(rng.integers(0, classes, n - classes), np.arange(classes))
    centres = np.random.default_rng(99).standard_normal((classes, d))
    return (centres[labels] + 0.3 * rng.standard_normal((n, d))).astype(np.float32), labels


def rotation(d, degrees):
    turn = np.eye(d)
    a = np.radians(degrees)
    turn[:2, :2] = [[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]]
    return turn


def mean_of(found, labels, c):
    return found[labels == c].astype(np.float64).mean(axis=0)


def cosine(a, b):
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


def test_angles_are_precise_where_arccos_is_not():
    for degrees in (0.0, 1e-6, 0.01, 45.0, 90.0, 179.999999, 180.0):
        a = np.radians(degrees)
        got = drift.angles(np.array([1.0, 0.0]), 3 * np.array([np.cos(a), np.sin(a)]))
        assert got == pytest.approx(degrees, abs=1e-13, rel=1e-9)
    assert np.isnan(drift.angles(np.zeros(3), np.ones(3)))


def test_drift_is_the_angle_between_class_means():
    old, labels = features()
    new = features(seed=1)[0]
    got = drift.drift(new, old, labels)
    expected = [
        np.degrees(np.arccos(cosine(mean_of(new, labels, c), mean_of(old, labels, c))))
        for c in range(5)
    ]
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_a_turned_space_has_drifted_by_its_angle():
    _, labels = features()
    flat = np.zeros((len(labels), 6))
    angle = 2 * np.pi * labels / 5
    flat[:, 0], flat[:, 1] = np.cos(angle), np.sin(angle)
    turned = [flat @ rotation(6, degrees).T for degrees in (0, 10, 35)]
    got = drift.drift_matrix([*turned, turned[0][:, :5]], labels)
    lower = [[0, np.nan, np.nan], [10, 0, np.nan], [35, 25, 0]]
    np.testing.assert_allclose(got[:3, :3], lower, atol=1e-9)
    np.testing.assert_allclose(got[3], [np.nan, np.nan, np.nan, 0], atol=1e-9)


def test_angles_to_prototypes():
    prototypes = np.asarray(simplex.prototypes(8))
    labels = np.repeat([1, 4, 6], 5)
    exact = drift.prototype_angles(2 * prototypes[labels], labels, prototypes)
    np.testing.assert_allclose(exact, 0, atol=1e-5)
    swapped = drift.prototype_angles(prototypes[labels], np.repeat([4, 1, 6], 5), prototypes)
    right = np.degrees(np.arccos(-1 / 7))
    np.testing.assert_allclose(swapped, [right, right, 0], atol=1e-4)


# Neural collapse


def oracle_collapse(found, labels, weights):
    """By the definitions, with the d x d moments and their pseudo-inverse."""
    found = found.astype(np.float64)
    classes = np.unique(labels)
    means = np.stack([mean_of(found, labels, c) for c in classes])
    centre = means.mean(axis=0)
    between = sum(np.outer(m - centre, m - centre) for m in means) / len(classes)
    within = np.zeros_like(between)
    for c, mean in zip(classes, means, strict=True):
        rows = found[labels == c] - mean
        within += rows.T @ rows / len(rows) / len(classes)
    nc1 = np.trace(within @ np.linalg.pinv(between, rcond=1e-10)) / len(classes)
    norms = [np.linalg.norm(m - centre) for m in means]
    pairs = [(i, j) for i in range(len(means)) for j in range(i)]
    cosines = np.array([cosine(means[i] - centre, means[j] - centre) for i, j in pairs])
    rows = weights[classes]
    gap = rows / np.linalg.norm(rows) - (means - centre) / np.linalg.norm(means - centre)
    differ = []
    for c in classes:
        named = [
            np.argmax(rows @ x) != np.argmin(np.linalg.norm(means - x, axis=1))
            for x in found[labels == c]
        ]
        differ.append(np.mean(named))
    return (
        nc1,
        np.std(norms) / np.mean(norms),
        np.std(cosines),
        np.mean(np.abs(cosines + 1 / (len(classes) - 1))),
        np.sum(gap**2),
        np.mean(differ),
        np.degrees(np.arccos(cosines)).mean(),
    )


@pytest.mark.parametrize("size", [3, 6, 12])
def test_neural_collapse_by_its_definitions(size):
    found, labels = features(d=size)
    labels = 2 * labels + 1  # class numbers need not be dense
    weights = np.random.default_rng(7).standard_normal((11, size))
    got = drift.neural_collapse(found, labels, weights)
    np.testing.assert_allclose(got, oracle_collapse(found, labels, weights), rtol=1e-5)
    assert got.nearest_mean > 0
    alone = drift.neural_collapse(found, labels)
    assert alone[:4] == got[:4] and np.isnan(alone.self_duality) and np.isnan(alone.nearest_mean)


def test_a_collapsed_network_scores_nothing():
    prototypes = np.asarray(simplex.prototypes(6), np.float64)
    labels = np.repeat(np.arange(6), [1, 2, 3, 4, 5, 6])
    got = drift.neural_collapse(3 * prototypes[labels] + 0.5, labels, prototypes)
    np.testing.assert_allclose(got[:5], 0, atol=1e-6)
    assert got.angle == pytest.approx(np.degrees(np.arccos(-1 / 5)), abs=1e-4)


def test_bad_input_is_refused():
    found, labels = features()
    with pytest.raises(UserError, match=r"same images, got shapes \(80, 5\) and \(80, 6\)"):
        drift.drift(found[:, :5], found, labels)
    with pytest.raises(UserError, match="need n labels"):
        drift.class_means(found, labels[1:])
    with pytest.raises(UserError, match=r"class features .* row 4"):
        drift.class_means(np.where(np.arange(80)[:, None] == 4, np.inf, found), labels)
    with pytest.raises(UserError, match="two classes or more"):
        drift.neural_collapse(found, np.zeros(80, int))
    with pytest.raises(UserError, match="but there are 4 prototypes"):
        drift.prototype_angles(found, labels, np.ones((4, 6)))
    with pytest.raises(UserError, match="classifier has 4 rows"):
        drift.neural_collapse(found, labels, np.ones((4, 6)))
    texts, rows = labels.astype(str), np.ones((9, 6))
    for measure in (drift.neural_collapse, drift.prototype_angles):
        with pytest.raises(UserError, match=r"labels must be whole numbers, .* got <U") as caught:
            measure(found, texts, rows)
        assert caught.value.argument == "labels"
    assert drift.neural_collapse(found, texts)[:4] == drift.neural_collapse(found, labels)[:4]
