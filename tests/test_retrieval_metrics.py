"""Identification, recall, CMC, mAP and verification against scikit-learn and plain loops."""

from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_curve
from sklearn.model_selection import KFold

from compat_jax import metrics, retrieval
from compat_jax.errors import UserError
from compat_jax.retrieval import mixed
from compat_jax.retrieval.labels import in_one_form
from compat_jax.retrieval.mixed import Both, Rescoring, Swap

GOLDEN = np.load(Path(__file__).parent / "golden" / "identification.npz")


def features(rows=60, size=5, classes=7, seed=0):
    """Small whole numbers, for exact scores with ties; labels, one class with a single image."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, rows)
    labels[-1] = classes
    return rng.integers(-3, 4, (rows, size)).astype(np.float32), labels


def distances_and_kinds(pairs=203, seed=0):
    rng = np.random.default_rng(seed)
    same = rng.random(pairs) < 0.4
    distances = np.round(np.clip(rng.normal(np.where(same, 1.2, 1.9), 0.4), 0, 4), 2)
    return distances, same


# Templates and identification


@pytest.mark.parametrize("i", [1, 2])
def test_identification_as_the_reference(i):
    case = [GOLDEN[f"{i}/{n}"] for n in ("query", "query_labels", "gallery", "gallery_labels")]
    assert retrieval.identification(*case) == GOLDEN[f"{i}/accuracy"]


def test_templates_are_normalised_means():
    gallery, labels = features()
    templates, classes = retrieval.class_templates(gallery, labels)
    assert templates.dtype == np.float32
    np.testing.assert_array_equal(classes, np.unique(labels))
    for template, number in zip(templates, classes, strict=True):
        mean = gallery[labels == number].mean(axis=0, dtype=np.float64)
        np.testing.assert_allclose(template, mean / np.linalg.norm(mean), rtol=1e-6, atol=1e-7)


def test_identification_names_classes_not_places():
    gallery = np.array([[0, 1], [1, 0]], np.float32)
    query = np.array([[2, 1], [1, 3], [0, 1]], np.float32)
    assert retrieval.identification(query, [4, 9, 5], gallery, [9, 4]) == pytest.approx(2 / 3)


# Rankings


def oracle_ranking(query, gallery, same_set):
    scores = query.astype(np.float64) @ gallery.astype(np.float64).T
    if same_set:
        np.fill_diagonal(scores, -np.inf)
    return scores, np.argsort(-scores, axis=1, kind="stable")


@pytest.mark.parametrize("same_set", [False, True])
def test_cmc_and_recall_against_a_loop(same_set):
    query, query_labels = features(seed=0)
    gallery = query + features(seed=1)[0]
    gallery_labels = query_labels if same_set else np.roll(query_labels, 3)[:-5]
    gallery = gallery if same_set else gallery[:-5]
    _, ranking = oracle_ranking(query, gallery, same_set)
    hits = gallery_labels[ranking[:, :10]] == query_labels[:, None]
    matches = (query_labels[:, None] == gallery_labels).sum(1) - same_set
    expected = [hits[matches > 0, :r].any(axis=1).mean() for r in range(1, 11)]
    args = (query, query_labels, gallery, gallery_labels)
    curve = retrieval.cumulative_matching_characteristic(*args, max_rank=10, same_set=same_set)
    np.testing.assert_allclose(curve, expected, rtol=1e-14)
    recall = retrieval.recall_at_k(*args, ks=(1, 5, 10), same_set=same_set)
    assert recall == {1: expected[0], 5: expected[4], 10: expected[9]}


def test_an_image_is_left_out_even_behind_its_duplicates():
    query = np.ones((5, 2), np.float32)
    curve = retrieval.cumulative_matching_characteristic(
        query, [0, 1, 1, 2, 0], query, [0, 1, 1, 2, 0], max_rank=1, same_set=True
    )
    # The first neighbour of row 0 is row 1; of all others row 0. Row 3 has no match.
    np.testing.assert_allclose(curve, [1 / 4])


@pytest.mark.parametrize("same_set", [False, True])
@pytest.mark.parametrize("scores_at_a_time", [1, 500, 1 << 24])
def test_map_against_scikit_learn(monkeypatch, same_set, scores_at_a_time):
    monkeypatch.setattr("compat_jax.retrieval.metrics.SCORES", scores_at_a_time)
    query, query_labels = features(seed=2)
    gallery = query + features(seed=3)[0]
    gallery_labels = query_labels if same_set else np.roll(query_labels, 3)[:-5]
    gallery = gallery if same_set else gallery[:-5]
    scores, _ = oracle_ranking(query, gallery, same_set)
    expected = []
    for i in range(len(query)):
        keep = scores[i] > -np.inf
        match = (gallery_labels == query_labels[i])[keep]
        if match.any():
            expected.append(average_precision_score(match, scores[i][keep]))
    got = retrieval.mean_average_precision(
        query, query_labels, gallery, gallery_labels, same_set=same_set
    )
    assert got.value == pytest.approx(np.mean(expected), abs=1e-12)
    assert (got.num_queries, got.num_without_match) == (
        len(expected),
        len(query) - len(expected),
    )


def oracle_map_at_r(scores, match):
    """(1/R) Σ P(i) rel(i), one rank after another; ties in the order of the gallery."""
    ranked = match[np.argsort(-scores, kind="stable")]
    r = match.sum()
    return sum(ranked[: i + 1].mean() for i in range(r) if ranked[i]) / r


@pytest.mark.parametrize("same_set", [False, True])
def test_map_at_r_by_its_definition(same_set):
    query, query_labels = features(seed=2)
    query += 2 * features(seed=9)[0][query_labels]
    gallery = query + features(seed=3)[0]
    gallery_labels = query_labels
    if not same_set:
        gallery, gallery_labels = gallery[5:][::-1], query_labels[5:][::-1]
        query_labels = np.append(query_labels[:-3], [99, 0, 1])
    scores, _ = oracle_ranking(query, gallery, same_set)
    own = np.arange(60) if same_set else None
    got = retrieval.precision_at_r_scores(query, query_labels, gallery, gallery_labels, own)
    for i, value in enumerate(got):
        keep = scores[i] > -np.inf
        match = (gallery_labels == query_labels[i])[keep]
        if match.any():
            assert value == pytest.approx(oracle_map_at_r(scores[i][keep], match), abs=1e-12)
        else:
            assert np.isnan(value)
    assert np.nanmin(got) < 0.2 < 0.4 < np.nanmax(got)


def test_map_at_r_knows_what_is_among_the_first_r_only():
    query, labels = np.eye(2, dtype=np.float32)[:1], np.array([7])
    gallery = np.array([[0.9, 0], [0.8, 0], [0.7, 0], [0.1, 0]], np.float32)
    for gallery_labels, expected in (
        ([7, 7, 7, 1], 1.0),
        ([7, 1, 7, 7], (1 + 0 + 2 / 3) / 3),
        ([1, 1, 1, 7], 0.0),
        ([1, 7, 1, 7], (1 / 2) / 2),
    ):
        got = retrieval.precision_at_r_scores(query, labels, gallery, np.array(gallery_labels))
        assert got == pytest.approx(expected)


@hypothesis.settings(max_examples=20, deadline=None)
@hypothesis.given(st.integers(0, 2**31))
def test_order_of_the_gallery_changes_nothing_in_map(seed):
    query, query_labels = features(seed=seed)
    gallery, gallery_labels = features(seed=seed + 1)
    order = np.random.default_rng(seed).permutation(len(gallery))
    one = retrieval.mean_average_precision(query, query_labels, gallery, gallery_labels)
    two = retrieval.mean_average_precision(
        query, query_labels, gallery[order], gallery_labels[order]
    )
    assert 0 < one.value <= 1
    assert two.value == pytest.approx(one.value, abs=1e-12)


def test_a_perfect_version():
    labels = np.repeat(np.arange(6), 4)
    perfect = np.eye(6, dtype=np.float32)[labels]
    args = (perfect, labels, perfect, labels)
    assert retrieval.identification(*args) == 1
    assert retrieval.mean_average_precision(*args) == (1.0, 24, 0)
    assert retrieval.recall_at_k(*args, ks=(1, 3), same_set=True) == {1: 1.0, 3: 1.0}


def test_rankings_refuse_bad_input():
    query, labels = features()
    for metric in (
        retrieval.identification,
        retrieval.recall_at_k,
        retrieval.mean_average_precision,
        retrieval.cumulative_matching_characteristic,
    ):
        with pytest.raises(UserError, match="versions of unequal feature size"):
            metric(query[:, :3], labels, query, labels)
        with pytest.raises(UserError, match="query: 60 features need as many labels"):
            metric(query, labels[:9], query, labels)
        with pytest.raises(UserError, match=r"gallery features .* row 7"):
            metric(query, labels, np.where(np.arange(60)[:, None] == 7, np.inf, query), labels)
    for metric in (retrieval.recall_at_k, retrieval.mean_average_precision):
        with pytest.raises(UserError, match="no query has an image of its class"):
            metric(query, labels + 100, query, labels)
        with pytest.raises(UserError, match=r"same_set=True .* labels differ"):
            metric(query, labels, query, labels[::-1], same_set=True)
    with pytest.raises(UserError, match="no query has an image of its class"):
        retrieval.precision_at_r_scores(query, labels + 100, query, labels)
    with pytest.raises(UserError, match="ks must be"):
        retrieval.recall_at_k(query, labels, query, labels, ks=())


def test_scores_of_queries_have_the_metrics_as_their_means():
    query, labels = features(seed=4)
    gallery, gallery_labels = features(seed=5)
    gallery_labels = gallery_labels % 5  # some queries have no match
    four = (query, labels, gallery, gallery_labels)
    templates, classes = retrieval.class_templates(gallery, gallery_labels)
    scores = retrieval.template_scores(query, labels, [templates], classes)
    assert scores.shape == (1, len(query)) and scores.mean() == retrieval.identification(*four)
    precisions, alone = retrieval.average_precision_scores(*four), ~np.isin(labels, classes)
    assert alone.any() and not alone.all()
    np.testing.assert_array_equal(np.isnan(precisions), alone)
    got = retrieval.mean_average_precision(*four)
    assert got == (precisions[~alone].mean(), (~alone).sum(), alone.sum())
    index = retrieval.ExactIndex()
    index.add(gallery)
    found = retrieval.neighbour_scores(
        query, labels, index, gallery_labels=gallery_labels, max_rank=10
    )
    np.testing.assert_array_equal(np.isnan(found), np.repeat(alone[:, None], 10, axis=1))
    np.testing.assert_array_equal(
        found[~alone].mean(axis=0), retrieval.cumulative_matching_characteristic(*four)
    )


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize(
    ("other", "message"),
    [
        (str, "query labels are (whole.* labels texts|texts.* labels whole numbers): give both"),
        (np.bytes_, "query labels are (whole.* labels bytes|bytes.* labels whole numbers): give"),
        (float, "labels must be whole numbers or texts, got float64"),
        (np.float32, "labels must be whole numbers or texts, got float32"),
        (bool, "labels must be whole numbers or texts, got bool"),
        (object, "labels must be whole numbers or texts, got object"),
    ],
)
def test_labels_of_different_kinds_are_refused_by_all_metrics_alike(other, message, swapped):
    query, labels = features()
    kinds = (labels, labels.astype(other))[:: -1 if swapped else 1]
    four = (query, kinds[0], query, kinds[1])
    for metric in (
        retrieval.identification,
        retrieval.recall_at_k,
        retrieval.mean_average_precision,
        retrieval.cumulative_matching_characteristic,
        retrieval.average_precision_scores,
    ):
        with pytest.raises(UserError, match=message):
            metric(*four)
    with pytest.raises(UserError, match=message):
        retrieval.make_pairs(*kinds, 5, 5)
    for name in metrics.names():
        metric, queries = metrics.get(name), metrics.Queries(query, kinds[0])
        with pytest.raises(UserError, match=message):
            metric.score(queries, [metric.prepare(query, kinds[1])])


def test_texts_are_labels_as_good_as_numbers():
    query, labels = features(seed=6)
    gallery, gallery_labels = features(seed=7)
    for kind in (str, np.bytes_, np.uint8):
        for metric in (
            retrieval.identification,
            retrieval.recall_at_k,
            retrieval.mean_average_precision,
        ):
            numbered = metric(query, labels, gallery, gallery_labels)
            assert metric(query, labels.astype(kind), gallery, gallery_labels.astype(kind)) == (
                numbered
            )


FORMS = {
    "whole and unsigned": (2**62 + 1, np.int64, np.uint64),
    "unsigned and whole": (2**62 + 1, np.uint64, np.int64),
    "hashes": (2**63 + 1, np.uint64, np.uint64),
    "small and whole": (-3, np.int16, np.int64),
    "of two sizes": (3, np.int8, np.uint16),
    "below zero": (-5, np.int64, np.int8),
}


@pytest.mark.parametrize("form", FORMS)
def test_labels_of_two_types_of_numbers_are_compared_exactly(form):
    offset, *types = FORMS[form]
    query, labels = features(rows=40, seed=6)
    gallery, gallery_labels = features(rows=50, seed=7)
    given = [
        (part.astype(object) + offset).astype(type_)
        for part, type_ in zip((labels, gallery_labels), types, strict=True)
    ]
    for name in metrics.names():
        metric = metrics.get(name)
        expected = metric.score_features(metrics.Queries(query, labels), gallery, gallery_labels)
        got = metric.score_features(metrics.Queries(query, given[0]), gallery, given[1])
        np.testing.assert_array_equal(got, expected, err_msg=name)
        if name.startswith(("identification", "recall", "map", "verif")):  # called without a metric
            queries = metrics.Queries(query, given[0])
            got = metric.score(queries, [metric.prepare(gallery, given[1])])[0]
            np.testing.assert_array_equal(got, expected, err_msg=name)
    for score in (retrieval.identification, retrieval.recall_at_k):
        assert score(query, given[0], gallery, given[1]) == (
            score(query, labels, gallery, gallery_labels)
        )
    for got, expected in zip(
        retrieval.make_pairs(*given, 9, 9),
        retrieval.make_pairs(labels, gallery_labels, 9, 9),
        strict=True,
    ):
        np.testing.assert_array_equal(got, expected)


def test_no_type_of_numpy_holds_all_labels_and_they_are_compared_nevertheless():
    first = np.array([-1, 2**62, 2**62 + 1])
    second = np.array([2**63 + 2, 2**62 + 1, 2**63 + 1], np.uint64)
    a, b = in_one_form(first, second)
    equal = [[int(x) == int(y) for y in second] for x in first]
    np.testing.assert_array_equal(a[:, None] == b[None], equal)
    assert sum(map(sum, equal)) == 1 and a.dtype == b.dtype
    assert [len(part) for part in in_one_form(first[:0], second)] == [0, 3]


@pytest.mark.parametrize("wrong", [False, True])
def test_who_is_alone_in_the_gallery_finds_nobody(wrong):
    query = unit(np.array([[1.0, 0], [0, 1]], np.float32))
    queries = metrics.Queries(query, np.array([3, 5]), np.array([0, -1]))
    own = np.array([5 if wrong else 3])  # perhaps the picture has another label there
    scores = metrics.identification.score_features(queries, query[:1], own)
    assert scores.tolist() == [0, float(wrong)]
    rows = Both(query[:1], query[:1], own)
    asking = Both(query, query, queries.labels, queries.own)
    for searcher in (
        Swap(asking, rows, True),
        Swap(asking, rows, False),
        Rescoring(asking, rows, 1),
    ):
        found = mixed.measure(searcher, [metrics.identification], np.arange(1), (0, 1))
        np.testing.assert_array_equal(found["identification"].scores, [scores] * 2)


# Verification


def test_pair_distances_by_hand():
    a = np.array([[1, 0], [0.6, 0.8]], np.float32)
    b = np.array([[0, 1], [0.6, 0.8]], np.float32)
    np.testing.assert_allclose(retrieval.pair_distances(a, b), [2, 0], atol=1e-12)
    with pytest.raises(UserError, match="two arrays of the same shape"):
        retrieval.pair_distances(a, b[:1])


def oracle_verification(distances, same, folds, thresholds):
    accuracies = []
    for train, test in KFold(folds, shuffle=False).split(distances):
        right = [np.mean((distances[train] < t) == same[train]) for t in thresholds]
        best = thresholds[np.argmax(right)]
        accuracies.append(np.mean((distances[test] < best) == same[test]))
    return np.mean(accuracies)


@pytest.mark.parametrize("folds", [2, 7, 10])
@pytest.mark.parametrize("seed", range(3))
def test_verification_against_a_loop_over_folds_and_thresholds(folds, seed):
    distances, same = distances_and_kinds(seed=seed)
    # Distances lie on some of the thresholds: strictly below is accepted.
    thresholds = np.arange(0, 4, 0.01)
    got = retrieval.verification_accuracy(distances, same, folds, thresholds)
    expected = oracle_verification(distances, same, folds, thresholds)
    assert got == pytest.approx(expected, abs=1e-12)


def test_verification_defaults_to_ten_folds_and_the_thresholds_of_insightface():
    distances, same = distances_and_kinds()
    expected = oracle_verification(distances, same, 10, np.arange(0, 4, 0.001))
    assert retrieval.verification_accuracy(distances, same) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_tar_at_far_against_the_roc_curve(seed):
    distances, same = distances_and_kinds(pairs=500, seed=seed)
    fars = [0.0, 0.001, 0.01, 0.07, 0.1, 0.5, 1.0]
    false_rate, true_rate, _ = roc_curve(same, -distances, drop_intermediate=False)
    expected = [true_rate[false_rate <= far + 1e-12].max() for far in fars]
    np.testing.assert_allclose(retrieval.tar_at_far(distances, same, fars), expected, rtol=1e-14)


@hypothesis.settings(deadline=None)
@hypothesis.given(st.integers(0, 2**31))
def test_tar_does_not_fall_as_far_grows(seed):
    distances, same = distances_and_kinds(seed=seed)
    tar = retrieval.tar_at_far(distances, same, np.linspace(0, 1, 30))
    assert (np.diff(tar) >= 0).all() and tar[-1] == 1


@pytest.mark.parametrize("same_set", [False, True])
def test_pairs_are_of_the_kind_they_say(same_set):
    query_labels = features()[1]
    gallery_labels = query_labels if same_set else np.append(query_labels[:40] + 2, 50)
    query, gallery, same = retrieval.make_pairs(
        query_labels, gallery_labels, 300, 700, seed=1, same_set=same_set
    )
    assert len(query) == len(gallery) == len(same) == 1000 and same.sum() == 300
    np.testing.assert_array_equal(query_labels[query] == gallery_labels[gallery], same)
    assert not (same_set and (query == gallery).any())
    assert 0.2 < same[:500].mean() < 0.4  # mixed, as folds need it
    again = retrieval.make_pairs(query_labels, gallery_labels, 300, 700, 1, same_set)
    np.testing.assert_array_equal(again[0], query)


@pytest.mark.parametrize("same_set", [False, True])
@pytest.mark.parametrize("kind", [True, False])
def test_pairs_of_a_kind_are_drawn_uniformly(same_set, kind):
    query_labels = np.array([0, 1, 0, 2, 1, 0])
    gallery_labels = query_labels if same_set else np.array([1, 0, 0, 3])
    pairs = [
        (i, j)
        for i, a in enumerate(query_labels)
        for j, b in enumerate(gallery_labels)
        if (a == b) == kind and not (same_set and i == j)
    ]
    count = 400 * len(pairs)
    numbers = (count, 0) if kind else (0, count)
    query, gallery, _ = retrieval.make_pairs(
        query_labels, gallery_labels, *numbers, same_set=same_set
    )
    drawn, times = np.unique(np.stack([query, gallery]), axis=1, return_counts=True)
    assert [tuple(p) for p in drawn.T] == pairs
    # Six standard deviations of a count with mean 400.
    np.testing.assert_allclose(times, 400, atol=120)


# Verification with the same number of pairs for every query


@pytest.mark.parametrize("inside", [False, True])
def test_every_query_has_its_pairs(inside):
    labels = features()[1]
    own = np.where(np.arange(60) % 2, np.arange(60), -1) if inside else None
    queries, genuine, impostor = retrieval.query_pairs(labels, labels, own, per_query=40, seed=2)
    alone = np.bincount(labels)[labels] - (0 if own is None else own >= 0) == 0
    assert sorted(queries) == list(np.flatnonzero(~alone))
    assert list(queries) != sorted(queries)  # mixed, as folds need it
    assert (labels[genuine] == labels[queries][:, None]).all()
    assert (labels[impostor] != labels[queries][:, None]).all()
    if inside:
        assert not (genuine == own[queries][:, None]).any()
        # Each other image of the class is drawn.
        assert set(genuine[queries == 1][0]) == set(np.flatnonzero(labels == labels[1])) - {1}
    again = retrieval.query_pairs(labels, labels, own, per_query=40, seed=2)
    np.testing.assert_array_equal(again.genuine, genuine)


def test_an_own_picture_under_another_label_is_no_match_to_skip():
    own = np.array([2, -1])
    got = retrieval.query_pairs(np.array([0, 1]), np.array([0, 1, 1]), own, per_query=5)
    assert set(got.genuine[got.queries == 0][0]) == {0}


def lists(query, gallery, pairs):
    """All pairs in one list."""
    rows = np.concatenate([pairs.genuine, pairs.impostor], axis=1)
    asking = np.repeat(query[pairs.queries], rows.shape[1], axis=0)
    same = np.tile(np.arange(rows.shape[1]) < pairs.genuine.shape[1], len(rows))
    distances = retrieval.pair_distances(asking, gallery[rows.reshape(-1)])
    return distances, same


def unit(x):
    return x / np.linalg.norm(x + 0.01, axis=1, keepdims=True)


@pytest.mark.parametrize("values", [1, 100, 1 << 22])
def test_the_scores_of_pairs_are_the_lists_figures(monkeypatch, values):
    monkeypatch.setattr("compat_jax.retrieval.verification.VALUES", values)
    query, labels = features()
    query = unit(query)
    gallery = unit(query + 0.3 * features(seed=1)[0])
    labels = np.minimum(labels, 6)  # all 60 have a match: ten folds of six
    pairs = retrieval.query_pairs(labels, labels)
    distances, same = lists(query, gallery, pairs)
    scores = retrieval.pair_scores(query, gallery, pairs)
    expected = oracle_verification(distances, same, 10, np.arange(0, 4, 0.001))
    assert scores.mean() == pytest.approx(expected, abs=1e-12)
    assert retrieval.verification_accuracy(distances, same) == pytest.approx(expected, abs=1e-12)
    for far in (0.001, 0.01, 0.2):
        got = retrieval.pair_scores(query, gallery, pairs, far=far)
        false_rate, true_rate, _ = roc_curve(same, -distances, drop_intermediate=False)
        tar = true_rate[false_rate <= far + 1e-12].max()
        assert got.mean() == pytest.approx(tar, abs=1e-12)
        assert got.shape == (60,) and ((got >= 0) & (got <= 1)).all()


def test_right_decisions_average_to_the_accuracy():
    distances, same = distances_and_kinds(pairs=200)
    right = retrieval.right_decisions(distances, same)
    assert right.mean() == pytest.approx(retrieval.verification_accuracy(distances, same))
    rows = retrieval.right_decisions(distances.reshape(40, 5), same.reshape(40, 5))
    np.testing.assert_array_equal(rows.reshape(-1), right)  # folds of four rows, of twenty pairs
    with pytest.raises(UserError, match="two lists of equal length"):
        retrieval.verification_accuracy(distances.reshape(40, 5), same.reshape(40, 5))


def test_queries_without_a_pair_are_left_out():
    query, labels = features()
    for name in ("verification", "tar@0.01"):
        metric = metrics.get(name)
        scores = metric.score(metrics.Queries(unit(query), labels), [(unit(query), labels[:-1])])
        np.testing.assert_array_equal(np.isnan(scores[0]), labels == labels[-1])


def test_metrics_have_names_with_a_number():
    query, labels = features()
    queries, gallery = metrics.Queries(query, labels), (query, labels)
    recall, cmc = (metrics.get(name).score(queries, [gallery]) for name in ("recall@3", "cmc@3"))
    np.testing.assert_array_equal(recall, cmc)
    curve = retrieval.cumulative_matching_characteristic(query, labels, query, labels)
    assert np.nanmean(cmc) == curve[2]
    for name, unit_of in (
        ("cmc@3", "% of queries with a match in the first 3"),
        ("tar@0.05", "% of pairs of a class accepted, 5 % of others"),
        ("tar@1e-4", "% of pairs of a class accepted, 0.01 % of others"),
    ):
        assert (metrics.get(name).name, metrics.get(name).unit) == (name, unit_of)
    for name in ("tar@0", "tar@2", "tar@", "tar@1e4", "cmc@0", "map@R"):
        with pytest.raises(UserError, match=f"unknown metric '{name}'"):
            metrics.get(name)


@pytest.mark.parametrize("name", ["recall@1", "recall@7", "cmc@3", "tar@0.1", "tar@1e-5", "map"])
def test_a_name_of_the_library_is_not_given_to_another_metric(name):
    there = metrics.get(name)
    with pytest.raises(UserError, match=f"there is another metric called '{name}'") as caught:
        metrics.register(metrics.Metric(name, "%", lambda queries, galleries: 0))
    assert caught.value.argument == "metric"
    assert metrics.get(name) is there


def test_verification_of_queries_refuses_bad_input():
    query, labels = features()
    with pytest.raises(UserError, match="no query has an image of its class"):
        retrieval.query_pairs(labels, labels + 100)
    with pytest.raises(UserError, match="no pair of different classes"):
        retrieval.query_pairs(np.zeros(4, int), np.zeros(4, int))
    pairs = retrieval.query_pairs(labels, labels)
    with pytest.raises(UserError, match="versions of unequal feature size"):
        retrieval.pair_scores(query[:, :3], query, pairs)
    with pytest.raises(UserError, match=r"gallery features .* row 7"):
        broken = np.where(np.arange(60)[:, None] == 7, np.inf, query)
        retrieval.pair_scores(query, broken, pairs)
    few = retrieval.query_pairs(labels[:5], labels)
    with pytest.raises(UserError, match=r"10 folds of the queries, but only 5 have an image"):
        retrieval.pair_scores(query, query, few)
    assert len(retrieval.pair_scores(query, query, few, far=0.1)) == len(query)
    ten = retrieval.query_pairs(labels[:10], labels)
    assert np.isfinite(retrieval.pair_scores(query, query, ten)).sum() == 10
    with pytest.raises(UserError, match=r"2\.\.4 \(the number of rows of pairs\)"):
        retrieval.right_decisions(np.ones((4, 6)), np.ones((4, 6), bool))


def test_verification_refuses_bad_input():
    distances, same = distances_and_kinds(pairs=5)
    with pytest.raises(UserError, match=r"folds must lie in 2\.\.5"):
        retrieval.verification_accuracy(distances, same)
    with pytest.raises(UserError, match="two lists of equal length"):
        retrieval.verification_accuracy(distances, same[:3])
    with pytest.raises(UserError, match="distance 2 is NaN"):
        retrieval.tar_at_far([0.1, 0.2, np.nan], [True, False, True])
    with pytest.raises(UserError, match="pairs of both kinds, got 2 of the same class and 0"):
        retrieval.tar_at_far([0.1, 0.2], [True, True])
    with pytest.raises(UserError, match="false accept rates"):
        retrieval.tar_at_far([0.1, 0.2], [True, False], fars=[2])
    with pytest.raises(UserError, match="no pair of the same class"):
        retrieval.make_pairs(np.arange(4), np.arange(4), 5, 5, same_set=True)
    with pytest.raises(UserError, match="no pair of different classes"):
        retrieval.make_pairs(np.zeros(4, int), np.zeros(4, int), 5, 5)
