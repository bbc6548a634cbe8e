"""The features of a LanceDB table: an index over them, how much it finds, and searches through it.

Import `compat_jax.gallery.lance` first: it sets what LanceDB logs, before LanceDB is imported.
"""

import functools
import time
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import pyarrow as pa
from lancedb.index import IvfFlat

from compat_jax.errors import UserError
from compat_jax.gallery import conventions, probe
from compat_jax.gallery.store import Found

VECTOR = "vector"  # the column of features

_QUERIES = 256
_SOURCE = r",? \S*\.cargo/registry/\S+"  # a line of its own source, in its messages
_PARTITION = 1000  # fewer rows than LanceDB puts into a partition
_ALL = 0  # partitions
_KNOWN_FOR = 60.0  # seconds: in a bucket each look at the table takes a request
_PROBES = "compat_jax.probes"


class Partitions:
    """The features of a table in the partitions of an index, where it has one.

    Args:
      table: of LanceDB's, with a column `VECTOR`.
      place: of the table, for messages.
      probes: partitions that a search reads; an index that finds too little with so many is read with
        more, whose number is kept in the table.
    """

    def __init__(self, table: Any, place: str, probes: int):
        self._table, self._place, self._probes = table, place, probes
        self._known, self._known_until = probes, 0.0

    def recall(self, probes: int | None = None) -> float:
        """Return the share of an exact search's ten best rows that a search finds, for 50 rows.

        Args:
          probes: partitions of the index to read; None for those that every search reads.
        """
        with reported(self._place):
            count = self._table.count_rows()
            some = np.random.default_rng(0).permutation(count)[: probe.QUERIES]
            taken = self._table.take_offsets(some.tolist()).select([VECTOR]).to_arrow()
        exact = functools.partial(self.nearest, exact=True)
        search = functools.partial(self.nearest, probes=probes)
        return probe.probe(features_of(taken), count, exact=exact, search=search)

    def build(self) -> None:
        """Build an index, and find how many of its partitions a search must read.

        Raises:
          UserError: it finds less than `probe.LEAST_RECALL`, however many; it is removed.
        """
        self._table.create_index(VECTOR, config=IvfFlat(distance_type="dot"))
        probes, most = self._probes, self._table.count_rows() / _PARTITION
        while (share := self.recall(probes)) < probe.LEAST_RECALL and probes < most:
            probes *= 2
        if share < probe.LEAST_RECALL:
            index = self.present()
            if index is not None:
                self._table.drop_index(index.name)
            raise UserError(
                f"{probe.too_little(self._place, share)}, and was removed: searches are exact and "
                f"slower; open the store with more probes than {probes} and refresh again"
            )
        self._table.update_field_metadata({"path": VECTOR, "metadata": {_PROBES: str(probes)}})
        self._known_until = 0.0

    def _enough(self) -> int:
        """Return the partitions to read, as the index said when it was built; asked once a minute."""
        now = time.monotonic()
        if now > self._known_until:
            with reported(self._place):
                kept = self._table.schema.field(VECTOR).metadata or {}
            self._known = max(self._probes, int(kept.get(_PROBES.encode(), 0)))
            self._known_until = now + _KNOWN_FOR
        return self._known

    def present(self) -> Any:
        """Return the index of the features; None where there is none."""
        return next((i for i in self._table.list_indices() if i.columns == [VECTOR]), None)

    def nearest(
        self,
        queries: np.ndarray,
        k: int,
        *,
        where: str = "",
        exact: bool = False,
        probes: int | None = None,
    ) -> Found:
        """Return the rows of largest inner product with each query; see `Store.search`.

        Args:
          queries: float32[q, columns], padded.
          k: answers to each.
          where: condition in SQL; "" for all rows.
          exact: whether to search without the index.
          probes: partitions of the index to read; None for as many as find enough.
        """
        read = None if exact else probes or self._enough()
        found = self._answered(queries, k, where=where, probes=read)
        short = np.flatnonzero(found.ids[:, -1] < 0)
        if not exact and len(short) and self.present() is not None:
            # Rows that a condition leaves may lie in other partitions. Asked for a range of partitions,
            # lance 13 reads the most in any case: so these queries are asked once more.
            rest = self._answered(queries[short], k, where=where, probes=_ALL)
            found.ids[short], found.scores[short] = rest
        return found

    def _answered(self, queries: np.ndarray, k: int, *, where: str, probes: int | None) -> Found:
        """Search so many partitions of the index, `_ALL` of them, or for None without it."""
        found = conventions.no_answers(len(queries), k)
        for start in range(0, len(queries), _QUERIES):
            some = queries[start : start + _QUERIES]
            with reported(self._place):
                query = self._table.search(some, vector_column_name=VECTOR).distance_type("dot")
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


def reported(place: str) -> AbstractContextManager[None]:
    """Turn what LanceDB raises (a full disk, a bucket that cannot be reached) into a `UserError`."""
    return conventions.reported(f"LanceDB, {place}", drop=_SOURCE)


def features_of(table: pa.Table) -> np.ndarray:
    """Return the column of features, float32[n, columns]."""
    column = table[VECTOR].combine_chunks()
    return column.flatten().to_numpy().reshape(len(table), column.type.list_size)
