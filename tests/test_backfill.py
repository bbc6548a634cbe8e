"""Backfill curves against galleries mixed by hand."""

import json

import numpy as np
import pytest

from compat_jax import backfill, metrics
from compat_jax.backfill import Gallery
from compat_jax.errors import UserError

SHARES = (0, 0.25, 0.5, 1)


def unit(x):
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def upgrade(seed=0, classes=4, d=6, queries=30, gallery=41, noise=0.9):
    """Queries of a good new version; a gallery of a bad old version and of the new one."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((classes, d))
    asked, labels = rng.integers(0, classes, queries), rng.integers(0, classes, gallery)
    new = unit(centres[labels] + 0.4 * rng.standard_normal((gallery, d)))
    old = unit(centres[labels] + noise * rng.standard_normal((gallery, d)))
    asking = unit(centres[asked] + 0.4 * rng.standard_normal((queries, d)))
    return metrics.Queries(asking, asked), Gallery(old, new, labels)


def loop(queries, gallery, order, *, shares, k=1):
    """Recall@k and the share of first answers that are new, one query after another."""
    values, answers = [], []
    for share in shares:
        fresh = order[: round(share * len(order))]
        mixed = gallery.old.astype(np.float64)
        mixed[fresh] = gallery.new[fresh]
        hits, new = [], []
        for i, query in enumerate(queries.features.astype(np.float64)):
            near = np.argsort(-(mixed @ query), kind="stable")
            if queries.own is not None:
                near = near[near != queries.own[i]]
            hits.append((gallery.labels[near[:k]] == queries.labels[i]).any())
            new.append(near[0] in fresh)
        values.append(np.mean(hits))
        answers.append(np.mean(new))
    return values, answers


@pytest.mark.parametrize("order", backfill.ORDERS)
@pytest.mark.parametrize("inside", [False, True])
def test_every_point_is_that_of_a_gallery_mixed_by_hand(order, inside):
    queries, gallery = upgrade()
    if inside:
        own = np.where(np.arange(41) % 3, np.arange(41), -1)
        queries = metrics.Queries(gallery.new, gallery.labels, own)
    got = backfill.backfill(queries, gallery, order=order, metric="recall@1", shares=SHARES, seed=3)
    rows = backfill.ranking(order, gallery, queries, seed=3)
    values, answers = loop(queries, gallery, rows, shares=SHARES)
    np.testing.assert_allclose(got.values, values, atol=1e-12)
    np.testing.assert_allclose(got.new_answers, answers, atol=1e-12)
    assert got.new_answers[0] == 0 and got.new_answers[-1] == 1
    assert (got.order, got.metric) == (order, "recall@1")
    assert got.scores.shape == (4, len(queries.labels))


@pytest.mark.parametrize("name", ["identification", "map", "map@r"])
def test_the_ends_are_the_cross_test_and_the_self_test(name):
    queries, gallery = upgrade(seed=1)
    got = backfill.backfill(queries, gallery, metric=name, shares=(0, 1))
    metric = metrics.get(name)
    for value, features in zip(got.values, gallery[:2], strict=True):
        expected = metric.score(queries, [metric.prepare(features, gallery.labels)])[0]
        assert value == pytest.approx(np.nanmean(expected), abs=1e-12)
    assert got.values[1] > got.values[0] + 0.1


def test_orders():
    queries, gallery = upgrade(seed=2)
    n = len(gallery.labels)
    order = backfill.ranking("random", gallery, seed=4)
    np.testing.assert_array_equal(order, np.random.default_rng(4).permutation(n))
    cosines = []
    for i, label in enumerate(gallery.labels):
        mean = gallery.old[gallery.labels == label].astype(np.float64).mean(axis=0)
        cosines.append(gallery.old[i] @ mean / np.linalg.norm(mean))
    farthest = backfill.ranking("farthest", gallery)
    assert (np.diff(np.array(cosines)[farthest]) > -1e-6).all()
    gains = backfill.rank_gains(gallery, queries)
    assert (np.diff(gains[backfill.ranking("oracle", gallery, queries)]) <= 0).all()


@pytest.mark.parametrize("inside", [False, True])
def test_gains_in_rank_pair_by_pair(inside):
    queries, gallery = upgrade(seed=2, queries=9, gallery=17)
    if inside:
        queries = queries._replace(own=np.arange(9) - 1)
    old, new = (queries.features @ part.T for part in gallery[:2])
    expected = np.zeros(17)
    for i, label in enumerate(queries.labels):
        own = -1 if queries.own is None else queries.own[i]
        rows = [j for j in range(17) if j != own]
        for j in rows:
            match = gallery.labels[j] == label
            kind = [n for n in rows if (gallery.labels[n] == label) == match]
            rest = [n for n in rows if (gallery.labels[n] == label) != match]
            if rest:
                wins = [
                    np.mean([s[j] > new[i, n] if match else s[j] <= new[i, n] for n in rest])
                    for s in (old[i], new[i])
                ]
                expected[j] += (wins[1] - wins[0]) / len(kind)
    np.testing.assert_allclose(backfill.rank_gains(gallery, queries), expected, atol=1e-12)


def test_an_oracle_without_queries_of_a_class_does_not_mind():
    queries, gallery = upgrade(seed=2)
    few = metrics.Queries(queries.features, np.full(30, 2))
    order = backfill.ranking("oracle", gallery, few)
    assert sorted(order) == list(range(len(gallery.labels)))


def test_the_oracle_is_worth_its_name_where_features_differ_in_use():
    """Half of the gallery is embedded well already: the oracle embeds the other half first."""
    queries, gallery = upgrade(seed=4, gallery=60, noise=3.0)
    old = np.where(np.arange(60)[:, None] % 2, gallery.new, gallery.old)
    gallery = Gallery(old, gallery.new, gallery.labels)
    curves = {
        order: backfill.backfill(queries, gallery, order=order, metric="map")
        for order in backfill.ORDERS
    }
    assert curves["oracle"].area > curves["farthest"].area > curves["random"].area
    assert curves["oracle"].reached() <= 0.5 < curves["random"].reached()
    assert len({(c.values[0], c.values[-1]) for c in curves.values()}) == 1


def test_an_order_of_ones_own():
    queries, gallery = upgrade()
    order = np.arange(41)[::-1]
    got = backfill.backfill(queries, gallery, order=order, metric="recall@1", shares=SHARES)
    np.testing.assert_allclose(
        got.values, loop(queries, gallery, order, shares=SHARES)[0], atol=1e-12
    )
    assert got.order == "given"


def test_area_and_the_share_at_which_the_new_level_is_reached():
    def curve(*values):
        shares = np.linspace(0, 1, len(values))
        return backfill.Curve("random", "map", shares, np.array(values), shares, np.empty((0, 0)))

    assert curve(0.2, 0.4).area == pytest.approx(0.3)
    assert curve(0, 1, 1).area == pytest.approx(0.75)
    assert curve(0.2, 0.5, 0.79, 0.7, 0.8).reached() == 1.0
    assert curve(0.2, 0.5, 0.79, 0.7, 0.8).reached(0.98) == 0.5
    assert curve(0.8, 0.9, 0.8).reached() == 0.0
    summary = json.loads(json.dumps(curve(0.0, 1.0, 1.0).summary(), allow_nan=False))
    assert summary["area"] == 0.75 and summary["reached"] == 0.5 and "scores" not in summary


def test_bad_input_is_refused():
    queries, gallery = upgrade()
    with pytest.raises(UserError, match="Did you mean 'farthest'"):
        backfill.backfill(queries, gallery, order="furthest")
    for shares in ((0, 0.5), (0.1, 1), (0, 0.5, 0.5, 1), (0,)):
        with pytest.raises(UserError, match="shares must ascend from 0 to 1"):
            backfill.backfill(queries, gallery, shares=shares)
    with pytest.raises(UserError, match="each of the 41 images once"):
        backfill.backfill(queries, gallery, order=np.zeros(41, int))
    with pytest.raises(UserError, match="no picture but the one that asks"):
        one = backfill.Gallery(*(part[:1] for part in gallery))
        backfill.backfill(queries._replace(own=np.zeros(len(queries.labels), int)), one)
    with pytest.raises(UserError, match="the oracle ranks a gallery for queries"):
        backfill.ranking("oracle", gallery)
    with pytest.raises(UserError, match="pad smaller features"):
        backfill.backfill(queries, gallery._replace(old=gallery.old[:, :4]))
    with pytest.raises(UserError, match=r"old features .* row 2"):
        broken = np.where(np.arange(41)[:, None] == 2, np.nan, gallery.old)
        backfill.backfill(queries, gallery._replace(old=broken))
