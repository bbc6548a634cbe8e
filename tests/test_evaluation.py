"""The matrix of a chain against every pair computed by hand, and what the cache keeps of it."""

import functools
import json
import logging
import shutil
from fractions import Fraction

import numpy as np
import pytest
import tiny
from PIL import Image

import compat_jax as cj
from compat_jax import array_cache, evaluation, metrics, report, retrieval
from compat_jax.chain import Chain
from compat_jax.data import Dataset
from compat_jax.data.same_pictures import same_pictures
from compat_jax.errors import Stopped, UserError
from compat_jax.evaluation import evaluate
from compat_jax.retrieval import embed, identification, mean_average_precision, recall_at_k

QUERY = tiny.dataset(classes=4, per_class=9, seed=1, name="retrieval")
GALLERY = tiny.dataset(classes=4, per_class=5, seed=2, name="retrieval")
# Query and gallery of the same pictures, or of some, in another order.
BOTH = Dataset(
    np.concatenate([QUERY.images, GALLERY.images])[::-1],
    np.concatenate([QUERY.labels, GALLERY.labels])[::-1],
    QUERY.class_names,
)


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """Three versions of one feature size and two widths; the last but one replaced another."""
    made = Chain(tmp_path_factory.mktemp("evaluation") / "chain")
    for task, width in enumerate((8, 16, 8)):
        record = tiny.record(
            task=task,
            backbone_arguments={"width": width},
            replaced_by="pre-trained version 0" if task == 1 else None,
        )
        made.add(tiny.variables(record, seed=task), record)
    return made


@pytest.fixture
def extractions(monkeypatch):
    """Numbers of the versions that embedded something, one for each time."""
    seen = []

    def counting(version, *arguments, **options):
        seen.append(version.number)
        return embed(version, *arguments, **options)

    monkeypatch.setattr(evaluation, "embed", counting)
    return seen


def cached(folder, **more):
    """A session that keeps what it computes."""
    return tiny.session(cache=folder, **more)


def by_hand(chain, score, query=QUERY, gallery=GALLERY):
    """Every pair of versions on its own."""
    matrix = np.zeros((len(chain), len(chain)))
    for t in chain.numbers():
        for k in range(t + 1):
            features = (
                embed(chain.open(t), query.images),
                query.labels,
                embed(chain.open(k), gallery.images),
                gallery.labels,
            )
            matrix[t, k] = score(*features)
    return matrix


def exact_mean(scores):
    return float(sum(map(Fraction, scores.tolist())) / len(scores))


def recall_oracle(k):
    return lambda *four: recall_at_k(*four, ks=(k,))[k]


def verification_oracle(far):
    """From all pairs in one list; the metrics' own tests check the lists against scikit-learn."""

    def score(query, query_labels, gallery, gallery_labels):
        queries, genuine, impostor = retrieval.query_pairs(query_labels, gallery_labels)
        rows = np.concatenate([genuine, impostor], axis=1)
        distances = retrieval.pair_distances(
            np.repeat(query[queries], rows.shape[1], axis=0), gallery[rows.reshape(-1)]
        )
        same = np.tile(np.arange(rows.shape[1]) < genuine.shape[1], len(queries))
        if far is not None:
            return retrieval.tar_at_far(distances, same, [far])[0]
        return retrieval.right_decisions(
            distances.reshape(rows.shape), same.reshape(rows.shape)
        ).mean()

    return score


SCORES = {
    "identification": identification,
    "recall@1": recall_oracle(1),
    "recall@5": recall_oracle(5),
    "recall@10": recall_oracle(10),
    "map": lambda *four: mean_average_precision(*four).value,
    "map@r": lambda *four: retrieval.precision_at_r_scores(*four).mean(),
    "verification": verification_oracle(None),
    "tar@0.01": verification_oracle(0.01),
    "tar@0.001": verification_oracle(0.001),
}


@pytest.mark.parametrize("metric", SCORES)
def test_the_matrix_is_what_each_pair_gives_by_itself(chain, metric):
    result = evaluate(chain, QUERY, GALLERY, metrics=metric)[metric]
    expected = by_hand(chain, SCORES[metric])
    np.testing.assert_allclose(result.matrix, expected, atol=1e-6)
    apart = 0.005 if metric.startswith("tar") else 0.05  # few pairs of a class are that near
    assert np.ptp(expected[np.tril_indices(3)]) > apart  # the pairs do differ
    assert result.metric == metric and result.incomparable == () and result.notes == ()
    assert result.tasks == ("0", "1", "2") and result.replaced == (False, True, False)


def test_every_metric_has_an_oracle_here():
    assert set(metrics.names()) == set(SCORES)


def test_several_metrics_at_once_are_the_same_as_one_by_one(chain, extractions):
    results = evaluate(chain, QUERY, GALLERY, metrics=list(SCORES))
    assert extractions == [0, 0, 1, 1, 2, 2]
    assert list(results) == list(SCORES) and len(results) == len(SCORES)
    for name in SCORES:
        alone = evaluate(chain, QUERY, GALLERY, metrics=[name])
        np.testing.assert_array_equal(results[name].matrix, alone.matrix)
        assert results[name].scores.keys() == alone[name].scores.keys()
        for pair, scores in alone[name].scores.items():
            np.testing.assert_array_equal(results[name].scores[pair], scores)
        assert results[name].unit == metrics.get(name).unit
    assert results.main is results["identification"]
    assert results.average_compatibility == results.main.average_compatibility
    np.testing.assert_array_equal(results.matrix, results.main.matrix)


@pytest.mark.parametrize("metric", SCORES)
def test_the_matrix_is_the_mean_of_the_scores_of_all_queries(chain, metric):
    result = evaluate(chain, QUERY, GALLERY, metrics=metric)[metric]
    assert set(result.scores) == {(t, k) for t in range(3) for k in range(t + 1)}
    for (t, k), scores in result.scores.items():
        assert scores.shape == (len(QUERY),) and scores.dtype == np.float64
        assert ((scores >= 0) & (scores <= 1)).all()
        assert result.matrix[t, k] == exact_mean(scores)
    assert result.labels is QUERY.labels and result.class_names == QUERY.class_names
    assert np.array_equal(np.triu(result.matrix, 1), np.zeros((3, 3)))
    assert "scores" not in result.summary() and "scores" not in repr(result)


def test_a_metric_of_ones_own_is_given_as_an_object(chain):
    def score(queries, galleries):
        best = [(queries.features @ features.T).max(axis=1) for features, _ in galleries]
        return (1 + np.stack(best)) / 2  # cosines as shares

    own = metrics.Metric("nearest", "mean similarity of the nearest", score)
    results = evaluate(chain, QUERY, GALLERY, metrics=[own, "map"])
    expected = by_hand(chain, lambda q, _, g, __: (1 + (q @ g.T).max(axis=1).mean()) / 2)
    np.testing.assert_allclose(results.matrix, expected, atol=1e-6)
    assert results.main.unit == "mean similarity of the nearest"
    np.testing.assert_array_equal(
        results["map"].matrix, evaluate(chain, QUERY, GALLERY, metrics="map").matrix
    )


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (np.ones((36, 1)), r"returns float64 \[36, 1\] for 1 galleries and 36 queries: return one"),
        (np.ones(1), r"returns float64 \[1\] for 1 galleries"),
        (np.ones((1, 3)), r"returns float64 \[1, 3\] for 1 galleries"),
        (np.full((1, 36), "a"), r"returns <U1 \[1, 36\]"),
        (np.full((1, 36), 50.0), "returns 50: scores are shares from 0 to 1, shown times 100; NaN"),
        (np.full((1, 36), -np.inf), "returns -inf: scores are shares"),
    ],
)
def test_scores_of_another_shape_or_range_are_refused(scores, message):
    odd = metrics.Metric("odd", "%", lambda queries, galleries: scores)
    queries = metrics.Queries(np.ones((36, 2), np.float32), QUERY.labels)
    with pytest.raises(UserError, match=f"metric 'odd' {message}"):
        odd.score_features(queries, np.ones((5, 2), np.float32), np.zeros(5, int))


def test_an_evaluation_checks_the_scores_and_takes_those_that_leave_queries_out(chain):
    def score(value, queries, galleries):
        found = np.full((len(galleries), len(queries.labels)), value)
        found[:, 1:] = np.nan
        return found

    half, fifty = (
        metrics.Metric("own", "%", functools.partial(score, value)) for value in (0.5, 50.0)
    )
    assert evaluate(chain, QUERY, GALLERY, versions=[0], metrics=[half]).matrix == 0.5
    with pytest.raises(UserError, match="metric 'own' returns 50"):
        evaluate(chain, QUERY, GALLERY, versions=[0], metrics=[fifty])


def test_scores_of_nobody_are_refused_with_the_metrics_name(chain):
    def nothing(queries, galleries):
        return np.full((len(galleries), len(queries.labels)), np.nan)

    blank = metrics.Metric("blank", "%", nothing)
    with pytest.raises(UserError, match=r"'blank' returns NaN.* all 36 queries in gallery 0 of 1"):
        evaluate(chain, QUERY, GALLERY, metrics=[blank])


def test_metrics_are_told_apart_by_name(chain, extractions):
    def constant(value):
        def score(queries, galleries):
            return np.full((len(galleries), len(queries.labels)), value)

        return metrics.Metric("mine", "%", score)

    with pytest.raises(UserError, match="two different metrics are called 'mine'") as caught:
        evaluate(chain, QUERY, GALLERY, metrics=[constant(0.1), "map", constant(0.2)])
    assert caught.value.argument == "metrics" and extractions == []
    one = constant(0.5)
    assert list(evaluate(chain, QUERY, GALLERY, metrics=[one, "map", one, "map"])) == [
        "mine",
        "map",
    ]
    assert list(evaluate(chain, QUERY, GALLERY, metrics=one)) == ["mine"]


@pytest.mark.parametrize("parts", [[1, 2, 17, 20], [3, 0, 20, 17], [0, 0, 20, 20]])
def test_a_tie_is_one_in_whatever_order_and_parts_the_scores_come(chain, parts):
    own = np.tile([1, 2, 17, 20], 9) / 20
    other = np.random.default_rng(0).permutation(np.tile(parts, 9)) / 20  # of the same total

    def score(queries, galleries):
        return np.stack([*[other] * (len(galleries) - 1), own])

    result = evaluate(chain, QUERY, GALLERY, metrics=[metrics.Metric("tied", "%", score)]).main
    assert len(set(result.matrix[np.tril_indices(3)])) == 1
    assert result.average_compatibility == 0
    assert result.within_noise[np.tril_indices(3, -1)].all()


def test_each_version_embeds_twice(chain, extractions):
    evaluate(chain, QUERY, GALLERY)
    assert extractions == [0, 0, 1, 1, 2, 2]


# The same pictures in query and gallery


def identified_without(scores, own, query_label, gallery_labels, features):
    """Compare the class of a query with that of the nearest template of other pictures."""
    query, gallery = features
    kept = [n for n in range(len(gallery)) if n != own]
    best, found = -np.inf, None
    for label in sorted({gallery_labels[n] for n in kept}):
        mean = np.mean([gallery[n] for n in kept if gallery_labels[n] == label], axis=0)
        score = float(query @ mean) / float(np.linalg.norm(mean))
        if score > best:
            best, found = score, label
    return float(found == query_label)


def recalled_without(k):
    def score(scores, own, query_label, gallery_labels, _):
        kept = [n for n in np.argsort(-scores, kind="stable") if n != own]
        return float(any(gallery_labels[n] == query_label for n in kept[:k]))

    return score


def precision_without(scores, own, query_label, gallery_labels, _):
    kept = [n for n in range(len(scores)) if n != own]
    precisions = []
    for n in kept:
        if gallery_labels[n] == query_label:
            above = [m for m in kept if scores[m] >= scores[n]]
            precisions.append(np.mean([gallery_labels[m] == query_label for m in above]))
    return np.mean(precisions)


WITHOUT_SELF = {
    "identification": identified_without,
    "recall@1": recalled_without(1),
    "recall@5": recalled_without(5),
    "map": precision_without,
}
OVERLAPS = {
    "the same": (QUERY, QUERY),
    "the same in another order": (QUERY, QUERY.select([0, 1, 2, 3]).per_class(9)),
    "queries among others": (GALLERY, BOTH),
    "a part of the queries": (BOTH, GALLERY),
}


@pytest.mark.parametrize("overlap", OVERLAPS)
def test_a_picture_in_query_and_gallery_is_not_its_own_answer(chain, overlap):
    query, gallery = OVERLAPS[overlap]
    of_gallery = {image.tobytes(): n for n, image in enumerate(gallery.images)}
    own = [of_gallery.get(image.tobytes(), -1) for image in query.images]
    results = evaluate(chain, query, gallery, metrics=list(WITHOUT_SELF), versions=[0, 1])
    asking, answering = (
        [embed(chain[n], part.images).astype(np.float64) for n in (0, 1)]
        for part in (query, gallery)
    )
    for name, oracle in WITHOUT_SELF.items():
        for (t, k), got in results[name].scores.items():
            g = answering[k]
            expected = [
                oracle(q @ g.T, own[i], query.labels[i], gallery.labels, (q, g))
                for i, q in enumerate(asking[t])
            ]
            np.testing.assert_allclose(got, expected, atol=1e-6, err_msg=f"{name} {t} {k}")
        inside = sum(n >= 0 for n in own)
        note = f"{inside} of {len(own)} query pictures are in the gallery: each leaves itself out."
        assert 0 < inside <= len(own) and results[name].notes == (note,)
        assert note in str(results[name]) and note in results[name].summary()["notes"]


def test_a_picture_is_found_again_whether_it_comes_from_a_file_or_from_an_array(tmp_path):
    for n, image in enumerate(GALLERY.images):
        name = GALLERY.class_names[GALLERY.labels[n]]
        (tmp_path / "png" / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(tmp_path / "png" / name / f"{n:03d}.png")
    files = cj.data.from_folder(tmp_path / "png", size=tiny.SIZE)
    arrays = Dataset(np.asarray(files.images[:]), files.labels, files.class_names)
    n = len(files)
    for query, gallery in ((files, files), (files, arrays), (arrays, files), (arrays, arrays)):
        assert same_pictures(query, gallery).tolist() == list(range(n))
    strangers = Dataset(QUERY.images[:n], files.labels, files.class_names)
    assert same_pictures(files, strangers) is None


def test_the_result_says_of_how_many_queries_the_gallery_has_further_copies(chain):
    twice = np.r_[: len(GALLERY), 0, 0, 3]
    gallery = Dataset(GALLERY.images[twice], GALLERY.labels[twice], GALLERY.class_names)
    (note,) = evaluate(chain, GALLERY, gallery, versions=[0]).main.notes
    n = len(GALLERY)
    assert note == (
        f"{n} of {n} query pictures are in the gallery: each leaves itself out; 2 of them have "
        "further copies there, which answer."
    )


def test_queries_whose_only_match_is_themselves_are_left_out(chain):
    lonely = np.flatnonzero(GALLERY.labels == 0)[1:]
    keep = np.setdiff1d(np.arange(len(GALLERY)), lonely)
    gallery = Dataset(GALLERY.images[keep], GALLERY.labels[keep], GALLERY.class_names)
    results = evaluate(chain, gallery, gallery, metrics=["identification", "recall@1", "map"])
    alone = gallery.labels == 0
    for name in ("recall@1", "map"):
        for (t, k), scores in results[name].scores.items():
            np.testing.assert_array_equal(np.isnan(scores), alone)
            assert results[name].matrix[t, k] == exact_mean(scores[~alone])
    for scores in results["identification"].scores.values():
        assert scores[alone].tolist() == [0.0]  # its class has no template: wrong


def test_a_query_that_is_alone_in_the_gallery_is_not_identified(chain):
    alone = GALLERY.take([0])
    result = evaluate(chain, alone, alone).main
    assert (result.matrix == 0).all()
    with pytest.raises(UserError, match="the gallery has no picture but the one that asks"):
        report.collect(chain, alone, alone)


# The cache


def test_what_is_cached_is_not_computed_again(chain, extractions, tmp_path):
    first = evaluate(chain, QUERY, GALLERY, session=cached(tmp_path))
    assert len(extractions) == 6
    again = evaluate(chain, QUERY, GALLERY, session=cached(tmp_path))
    assert len(extractions) == 6
    np.testing.assert_array_equal(first.matrix, again.matrix)
    np.testing.assert_array_equal(first.matrix, evaluate(chain, QUERY, GALLERY).matrix)


def test_another_metric_reads_no_image(chain, extractions, tmp_path):
    evaluate(chain, QUERY, GALLERY, session=cached(tmp_path))
    before = list(extractions)
    again = evaluate(chain, QUERY, GALLERY, metrics=["map", "recall@5"], session=cached(tmp_path))
    assert extractions == before
    for name in again:
        fresh = evaluate(chain, QUERY, GALLERY, metrics=name)[name]
        np.testing.assert_array_equal(again[name].matrix, fresh.matrix)
    del extractions[:]
    for number in chain.numbers():
        kept = evaluation.features(chain.open(number), QUERY, session=cached(tmp_path))
        np.testing.assert_array_equal(kept, embed(chain.open(number), QUERY.images))
    assert extractions == []
    evaluation.features(chain.open(0), QUERY)
    assert extractions == [0]  # nothing is kept without a cache


def test_a_metric_of_ones_own_that_was_edited_is_computed_again(chain, extractions, tmp_path):
    def edited(value):
        def score(queries, galleries):
            return np.full((len(galleries), len(queries.labels)), value)

        # By the name of one of the library's as well.
        return [metrics.Metric(name, "%", score) for name in ("own", "recall@7", "map")]

    for value in (0.25, 0.5):
        results = evaluate(
            chain, QUERY, GALLERY, versions=[0], metrics=edited(value), session=cached(tmp_path)
        )
        assert [results[name].matrix for name in results] == [value] * 3
    assert extractions == [0, 0]
    assert all(path.name.startswith("features") for path in tmp_path.iterdir())


def test_a_cache_that_another_process_lacks_is_computed_again(monkeypatch, tmp_path):
    made = []

    def value():
        made.append(1)
        return (np.ones(2),)

    cache = array_cache.Cache(tmp_path, "")
    for _ in range(2):
        cache.get("kind", ["a"], value)
    assert len(made) == 1
    asked = []
    monkeypatch.setattr(array_cache.hosts, "any_process", lambda own: asked.append(own) or True)
    np.testing.assert_array_equal(cache.get("kind", ["a"], value)[0], np.ones(2))
    assert len(made) == 2
    cache.get("kind", ["b"], value)
    assert asked == [False, True], "all processes are asked, whatever each has"


def test_a_cache_that_cannot_be_written_is_done_without(chain, monkeypatch, tmp_path, caplog):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(array_cache, "write_sealed", full)
    with caplog.at_level(logging.WARNING):
        result = evaluate(chain, QUERY, GALLERY, versions=[0], session=cached(tmp_path))
    assert result.matrix == evaluate(chain, QUERY, GALLERY, versions=[0]).matrix
    assert all("No space left" in record.getMessage() for record in caplog.records)
    assert len(caplog.records) == 4


def test_a_stopped_evaluation_goes_on_where_it_was(chain, extractions, tmp_path):
    with pytest.raises(Stopped):
        stopping = cached(tmp_path, should_stop=lambda: len(extractions) >= 4)
        evaluate(chain, QUERY, GALLERY, session=stopping)
    assert extractions == [0, 0, 1, 1]
    result = evaluate(chain, QUERY, GALLERY, session=cached(tmp_path))
    assert extractions == [0, 0, 1, 1, 2, 2]
    np.testing.assert_array_equal(result.matrix, evaluate(chain, QUERY, GALLERY).matrix)


def test_a_killed_evaluation_goes_on_where_it_was(chain, monkeypatch, tmp_path):
    whole = evaluate(chain, QUERY, GALLERY)
    for moment in (1, 3, 4):
        calls = []

        def killed(*arguments, moment=moment, calls=calls, **options):
            if len(calls) == moment:
                raise KeyboardInterrupt
            calls.append(arguments)
            return embed(*arguments, **options)

        session = cached(tmp_path / str(moment))
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(evaluation, "embed", killed)
            evaluate(chain, QUERY, GALLERY, session=session)
        result = evaluate(chain, QUERY, GALLERY, session=session)
        np.testing.assert_array_equal(result.matrix, whole.matrix)


def test_the_cache_knows_what_its_numbers_were_made_of(chain, extractions, tmp_path):
    session = cached(tmp_path)
    part = evaluate(chain, QUERY, GALLERY, versions=[0, 2], session=session)
    whole = evaluate(chain, QUERY, GALLERY, session=session)
    np.testing.assert_array_equal(part.matrix, whole.matrix[np.ix_([0, 2], [0, 2])])
    np.testing.assert_array_equal(whole.matrix, evaluate(chain, QUERY, GALLERY).matrix)
    for other, made in (
        ({"metrics": "map"}, 0),
        ({"dtype": "bfloat16"}, 2),
        ({"dtype": "auto"}, 0),  # one of the two above
        ({"query": tiny.dataset(classes=4, per_class=9, seed=3, name="retrieval")}, 1),
        ({"gallery": tiny.dataset(classes=4, per_class=5, seed=3, name="retrieval")}, 1),
    ):
        before = len(extractions)
        arguments = {"query": QUERY, "gallery": GALLERY, "session": session, **other}
        evaluate(chain, versions=[0], **arguments)
        assert len(extractions) == before + made


def test_a_cache_file_that_was_altered_or_cut_is_made_again(chain, tmp_path, caplog):
    session, chosen = cached(tmp_path), {"metrics": ["identification", "map"], "versions": [1, 2]}
    whole = evaluate(chain, QUERY, GALLERY, session=session, **chosen)
    files = sorted(tmp_path.iterdir())
    kinds = {file.name.partition("-")[0] for file in files}
    made = {f"{kind}000{number}" for kind in ("features", "gallery", "row") for number in (1, 2)}
    # For each version features of query and gallery, templates, and a row for each metric.
    assert kinds == made and len(files) == 10
    contents = [file.read_bytes() for file in files]
    for number, (file, content) in enumerate(zip(files, contents, strict=True)):
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        others = (content[:-1], b"", contents[number - 1], b"x" + content, flipped)
        for broken in others if number < 2 else others[-1:]:
            file.write_bytes(broken)
            for row in tmp_path.glob("row*" if "features" in file.name else "none"):
                row.unlink()  # a row that is there needs no features of its queries
            caplog.clear()
            with caplog.at_level(logging.WARNING):
                again = evaluate(chain, QUERY, GALLERY, session=session, **chosen)
            messages = [record.getMessage() for record in caplog.records]
            assert messages == [f"{file} was altered or cut off: made again"]
            assert file.read_bytes() == content
            for name in whole:
                np.testing.assert_array_equal(again[name].matrix, whole[name].matrix)


def test_a_cache_is_found_below_the_home_folder(chain, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    evaluate(chain, QUERY, GALLERY, versions=[0], session=cached("~/cache"))
    assert len(list((tmp_path / "home" / "cache").iterdir())) == 4
    assert [p.name for p in tmp_path.iterdir()] == ["home"]


# Chains that are not of one size, not whole, or chosen from


def test_features_of_other_sizes_count_as_nothing_and_are_listed(tmp_path):
    chain = Chain(tmp_path / "chain")
    for task, width in enumerate((8, 16, 8)):
        record = tiny.record(
            method="er",
            task=task,
            head_classes=2 + task,
            feature_size=width,
            backbone_arguments={"width": width},
        )
        chain.add(tiny.variables(record, seed=task), record)
    session = cached(tmp_path / "cache")
    result = evaluate(chain, QUERY, GALLERY, session=session).main
    assert result.incomparable == ((1, 0), (2, 1))
    assert result.matrix[1, 0] == 0 and result.matrix[2, 1] == 0
    assert (result.matrix[[0, 1, 2, 2], [0, 1, 2, 0]] > 0).all()
    assert set(result.scores) == {(0, 0), (1, 1), (2, 0), (2, 2)}
    assert result.notes == ("2 pairs have features of different sizes and count as 0.",)
    again = evaluate(chain, QUERY, GALLERY, session=session).main
    assert again.incomparable == result.incomparable
    assert json.loads(json.dumps(result.summary()))["incomparable"] == [[1, 0], [2, 1]]


def test_the_versions_of_a_chain_may_be_chosen(chain):
    whole = evaluate(chain, QUERY, GALLERY).matrix
    last = evaluate(chain, QUERY, GALLERY, versions=[2]).main
    np.testing.assert_array_equal(last.matrix, whole[2:, 2:])
    assert last.summary()["backward_compatibility"] is None
    assert last.summary()["average_accuracy"] == pytest.approx(whole[2, 2])

    np.testing.assert_array_equal(
        evaluate(chain, QUERY, GALLERY, versions=np.array([-2, -1])).matrix, whole[1:, 1:]
    )


@pytest.mark.parametrize("versions", [[2, 0], [1, 1], [0, -3], [], 1, [1.0], ["0"], [None]])
def test_versions_are_chosen_once_and_ascending(chain, extractions, versions):
    with pytest.raises(UserError, match="versions must be"):
        evaluate(chain, QUERY, GALLERY, versions=versions)
    assert extractions == []


def test_versions_that_were_never_trained_are_named(chain, tmp_path):
    made = Chain(tmp_path / "chain")
    for seed, fresh in enumerate(((), ("projection",))):
        record = tiny.record(task=seed, fresh=fresh)
        made.add(tiny.variables(record, seed), record)
    words = "version 1 has layers that were never trained (projection): train it before it answers"
    result = evaluate(made, QUERY, GALLERY)
    assert f"{words}." in result.main.notes and words in str(result.main)
    assert evaluate(chain, QUERY, GALLERY, versions=[0]).main.notes == ()
    index = retrieval.Index(made[0], GALLERY.images)
    with pytest.raises(UserError, match="version 1 has layers that were never trained"):
        index.search(made[1], QUERY.images, k=3)
    assert len(retrieval.Index(made[1], GALLERY.images).search(made[1], QUERY.images, k=3)[0])


def test_a_replacement_between_chosen_versions_counts(chain, tmp_path):
    chosen = {(0, 1): (False, True), (0, 2): (False, True), (1, 2): (False, False), (2,): (False,)}
    results = {v: evaluate(chain, QUERY, GALLERY, versions=v).main for v in chosen}
    assert {v: result.replaced for v, result in results.items()} == chosen
    assert "after a replacement" in results[0, 2].sentence()
    damaged = shutil.copytree(chain.path, tmp_path / "chain") / "0001" / "record.json"
    damaged.write_text("{")
    again = evaluate(Chain(tmp_path / "chain"), QUERY, GALLERY, versions=[0, 2]).main
    np.testing.assert_array_equal(again.matrix, results[0, 2].matrix)


def test_a_chain_with_a_gap_is_refused_unless_versions_are_chosen(chain, tmp_path, extractions):
    holes = Chain(tmp_path / "chain")
    for number in (0, 2, 3):
        version = chain.open(min(number, 2))
        holes.add(version.variables, version.record, number)
    with pytest.raises(
        UserError, match=r"lacks 1 of its versions 0\.\.3: restore them, or name the"
    ):
        evaluate(holes, QUERY, GALLERY)
    assert extractions == []
    chosen = evaluate(holes, QUERY, GALLERY, versions=[0, 2]).matrix
    np.testing.assert_array_equal(chosen, evaluate(chain, QUERY, GALLERY, versions=[0, 2]).matrix)


def test_mistakes_are_refused_before_anything_is_embedded(chain, extractions):
    for name in ("recall@0", "recall@01", "recall@-1", "recall", "recal@1"):
        with pytest.raises(UserError, match=rf"unknown metric '{name}'\..* Valid: identification,"):
            evaluate(chain, QUERY, GALLERY, metrics=name)
    with pytest.raises(UserError, match=r"unknown metric 'recal@1'\. Did you mean 'recall@1'\?"):
        evaluate(chain, QUERY, GALLERY, metrics=["map", "recal@1"])
    with pytest.raises(UserError, match="no metric: name at least one"):
        evaluate(chain, QUERY, GALLERY, metrics=[])
    with pytest.raises(UserError, match="query and gallery have different classes"):
        evaluate(chain, QUERY, tiny.dataset(classes=4, name="other"))
    with pytest.raises(UserError, match="no version 5"):
        evaluate(chain, QUERY, GALLERY, versions=[5])
    assert extractions == []
    with pytest.raises(
        UserError,
        match=r"version 0 embeds uint8 images of shape \[n, 8, 8, 3\], got uint8 \[64, 16",
    ):
        large = tiny.dataset(classes=4, size=16, name="retrieval")
        evaluate(chain, large, large)
    with pytest.raises(UserError, match=r"got float32 \[36, 8, 8, 3\]: convert them to uint8"):
        embed(chain[0], QUERY.images.astype(np.float32))


def test_recall_takes_any_number_of_neighbours(chain):
    result = evaluate(chain, QUERY, GALLERY, metrics="recall@3")
    np.testing.assert_allclose(result.matrix, by_hand(chain, recall_oracle(3)), atol=1e-6)
    with pytest.raises(UserError, match=r"k=21 neighbours of a gallery of 20 rows: choose k in 1"):
        evaluate(chain, QUERY, GALLERY, metrics="recall@21")
    says = (
        r"k=20 neighbours of a gallery of 20 rows that holds the picture that asks: .* in 1\.\.19"
    )
    with pytest.raises(UserError, match=says):
        evaluate(chain, GALLERY, GALLERY, metrics="recall@20")


# Intervals and flips


def by_definition(scores, level=0.95, resamples=1000, seed=0):
    """A loop over draws: AC, AA and the differences of each."""
    size = 1 + max(t for t, _ in scores)
    rng = np.random.default_rng(seed)
    queries = len(scores[0, 0])
    draws = []
    for _ in range(resamples):
        chosen = rng.integers(queries, size=queries)
        matrix = np.zeros((size, size))
        for cell, values in scores.items():
            matrix[cell] = np.nanmean(values[chosen])
        draws.append(matrix)
    return np.quantile(draws, [(1 - level) / 2, (1 + level) / 2], axis=0), np.array(draws)


def test_an_evaluation_has_intervals_and_flips(chain):
    result = evaluate(chain, QUERY, GALLERY, metrics="recall@1").main
    (low, high), draws = by_definition(result.scores)
    lower = np.tril_indices(3)
    np.testing.assert_allclose(result.intervals.cells.low[lower], low[lower], atol=1e-6)
    np.testing.assert_allclose(result.intervals.cells.high[lower], high[lower], atol=1e-6)
    aa = np.quantile(draws[:, *lower].mean(axis=1), [0.025, 0.975])
    np.testing.assert_allclose(result.intervals.average_accuracy, aa, atol=1e-6)
    change = result.flips.positive - result.flips.negative
    expected = result.matrix - np.diagonal(result.matrix)
    np.testing.assert_allclose(change[lower], expected[lower], atol=1e-12)
    by_class = result.flips_by_class()
    assert by_class.positive.shape == (3, 3, 4)
    np.testing.assert_allclose(  # classes of one size
        by_class.negative[lower].mean(axis=-1), result.flips.negative[lower], atol=1e-12
    )
    written = json.loads(json.dumps(result.summary(), allow_nan=False))
    assert (
        written["intervals"]["cells"][0][0][1] is None and written["flips"]["negative"][2][2] == 0
    )
    assert written["intervals"]["within_noise"] == np.argwhere(result.within_noise).tolist()
    assert evaluate(chain, QUERY, GALLERY, metrics="recall@1").main.summary() == result.summary()


def test_the_mean_of_all_cells_is_what_it_says(chain):
    result = evaluate(chain, QUERY, GALLERY).main
    cells = result.matrix[np.tril_indices(3)]
    assert f"AA {100 * cells.mean():.2f}" in str(result)
    better = [result.matrix[t, k] > result.matrix[k, k] for t in range(3) for k in range(t)]
    assert f"AC: in {sum(better)} of 3 pairs" in str(result)
    assert f"AC {np.mean(better):.2f}" in str(result)
    assert str(cj.evaluate(chain, QUERY, GALLERY)) == str(result)
