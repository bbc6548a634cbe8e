"""Qdrant: folders and servers."""

import warnings

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
