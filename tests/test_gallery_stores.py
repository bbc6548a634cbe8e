"""Every store keeps the same promises: one suite over memory, LanceDB and Qdrant."""

import dataclasses
import functools
import importlib.util
import shutil
import socket
import subprocess
import threading
import time
import urllib.request
import warnings

import numpy as np
import pyarrow as pa
import pytest
import qdrant_client

from compat_jax.errors import UserError
from compat_jax.gallery import lance, memory, probe, qdrant, store
from compat_jax.gallery.places import open_store
from compat_jax.gallery.store import Rows, Where, row_id

D = 7  # a store pads it to 8
ENGINES = ("memory", "lance", "qdrant")
MODELS = {number: f"{number:016x}" for number in range(10)}


@pytest.fixture(params=ENGINES)
def place(request, tmp_path):
    if request.param == "memory":
        return f"memory:{tmp_path}"
    return f"{request.param}:{tmp_path}/rows"


@pytest.fixture
def empty(place):
    return open_store(place, D)


def vector(key, version, size=D):
    """The feature that a version gives a picture."""
    return np.random.default_rng([row_id(key), version]).normal(size=size).astype(np.float32)


def make(keys, version, *, contents=None, payloads=None, size=D):
    keys = list(keys)
    return Rows(
        keys=keys,
        versions=np.full(len(keys), version, np.int32),
        models=[MODELS[version]] * len(keys),
        contents=contents or ["c0"] * len(keys),
        payloads=payloads or [{}] * len(keys),
        vectors=np.array([vector(k, version, size) for k in keys], np.float32).reshape(-1, size),
    )


def names(count, start=0):
    return [f"p{i}.png" for i in range(start, start + count)]


def contents_of(a_store, **options):
    """All rows as key -> (version, model, content, payload, feature), read page by page."""
    found, after = {}, -1
    while len(page := a_store.rows(after=after, limit=5, vectors=True, **options)):
        ids = page.ids
        assert (np.diff(ids) > 0).all() and ids[0] > after
        after = int(ids[-1])
        columns = (page.versions, page.models, page.contents, page.payloads, page.vectors)
        for key, *values in zip(page.keys, *columns, strict=True):
            assert key not in found
            found[key] = tuple(values)
    return found


# --- A plain model of a store, and random histories


class Model:
    """Return what a store should hold: key -> [version, content, payload, feature]."""

    def __init__(self):
        self.rows = {}

    def put(self, rows, *, replace):
        for i, key in enumerate(rows.keys):
            if replace or key not in self.rows:
                self.rows[key] = [
                    int(rows.versions[i]),
                    rows.contents[i],
                    rows.payloads[i],
                    rows.vectors[i],
                ]

    def matching(self, where):
        def equal(one, other):
            return type(one) is type(other) and one == other

        return [
            key
            for key, (version, _, payload, _) in self.rows.items()
            if where.version in (None, version)
            and (where.below is None or version < where.below)
            and (where.ids is None or row_id(key) in where.ids)
            and all(
                equal(payload.get(name), value) for name, value in (where.payload or {}).items()
            )
        ]

    def update(self, rows, where):
        chosen = set(self.matching(where))
        done = [
            i
            for i, key in enumerate(rows.keys)
            if key in chosen and self.rows[key][1] == rows.contents[i]
        ]
        for i in done:
            row = self.rows[rows.keys[i]]
            row[0], row[3] = int(rows.versions[i]), rows.vectors[i]
        return len(done)


PAYLOADS = (
    {},
    {"label": 1},
    {"label": "1"},
    {"label": True, "a.b[0]": 'it\'s \\ "quoted" % _ é\n'},
    {"label": 0, "nested": {"x": [1.5, None]}},
)
ASKED = (
    None,
    {"label": 1},
    {"label": "1"},
    {"label": True},
    {"a.b[0]": 'it\'s \\ "quoted" % _ é\n'},
    {"label": 0, "nothing": 1},
)


def random_where(rng, keys):
    pick = rng.integers(5)
    ids = np.array([row_id(k) for k in rng.choice(keys, rng.integers(0, 5))], np.int64)
    return Where(
        version=int(rng.integers(1, 4)) if pick == 1 else None,
        below=int(rng.integers(1, 5)) if pick in (2, 4) else None,
        ids=ids if pick == 3 else None,
        payload=ASKED[rng.integers(len(ASKED))],
    )


def random_rows(rng, keys):
    chosen = rng.choice(keys, rng.integers(0, 6), replace=False).tolist()
    return make(
        chosen,
        int(rng.integers(1, 4)),
        contents=[f"c{rng.integers(2)}" for _ in chosen],
        payloads=[PAYLOADS[rng.integers(len(PAYLOADS))] for _ in chosen],
    )


def step(a_store, model, rng, keys):
    """Do one random thing to both; what they return must agree."""
    rows, where = random_rows(rng, keys), random_where(rng, keys)
    new = len([k for k in rows.keys if k not in model.rows])
    match rng.integers(5):
        case 0:
            assert a_store.insert(rows) == new
            model.put(rows, replace=False)
        case 1:
            a_store.put(rows)
            model.put(rows, replace=True)
        case 2 | 3:
            assert a_store.update(rows, where) == model.update(rows, where)
        case 4:
            gone = [k for k in rows.keys[:2] if k in model.rows]
            assert a_store.delete(rows.ids[:2]) == len(gone)
            for key in gone:
                del model.rows[key]


def check_same(a_store, model, where, query):
    found = contents_of(a_store)
    assert found.keys() == model.rows.keys()
    for key, (version, content, payload, feature) in model.rows.items():
        assert found[key][:4] == (version, MODELS[version], content, payload)
        np.testing.assert_array_equal(found[key][4], feature)
    versions = [row[0] for row in model.rows.values()]
    assert dict(a_store.counts()) == {v: versions.count(v) for v in set(versions)}
    chosen = model.matching(where)
    assert set(contents_of(a_store, where=where)) == set(chosen)
    scores = {row_id(k): float(query @ model.rows[k][3]) for k in chosen}
    ids, answered = (part[0] for part in a_store.search(query[None], 3, where))
    best = sorted(scores.values(), reverse=True)[:3]
    assert (ids >= 0).sum() == len(best)
    np.testing.assert_allclose(answered[: len(best)], best, atol=1e-5)
    np.testing.assert_allclose([scores[i] for i in ids[: len(best)]], best, atol=1e-5)
    assert (answered[len(best) :] == -np.inf).all() and (ids[len(best) :] == -1).all()


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_random_histories_agree_with_a_plain_dictionary(empty, seed, capfd):
    rng, model, keys = np.random.default_rng(seed), Model(), names(12)
    for i in range(30 if seed == 0 else 300):
        step(empty, model, rng, keys)
        if i % 6 == 0:
            check_same(empty, model, random_where(rng, keys), rng.normal(size=D).astype(np.float32))
        if i % 15 == 14:
            empty.refresh()
    check_same(empty, model, Where(), np.ones(D, np.float32))
    assert capfd.readouterr() == ("", "")


# --- Rows


def test_inserting_again_neither_doubles_nor_changes_a_row(empty):
    assert empty.insert(make(names(4), 1)) == 4
    assert empty.insert(make(names(6), 2)) == 2
    found = contents_of(empty)
    assert len(found) == 6 and dict(empty.counts()) == {1: 4, 2: 2}
    np.testing.assert_array_equal(found["p0.png"][4], vector("p0.png", 1))


def test_an_update_brings_no_deleted_row_back(empty):
    empty.insert(make(names(4), 1))
    read = empty.rows()  # a backfill reads, and embeds for a while
    assert empty.delete(read.ids[:1]) == 1
    assert empty.update(make(read.keys, 2), Where(below=2)) == 3
    assert contents_of(empty).keys() == set(read.keys[1:])


def test_a_picture_replaced_meanwhile_keeps_its_own_feature(empty):
    empty.insert(make(names(3), 1))
    replaced = make(["p1.png"], 1, contents=["c1"])
    empty.put(dataclasses.replace(replaced, vectors=np.full((1, D), 9, np.float32)))
    assert empty.update(make(names(3), 2), Where(below=2)) == 2
    version, _, content, _, feature = contents_of(empty)["p1.png"]
    assert (version, content) == (1, "c1") and (feature == 9).all()


def test_an_update_replaces_what_it_was_meant_to_and_once(empty):
    empty.insert(make(names(2), 1))
    empty.insert(make(names(2, 2), 3))
    assert empty.update(make(names(4), 2), Where(below=2)) == 2
    assert empty.update(make(names(4), 2), Where(below=2)) == 0
    assert dict(empty.counts()) == {2: 2, 3: 2}
    assert empty.update(make(names(4), 1), Where(version=2)) == 2  # and back
    assert dict(empty.counts()) == {1: 2, 3: 2}


def test_an_update_leaves_payloads_alone(empty):
    payloads = [{"label": "cat", "n": {"x": 1}}, {"label": "dog"}]
    empty.insert(make(names(2), 1, payloads=payloads))
    assert empty.update(make(names(2), 2, payloads=[{"label": "?"}] * 2), Where(below=2)) == 2
    assert [row[3] for row in contents_of(empty).values()] in (payloads, payloads[::-1])
    assert empty.search(np.ones((1, D)), 2, Where(payload={"label": "cat"})).ids[0, 1] == -1


def test_keys_that_are_not_utf_8_come_back_as_they_were(empty):
    keys = ["caf\udce9.png", r"caf\xe9.png", "a\\b", "日本.png"]
    assert empty.insert(make(keys, 1)) == 4
    assert contents_of(empty).keys() == set(keys)
    assert empty.update(make(keys, 2), Where(below=2)) == 4
    with pytest.raises(UserError, match="no name that a file can have"):
        empty.insert(dataclasses.replace(make(["p1"], 1), keys=["\ud800"]))


def test_two_keys_of_one_id_are_refused_and_nothing_is_overwritten(empty, monkeypatch):
    monkeypatch.setattr(store, "row_id", lambda key: 5)
    first = Rows(["one"], np.ones(1, np.int32), ["m"], ["c"], [{}], np.ones((1, D), np.float32))
    other = dataclasses.replace(first, keys=["two"])
    both = Rows(["one", "two"], np.ones(2), ["m"] * 2, ["c"] * 2, [{}] * 2, np.ones((2, D)))
    empty.insert(first)
    for write in (empty.insert, empty.put):
        with pytest.raises(UserError, match="'two' and 'one' have the same id"):
            write(other)
    with pytest.raises(UserError, match="same id"):
        empty.insert(both)
    assert empty.update(other, Where()) == 0
    assert contents_of(empty).keys() == {"one"}


@pytest.mark.parametrize(
    "bad, words",
    [
        (make(["a", "a"], 1), "comes twice"),
        (make(["a"], 1, size=D + 1), "size 7, got"),
        (dataclasses.replace(make(["a"], 1), vectors=None), "without features"),
        (make(["a"], 1, payloads=[{"x": float("nan")}]), "no JSON"),
        (make(["a"], 1, payloads=[{"x": "\udce9"}]), "no JSON in UTF-8"),
        (make(["a"], 1, payloads=[{1: "x"}]), "names of fields must be texts"),
    ],
)
def test_rows_that_cannot_be_stored_are_refused(empty, bad, words):
    for write in (empty.insert, empty.put, lambda rows: empty.update(rows, Where())):
        with pytest.raises(UserError, match=words):
            write(bad)
    assert not len(empty.rows())


def test_no_rows_are_no_error(empty):
    none = make([], 1)
    empty.put(none)
    assert empty.insert(none) == empty.update(none, Where()) == empty.delete(none.ids) == 0
    assert dict(empty.counts()) == {} and len(empty.rows(vectors=True)) == 0
    empty.refresh()


# --- Searches


def test_scores_are_inner_products_and_padding_changes_none(place):
    wide = open_store(place, 127)
    rows = make(names(5), 1, size=127)
    rows = dataclasses.replace(rows, vectors=3 * rows.vectors)  # not of length 1
    wide.insert(rows)
    queries = rows.vectors[:2]
    ids, scores = wide.search(queries, 5)
    np.testing.assert_allclose(scores, -np.sort(-queries @ rows.vectors.T, axis=1), rtol=1e-5)
    assert (ids[:, 0] == rows.ids[:2]).all()
    assert wide.rows(vectors=True).vectors.shape == (5, 127)


def test_a_search_answers_with_fewer_rows_where_there_are_fewer(empty):
    assert (empty.search(np.ones((2, D)), 3).ids == -1).all()
    empty.insert(make(names(2), 1))
    ids, scores = empty.search(np.ones((2, D)), 3)
    assert (ids[:, 2] == -1).all() and (scores[:, 2] == -np.inf).all() and (ids[:, :2] >= 0).all()
    assert empty.search(np.ones((0, D)), 3).ids.shape == (0, 3)
    assert (empty.search(np.ones((1, D)), 3, Where(ids=np.zeros(0, np.int64))).ids == -1).all()


def test_queries_that_cannot_be_compared_are_refused(empty):
    for queries, k, words in [
        (np.ones((1, D + 1)), 1, "the queries have shape"),
        (np.ones(D), 1, "the queries have shape"),
        (np.full((1, D), np.nan), 1, "not finite"),
        (np.ones((1, D)), 0, "at least 1"),
    ]:
        with pytest.raises(UserError, match=words):
            empty.search(queries, k)
    with pytest.raises(UserError, match="compares with a text"):
        empty.search(np.ones((1, D)), 1, Where(payload={"x": 1.5}))


# --- The manifest, and several writers at once


def at_once(*actions):
    """Run actions in threads that start together; return what they return."""
    start, results = threading.Barrier(len(actions)), [None] * len(actions)

    def run(i):
        start.wait()
        results[i] = actions[i]()

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(actions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_of_several_who_swap_the_manifest_exactly_one_wins(place, empty):
    assert empty.manifest() is None
    assert not empty.swap_manifest({"generation": 4}, 3)
    for generation in range(4):
        stores = [empty, *(open_store(place) for _ in range(3))]
        manifests = [{"generation": generation + 1, "by": i, "é": [1.5]} for i in range(4)]
        won = at_once(
            *(
                functools.partial(one.swap_manifest, new, generation)
                for one, new in zip(stores, manifests, strict=True)
            )
        )
        assert sorted(won) == [False, False, False, True]
        assert empty.manifest() == manifests[won.index(True)]
    with pytest.raises(UserError, match="must have generation 5"):
        empty.swap_manifest({"generation": 6}, 4)
    with pytest.raises(UserError, match="no JSON"):
        empty.swap_manifest({"generation": 5, "x": np.ones(1)}, 4)


def test_rows_inserted_by_several_at_once_are_there_once(place, empty):
    rows = make(names(20), 1)
    counts = at_once(*(functools.partial(open_store(place).insert, rows) for _ in range(4)))
    assert sum(counts) == 20
    assert len(contents_of(empty)) == 20 and dict(empty.counts()) == {1: 20}


def test_updates_deletions_and_insertions_at_once_tear_no_row(place, empty):
    keys = names(24)
    empty.insert(make(keys, 1))

    def backfill(version):
        mine = open_store(place)
        for start in range(0, 24, 6):
            mine.update(make(keys[start : start + 6], version), Where(below=2))

    def delete():
        for key in keys[::4]:
            assert open_store(place).delete(np.array([row_id(key)])) == 1

    def insert():
        open_store(place).insert(make(names(8, 24), 4))

    at_once(lambda: backfill(2), lambda: backfill(3), delete, insert)
    found = contents_of(empty)
    assert found.keys() == set(names(32)) - set(keys[::4])
    for key, (version, model, _, _, feature) in found.items():
        assert version in ((4,) if key in names(8, 24) else (2, 3))
        assert model == MODELS[version]
        np.testing.assert_array_equal(feature, vector(key, version))


# --- Opening


def test_what_was_written_is_there_when_it_is_opened_again(place):
    first = open_store(place, D)
    first.insert(make(names(3), 1))
    first.swap_manifest({"generation": 1}, 0)
    again = open_store(place)
    assert again.size == D and again.manifest() == {"generation": 1}
    assert len(contents_of(again)) == 3
    with pytest.raises(UserError, match="size 7, not 8"):
        open_store(place, D + 1)


def test_a_gallery_that_is_not_there_is_not_made(place, tmp_path):
    with pytest.raises(UserError, match="there is no gallery"):
        open_store(place)
    assert not list(tmp_path.glob("**/*.lance"))


def test_tables_and_collections_of_others_are_refused(tmp_path):
    lance.lancedb.connect(tmp_path / "l").create_table("rows", pa.table({"id": [1]}))
    client = qdrant_client.QdrantClient(path=str(tmp_path / "q"))
    client.create_collection("rows", vectors_config={})
    client.close()
    for place in (f"lance:{tmp_path}/l/rows", f"qdrant:{tmp_path}/q/rows"):
        with pytest.raises(UserError, match="is no gallery of compat_jax"):
            open_store(place)


@pytest.mark.parametrize(
    "place, words",
    [
        ("nowhere", "names no gallery: write lance:"),
        ("lanze:a/b", "Did you mean 'lance'"),
        ("lance:", "has no name"),
        ("gs://bucket", "has no name"),
        ("qdrant:http://localhost:6333", "has no name"),
        ("http://localhost:6333/rows", "qdrant:http://localhost:6333/rows"),
        ("qdrant:http://localhost:1/rows", "Qdrant, http://localhost:1/rows: "),
        ("lance:/dev/null/x/rows", "LanceDB, /dev/null/x"),
    ],
)
def test_places_that_cannot_be_opened_are_refused(place, words):
    with pytest.raises(UserError) as caught:
        open_store(place, D)
    assert words in str(caught.value)


def test_a_path_that_ends_in_lance_is_a_table(tmp_path, monkeypatch):
    open_store(f"{tmp_path}/some.lance", D).insert(make(names(1), 1))
    assert dict(open_store(f"lance:{tmp_path}/some").counts()) == {1: 1}
    monkeypatch.chdir(tmp_path)
    assert dict(open_store("some.lance").counts()) == {1: 1}


@pytest.mark.parametrize("engine, extra", [("lance", "gallery"), ("qdrant", "qdrant")])
def test_an_engine_that_is_missing_is_named_with_the_command(engine, extra, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'compat_jax\[") as caught:
        open_store(f"{engine}:a/b", D)
    assert f"'compat_jax[{extra}]'" in str(caught.value)


# --- LanceDB: the index


def indexes(folder):
    # Imported by our module: imported before it, LanceDB would log about small refreshes on stderr.
    return lance.lancedb.connect(folder).open_table("gallery").list_indices()


def test_lance_has_no_index_below_its_number_of_rows_and_none_on_ids(tmp_path, capfd):
    small = lance.LanceStore(tmp_path, size=D, index_from=300)
    small.insert(make(names(299), 1))
    small.refresh()
    assert indexes(tmp_path) == []
    small.insert(make(names(301), 1))
    small.refresh()
    [index] = indexes(tmp_path)
    assert (index.index_type, index.columns) == ("IvfFlat", ["vector"])
    # Rows written later are found before they are indexed, and a few rows of one version among many
    # are all found.
    assert small.update(make(names(7), 2), Where(below=2)) == 7
    for _ in range(2):
        assert (small.search(np.ones((2, D)), 8, Where(version=2)).ids >= 0).sum() == 14
        found = small.search(vector("p3.png", 2)[None] * 50, 1)
        assert found.ids[0, 0] == row_id("p3.png") or found.scores[0, 0] > 50 * D
        small.refresh()
        assert indexes(tmp_path)[0].num_unindexed_rows == 0
    assert capfd.readouterr() == ("", "")


def test_lance_removes_an_index_that_finds_too_little(tmp_path, monkeypatch):
    one = lance.LanceStore(tmp_path, size=D, index_from=200)
    one.insert(make(names(200), 1))
    monkeypatch.setattr(probe, "recall", lambda exact, found: 0.5)
    with pytest.raises(UserError, match="finds 50% of what an exact search finds"):
        one.refresh()
    assert indexes(tmp_path) == []
    monkeypatch.undo()
    one.refresh()
    assert one.recall() == 1
    one.insert(make(names(1, 200), 1))
    monkeypatch.setattr(probe, "recall", lambda exact, found: 0.5)
    with pytest.raises(UserError, match="more probes than 50"):  # measured again after a backfill
        one.refresh()


def test_lance_reads_as_few_partitions_as_find_enough(tmp_path):
    rng = np.random.default_rng(0)
    count, size = 20_000, 8
    features = rng.normal(size=(count, size)).astype(np.float32)
    wide = lance.LanceStore(tmp_path, size=size, index_from=count, probes=1)
    rows = Rows(
        names(count),
        np.zeros(count, np.int32),
        ["m"] * count,
        ["c"] * count,
        [{}] * count,
        features,
    )
    assert wide.insert(rows) == count
    wide.refresh()
    # Rows without clusters: one partition holds too few of the nearest, so that more are read.
    assert wide.recall(1) < probe.LEAST_RECALL <= wide.recall()
    kept = lance.LanceStore(tmp_path, probes=1).recall()
    assert probe.LEAST_RECALL <= kept == wide.recall()
    # Of a condition that leaves few rows, all are found, in whatever partitions.
    some = rows.ids[:9]
    found = wide.search(features[:2], 9, Where(ids=some)).ids
    assert (np.sort(found) == np.sort(some)).all()


def test_recall_compares_scores():
    exact = np.array([[3.0, 2.0], [5.0, 5.0]], np.float32)
    assert probe.recall(exact, exact) == 1
    assert probe.recall(exact, np.array([[3, 1], [5, 4]], np.float32)) == 0.5


@pytest.mark.slow
@pytest.mark.parametrize("size", [127, 128])
def test_a_large_lance_table_is_indexed_probed_and_stays_right(tmp_path, size, capfd):
    rng = np.random.default_rng(0)
    count = 120_000
    centres = rng.normal(size=(1000, size))
    noise = rng.normal(size=(count, size))
    vectors = (centres[rng.integers(1000, size=count)] + noise).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    keys = names(count)

    def rows(chosen, version, features):
        n = len(chosen)
        return Rows(
            [keys[i] for i in chosen],
            np.full(n, version, np.int32),
            [MODELS[version]] * n,
            ["c"] * n,
            [{"parity": int(i) % 2} for i in chosen],
            features,
        )

    large = lance.LanceStore(tmp_path, size=size)
    for start in range(0, count, 20_000):
        part = np.arange(start, start + 20_000)
        assert large.insert(rows(part, 1, vectors[part])) == 20_000
    large.refresh()
    assert [i.index_type for i in indexes(tmp_path)] == ["IvfFlat"]
    assert large.recall() >= 0.9

    moved = rng.choice(count, 12_000, replace=False)
    vectors[moved] = -vectors[moved]
    for part in np.split(moved, 2):
        assert large.update(rows(part, 2, vectors[part]), Where(below=2)) == 6_000
    gone = np.setdiff1d(np.arange(count), moved)[:1000]
    ids = np.array([row_id(key) for key in keys])
    assert large.delete(ids[gone]) == 1000
    kept = np.setdiff1d(np.arange(count), gone)
    queries = vectors[moved[:50]]
    exact = -np.sort(-(queries @ vectors[kept].T), axis=1)[:, :10]
    for _ in range(2):
        found = large.search(queries, 10)
        assert probe.recall(exact, found.scores) >= 0.9
        assert not np.isin(found.ids, ids[gone]).any()
        place = {one: i for i, one in enumerate(ids.tolist())}
        own = vectors[[[place[i] for i in row] for row in found.ids.tolist()]]
        np.testing.assert_allclose((own @ queries[..., None])[..., 0], found.scores, atol=1e-5)
        rare = large.search(queries[:2], 10, Where(version=2, payload={"parity": 1}))
        assert (rare.ids >= 0).all()
        large.refresh()
    assert indexes(tmp_path)[0].num_unindexed_rows == 0
    assert dict(large.counts()) == {1: count - 13_000, 2: 12_000}
    # Seven rows of one version, in whatever partitions of the index, are all found.
    few = rng.choice(moved, 7, replace=False)
    assert large.update(rows(few, 3, vectors[few]), Where(version=2)) == 7
    large.refresh()
    found = large.search(queries, 10, Where(version=3)).ids
    assert (np.sort(found[:, :7]) == np.sort(ids[few])).all() and (found[:, 7:] == -1).all()
    assert capfd.readouterr() == ("", "")


@pytest.fixture
def bucket(monkeypatch):
    """Place in a bucket of moto's stand-in for S3."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    monkeypatch.setenv("AWS_ENDPOINT", url)
    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "anyone")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    command = ["moto_server", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(300):
            assert process.poll() is None
            try:
                make = urllib.request.Request(f"{url}/bucket", method="PUT")
                urllib.request.urlopen(make).close()
                break
            except OSError:
                time.sleep(0.1)
        yield "s3://bucket/folder/rows.lance"
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("moto_server") is None, reason="needs pip install moto[server]")
def test_a_lance_table_in_a_bucket_keeps_the_same_promises(bucket):
    with pytest.raises(UserError, match="there is no gallery"):
        open_store(bucket)
    inside, model, rng = open_store(bucket, D), Model(), np.random.default_rng(0)
    for _ in range(20):
        step(inside, model, rng, names(12))
    check_same(inside, model, Where(), np.ones(D, np.float32))
    stores = [open_store(bucket) for _ in range(4)]
    rows = make(names(20, 12), 1)
    assert sum(at_once(*(functools.partial(one.insert, rows) for one in stores))) == 20
    assert len(contents_of(inside)) == len(model.rows) + 20
    swaps = [
        functools.partial(s.swap_manifest, {"generation": 1, "by": i}, 0)
        for i, s in enumerate(stores)
    ]
    assert sorted(at_once(*swaps)) == [False, False, False, True]


# --- Qdrant: folders and servers


def test_a_folder_of_qdrant_holds_few_rows_only(tmp_path, monkeypatch):
    monkeypatch.setattr(qdrant, "MOST_IN_FOLDER", 3)
    folder = qdrant.QdrantStore(tmp_path, size=D)
    folder.insert(make(names(3), 1))
    with pytest.raises(UserError, match="use a server"):
        folder.insert(make(names(3, 3), 1))
    assert folder.update(make(names(3), 2), Where(below=2)) == 3
    assert folder.recall() == 1


@pytest.fixture
def server(monkeypatch):
    """Takes the place of a server: the client's own engine in memory."""
    engine = qdrant_client.QdrantClient(":memory:")
    given = {}

    def connect(**options):
        given.update(options)
        return engine

    monkeypatch.setattr(qdrant_client, "QdrantClient", connect)
    yield engine, given
    engine.close()


def test_a_server_of_qdrant_gets_indexes_of_payloads_and_the_key(server, monkeypatch):
    engine, given = server
    monkeypatch.setenv("QDRANT_API_KEY", "secret")
    indexes = []
    monkeypatch.setattr(engine, "create_payload_index", lambda *args: indexes.append(args[1]))
    remote = open_store("qdrant:https://example.org:6333/rows", D)
    assert given["url"] == "https://example.org:6333"
    assert given["headers"] == {"api-key": "secret"}
    assert indexes == ["version", "facts", "write", "generation"]
    assert remote.insert(make(names(3), 1)) == 3
    with warnings.catch_warnings():  # the engine in memory has nothing but exact searches
        warnings.simplefilter("ignore")
        assert remote.recall() == 1
    with pytest.raises(UserError, match="clear text"):
        open_store("qdrant:http://example.org:6333/rows", D)


def test_a_server_that_is_too_old_to_keep_conditions_is_refused(server, monkeypatch):
    engine, _ = server
    old = engine.info().model_copy(update={"version": "1.15.3"})
    monkeypatch.setattr(engine, "info", lambda: old)
    with pytest.raises(UserError, match=r"runs Qdrant 1\.15\.3: 1\.19 or later"):
        open_store("qdrant:http://localhost:6333/rows", D)


def test_stores_in_memory_have_names():
    assert memory.named("one", 3) is memory.named("one")
    with pytest.raises(UserError, match="at least one column"):
        memory.MemoryStore(0)
