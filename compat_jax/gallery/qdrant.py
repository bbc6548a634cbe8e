"""A gallery in a collection of Qdrant: a server by URL; a folder for tests and small trials."""

import contextlib
import functools
import os
import threading
import time
import urllib.parse
import uuid
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import qdrant_client
from qdrant_client import models
from qdrant_client.common.client_exceptions import QdrantException
from qdrant_client.http.exceptions import ApiException

from compat_jax import files
from compat_jax.errors import UserError
from compat_jax.gallery import conventions, probe
from compat_jax.gallery.points import batch, requests
from compat_jax.gallery.store import EVERY, Found, Rows, Where

# Its folders hold a Python imitation of the engine: everything in memory, compared one by one.
MOST_IN_FOLDER = 20_000
# Older servers ignore the conditions of a write that they do not know.
_OLDEST_SERVER = (1, 19)
_KEY_VARIABLE = "QDRANT_API_KEY"

_SIZE = "compat_jax.size"
_TIMEOUT = 120
_QUERIES = 64
_STRONG = models.WriteOrdering.STRONG
_INSERT, _UPDATE = models.UpdateMode.INSERT_ONLY, models.UpdateMode.UPDATE_ONLY
_ALL_BUT_FACTS = models.PayloadSelectorExclude(exclude=["facts"])
_NAMING = ["key", "write"]
_FIELDS = [*_NAMING, "version", "model", "content", "payload"]  # and facts, which are derived
_INDEXED = {
    "version": models.PayloadSchemaType.INTEGER,
    "facts": models.PayloadSchemaType.KEYWORD,
    "write": models.PayloadSchemaType.UUID,
}


class _Connection:
    """A client of a server or of a folder, and a lock: folders take one caller at a time."""

    def __init__(self, client: qdrant_client.QdrantClient, is_server: bool):
        self.client, self.is_server = client, is_server
        self.lock: Any = contextlib.nullcontext() if is_server else threading.RLock()
        # Also when the interpreter ends: left to itself, a client of a folder fails then, in words.
        weakref.finalize(self, client.close)


_FOLDERS: weakref.WeakValueDictionary[str, _Connection] = weakref.WeakValueDictionary()
_FOLDERS_LOCK = threading.Lock()


class QdrantStore:
    """A `Store` in a collection of Qdrant, and the manifest in a second one beside it.

    Every write of a row leaves a token in it. An update reads the rows, picks those that it may
    replace, and writes each on condition that its token is still the one that was read.

    Args:
      place: http://host:6333 or https://…, with the key of the server in QDRANT_API_KEY; or a folder,
        which one process at a time can open and which holds 20,000 rows at most.
      collection: name of the rows' collection.
      size: of the features; None opens a collection that is there.

    Raises:
      UserError: there is no such collection and no size, another size, a collection of somebody
        else's, a server that cannot be reached or is too old, or a folder that another process uses.
    """

    def __init__(
        self, place: str | os.PathLike[str], collection: str = "gallery", size: int | None = None
    ):
        self.place = f"{place}/{collection}"
        self._rows, self._own = collection, conventions.manifest_name(collection)
        with self._reported():
            self._connection = _connect(place)
        with self._engine() as client:
            if not client.collection_exists(self._rows):
                if size is None:
                    raise UserError(f"there is no gallery at {self.place}")
                self._create(size)
            self._create_manifest()
            config = client.get_collection(self._rows).config
            self.size = int((config.metadata or {}).get(_SIZE, 0))
        if not self.size:
            raise UserError(f"{self.place} is no gallery of compat_jax: choose another place")
        conventions.check_size(self.size, size, self.place)

    def _create(self, size: int) -> None:
        vectors = models.VectorParams(size=conventions.columns(size), distance=models.Distance.DOT)
        self._create_collection(self._rows, vectors, metadata={_SIZE: size})
        for name, kind in _INDEXED.items() if self._connection.is_server else ():
            self._connection.client.create_payload_index(self._rows, name, kind)

    def _create_manifest(self) -> None:
        client = self._connection.client
        if not client.collection_exists(self._own):
            self._create_collection(self._own, {})
            if self._connection.is_server:
                kind = models.PayloadSchemaType.INTEGER
                client.create_payload_index(self._own, "generation", kind)
        if client.get_collection(self._own).config.params.vectors:
            raise UserError(f"the collection {self._own} is somebody else's: choose another place")
        if not client.retrieve(self._own, [0]):
            none = {"generation": 0, "text": "", "writes": []}
            point = models.PointStruct(id=0, vector={}, payload=none)
            client.upsert(self._own, [point], ordering=_STRONG, update_mode=_INSERT)

    def _create_collection(self, name: str, vectors: Any, **options: Any) -> None:
        try:
            self._connection.client.create_collection(name, vectors, **options)
        except (ApiException, ValueError):
            if not self._connection.client.collection_exists(name):  # else another process made it
                raise

    def _reported(self) -> contextlib.AbstractContextManager[None]:
        errors = (ApiException, QdrantException)
        return conventions.reported(f"Qdrant, {self.place}", *errors)

    @contextlib.contextmanager
    def _engine(self) -> Iterator[Any]:
        with self._reported(), self._connection.lock:
            yield self._connection.client

    def manifest(self) -> Mapping[str, Any] | None:
        """See `Store`."""
        with self._engine():
            text = self._manifest_payload()["text"]
        return conventions.read_manifest(text)

    def _manifest_payload(self) -> dict[str, Any]:
        [point] = self._connection.client.retrieve(self._own, [0])
        return point.payload or {}

    def swap_manifest(self, new: Mapping[str, Any], expected: int) -> bool:
        """See `Store`."""
        text, token = conventions.check_swap(new, expected), uuid.uuid4().hex
        with self._engine() as client:
            now = self._manifest_payload()
            if now["generation"] != expected:
                return False
            # Who won is read back. The winner may be replaced before it reads: the tokens of the last
            # writes stay.
            writes = [*now["writes"][-63:], token]
            payload = {"generation": expected + 1, "text": text, "writes": writes}
            client.upsert(
                self._own,
                [models.PointStruct(id=0, vector={}, payload=payload)],
                ordering=_STRONG,
                update_mode=_UPDATE,
                update_filter=models.Filter(must=[_equal("generation", expected)]),
            )
            return token in self._manifest_payload()["writes"]

    def insert(self, rows: Rows) -> int:
        """See `Store`."""
        count = 0
        for points, ids in self._points(rows):
            with self._engine() as client:
                self._check_room(ids)
                client.upsert(self._rows, points, ordering=_STRONG, update_mode=_INSERT)
                there = client.retrieve(self._rows, ids, with_payload=_NAMING)
            self._refuse_clashes(points, there)
            token = points[0].payload["write"]
            count += sum(one.payload["write"] == token for one in there)
        return count

    def put(self, rows: Rows) -> None:
        """See `Store`."""
        for points, ids in self._points(rows):
            with self._engine() as client:
                self._check_room(ids)
                there = client.retrieve(self._rows, ids, with_payload=_NAMING)
                self._refuse_clashes(points, there)
                client.upsert(self._rows, points, ordering=_STRONG)

    def update(self, rows: Rows, replaces: Where) -> int:
        """See `Store`; the count lacks rows that were written once more before it was made."""
        return sum(self._update(points, replaces) for points, _ in self._points(rows))

    def _update(self, points: Sequence[Any], replaces: Where) -> int:
        count = 0
        open_points = {point.id: point for point in points}
        while open_points:
            with self._engine() as client:
                there = client.retrieve(self._rows, list(open_points), with_payload=_ALL_BUT_FACTS)
                self._check_fields(there)
                replaced: dict[str, list[Any]] = {}
                for one in there:
                    new = open_points[one.id]
                    if _holds(replaces, one) and _same_picture(one.payload, new.payload):
                        replaced.setdefault(one.payload["write"], []).append(_renewed(one, new))
                if not replaced:
                    break
                written = [point for some in replaced.values() for point in some]
                unchanged: list[Any] = [_unchanged(token, some) for token, some in replaced.items()]
                client.upsert(
                    self._rows,
                    written,
                    ordering=_STRONG,
                    update_mode=_UPDATE,
                    update_filter=models.Filter(should=unchanged),
                )
                ids = [point.id for point in written]
                after = client.retrieve(self._rows, ids, with_payload=["write"])
            token = points[0].payload["write"]
            done = {one.id for one in after if one.payload["write"] == token}
            count += len(done)
            # A row whose token had changed is looked at again.
            open_points = {one: open_points[one] for one in ids if one not in done}
        return count

    def delete(self, ids: np.ndarray) -> int:
        """See `Store`."""
        unique, count = np.unique(np.asarray(ids, np.int64)).tolist(), 0
        for start in range(0, len(unique), 4096):
            some = unique[start : start + 4096]
            with self._engine() as client:
                count += len(client.retrieve(self._rows, some, with_payload=False))
                chosen = models.PointIdsList(points=some)
                client.delete(self._rows, chosen, ordering=_STRONG)
        return count

    def search(self, queries: np.ndarray, k: int, where: Where = EVERY) -> Found:
        """See `Store`; a server searches approximately where it has built an index."""
        queries = conventions.check_queries(queries, k, self.size)
        return self._nearest(conventions.padded(queries), k, where=where)

    def _nearest(
        self, queries: np.ndarray, k: int, *, where: Where = EVERY, exact: bool = False
    ) -> Found:
        found = conventions.no_answers(len(queries), k)
        # A folder is always searched exactly, and has a warning for those who ask for it.
        params = models.SearchParams(exact=True) if exact and self._connection.is_server else None
        condition = _filter(where)
        for start in range(0, len(queries), _QUERIES):
            requests = [
                models.QueryRequest(query=one, limit=k, filter=condition, params=params)
                for one in queries[start : start + _QUERIES].tolist()
            ]
            with self._engine() as client:
                answers = client.query_batch_points(self._rows, requests)
            for row, answer in enumerate(answers, start):
                for place, point in enumerate(answer.points):
                    if not isinstance(point.id, int):
                        raise UserError(conventions.foreign(point.id, self.place))
                    found.ids[row, place], found.scores[row, place] = point.id, point.score
        return found

    def rows(
        self, where: Where = EVERY, *, after: int = -1, limit: int = 4096, vectors: bool = False
    ) -> Rows:
        """See `Store`."""
        found: list[Any] = []
        condition, begin = _filter(where), max(0, after + 1)
        while len(found) < limit:
            most = min(limit - len(found), batch(self.size) if vectors else 4096)
            with self._engine() as client:
                page, following = client.scroll(
                    self._rows,
                    condition,
                    limit=most,
                    offset=begin,
                    with_payload=_ALL_BUT_FACTS,
                    with_vectors=vectors,
                )
            found += page
            if following is None:
                break
            begin = following
        features = np.array([one.vector for one in found], np.float32) if vectors else None
        self._check_fields(found)
        rows = Rows(
            keys=[conventions.key_of(one.payload["key"]) for one in found],
            versions=np.array([one.payload["version"] for one in found], np.int32),
            models=[one.payload["model"] for one in found],
            contents=[one.payload["content"] for one in found],
            payloads=[one.payload["payload"] for one in found],
            vectors=None
            if features is None
            else features.reshape(len(found), conventions.columns(self.size))[:, : self.size],
        )
        conventions.check_ids(rows, [one.id for one in found], self.place)
        return rows

    def _check_fields(self, points: Sequence[Any], names: Sequence[str] = _FIELDS) -> None:
        """Refuse points of others: without some field of a row, or with another one's in its place."""
        for one in points:
            payload = one.payload or {}
            lacking = [name for name in names if name not in payload]
            if lacking or not isinstance(payload["key"], str):
                raise UserError(conventions.foreign(one.id, self.place, lacking))

    def counts(self) -> Mapping[int, int]:
        """See `Store`."""
        with self._engine() as client:
            hits = client.facet(self._rows, "version", limit=10_000, exact=True).hits
        return {int(hit.value): hit.count for hit in hits}

    def refresh(self) -> None:
        """Wait until a server has indexed the rows, as it does by itself, and probe the index.

        Raises:
          UserError: the index finds less than 90 % of what an exact search finds.
        """
        while True:
            with self._engine() as client:
                info = client.get_collection(self._rows)
            if info.status != models.CollectionStatus.YELLOW:
                break
            time.sleep(1)
        if info.indexed_vectors_count and (share := self.recall()) < probe.LEAST_RECALL:
            raise UserError(
                f"{probe.too_little(self.place, share)}: raise m and ef_construct of the collection in "
                "Qdrant"
            )

    def recall(self) -> float:
        """Return the share of an exact search's ten best rows that a search finds, for 50 rows."""
        sample = models.SampleQuery(sample=models.Sample.RANDOM)
        with self._engine() as client:
            some = client.query_points(
                self._rows, query=sample, limit=probe.QUERIES, with_vectors=True
            ).points
            count = client.count(self._rows).count
        queries = np.array([one.vector for one in some], np.float32)
        exact = functools.partial(self._nearest, exact=True)
        return probe.probe(queries, count, exact=exact, search=self._nearest)

    def _points(self, rows: Rows) -> Iterator[tuple[list[Any], list[int]]]:
        """Check rows and lay them out as points with one token, in batches, with their ids."""
        for some in requests(rows, self.size):
            yield [models.PointStruct(**one._asdict()) for one in some], [one.id for one in some]

    def _refuse_clashes(self, points: Sequence[Any], there: Sequence[Any]) -> None:
        self._check_fields(there, _NAMING)
        keys = [conventions.key_of(point.payload["key"]) for point in points]
        present = {one.id: conventions.key_of(one.payload["key"]) for one in there}
        conventions.refuse_clashes(keys, [point.id for point in points], present)

    def _check_room(self, ids: Sequence[int]) -> None:
        """Refuse rows that a folder has no room for; those that are there take none."""
        if self._connection.is_server:
            return
        client = self._connection.client
        more = len(ids) - len(client.retrieve(self._rows, ids, with_payload=False))
        if more and client.count(self._rows).count + more > MOST_IN_FOLDER:
            raise UserError(
                f"{self.place} is a folder of Qdrant's, which holds {MOST_IN_FOLDER:,} rows at most: "
                "use a server, or a folder of LanceDB's"
            )


def _connect(place: str | os.PathLike[str]) -> _Connection:
    if not files.in_bucket(place):
        folder = str(files.absolute(place))
        with _FOLDERS_LOCK:
            connection = _FOLDERS.get(folder)
            if connection is None:
                # Our lock serialises the callers. Asking SQLite whether it does, the client leaves
                # a connection open, of which Python 3.13 warns.
                client = qdrant_client.QdrantClient(
                    path=folder, force_disable_check_same_thread=True
                )
                connection = _FOLDERS[folder] = _Connection(client, is_server=False)
        return connection
    address = urllib.parse.urlsplit(str(place))
    key = os.environ.get(_KEY_VARIABLE)
    if key and address.scheme == "http" and address.hostname not in ("localhost", "127.0.0.1"):
        raise UserError(
            f"{place} would send the key in {_KEY_VARIABLE} over the network in clear text: use https://"
        )
    client = qdrant_client.QdrantClient(
        url=str(place),
        headers={"api-key": key} if key else None,
        timeout=_TIMEOUT,
        check_compatibility=False,
    )
    connection = _Connection(client, is_server=True)
    version = client.info().version
    if tuple(int(part) for part in version.split("-")[0].split(".")[:2]) < _OLDEST_SERVER:
        oldest = ".".join(map(str, _OLDEST_SERVER))
        raise UserError(f"{place} runs Qdrant {version}: {oldest} or later is needed")
    return connection


def _equal(name: str, value: int | str) -> models.FieldCondition:
    return models.FieldCondition(key=name, match=models.MatchValue(value=value))


def _filter(where: Where) -> models.Filter | None:
    """Return a condition for Qdrant; None for one that does not restrict."""
    version, below, ids, _ = where
    must: list[Any] = [_equal("facts", fact) for fact in conventions.asked(where)]
    if version is not None:
        must.append(_equal("version", int(version)))
    if below is not None:
        must.append(models.FieldCondition(key="version", range=models.Range(lt=int(below))))
    if ids is not None:
        must.append(models.HasIdCondition(has_id=[int(one) for one in ids]))
    return models.Filter(must=must) if must else None


def _holds(where: Where, point: Any) -> bool:
    """Return whether a condition holds of a point that was read."""
    version, below, ids, _ = where
    found = point.payload["version"]
    return (
        (version is None or found == version)
        and (below is None or found < below)
        and (ids is None or point.id in ids)
        and set(conventions.asked(where)) <= set(conventions.facts(point.payload["payload"]))
    )


def _same_picture(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return one["key"] == other["key"] and one["content"] == other["content"]


def _renewed(old: Any, new: Any) -> models.PointStruct:
    """Return a point with the feature and version of a new one and the payload of the old one."""
    payload = {**new.payload, "payload": old.payload["payload"]}
    payload["facts"] = conventions.facts(payload["payload"])
    return models.PointStruct(id=old.id, vector=new.vector, payload=payload)


def _unchanged(token: str, points: Sequence[Any]) -> models.Filter:
    """Return the condition that points still carry the token that was read, or already the new one.

    An engine that asks a condition again as it reads its log after a kill may by then have the new token
    in an index and the old row beside it (Qdrant Edge 0.9 does): the write is then done again, where the
    condition on the old token alone would leave the old payload beside the new feature.
    """
    ids = models.HasIdCondition(has_id=[point.id for point in points])
    tokens = models.MatchAny(any=[token, points[0].payload["write"]])
    return models.Filter(must=[ids, models.FieldCondition(key="write", match=tokens)])
