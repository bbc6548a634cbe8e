"""A gallery in a LanceDB table: a folder, or the same in a bucket."""

import contextlib
import datetime
import json
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from compat_jax import files
from compat_jax.errors import UserError
from compat_jax.gallery.store import (
    EVERY,
    Found,
    Rows,
    Where,
    asked,
    check_queries,
    check_rows,
    check_size,
    check_swap,
    clash,
    columns,
    facts,
    key_of,
    manifest_name,
    no_answers,
    padded,
    recall,
    stored_key,
)

# Its Rust side logs on stderr, e.g. each partition of an index that is empty: expected after a small
# refresh. Errors are still logged, and raised.
os.environ.setdefault("LANCEDB_LOG", "error")

import lancedb
from lancedb.index import IvfFlat
from lancedb.query import ColumnOrdering

INDEX_FROM = 100_000
PROBES = 50
LEAST_RECALL = 0.9
PROBE_QUERIES, PROBE_K = 50, 10
# Readers and writers of other processes use a version for seconds.
KEEP = datetime.timedelta(hours=1)

_QUERIES = 256
_IDS = 10_000
# Without a primary key in the schema, writers that insert the same new row at once all insert it.
_KEY = {"lance-schema:unenforced-primary-key:position": "1"}
_SOURCE = re.compile(r",? \S*\.cargo/registry/\S+")  # a line of its own source, in its messages
_PARTITION = 1000  # fewer rows than LanceDB puts into a partition
_ALL = 0  # partitions
_KNOWN_FOR = 60.0  # seconds: in a bucket each look at the table takes a request
_PROBES = "compat_jax.probes"
_SIZE = b"compat_jax.size"
_ID = pa.field("id", pa.int64(), nullable=False, metadata=_KEY)
_MANIFEST = pa.schema([_ID, ("generation", pa.int64()), ("text", pa.string())])
_TEXTS = ("id", "key", "version", "model", "content", "payload")


class LanceStore:
    """A `Store` in a LanceDB table, and the manifest in a second one beside it.

    Rows are written by `merge_insert` alone: `add` would double a row that is there, `restore` would
    bring deleted ones back. There is no index on a scalar column: pages and updates are no faster with
    one, and lance 13 fails on an update of some columns where one exists.

    Args:
      folder: of the database, also gs://bucket/folder or s3://bucket/folder.
      table: name of the rows' table.
      size: of the features; None opens a table that is there.
      index_from: number of rows from which `refresh` builds an index.
      probes: partitions of the index that a search reads; more are slower and find more. An index that
        finds too little with so many is read with more, whose number is kept in the table.

    Raises:
      UserError: there is no such table and no size, another size, or a table of somebody else's.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        table: str = "gallery",
        size: int | None = None,
        *,
        index_from: int = INDEX_FROM,
        probes: int = PROBES,
    ):
        root, own = files.absolute(folder), manifest_name(table)
        self.place = f"{root}/{table}.lance"
        self._index_from, self._probes = index_from, probes
        self._known, self._known_until = probes, 0.0
        if not files.in_bucket(root):
            _check_folders(root / f"{table}.lance", root / f"{own}.lance", size)
        with self._reported():
            # Whoever reads sees what was acknowledged before, by whatever process.
            always = datetime.timedelta(0)
            database = lancedb.connect(str(root), read_consistency_interval=always)
            self._table = _opened(database, table, None if size is None else _no_rows(size))
            self.size = self._own_size()
            none = pa.table([[0], [0], [""]], schema=_MANIFEST)
            self._manifest = _opened(database, own, none)
            if self._manifest.schema.names != _MANIFEST.names:
                raise UserError(f"{root}/{own}.lance is somebody else's: choose another place")
        check_size(self.size, size, self.place)

    def _own_size(self) -> int:
        size = int((self._table.schema.metadata or {}).get(_SIZE, 0))
        if not size or self._table.schema.names != _no_rows(size).schema.names:
            raise UserError(f"{self.place} is no gallery of compat_jax: choose another place")
        return size

    @contextlib.contextmanager
    def _reported(self) -> Iterator[None]:
        """Turn what LanceDB raises (a full disk, a bucket that cannot be reached) into a `UserError`."""
        try:
            yield
        except UserError:
            raise
        except (OSError, RuntimeError, ValueError) as error:
            told = _SOURCE.sub("", files.first_line(error))
            raise UserError(f"LanceDB, {self.place}: {told}") from error

    def manifest(self) -> Mapping[str, Any] | None:
        """See `Store`."""
        with self._reported():
            [text] = self._manifest.search().to_arrow()["text"].to_pylist()
        return json.loads(text) if text else None

    def swap_manifest(self, new: Mapping[str, Any], expected: int) -> bool:
        """See `Store`."""
        row = pa.table([[0], [expected + 1], [check_swap(new, expected)]], schema=_MANIFEST)
        with self._reported():
            merge = self._manifest.merge_insert("id")
            merge = merge.when_matched_update_all(where=f"target.generation = {int(expected)}")
            return merge.execute(row).num_updated_rows == 1

    def insert(self, rows: Rows) -> int:
        """See `Store`; one commit, so that batches of thousands of rows are cheapest."""
        table = self._arrow(rows)
        if not len(rows):
            return 0
        with self._reported():
            merge = self._table.merge_insert("id").when_not_matched_insert_all()
            count = merge.execute(table).num_inserted_rows
        if count < len(rows):
            self._refuse_clashes(rows)
        return count

    def put(self, rows: Rows) -> None:
        """See `Store`; one commit."""
        table = self._arrow(rows)
        if not len(rows):
            return
        with self._reported():
            merge = self._table.merge_insert("id").when_not_matched_insert_all()
            merge = merge.when_matched_update_all(where="target.key = source.key")
            done = merge.execute(table)
        if done.num_inserted_rows + done.num_updated_rows < len(rows):
            self._refuse_clashes(rows)

    def update(self, rows: Rows, replaces: Where) -> int:
        """See `Store`; one commit."""
        table = self._arrow(rows)
        conditions = [f"target.{one}" for one in _of_version(replaces)]
        conditions += ["target.key = source.key", "target.content = source.content"]
        names = ["id", "key", "version", "model", "content", "vector"]
        if replaces.ids is not None:
            table = table.filter(pa.array(np.isin(rows.ids, replaces.ids), pa.bool_()))
        if replaces.payload:
            # A condition of merge_insert takes no functions: ask for the payloads of the rows first,
            # and write those that still have them.
            table = self._with_payloads(table, replaces)
            names, conditions = (
                [*names, "payload"],
                [*conditions, "target.payload = source.payload"],
            )
        if not len(table):
            return 0
        with self._reported():
            merge = self._table.merge_insert("id")
            merge = merge.when_matched_update_all(where=" AND ".join(conditions))
            return merge.execute(table.select(names)).num_updated_rows

    def delete(self, ids: np.ndarray) -> int:
        """See `Store`; one commit per 10,000 ids."""
        ids, count = np.unique(np.asarray(ids, np.int64)), 0
        with self._reported():
            for start in range(0, len(ids), _IDS):
                some = _sql(Where(ids=ids[start : start + _IDS]))
                count += self._table.delete(some).num_deleted_rows
        return count

    def search(self, queries: np.ndarray, k: int, where: Where = EVERY) -> Found:
        """See `Store`; exact below `index_from` rows."""
        queries = check_queries(queries, k, self.size)
        return self._nearest(padded(queries), k, where=_sql(where))

    def rows(
        self, where: Where = EVERY, *, after: int = -1, limit: int = 4096, vectors: bool = False
    ) -> Rows:
        """See `Store`."""
        condition = " AND ".join(filter(None, [f"id > {int(after)}", _sql(where)]))
        by_id = [ColumnOrdering(column_name="id", ascending=True, nulls_first=False)]
        names = [*_TEXTS, "vector"] if vectors else list(_TEXTS)
        with self._reported():
            page = self._table.search().where(condition).order_by(by_id).select(names)
            # To LanceDB a limit of 0 is none.
            found = page.limit(max(limit, 1)).to_arrow().slice(0, max(limit, 0))
        return Rows(
            keys=[key_of(text) for text in found["key"].to_pylist()],
            versions=found["version"].to_numpy().astype(np.int32),
            models=found["model"].to_pylist(),
            contents=found["content"].to_pylist(),
            payloads=[json.loads(text) for text in found["payload"].to_pylist()],
            vectors=_vectors(found)[:, : self.size] if vectors else None,
        )

    def counts(self) -> Mapping[int, int]:
        """See `Store`; reads the column of versions."""
        with self._reported():
            versions = self._table.search().select(["version"]).to_arrow()["version"].to_numpy()
        found, counts = np.unique(versions, return_counts=True)
        return dict(zip(found.tolist(), counts.tolist(), strict=True))

    def refresh(self) -> None:
        """Compact, and index the rows: IVF_FLAT from `index_from` rows on, none below.

        An index that finds less than 90 % of what an exact search finds is built anew; files that no
        version of the last hour needs are deleted.

        Raises:
          UserError: the new index finds less than 90 % as well; it is removed, so that searches are
            exact, and slower.
        """
        with self._reported():
            index = self._index()
            stale = index is not None and index.num_unindexed_rows
            self._table.optimize(cleanup_older_than=KEEP)
            many = self._table.count_rows() >= self._index_from
            if (index is None and many) or (stale and self.recall() < LEAST_RECALL):
                self._build()

    def recall(self, probes: int | None = None) -> float:
        """Return the share of an exact search's ten best rows that a search finds, for 50 rows.

        Args:
          probes: partitions of the index to read; None for those that every search reads.
        """
        with self._reported():
            count = self._table.count_rows()
            some = np.random.default_rng(0).permutation(count)[:PROBE_QUERIES]
            taken = self._table.take_offsets(some.tolist()).select(["vector"]).to_arrow()
        if not len(taken):
            return 1.0
        queries, k = _vectors(taken), min(PROBE_K, count)
        exact = self._nearest(queries, k, exact=True)
        return recall(exact.scores, self._nearest(queries, k, probes=probes).scores)

    def _build(self) -> None:
        self._table.create_index("vector", config=IvfFlat(distance_type="dot"))
        probes, most = self._probes, self._table.count_rows() / _PARTITION
        while (share := self.recall(probes)) < LEAST_RECALL and probes < most:
            probes *= 2
        if share < LEAST_RECALL:
            index = self._index()
            if index is not None:
                self._table.drop_index(index.name)
            raise UserError(
                f"the index of {self.place} finds {share:.0%} of what an exact search finds, less than "
                f"{LEAST_RECALL:.0%}, and was removed: searches are exact and slower; open the store "
                f"with more probes than {probes} and refresh again"
            )
        self._table.update_field_metadata({"path": "vector", "metadata": {_PROBES: str(probes)}})
        self._known_until = 0.0

    def _enough(self) -> int:
        """Return the partitions to read, as the index said when it was built; asked once a minute."""
        now = time.monotonic()
        if now > self._known_until:
            with self._reported():
                kept = self._table.schema.field("vector").metadata or {}
            self._known = max(self._probes, int(kept.get(_PROBES.encode(), 0)))
            self._known_until = now + _KNOWN_FOR
        return self._known

    def _index(self) -> Any:
        """Return the index of the features; None where there is none."""
        return next((i for i in self._table.list_indices() if i.columns == ["vector"]), None)

    def _nearest(
        self,
        queries: np.ndarray,
        k: int,
        *,
        where: str = "",
        exact: bool = False,
        probes: int | None = None,
    ) -> Found:
        """Search with padded queries."""
        read = None if exact else probes or self._enough()
        found = self._answered(queries, k, where=where, probes=read)
        short = np.flatnonzero(found.ids[:, -1] < 0)
        if not exact and len(short) and self._index() is not None:
            # Rows that a condition leaves may lie in other partitions. Asked for a range of partitions,
            # lance 13 reads the most in any case: so these queries are asked once more.
            rest = self._answered(queries[short], k, where=where, probes=_ALL)
            found.ids[short], found.scores[short] = rest
        return found

    def _answered(self, queries: np.ndarray, k: int, *, where: str, probes: int | None) -> Found:
        """Search so many partitions of the index, `_ALL` of them, or for None without it."""
        found = no_answers(len(queries), k)
        for start in range(0, len(queries), _QUERIES):
            some = queries[start : start + _QUERIES]
            with self._reported():
                query = self._table.search(some, vector_column_name="vector").distance_type("dot")
                if probes is None:
                    query = query.bypass_vector_index()
                elif probes == _ALL:
                    query = query.minimum_nprobes(1).maximum_nprobes(_ALL)
                else:
                    query = query.nprobes(probes)
                query = query.where(where, prefilter=True) if where else query
                answer = query.select(["id", "_distance"]).limit(k).to_arrow()
            one = np.zeros(len(answer), np.int32)
            if "query_index" in answer.column_names:
                one = answer["query_index"].to_numpy()
            scores = (
                1 - answer["_distance"].to_numpy()
            )  # "dot" is a distance here: 1 - inner product
            order = np.lexsort((-scores, one))
            one, scores = one[order], scores[order]
            place = np.arange(len(one)) - np.searchsorted(one, one)
            found.ids[start + one, place] = answer["id"].to_numpy()[order]
            found.scores[start + one, place] = scores
        return found

    def _arrow(self, rows: Rows) -> pa.Table:
        """Check rows and lay them out as the table's columns."""
        ids, vectors = check_rows(rows, self.size)
        flat = pa.array(padded(vectors).ravel())
        return pa.table(
            [
                pa.array(ids),
                pa.array(map(stored_key, rows.keys), pa.string()),
                pa.array(np.asarray(rows.versions, np.int32)),
                pa.array(rows.models, pa.string()),
                pa.array(rows.contents, pa.string()),
                pa.array(map(json.dumps, rows.payloads), pa.string()),
                pa.array(map(facts, rows.payloads), pa.list_(pa.string())),
                pa.FixedSizeListArray.from_arrays(flat, columns(self.size)),
            ],
            schema=_no_rows(self.size).schema,
        )

    def _with_payloads(self, table: pa.Table, replaces: Where) -> pa.Table:
        """Return the rows of which `replaces.payload` holds in the store, with their payloads there."""
        condition = _sql(Where(ids=table["id"].to_numpy(), payload=replaces.payload))
        with self._reported():
            there = self._table.search().where(condition).select(["id", "payload"]).to_arrow()
        known = dict(zip(there["id"].to_pylist(), there["payload"].to_pylist(), strict=True))
        table = table.filter(pa.array([i in known for i in table["id"].to_pylist()], pa.bool_()))
        payloads = pa.array([known[i] for i in table["id"].to_pylist()], pa.string())
        return table.set_column(table.schema.get_field_index("payload"), "payload", payloads)

    def _refuse_clashes(self, rows: Rows) -> None:
        ids = rows.ids
        with self._reported():
            query = self._table.search().where(_sql(Where(ids=ids))).select(["id", "key"])
            there = query.to_arrow()
        known = dict(zip(there["id"].to_pylist(), there["key"].to_pylist(), strict=True))
        for key, one in zip(rows.keys, ids.tolist(), strict=True):
            if one in known and known[one] != stored_key(key):
                raise UserError(clash(key, key_of(known[one])))


def _check_folders(rows: Path, manifest: Path, size: int | None) -> None:
    """Refuse a local place that cannot be opened, or lost its rows but kept its manifest."""
    known = manifest.exists()  # asked first: the rows' table is made before it
    if rows.is_file():
        raise UserError(f"{rows} is a file, not a table: choose another place")
    if rows.exists():
        return
    if known:
        raise UserError(
            f"{rows} is gone, but its manifest {manifest} is there: restore the one from a backup, or "
            "delete the other to begin anew"
        )
    if size is None:
        raise UserError(f"there is no gallery at {rows}")


def _opened(database: Any, name: str, new: pa.Table | None) -> Any:
    """Open a table; make it of `new` where there is none. Of several who make it at once, one does."""
    try:
        return database.open_table(name)
    except ValueError as error:
        if new is None:
            raise UserError(f"there is no gallery: {files.first_line(error)}") from error
    with contextlib.suppress(ValueError):  # there is one now
        return database.create_table(name, new)
    return database.open_table(name)


def _no_rows(size: int) -> pa.Table:
    """Return an empty table of the rows' columns; the size lies in its metadata."""
    text = pa.string()
    fields = [
        _ID,
        ("key", text),
        ("version", pa.int32()),
        ("model", text),
        ("content", text),
        ("payload", text),
        ("facts", pa.list_(text)),
        ("vector", pa.list_(pa.float32(), columns(size))),
    ]
    return pa.schema(fields, metadata={_SIZE: str(size)}).empty_table()


def _vectors(table: pa.Table) -> np.ndarray:
    """Return the column of features, float32[n, columns]."""
    column = table["vector"].combine_chunks()
    return column.flatten().to_numpy().reshape(len(table), column.type.list_size)


def _of_version(where: Where) -> list[str]:
    """Return the conditions on the version in SQL."""
    version, below, _, _ = where
    found = [] if version is None else [f"version = {int(version)}"]
    return found if below is None else [*found, f"version < {int(below)}"]


def _sql(where: Where) -> str:
    """Return a condition in SQL; "" for one that does not restrict."""
    found = _of_version(where)
    if where.ids is not None:
        found.append(f"id IN ({_listed(where.ids)})" if len(where.ids) else "false")
    for fact in asked(where):
        quoted = fact.replace("'", "''")
        found.append(f"array_has(facts, '{quoted}')")
    return " AND ".join(found)


def _listed(ids: Iterable[int]) -> str:
    return ",".join(str(int(one)) for one in ids)
