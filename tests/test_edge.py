"""The side of Qdrant Edge in the benchmark of galleries: it writes what our store writes to a server."""

import dataclasses
import sys

import numpy as np
import pytest

from compat_jax.errors import UserError
from compat_jax.gallery.probe import recall
from compat_jax.gallery.store import Rows, Where
from launch.benchmarks import gallery

edge = pytest.importorskip("launch.benchmarks.edge")

COUNT, SIZE, MOVED = 2000, 23, 200


def rows(count, version=0, start=0, seed=0):
    """Rows of unit features in planted clusters; those of version 1 lie nearer to the centres."""
    rng = np.random.default_rng([seed, version])
    centres = np.random.default_rng(1).standard_normal((30, SIZE))
    at = np.arange(start, start + count)
    vectors = centres[at % 30] + (0.6 if version else 1) * rng.standard_normal((count, SIZE))
    return Rows(
        keys=[f"photos/{i}.jpg" for i in at],
        versions=np.full(count, version, np.int32),
        models=[f"{version:016x}"] * count,
        contents=[f"{i:032x}" for i in at],
        payloads=[{"label": f"class {i % 30}", "page": int(i), "note": None} for i in at],
        vectors=(vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32),
    )


def points(store):
    """{id: (payload, vector)} of all points of a shard."""
    request = edge.engine.ScrollRequest(limit=10_000, with_payload=True, with_vector=True)
    return {one.id: (one.payload, one.vector) for one in store.shard.scroll(request)[0]}


def exact(queries, features, k):
    return -np.sort(-(queries @ features.T), axis=1)[:, :k]


def test_points_and_requests_are_those_of_the_store(tmp_path, monkeypatch):
    package = pytest.importorskip("qdrant_client")
    from compat_jax.gallery.qdrant import QdrantStore

    client = package.QdrantClient(
        ":memory:"
    )  # a folder would write each point to the disk by itself
    monkeypatch.setattr(package, "QdrantClient", lambda **settings: client)
    given, new = rows(270), rows(40, version=1)
    store, shard = QdrantStore(tmp_path / "a", size=SIZE), edge.EdgeStore(tmp_path / "b", SIZE)
    sizes, written, upsert = [], {}, client.upsert

    def seen(name, some, **options):
        sizes.append(len(some))
        written.update({one.id: (one.payload, one.vector) for one in some})
        return upsert(name, some, **options)

    monkeypatch.setattr(client, "upsert", seen)
    for call in (lambda to: to.insert(given), lambda to: to.update(new, Where(version=0))):
        assert call(store) == call(shard)
    assert sizes == [256, 14, 40]
    assert [len(some) for some in edge.requests(given, SIZE)] == sizes[:2]
    found = points(shard)
    assert found.keys() == written.keys() and len(found) == 270
    tokens = set()
    for one, (payload, vector) in written.items():
        tokens.add((payload.pop("write"), found[one][0].pop("write")))
        assert found[one] == (payload, vector)
    assert len(tokens) == 2  # one a call, on either side


def test_an_update_leaves_alone_what_is_gone_or_changed(tmp_path):
    store = edge.EdgeStore(tmp_path / "shard", SIZE)
    old, new = rows(6), rows(6, version=1)
    store.insert(old)
    ids = old.ids.tolist()
    another = dataclasses.replace(rows(1, start=1, seed=2), contents=["another"])
    store.shard.update(edge.engine.UpdateOperation.delete_points(ids[:2]))
    assert store.insert(another) == 1
    meanwhile = Meanwhile(
        store.shard, lambda: store.update(rows(3, 1, 2, seed=3), Where(version=0))
    )
    store.shard = meanwhile
    assert store.update(new, Where(version=0)) == 1
    assert store.update(new, Where(version=0)) == 0
    found = points(store)
    assert ids[0] not in found and found[ids[1]][0]["content"] == "another"
    np.testing.assert_array_equal(
        [found[one][1][:SIZE] for one in ids[1:]],
        [another.vectors[0], *rows(3, 1, 2, seed=3).vectors, new.vectors[5]],
    )
    assert store.counts() == {0: 1, 1: 4}


class Meanwhile:
    """A shard in which another writer is faster, once, between a reading and the write after it."""

    def __init__(self, shard, other):
        self.shard, self.others = shard, [other]

    def __getattr__(self, name):
        return getattr(self.shard, name)

    def retrieve(self, *given):
        found = self.shard.retrieve(*given)
        while self.others:
            self.others.pop()()
        return found


def test_an_index_is_built_on_call_and_after_a_backfill_again(tmp_path):
    store = edge.EdgeStore(tmp_path / "shard", SIZE, index_above=100)
    old, new = rows(COUNT), rows(MOVED, version=1)
    store.insert(old)
    queries = rows(20, version=1, seed=5).vectors
    assert store.shard.info().indexed_vectors_count == 0
    before = exact(queries, old.vectors, 10)
    assert recall(before, store.search(queries, 10).scores) == 1
    store.refresh()
    assert store.shard.info().indexed_vectors_count == COUNT
    found = store.search(queries, 10)
    assert recall(before, found.scores) > 0.9
    of = dict(zip(old.ids.tolist(), old.vectors, strict=True))
    np.testing.assert_allclose(found.scores[3, 0], of[found.ids[3, 0]] @ queries[3], atol=1e-5)
    assert store.update(new, Where(version=0)) == MOVED
    assert store.counts() == {0: COUNT - MOVED, 1: MOVED}
    after = exact(queries, new.vectors, 10)
    assert recall(after, store.search(queries, 10, Where(version=1)).scores) > 0.9
    store.refresh()
    assert recall(after, store.search(queries, 10, Where(version=1)).scores) > 0.9
    store.shard.close()
    again = edge.EdgeStore(tmp_path / "shard", SIZE)
    assert again.counts() == {0: COUNT - MOVED, 1: MOVED}


def test_without_the_package_one_line_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "qdrant_edge", None)
    with pytest.raises(UserError, match="pip install qdrant-edge-py"):
        gallery.opened(f"edge:{tmp_path}/load", SIZE)
