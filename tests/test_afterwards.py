"""Ways to upgrade against galleries searched by hand, and against the cells of the matrix."""

import dataclasses
import json
import re

import flat  # noqa: F401, registers its backbone
import numpy as np
import programs
import pytest
import tiny

from compat_jax import afterwards, align, backfill, evaluation, metrics, retrieval
from compat_jax import config as configs
from compat_jax.afterwards import WAYS, Plan, Spaces, comparing
from compat_jax.chain import Chain
from compat_jax.data import Dataset
from compat_jax.errors import Stopped, UserError
from compat_jax.evaluation import Maps, evaluate, evaluate_mapped
from compat_jax.retrieval import mixed
from compat_jax.retrieval.mixed import Both

SHARES = (0, 0.3, 0.7, 1)
LIGHT = tuple(way for way in WAYS if way != "adapter")  # it compiles for each shape
PLAN = Plan(shares=SHARES, candidates=4, seed=3, ways=LIGHT)
MEASURED = [metrics.get(name) for name in ("identification", "recall@1", "recall@3", "map")]
QUERY = tiny.dataset(classes=4, per_class=6, seed=1)
GALLERY = tiny.dataset(classes=4, per_class=5, seed=2)
A_PICTURE_A_CLASS = {
    "data__query__classes": (6, 12),
    "data__gallery__classes": (6, 12),
    "data__gallery__per_class": 1,
}


def unit(x):
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def spaces(sizes=(6, 6), own=False):
    """A bad old version and a good new one, whose space is turned."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((4, max(sizes)))
    turn = np.linalg.qr(rng.standard_normal((max(sizes),) * 2))[0]

    def drawn(count):
        labels = rng.integers(0, 4, count)
        pictures = centres[labels] + 0.4 * rng.standard_normal((count, max(sizes)))
        old = pictures + 0.5 * rng.standard_normal(pictures.shape)
        return unit(old[:, : sizes[0]]), unit((pictures @ turn)[:, : sizes[1]]), labels

    gallery = Both(*drawn(23))
    queries = Both(*drawn(17))
    if own:
        rows = np.array([0, 5, 9, 22])
        parts = [
            np.concatenate([q[4:], g[rows]]) for q, g in zip(queries[:3], gallery[:3], strict=True)
        ]
        queries = Both(*parts, np.concatenate([np.full(13, -1), rows]))
    return Spaces(
        queries, gallery, align.Pairs(*drawn(60)), fitted=np.arange(0, len(gallery.labels), 3)
    )


def cosine(query, rows):
    total = rows.astype(np.float64).sum(axis=0)
    return float(query.astype(np.float64) @ total / np.linalg.norm(total))


def judge(name, scores, label, labels):
    """A metric of one query by the scores of the images, own picture left out; NaN without a match."""
    if not (labels == label).any():
        return np.nan
    order = np.argsort(-scores, kind="stable")
    match = labels[order] == label
    if name == "map":
        return float(np.mean((np.cumsum(match) / np.arange(1, len(match) + 1))[match]))
    return float(match[: int(name.partition("@")[2])].any())


def by_hand(way, found, share, name):
    """One query after another: float64[q], and the share whose first answer was embedded again."""
    queries, gallery, pairs, *_ = found
    count = len(gallery.labels)
    renewed = np.zeros(count, bool)
    renewed[np.random.default_rng(PLAN.seed).permutation(count)[: round(share * count)]] = True
    mapped = queries.new
    if way in align.KINDS:
        fitted = align.fit(pairs.old, pairs.new, way, labels=pairs.labels)
        mapped = fitted.map(queries.new, queries.old)
    if way == "forward":
        rows = align.fit(pairs.new, pairs.old, "ridge").map(gallery.old)
        rows[found.fitted] = gallery.new[found.fitted]
        gallery = gallery._replace(old=rows)
    scores, answers = [], []
    for i, label in enumerate(queries.labels):
        own = -1 if queries.own is None else queries.own[i]
        others = np.arange(count) != own
        new = gallery.new.astype(np.float64) @ queries.new[i].astype(np.float64)
        seen, rank = renewed & others, None
        if way == "rescoring":
            old = gallery.old.astype(np.float64) @ queries.old[i].astype(np.float64)
            stale = np.flatnonzero(~renewed & others)
            seen[stale[np.argsort(-old[stale], kind="stable")[: PLAN.candidates]]] = True
            rank = np.where(seen, new, old - 10)
        else:
            rank = np.where(renewed, new, gallery.old.astype(np.float64) @ mapped[i])
        answers.append(renewed[others][rank[others].argmax()])
        if name != "identification":
            scores.append(judge(name, rank[others], label, gallery.labels[others]))
            continue
        best = {}
        for c in np.unique(gallery.labels[others]):
            old = np.flatnonzero((gallery.labels == c) & others & ~renewed)
            new = np.flatnonzero(
                (gallery.labels == c) & (seen if way == "rescoring" else renewed & others)
            )
            of_new = cosine(queries.new[i], gallery.new[new]) if len(new) else 0.0
            if way == "rescoring":
                best[c] = of_new if len(new) else -9
            elif way in ("naive", "forward"):
                best[c] = cosine(mapped[i], np.concatenate([gallery.old[old], gallery.new[new]]))
            else:
                of_old = cosine(mapped[i], gallery.old[old]) if len(old) else 0.0
                best[c] = (len(old) * of_old + len(new) * of_new) / (len(old) + len(new))
        scores.append(float(max(best, key=best.get) == label))
    return np.array(scores), np.mean(answers)


QUICK = ("naive", "procrustes", "ridge", "slerp", "forward", "rescoring")


@pytest.fixture(scope="module", params=[(6, False), (6, True), (4, False)], ids=str)
def case(request):
    """Spaces of one size or two, with queries in the gallery or not, and what comes out."""
    size, own = request.param
    found = spaces((size, 6), own)
    return found, {way.name: way for way in afterwards.measure(found, MEASURED, PLAN)}


def test_every_point_is_that_of_a_gallery_searched_by_hand(case):
    found, ways = case
    for name in QUICK:
        if name not in ways:
            assert name == "naive" and found.gallery.old.shape[1] == 4
            continue
        for metric, curve in ways[name].curves.items():
            for place, share in enumerate(SHARES):
                scores, answers = by_hand(name, found, share, metric)
                np.testing.assert_allclose(
                    curve.scores[place], scores, atol=1e-9, err_msg=f"{name} {metric}"
                )
                assert curve.values[place] == pytest.approx(np.nanmean(scores))
                assert curve.new_answers[place] == pytest.approx(answers)


def test_all_ways_end_at_the_new_self_test_and_maps_begin_at_the_mapped_cross_test(case):
    found, ways = case
    queries, gallery, pairs, *_ = found
    assert set(LIGHT) - set(ways) <= {"naive"}

    def tested(metric, asking, answering):
        prepare = metric.prepare if queries.own is None else metrics.everything
        asked = metrics.Queries(asking, queries.labels, queries.own)
        return np.nanmean(metric.score(asked, [prepare(answering, gallery.labels)])[0])

    for metric in MEASURED:
        itself = tested(metric, queries.new, gallery.new)
        for way in ways.values():
            assert way.curves[metric.name].values[-1] == pytest.approx(itself), way.name
        for kind in ("procrustes", "low_rank", "slerp"):
            fitted = align.fit(pairs.old, pairs.new, kind, labels=pairs.labels)
            cross = tested(metric, fitted.map(queries.new, queries.old), gallery.old)
            assert ways[kind].curves[metric.name].values[0] == pytest.approx(cross), kind
        waiting = ways["reindex"].curves[metric.name]
        before = tested(metric, queries.old, gallery.old)
        np.testing.assert_allclose(waiting.values, [before] * 4 + [itself])
        assert waiting.area == pytest.approx(before)  # the old version answers to the end


def test_a_naive_swap_is_a_backfill_and_other_metrics_go_by_features():
    found = spaces()
    queries, gallery, *_ = found
    metric = dataclasses.replace(metrics.get("recall@3"), name="of_my_own")
    ways = {w.name: w for w in afterwards.measure(found, [*MEASURED, metric], PLAN)}
    asking = metrics.Queries(queries.new, queries.labels)
    for name, curve in ways["naive"].curves.items():
        chosen = metric if name == "of_my_own" else name
        expected = backfill.backfill(
            asking, backfill.Gallery(*gallery[:3]), metric=chosen, shares=SHARES, seed=PLAN.seed
        )
        np.testing.assert_allclose(curve.values, expected.values)
        np.testing.assert_allclose(curve.new_answers, expected.new_answers)
    for name in ("procrustes", "ridge"):
        curves = ways[name].curves
        np.testing.assert_allclose(curves["of_my_own"].values, curves["recall@3"].values)
    assert "of_my_own" not in ways["rescoring"].curves
    with pytest.raises(KeyError):
        ways["rescoring"].curves["of_my_own"]


@pytest.mark.slow
def test_a_turned_space_needs_a_map_and_costs_what_it_costs():
    plan = dataclasses.replace(PLAN, ways=WAYS)
    every = afterwards.measure(spaces(), MEASURED[1:2], plan, seconds_an_image=2.0)
    ways = {way.name: way for way in every}
    assert list(ways) == list(WAYS)
    before = {name: way.curves["recall@1"].values[0] for name, way in ways.items()}
    assert before["procrustes"] > before["naive"] + 0.2
    assert ways["naive"].cost == afterwards.Cost()
    cost = ways["procrustes"].cost
    assert (cost.pairs, cost.images, cost.networks, cost.bytes) == (60, 60, 1, 6 * 6 * 4)
    assert cost.seconds == pytest.approx(120 + cost.fit_seconds) and cost.fit_seconds > 0
    cost = ways["forward"].cost
    assert (cost.pairs, cost.images, cost.networks, cost.bytes) == (60, 60, 1, 23 * 6 * 4)
    assert before["forward"] > before["naive"] + 0.2
    assert ways["slerp"].cost.networks == ways["rescoring"].cost.networks == 2
    rescoring, whole = ways["rescoring"].cost, ways["reindex"].cost
    assert (rescoring.images, rescoring.images_a_query, rescoring.bytes % 24) == (0, 4, 0)
    assert (whole.images, whole.seconds, whole.bytes) == (23, 46.0, 23 * 6 * 4)
    low, high = ways["naive"].intervals["recall@1"]
    assert low < ways["naive"].curves["recall@1"].area < high


def test_images_are_counted_once():
    way = next(iter(afterwards.measure(spaces(), MEASURED[:1], PLAN)))
    paired = dataclasses.replace(way, cost=afterwards.Cost(images=40))
    np.testing.assert_allclose(way.embedded(100, "identification"), [0, 30, 70, 100])
    np.testing.assert_allclose(paired.embedded(100, "identification"), [40, 40, 70, 100])
    given = paired.embedded(100, "identification", from_gallery=False)
    np.testing.assert_allclose(given, [40, 70, 110, 140])


def test_pairs_of_pictures_have_no_candidates():
    assert not mixed.judges_scores(metrics.get("verification"))
    assert not mixed.judges_scores(metrics.get("tar@0.05"))
    assert mixed.judges_scores(metrics.get("cmc@7"))


OWN_NAMES = ("recall@1", "recall@3", "recall@euclid", "identification", "map")


@pytest.mark.parametrize("name", OWN_NAMES)
@pytest.mark.parametrize("sizes", [(6, 6), (4, 6)])
def test_a_metric_of_ones_own_gets_unit_features_whatever_its_name(name, sizes):
    seen = set()

    def score(queries, galleries):
        for features in (queries.features, *(rows for rows, _ in galleries)):
            np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, atol=1e-5)
        seen.add(queries.features.shape)
        return np.full((len(galleries), len(queries.labels)), 0.125)

    own = metrics.Metric(name, "%", score)
    ways = {way.name: way for way in afterwards.measure(spaces(sizes), [own], PLAN)}
    assert set(LIGHT) - set(ways) <= {"naive"}
    for way in ways.values():
        for curve in way.curves.values():
            np.testing.assert_array_equal(curve.values, 0.125)
    assert not ways["rescoring"].curves and seen <= {(17, 4), (17, 6), (17, sum(sizes))}


def test_ways_that_cannot_be_fitted_are_left_out():
    found = spaces((4, 6))
    pairs = found.pairs._replace(labels=np.arange(60))
    gone = afterwards.left_out(found._replace(pairs=pairs), PLAN)
    assert list(gone) == ["naive", "slerp"] and "sizes, 4 and 6" in gone["naive"]
    assert "no class has two pictures" in gone["slerp"]
    few = align.Pairs(*(part[:1] for part in found.pairs))
    gone = afterwards.left_out(found._replace(pairs=few), PLAN)
    assert set(LIGHT) - gone.keys() == {"rescoring", "reindex"}
    ways = [way.name for way in afterwards.measure(found._replace(pairs=few), MEASURED, PLAN)]
    assert ways == ["rescoring", "reindex"]
    assert not afterwards.left_out(spaces(), PLAN)


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """Three versions that were never trained."""
    made = Chain(tmp_path_factory.mktemp("chain") / "chain")
    for seed in range(3):
        record = tiny.record(task=seed)
        made.add(tiny.variables(record, seed), record)
    return made


def test_a_chain_is_compared_once_and_read_back_afterwards(chain, tmp_path, monkeypatch):
    session = tiny.session(cache=tmp_path, progress=False)
    found = afterwards.compare(chain, QUERY, GALLERY, plan=PLAN, session=session)
    assert (found.versions, found.queries, found.gallery_size) == ((0, 2), 24, 20)
    assert found.metrics == afterwards.METRICS and found.seconds_an_image > 0
    assert {way.cost.pairs for way in found.ways} == {0, 10}  # at most half of the gallery
    result = evaluate(chain, QUERY, GALLERY, metrics=found.metrics, session=session)
    for name, evaluated in result.items():
        values = found.way("naive").curves[name].values
        np.testing.assert_allclose(values[[0, -1]], evaluated.matrix[2, [0, 2]])
        assert found.way("reindex").curves[name].values[0] == evaluated.matrix[0, 0]
    for module in (evaluation, comparing):
        monkeypatch.setattr(module, "embed", lambda *_, **__: pytest.fail("embedded again"))
    again = afterwards.compare(chain, QUERY, GALLERY, plan=PLAN, session=session)
    assert json.dumps(again.summary()) == json.dumps(found.summary())
    np.testing.assert_array_equal(
        again.way("ridge").curves["recall@1"].scores, found.way("ridge").curves["recall@1"].scores
    )
    with pytest.raises(UserError, match="Did you mean 'naive'"):
        found.way("naiv")


def constant(value, name="mine"):
    """A metric of one's own that gives one value to all."""

    def score(queries, galleries):
        return np.full((len(galleries), len(queries.labels)), value)

    return metrics.Metric(name, "%", score)


@pytest.mark.parametrize("name", ["mine", "recall@1"])
def test_a_metric_of_ones_own_that_was_edited_is_measured_again(chain, tmp_path, name):
    plan = dataclasses.replace(PLAN, ways=("naive", "ridge", "reindex"))
    session = tiny.session(cache=tmp_path, progress=False)
    for value in (0.25, 0.75):
        chosen = [constant(value, name), "identification"]
        found = afterwards.compare(
            chain, QUERY, GALLERY, metrics=chosen, plan=plan, session=session
        )
        for way in found.ways:
            np.testing.assert_array_equal(way.curves[name].values, value)
    assert all(path.name.startswith("features") for path in tmp_path.iterdir())
    with pytest.raises(UserError, match="two different metrics are called"):
        chosen = [constant(0.1, name), constant(0.2, name)]
        afterwards.compare(chain, QUERY, GALLERY, metrics=chosen, plan=plan, session=session)


def a_picture_a_class(count=8):
    """Queries and a gallery with one picture of each class."""
    query = tiny.dataset(classes=count, per_class=3, seed=1)
    gallery = tiny.dataset(classes=count, per_class=5, seed=2)
    return query, gallery.take(np.unique(gallery.labels, return_index=True)[1])


def test_a_gallery_of_a_picture_a_class_leaves_slerp_out_and_measures_the_rest(chain, tmp_path):
    data = a_picture_a_class()
    session = tiny.session(cache=tmp_path, progress=False)
    found = afterwards.compare(chain, *data, plan=PLAN, session=session)
    assert [way.name for way in found.ways] == [way for way in LIGHT if way != "slerp"]
    (reason,) = (found.left_out[name] for name in ("slerp",))
    assert "no class has two pictures" in reason and len(found.left_out) == 1
    with pytest.raises(UserError, match="slerp was left out: no class has two pictures"):
        found.way("slerp")
    again = afterwards.compare(chain, *data, plan=PLAN, session=session)  # from the cache
    assert again.left_out == found.left_out and again.summary() == found.summary()
    assert json.loads(json.dumps(found.summary()))["left_out"] == {"slerp": reason}
    for kind, refused in (("ridge", False), ("slerp", True)):
        maps = Maps(kind=kind)
        assert maps.unfit(data[1]) == (reason if refused else "")
        if refused:
            with pytest.raises(UserError, match="no class has two pictures"):
                evaluate_mapped(chain, *data, maps, session=session)
        else:
            assert evaluate_mapped(chain, *data, maps, session=session).matrix.shape == (3, 3)
    only = dataclasses.replace(PLAN, ways=("slerp",))
    with pytest.raises(UserError, match=r"no way can be measured \(slerp: no class"):
        afterwards.compare(chain, *data, plan=only, session=session)


def test_a_gallery_of_three_pictures_has_no_maps_but_other_ways(chain):
    session = tiny.session(progress=False)
    found = afterwards.compare(chain, QUERY, GALLERY.take([0, 5, 10]), plan=PLAN, session=session)
    assert [way.name for way in found.ways] == ["naive", "rescoring", "reindex"]
    assert "on 2 pictures at least, here on 1" in found.left_out["procrustes"]
    assert found.left_out.keys() == set(LIGHT) - {way.name for way in found.ways}


def test_queries_that_have_nothing_to_find_are_refused():
    found = spaces()
    queries = found.queries._replace(labels=found.queries.labels + 10)
    with pytest.raises(UserError, match="no query has an image of its class in the gallery"):
        list(afterwards.measure(found._replace(queries=queries), MEASURED, PLAN))


def test_maps_may_be_fitted_on_other_pictures_and_the_versions_chosen(chain):
    pictures = tiny.dataset(classes=3, per_class=8, seed=5)
    plan = dataclasses.replace(PLAN, pictures=pictures, pairs=20, old=1)
    session = tiny.session(progress=False)
    found = afterwards.compare(chain, QUERY, GALLERY, metrics=["map"], plan=plan, session=session)
    assert found.versions == (1, 2) and not found.from_gallery
    assert found.way("ridge").cost[:2] == (20, 40)  # both versions embed them
    assert plan.address() != dataclasses.replace(plan, pictures=None).address()


def test_what_cannot_be_compared_is_refused(chain, tmp_path):
    for change, says in (
        ({"new": 0}, "must be older"),
        ({"old": 7}, "has 3 versions"),
    ):
        with pytest.raises(UserError, match=says):
            afterwards.compare(chain, QUERY, GALLERY, plan=dataclasses.replace(PLAN, **change))
    for wrong, says in (({"candidates": 0}, "candidates"), ({"ways": ("naiv",)}, "'naive'")):
        with pytest.raises(UserError, match=says):
            Plan(**wrong)
    with pytest.raises(UserError, match="label"):
        Plan(pictures=Dataset(GALLERY.images))
    session = tiny.session(progress=False, should_stop=lambda: True)
    with pytest.raises(Stopped):
        afterwards.compare(chain, QUERY, GALLERY, session=session)
    alone = Chain(tmp_path / "chain")
    alone.add(tiny.variables(tiny.record()), tiny.record())
    with pytest.raises(UserError, match="nothing to upgrade"):
        afterwards.compare(alone, QUERY, GALLERY)
    with pytest.raises(UserError, match="too few to fit"):
        Maps().rows(3)


@pytest.mark.parametrize("kind", ["procrustes", "slerp"])
def test_a_matrix_with_maps_has_the_mapped_tests_below_its_diagonal(chain, kind, tmp_path):
    session = tiny.session(progress=False, cache=tmp_path)
    maps = Maps(kind=kind, pairs=8, seed=1)
    plain = evaluate(chain, QUERY, GALLERY, metrics=["recall@1"], session=session).main
    names = ["recall@1", "identification"]
    found = evaluate_mapped(chain, QUERY, GALLERY, maps, metrics=names, session=session)
    result = found["recall@1"]
    np.testing.assert_array_equal(np.diag(result.matrix), np.diag(plain.matrix))
    asking = [retrieval.embed(chain[n], QUERY.images) for n in range(3)]
    answering = [retrieval.embed(chain[n], GALLERY.images) for n in range(3)]
    rows = maps.rows(len(GALLERY))
    assert len(rows) == len(set(rows)) == 8
    for t, k in ((1, 0), (2, 0), (2, 1)):
        pairs = answering[k][rows], answering[t][rows]
        fitted = align.fit(*pairs, kind, labels=GALLERY.labels[rows])
        scores = fitted.map(asking[t], asking[k]) @ answering[k].T
        hits = GALLERY.labels[scores.argmax(axis=1)] == QUERY.labels
        np.testing.assert_array_equal(result.scores[t, k], hits)
    assert f"mapped into older spaces by {kind}" in str(result)
    again = evaluate_mapped(chain, QUERY, GALLERY, maps, metrics=names, session=session)
    np.testing.assert_array_equal(again["identification"].matrix, found["identification"].matrix)
    assert evaluate(chain, QUERY, GALLERY, metrics=["recall@1"], session=session).main.table() == (
        plain.table()
    )


def test_features_of_other_sizes_compare_by_maps(tmp_path):
    chain = Chain(tmp_path / "chain")
    for number, width in enumerate((8, 16)):
        made = tiny.record(
            method="er",
            task=number,
            backbone_arguments={"width": width},
            feature_size=width,
            head_classes=2,
        )
        chain.add(tiny.variables(made, number), made)
    session = tiny.session(progress=False)
    assert evaluate(chain, QUERY, GALLERY, session=session).matrix[1, 0] == 0
    found = evaluate_mapped(chain, QUERY, GALLERY, Maps(), metrics=["map"], session=session).main
    assert found.matrix[1, 0] > 0 and not found.incomparable
    ways = afterwards.compare(chain, QUERY, GALLERY, metrics=["map"], plan=PLAN, session=session)
    assert [way.name for way in ways.ways] == list(LIGHT[1:])
    assert list(ways.left_out) == ["naive"] and "sizes, 8 and 16" in ways.left_out["naive"]


@pytest.mark.parametrize("kind", ["procrustes", "slerp"])
def test_an_index_searches_with_a_map(chain, kind):
    old, new = chain[0], chain[2]
    index = retrieval.Index(old, GALLERY.images)
    pairs = [retrieval.embed(version, GALLERY.images) for version in (old, new)]
    fitted = align.fit(*pairs, kind, labels=GALLERY.labels)
    scores, ids = index.search(new, iter(list(QUERY.images)), k=3, map=fitted)
    asking = [retrieval.embed(version, QUERY.images) for version in (old, new)]
    expected = fitted.map(asking[1], asking[0]) @ pairs[0].T
    np.testing.assert_allclose(scores, -np.sort(-expected, axis=1)[:, :3], atol=1e-5)
    np.testing.assert_allclose(np.take_along_axis(expected, ids, 1), scores, atol=1e-5)
    other = align.fit(pairs[0], np.pad(pairs[1], ((0, 0), (0, 1))))
    with pytest.raises(UserError, match=r"takes features of size 16 to 15.* have 15"):
        index.search(new, QUERY.images, k=3, map=other)


def test_many_queries_are_sampled():
    rows = afterwards.sampled(5000)
    assert len(rows) == afterwards.SAMPLE == len(set(rows)) and (np.diff(rows) > 0).all()
    np.testing.assert_array_equal(afterwards.sampled(7), np.arange(7))


@pytest.mark.slow
def test_the_program_prints_a_matrix_for_each_kind_of_map(tmp_path):
    config = tiny.config()
    described = tiny.record(backbone="flat", config=configs.plain(config), task=None)
    made = Chain(tmp_path / "chain")
    for seed in range(2):
        made.add(tiny.variables(described, seed), described)
    arguments = [
        f"--chain={made.path}",
        f"--out={tmp_path / 'out'}",
        "--mesh=data:1",
        "--noprogress",
    ]
    code, text, error = programs.call("evaluate", *arguments, "--afterwards=ridge,slerp", flat=True)
    assert code == 0, error
    assert re.findall(r"d-Simplex-HOC(.*): identification %", text) == ["", ", ridge", ", slerp"]
    assert "fitted for each pair of versions on 6 gallery images" in text
    for kind in ("ridge", "slerp"):
        content = json.loads((tmp_path / "out" / kind / "matrix.json").read_text())
        assert list(content) == [f"d-Simplex-HOC, {kind}"]
    config = tiny.config(**A_PICTURE_A_CLASS)
    described = tiny.record(backbone="flat", config=configs.plain(config), task=None)
    made = Chain(tmp_path / "lonely" / "chain")
    for seed in range(2):
        made.add(tiny.variables(described, seed), described)
    alone = [f"--chain={made.path}", "--mesh=data:1", "--noprogress"]
    code, text, error = programs.call(
        "evaluate", *alone, "--afterwards=procrustes,slerp,ridge", flat=True
    )
    assert code == 0, error
    shown = re.findall(r"d-Simplex-HOC(.*): identification %", text)
    assert shown == ["", ", procrustes", ", ridge"]
    assert "slerp was left out: no class has two pictures" in text
    code, _, error = programs.call("evaluate", *arguments, "--afterwards=rigde", flat=True)
    assert code == 2 and "ridge" in error, error
