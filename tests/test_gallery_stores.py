"""Every store keeps the same promises: one suite over memory, LanceDB and Qdrant."""

import dataclasses
import functools
import importlib.util

import numpy as np
import pyarrow as pa
import pytest
import qdrant_client
from plain_store import (
    MODELS,
    D,
    Model,
    at_once,
    check_same,
    contents_of,
    make,
    names,
    random_where,
    step,
    vector,
)

from compat_jax.errors import UserError
from compat_jax.gallery import lance, memory, probe, store
from compat_jax.gallery.places import open_store
from compat_jax.gallery.store import Rows, Where, row_id

ENGINES = ("memory", "lance", "qdrant")


@pytest.fixture(params=ENGINES)
def place(request, tmp_path):
    if request.param == "memory":
        return f"memory:{tmp_path}"
    return f"{request.param}:{tmp_path}/rows"


@pytest.fixture
def empty(place):
    return open_store(place, D)


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
    client = qdrant_client.QdrantClient(
        path=str(tmp_path / "q"), force_disable_check_same_thread=True
    )
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


def test_recall_compares_scores():
    exact = np.array([[3.0, 2.0], [5.0, 5.0]], np.float32)
    assert probe.recall(exact, exact) == 1
    assert probe.recall(exact, np.array([[3, 1], [5, 4]], np.float32)) == 0.5


def test_stores_in_memory_have_names():
    assert memory.named("one", 3) is memory.named("one")
    with pytest.raises(UserError, match="at least one column"):
        memory.MemoryStore(0)
