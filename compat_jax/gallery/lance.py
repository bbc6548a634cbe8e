"""A gallery in a LanceDB table: a folder, or the same in a bucket."""

import contextlib
import datetime
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from compat_jax import files
from compat_jax.errors import UserError
from compat_jax.gallery import conventions, probe
from compat_jax.gallery.store import EVERY, Found, Rows, Where

# Its Rust side logs on stderr, e.g. each partition of an index that is empty: expected after a small
# refresh. Errors are still logged, and raised.
os.environ.setdefault("LANCEDB_LOG", "error")

import lancedb
from lancedb.query import ColumnOrdering

from compat_jax.gallery.lance_index import Partitions, features_of, reported

INDEX_FROM = 100_000
PROBES = 50
# Readers and writers of other processes use a version for seconds.
KEEP = datetime.timedelta(hours=1)

_IDS = 10_000
# Without a primary key in the schema, writers that insert the same new row at once all insert it.
_KEY = {"lance-schema:unenforced-primary-key:position": "1"}
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
        root, own = files.absolute(folder), conventions.manifest_name(table)
        self.place = f"{root}/{table}.lance"
        self._index_from = index_from
        if not files.in_bucket(root):
            _check_folders(root / f"{table}.lance", root / f"{own}.lance", size)
        with self._reported():
            # Whoever reads sees what was acknowledged before, by whatever process.
            always = datetime.timedelta(0)
            database = lancedb.connect(str(root), read_consistency_interval=always)
            self._table = _opened(database, table, None if size is None else _no_rows(size))
            self._features = Partitions(self._table, self.place, probes)
            self.size = self._own_size()
            none = pa.table([[0], [0], [""]], schema=_MANIFEST)
            self._manifest = _opened(database, own, none)
            if self._manifest.schema.names != _MANIFEST.names:
                raise UserError(f"{root}/{own}.lance is somebody else's: choose another place")
        conventions.check_size(self.size, size, self.place)

    def _own_size(self) -> int:
        size = int((self._table.schema.metadata or {}).get(_SIZE, 0))
        if not size or self._table.schema.names != _no_rows(size).schema.names:
            raise UserError(f"{self.place} is no gallery of compat_jax: choose another place")
        return size

    def _reported(self) -> contextlib.AbstractContextManager[None]:
        return reported(self.place)

    def manifest(self) -> Mapping[str, Any] | None:
        """See `Store`."""
        with self._reported():
            [text] = self._manifest.search().to_arrow()["text"].to_pylist()
        return conventions.read_manifest(text)

    def swap_manifest(self, new: Mapping[str, Any], expected: int) -> bool:
        """See `Store`."""
        row = pa.table(
            [[0], [expected + 1], [conventions.check_swap(new, expected)]], schema=_MANIFEST
        )
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
        queries = conventions.check_queries(queries, k, self.size)
        return self._features.nearest(conventions.padded(queries), k, where=_sql(where))

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
        rows = Rows(
            keys=[conventions.key_of(text) for text in found["key"].to_pylist()],
            versions=found["version"].to_numpy().astype(np.int32),
            models=found["model"].to_pylist(),
            contents=found["content"].to_pylist(),
            payloads=[json.loads(text) for text in found["payload"].to_pylist()],
            vectors=features_of(found)[:, : self.size] if vectors else None,
        )
        conventions.check_ids(rows, found["id"].to_pylist(), self.place)
        return rows

    def counts(self) -> Mapping[int, int]:
        """See `Store`; reads the column of versions."""
        with self._reported():
            versions = self._table.search().select(["version"]).to_arrow()["version"].to_numpy()
        return conventions.counted(versions)

    def refresh(self) -> None:
        """Compact, and index the rows: IVF_FLAT from `index_from` rows on, none below.

        An index that finds less than 90 % of what an exact search finds is built anew; files that no
        version of the last hour needs are deleted.

        Raises:
          UserError: the new index finds less than 90 % as well; it is removed, so that searches are
            exact, and slower.
        """
        with self._reported():
            index = self._features.present()
            stale = index is not None and index.num_unindexed_rows
            self._table.optimize(cleanup_older_than=KEEP)
            many = self._table.count_rows() >= self._index_from
            if (index is None and many) or (stale and self.recall() < probe.LEAST_RECALL):
                self._features.build()

    def recall(self, probes: int | None = None) -> float:
        """Return the share of an exact search's ten best rows that a search finds, for 50 rows.

        Args:
          probes: partitions of the index to read; None for those that every search reads.
        """
        return self._features.recall(probes)

    def _arrow(self, rows: Rows) -> pa.Table:
        """Check rows and lay them out as the table's columns."""
        ids, vectors = conventions.check_rows(rows, self.size)
        flat = pa.array(conventions.padded(vectors).ravel())
        return pa.table(
            [
                pa.array(ids),
                pa.array(map(conventions.stored_key, rows.keys), pa.string()),
                pa.array(np.asarray(rows.versions, np.int32)),
                pa.array(rows.models, pa.string()),
                pa.array(rows.contents, pa.string()),
                pa.array(map(json.dumps, rows.payloads), pa.string()),
                pa.array(map(conventions.facts, rows.payloads), pa.list_(pa.string())),
                pa.FixedSizeListArray.from_arrays(flat, conventions.columns(self.size)),
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
        keys = map(conventions.key_of, there["key"].to_pylist())
        present = dict(zip(there["id"].to_pylist(), keys, strict=True))
        conventions.refuse_clashes(rows.keys, ids.tolist(), present)


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
        ("vector", pa.list_(pa.float32(), conventions.columns(size))),
    ]
    return pa.schema(fields, metadata={_SIZE: str(size)}).empty_table()


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
    for fact in conventions.asked(where):
        quoted = fact.replace("'", "''")
        found.append(f"array_has(facts, '{quoted}')")
    return " AND ".join(found)


def _listed(ids: Iterable[int]) -> str:
    return ",".join(str(int(one)) for one in ids)
