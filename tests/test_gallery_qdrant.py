"""Qdrant: folders and servers."""

import warnings

import numpy as np
import pytest
import qdrant_client
from plain_store import D, make, names

from compat_jax.errors import UserError
from compat_jax.gallery import qdrant
from compat_jax.gallery.places import open_store
from compat_jax.gallery.store import Where


def test_a_folder_of_qdrant_holds_few_rows_only(tmp_path, monkeypatch):
    monkeypatch.setattr(qdrant, "MOST_IN_FOLDER", 3)
    folder = qdrant.QdrantStore(tmp_path, size=D)
    folder.insert(make(names(3), 1))
    with pytest.raises(UserError, match="use a server"):
        folder.insert(make(names(3, 3), 1))
    assert folder.insert(make(names(3), 1)) == 0  # rows that are there take no room
    folder.put(make(names(3), 1))
    assert folder.update(make(names(3), 2), Where(below=2)) == 3
    assert folder.recall() == 1


@pytest.mark.parametrize(
    ("one", "left_out", "message"),
    [
        (
            42,
            ["key", "write"],
            r"row 42 of .*rows lacks key, write: another program wrote it. Delete",
        ),
        (42, [], "row 42 of .* has not the id that rows get from their keys"),
        ("8" * 32, [], "row 88888888-8888-.* has not the id"),
    ],
)
def test_points_of_others_are_refused_by_name(server, one, left_out, message):
    """As a service writes them that does not go through `Gallery.put`."""
    engine, _ = server
    with warnings.catch_warnings():  # the engine in memory has no indexes of payloads
        warnings.simplefilter("ignore")
        remote = open_store("qdrant:http://localhost:6333/rows", D)
    remote.insert(make(names(3), 1))
    own = {"key": "p9.png", "version": 1, "model": "0" * 16, "content": "c0", "payload": {}}
    payload = {**own, "facts": [], "write": "0" * 32}
    for name in left_out:
        del payload[name]
    vector = np.full(8, 100.0)
    engine.upsert(
        "rows", [qdrant_client.models.PointStruct(id=one, vector=vector, payload=payload)]
    )
    with pytest.raises(UserError, match=message):
        remote.rows(vectors=True)
    with pytest.raises(UserError, match=message):
        found = remote.search(np.ones((1, D), np.float32), 2)
        remote.rows(Where(ids=found.ids[0]))


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
