"""LanceDB: its index."""

import numpy as np
import pyarrow as pa
import pytest
from plain_store import (
    MODELS,
    D,
    make,
    names,
    vector,
)

from compat_jax.errors import UserError
from compat_jax.gallery import lance, probe
from compat_jax.gallery.store import Rows, Where, row_id


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


def test_a_row_that_another_program_wrote_under_an_id_of_its_own_is_refused(tmp_path):
    own = lance.LanceStore(tmp_path, "rows", D)
    own.insert(make(names(2), 1))
    table = lance.lancedb.connect(tmp_path).open_table("rows")
    row = table.search().limit(1).to_arrow().select(table.schema.names)
    table.add(row.set_column(0, table.schema.field("id"), pa.array([42])))
    with pytest.raises(UserError, match=r"row 42 of .*rows\.lance has not the id .*Gallery\.put"):
        own.rows()


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
