"""Maps fitted afterwards: planted ones are found, closed forms agree, files come back."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from compat_jax import align
from compat_jax.align.spherical import FACTORS, interpolate
from compat_jax.errors import UserError


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def drawn(count=200, size=12, seed=0, classes=8):
    """Unit features around class means, and labels."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, count)
    means = rng.normal(size=(classes, size))
    return unit(means[labels] + 0.4 * rng.normal(size=(count, size))), labels


def rotated(features, seed=1):
    """A random rotation, and the features before it."""
    size = features.shape[1]
    rotation = np.linalg.qr(np.random.default_rng(seed).normal(size=(size, size)))[0]
    return rotation, features @ rotation.T


OLD, LABELS = drawn()
ROTATION, NEW = rotated(OLD)
NOISY = unit(NEW + 0.05 * np.random.default_rng(2).normal(size=NEW.shape))
QUICK = {"adapter": {"epochs": 3, "hidden": 8, "batch_size": 50}, "low_rank": {"rank": 5}}


def fitted(kind, old=OLD, new=NOISY, **more):
    return align.fit(old, new, kind, **{"labels": LABELS, **QUICK.get(kind, {}), **more})


def test_a_planted_rotation_is_recovered():
    found = align.fit(OLD.astype(np.float32), NEW.astype(np.float32))
    matrix = found.arrays["matrix"]
    np.testing.assert_allclose(matrix, ROTATION, atol=1e-5)
    np.testing.assert_allclose(matrix.T @ matrix, np.eye(12), atol=1e-5)
    np.testing.assert_allclose(found.map(NEW), OLD, atol=1e-5)


@pytest.mark.parametrize("sizes", [(12, 7), (7, 12)])
def test_unequal_sizes_are_those_of_zero_padded_spaces(sizes):
    old, new = OLD[:, : sizes[0]], NOISY[:, : sizes[1]]
    old, new = unit(old), unit(new)
    padded = [np.pad(x, ((0, 0), (0, 12 - x.shape[1]))) for x in (old, new)]
    left, _, right = np.linalg.svd(padded[1].T @ padded[0])
    whole = left @ right  # orthogonal, 12 x 12
    found = align.fit(old, new)
    matrix = found.arrays["matrix"]
    if sizes[1] > sizes[0]:
        np.testing.assert_allclose(found.map(new), unit((new @ whole)[:, : sizes[0]]), atol=1e-5)
        np.testing.assert_allclose(matrix.T @ matrix, np.eye(sizes[0]), atol=1e-5)
    else:  # inner products among new features are kept
        np.testing.assert_allclose(found.map(new) @ found.map(new).T, new @ new.T, atol=1e-5)
    whole_found = np.zeros((12, 12))
    whole_found[: sizes[1], : sizes[0]] = matrix
    inner = np.sum(padded[1] @ whole * padded[0])
    assert np.sum(padded[1] @ whole_found * padded[0]) == pytest.approx(inner, rel=1e-6)


def ridge_closed_form(new, old, strength):
    """Normal equations with an unpenalised column of ones."""
    count, size = new.shape
    design = np.hstack([new, np.ones((count, 1))])
    penalty = strength * np.eye(size + 1)
    penalty[-1, -1] = 0.0
    weights = np.linalg.solve(design.T @ design / count + penalty, design.T @ old / count)
    return weights[:-1], weights[-1]


@pytest.mark.parametrize("strength", [1e-4, 1e-2])
def test_ridge_is_the_closed_form(strength):
    found = fitted("ridge", strength=strength)
    matrix, bias = ridge_closed_form(NOISY, OLD, strength)
    np.testing.assert_allclose(found.arrays["matrix"], matrix, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.arrays["bias"], bias, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.map(NOISY), unit(NOISY @ matrix + bias), atol=1e-5)


def test_a_low_rank_map_is_the_best_of_its_rank():
    def cost(found):
        matrix = found.arrays["left"].astype(float) @ found.arrays["right"]
        error = NOISY @ matrix + found.arrays["bias"] - OLD
        return np.sum(error**2) / len(OLD) + 1e-4 * np.sum(matrix**2), matrix

    costs = []
    for rank in (1, 3, 6, 12, 99):
        value, matrix = cost(fitted("low_rank", rank=rank))
        assert np.linalg.matrix_rank(matrix, tol=1e-5) == min(rank, 12)
        costs.append(value)
    assert all(a >= b - 1e-9 for a, b in itertools.pairwise(costs))
    np.testing.assert_allclose(matrix, ridge_closed_form(NOISY, OLD, 1e-4)[0], atol=1e-5)
    # Truncating the matrix itself, whatever the data, is no better.
    u, s, v = np.linalg.svd(matrix)
    truncated = u[:, :3] * s[:3] @ v[:3]
    bias = OLD.mean(0) - NOISY.mean(0) @ truncated
    error = np.sum((NOISY @ truncated + bias - OLD) ** 2) / len(OLD)
    assert costs[1] <= error + 1e-4 * np.sum(truncated**2)


@pytest.mark.parametrize("kind", align.KINDS)
def test_features_may_be_of_any_float_type(kind):
    half = OLD.astype(jnp.bfloat16), jnp.asarray(NOISY, jnp.bfloat16)
    wide = [np.asarray(part, np.float32) for part in half]
    found, same = fitted(kind, *half), fitted(kind, *wide)
    np.testing.assert_array_equal(found.map(half[1], half[0]), same.map(wide[1], wide[0]))
    with pytest.raises(UserError, match=r"old must be float\[n, size\], got int64"):
        fitted(kind, np.ones((200, 12), int))


def test_a_kind_says_why_it_cannot_be_fitted():
    for kind in align.KINDS:
        assert align.unfit(kind, LABELS) == ""
        assert "on 2 pictures at least, here on 1" in align.unfit(kind, LABELS[:1])
        lonely = align.unfit(kind, np.arange(9))
        assert ("no class has two pictures" in lonely) == (kind == "slerp")
        if not lonely:
            fitted(kind, OLD[:9], NOISY[:9], labels=np.arange(9))


def test_slerp_ends_at_the_two_spaces():
    rotation = fitted("procrustes")
    for factor, end in ((0.0, OLD), (1.0, rotation.map(NOISY))):
        found = fitted("slerp", factor=factor).map(NOISY, OLD)
        np.testing.assert_allclose(found, end, atol=1e-6)
    middle = fitted("slerp", factor=0.5).map(NOISY, OLD)
    np.testing.assert_allclose(np.linalg.norm(middle, axis=1), 1, atol=1e-6)
    angles = [np.sum(middle * end, axis=1) for end in (OLD, rotation.map(NOISY))]
    np.testing.assert_allclose(*angles, atol=1e-5)


def test_interpolation_goes_at_constant_speed_also_where_features_are_equal_or_opposite():
    start, end = np.eye(3)[[0]], np.eye(3)[[1]]
    for factor in FACTORS:
        angle = factor * np.pi / 2
        expected = [[np.cos(angle), np.sin(angle), 0]]
        np.testing.assert_allclose(interpolate(start, end, factor), expected, atol=1e-12)
        np.testing.assert_allclose(interpolate(start, start, factor), start, atol=1e-12)
        nearer = -start if factor >= 0.5 else start
        np.testing.assert_allclose(interpolate(start, -start, factor), nearer, atol=1e-12)


def recall(queries, gallery):
    scores = queries @ gallery.T
    np.fill_diagonal(scores, -np.inf)
    return np.mean(LABELS[scores.argmax(1)] == LABELS)


@pytest.mark.parametrize("better", ["old", "new"])
def test_the_factor_is_the_best_on_the_pairs(better):
    noise = np.random.default_rng(3).normal(size=OLD.shape)
    worse = unit(OLD + 0.5 * noise) if better == "new" else OLD
    new = NEW if better == "new" else unit(NEW + 0.5 * noise)
    found = align.fit(worse, new, "slerp", labels=LABELS)
    recalls = [
        recall(align.fit(worse, new, "slerp", factor=factor).map(new, worse), worse)
        for factor in FACTORS
    ]
    assert found.settings["factor"] == FACTORS[len(FACTORS) - 1 - np.argmax(recalls[::-1])]
    assert max(recalls) >= recalls[0] and max(recalls) >= recalls[-1]


def distance(found, new, old):
    return np.mean(1 - np.sum(found.map(new) * old, axis=1))


@pytest.mark.parametrize("base", [pytest.param("identity", marks=pytest.mark.slow), "procrustes"])
def test_an_adapter_begins_as_its_base_and_is_never_worse(base):
    start = fitted("adapter", base=base, epochs=0)
    plain = fitted("procrustes").map(NOISY) if base == "procrustes" else NOISY
    np.testing.assert_allclose(start.map(NOISY), plain, atol=1e-6)
    for lr in (1e-3, 30.0):  # one that learns, one that only does harm
        found = fitted("adapter", base=base, lr=lr)
        assert distance(found, NOISY, OLD) <= distance(start, NOISY, OLD) + 1e-6
        assert found.settings["loss"] == pytest.approx(distance(found, NOISY, OLD), abs=1e-5)
    learnt = fitted("adapter", base=base, epochs=30, lr=0.01, hidden=32)
    assert distance(learnt, NOISY, OLD) < 0.9 * distance(start, NOISY, OLD)


@pytest.mark.parametrize("kind", align.KINDS)
def test_a_map_has_unit_rows_of_the_old_size_and_comes_back_from_its_file(kind, tmp_path):
    old, new = unit(OLD[:, :9]), NOISY
    found = fitted(kind, old, new)
    queries = np.vstack([3.0 * new[:5], np.zeros((1, 12))]).astype(np.float32)
    second = np.vstack([old[:5], np.zeros((1, 9))])
    mapped = found.map(queries, second)
    assert mapped.dtype == np.float32 and mapped.shape == (6, 9)
    np.testing.assert_allclose(np.linalg.norm(mapped, axis=1), [1] * 5 + [0], atol=1e-6)
    np.testing.assert_allclose(mapped[:5], found.map(new[:5], second[:5]), atol=1e-6)  # any length
    found.save(tmp_path / "map.npz")
    again = align.load(tmp_path / "map.npz")
    np.testing.assert_array_equal(again.map(queries, second), mapped)
    assert (again.kind, again.settings) == (kind, found.settings)
    # Pairs determine the map: fitted again, it is the same.
    np.testing.assert_array_equal(fitted(kind, old, new).map(queries, second), mapped)


def broken(content, tmp_path):
    (tmp_path / "map.npz").write_bytes(content)
    return align.load(tmp_path / "map.npz")


@pytest.mark.parametrize(
    ("make", "message", "argument"),
    [
        (lambda: align.fit(OLD, NEW, "rigde"), r"unknown kind of map 'rigde'\. Did you", "kind"),
        (
            lambda: align.fit(OLD, NEW, "ridge", strength=0.0),
            "strength must be ab",
            "ridge.strength",
        ),
        (lambda: align.fit(OLD, NEW, "ridge", rank=3), "unknown argument of ridge", "ridge.rank"),
        (lambda: align.fit(OLD, NEW[:9]), "old has 200 rows and new 9: give features of", "new"),
        (lambda: align.fit(OLD[:1], NEW[:1]), "at least two", "new"),
        (lambda: align.fit(OLD[0], NEW), r"old must be float\[n, size\], got float64\[12\]", "old"),
        (lambda: align.fit(OLD, NEW * np.nan), "new has values that are not finite", "new"),
        (lambda: align.fit(OLD, NEW, "slerp"), "give labels of the pairs", "labels"),
        (lambda: align.fit(OLD, NEW, labels=LABELS[:3]), r"labels must be int\[200\]", "labels"),
        (
            lambda: align.fit(OLD, NEW, "slerp", labels=np.arange(200)),
            "no class has two pictures among those .* or give factor",
            "labels",
        ),
        (lambda: fitted("slerp").map(NEW), "slerp goes between two features", "old"),
        (lambda: fitted("slerp").map(NEW, OLD[:3]), "old has 3 rows, features 200", "old"),
        (lambda: fitted("ridge").map(NEW[:, :5]), r"features must be float\[n, 12\]", "features"),
        (lambda: align.load("/nowhere/map.npz"), "there is no file /nowhere/map.npz", "path"),
    ],
)
def test_what_cannot_be_mapped_is_refused(make, message, argument):
    with pytest.raises(UserError, match=message) as caught:
        make()
    assert caught.value.argument == argument


def test_other_files_are_refused(tmp_path):
    for content in (b"", b"not a map", b"PK\x03\x04" + bytes(40)):
        with pytest.raises(UserError, match="is not a map that"):
            broken(content, tmp_path)
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    with pytest.raises(UserError, match="is not a map"):
        align.load(tmp_path / "other.npz")
