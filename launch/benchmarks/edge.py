"""Qdrant Edge, the engine of a Qdrant server in one process, as a side of the measure of galleries.

The library has no store for it: this is as much of one as the measure asks for. It writes the points of
`compat_jax.gallery.qdrant`, on the same conditions, in requests of the same size.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import qdrant_edge as engine

from compat_jax.gallery import conventions
from compat_jax.gallery import points as laid_out
from compat_jax.gallery.store import EVERY, Found, Rows, Where

_QUERIES = 64  # of one request
_FLUSH = 5.0  # seconds between two flushes, as a server has them
_INDEXED = {
    "version": engine.PayloadSchemaType.Integer,
    "facts": engine.PayloadSchemaType.Keyword,
    "write": engine.PayloadSchemaType.Uuid,
}


class EdgeStore:
    """Rows of a gallery in a shard of Qdrant Edge, for one process and one thread.

    Attributes:
      shard: the engine's own object.

    Args:
      folder: of the shard; made where it is missing.
      size: of the features.
      index_above: kilobytes of features from which `refresh` builds an index; None for the engine's own
        10,000.
    """

    def __init__(self, folder: Path, size: int, *, index_above: int | None = None):
        self.size = size
        self._flushed = time.monotonic()
        if (folder / "edge_config.json").exists():
            self.shard = engine.EdgeShard.load(str(folder))
            return
        folder.mkdir(parents=True, exist_ok=True)
        vectors = engine.EdgeVectorParams(conventions.columns(size), engine.Distance.Dot)
        optimizers = engine.EdgeOptimizersConfig(indexing_threshold=index_above)
        config = engine.EdgeConfig(vectors=vectors, optimizers=optimizers)
        self.shard = engine.EdgeShard.create(str(folder), config)
        for name, kind in _INDEXED.items():
            self.shard.update(engine.UpdateOperation.create_field_index(name, kind))

    def insert(self, rows: Rows) -> int:
        """See `compat_jax.gallery.store.Store`."""
        count = 0
        for points in requests(rows, self.size):
            self._write(points, None, engine.UpdateMode.InsertOnly)
            count += len(self._written(points))
        return count

    def update(self, rows: Rows, replaces: Where) -> int:
        """See `compat_jax.gallery.store.Store`; of the conditions it knows the version only."""
        return sum(self._update(points, replaces) for points in requests(rows, self.size))

    def _update(self, points: Sequence[engine.Point], replaces: Where) -> int:
        new = {point.id: point for point in points}
        replaced: dict[str, list[engine.Point]] = {}
        for one in self.shard.retrieve([*new], engine.PayloadSelector.Exclude(["facts"]), False):
            if _replaces(replaces, one.payload, new[one.id].payload):
                point = _renewed(one.payload, new[one.id])
                replaced.setdefault(one.payload["write"], []).append(point)
        if not replaced:
            return 0
        written = [point for some in replaced.values() for point in some]
        unchanged = [_unchanged(token, some) for token, some in replaced.items()]
        self._write(written, engine.Filter(should=unchanged), engine.UpdateMode.UpdateOnly)
        return len(self._written(written))

    def _write(self, points, condition, mode):
        self.shard.update(engine.UpdateOperation.upsert_points(points, condition, mode))
        # A flush also shortens the log of writes, which grows until then.
        if time.monotonic() - self._flushed > _FLUSH:
            self.shard.flush()
            self._flushed = time.monotonic()

    def _written(self, points):
        """Return the ids of points that now carry the token of their write."""
        token = points[0].payload["write"]
        there = self.shard.retrieve([point.id for point in points], ["key", "write"], False)
        return [one.id for one in there if one.payload["write"] == token]

    def search(self, queries: np.ndarray, k: int, where: Where = EVERY) -> Found:
        """See `compat_jax.gallery.store.Store`; of the conditions it knows the version only."""
        queries = conventions.padded(conventions.check_queries(queries, k, self.size))
        found = conventions.no_answers(len(queries), k)
        condition = _filter(where)
        for start in range(0, len(queries), _QUERIES):
            asked = [
                engine.QueryRequest(limit=k, query=engine.Query.Nearest(one), filter=condition)
                for one in queries[start : start + _QUERIES].tolist()
            ]
            answers = self.shard.query_batch(engine.QueryBatchRequest(asked))
            for row, points in enumerate(answers, start):
                for place, point in enumerate(points):
                    found.ids[row, place], found.scores[row, place] = point.id, point.score
        return found

    def counts(self) -> Mapping[int, int]:
        """See `compat_jax.gallery.store.Store`."""
        hits = self.shard.facet(engine.FacetRequest("version", limit=10_000, exact=True)).hits
        return {int(hit.value): hit.count for hit in hits}

    def refresh(self) -> None:
        """Index what is not indexed, which this engine does on call only, and flush."""
        self.shard.optimize()
        self.shard.flush()


def requests(rows: Rows, size: int) -> Iterator[list[engine.Point]]:
    """Lay out rows as points of this engine, in lists of the size of one request; see `points`."""
    for some in laid_out.requests(rows, size):
        yield [engine.Point(*one) for one in some]


def _replaces(replaces: Where, old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Return whether a row that was read may be replaced: its version, and the same picture."""
    of_version = replaces.version is None or old["version"] == replaces.version
    return of_version and old["key"] == new["key"] and old["content"] == new["content"]


def _renewed(old: Mapping[str, Any], new: engine.Point) -> engine.Point:
    """Return a point with the feature and version of a new one and the payload of the old one."""
    payload = {**new.payload, "payload": old["payload"]}
    payload["facts"] = conventions.facts(old["payload"])
    return engine.Point(new.id, new.vector, payload)


def _unchanged(token: str, points: Sequence[engine.Point]) -> engine.Filter:
    """Return the condition that points still carry the token that was read, or the new one already.

    This engine logs a write with its condition, and asks it again when it reads the log after a kill
    (a server resolves it before it logs). A kill in a flush can leave the index of the tokens ahead of
    the rows: the condition on the old token alone then fails, and a row keeps the old payload beside
    the new feature. Here the write is done again.
    """
    ids = engine.HasIdCondition({point.id for point in points})
    tokens = engine.MatchAny([token, points[0].payload["write"]])
    return engine.Filter(must=[ids, engine.FieldCondition("write", match=tokens)])


def _filter(where: Where) -> engine.Filter | None:
    if where.version is None:
        return None
    version = engine.MatchValue(where.version)
    return engine.Filter(must=[engine.FieldCondition("version", match=version)])
