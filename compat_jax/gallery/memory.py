"""A gallery's rows in the memory of this process, searched exactly."""

import functools
import json
import threading
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np

from compat_jax.errors import UserError
from compat_jax.gallery import conventions
from compat_jax.gallery.store import EVERY, Found, Rows, Where
from compat_jax.retrieval import exact

_SMALLEST = 1024

_Method = TypeVar("_Method", bound=Callable[..., Any])


def _alone(method: _Method) -> _Method:
    """Run a method while no other thread is in one of the same store."""

    @functools.wraps(method)
    def run(self, *args, **kwargs):
        with self._lock:
            return method(self, *args, **kwargs)

    return run  # type: ignore[return-value]


class MemoryStore:
    """A `Store` in memory: for tests, for small galleries, and for exact answers from an accelerator.

    Threads may share it; nothing outlives the process. Rows lie in slots 0..n-1 of arrays that double
    when they are full; the last row moves into the slot of a deleted one.

    Args:
      size: of the features.
      options: of the search; exact by default.
    """

    def __init__(self, size: int, options: exact.SearchOptions = exact.DEFAULT_OPTIONS):
        if size < 1:
            raise UserError(f"features need at least one column, got size {size}", "size")
        self.size = size
        self._options = options
        self._lock = threading.RLock()
        self._manifest = ""
        self._slots: dict[int, int] = {}
        self._vectors = np.zeros((_SMALLEST, size), np.float32)
        self._ids = np.zeros(_SMALLEST, np.int64)
        self._versions = np.zeros(_SMALLEST, np.int32)
        self._records: list[dict[str, Any]] = []  # key, model, content, payload as JSON, facts
        self._whole: exact.Prepared | None = None  # all rows, for searches until one changes

    @_alone
    def manifest(self) -> Mapping[str, Any] | None:
        """See `Store`."""
        return conventions.read_manifest(self._manifest)

    @_alone
    def swap_manifest(self, new: Mapping[str, Any], expected: int) -> bool:
        """See `Store`."""
        text = conventions.check_swap(new, expected)
        now = conventions.read_manifest(self._manifest) or {"generation": 0}
        if now["generation"] != expected:
            return False
        self._manifest = text
        return True

    @_alone
    def insert(self, rows: Rows) -> int:
        """See `Store`."""
        ids, vectors = conventions.check_rows(rows, self.size)
        self._refuse_clashes(rows, ids)
        fresh = [i for i, one in enumerate(ids.tolist()) if one not in self._slots]
        for i in fresh:
            self._write(rows, i, vectors[i], slot=self._new_slot(int(ids[i])))
        return len(fresh)

    @_alone
    def put(self, rows: Rows) -> None:
        """See `Store`."""
        ids, vectors = conventions.check_rows(rows, self.size)
        self._refuse_clashes(rows, ids)
        for i, one in enumerate(ids.tolist()):
            slot = self._slots.get(one)
            self._write(rows, i, vectors[i], slot=self._new_slot(one) if slot is None else slot)

    @_alone
    def update(self, rows: Rows, replaces: Where) -> int:
        """See `Store`."""
        ids, vectors = conventions.check_rows(rows, self.size)
        holds = set(self._ids[self._matching(replaces)].tolist())
        count = 0
        for i, one in enumerate(ids.tolist()):
            if one not in holds:
                continue
            slot = self._slots[one]
            record = self._records[slot]
            if (record["key"], record["content"]) != (rows.keys[i], rows.contents[i]):
                continue
            self._whole = None
            self._vectors[slot] = vectors[i]
            self._versions[slot] = rows.versions[i]
            record["model"] = rows.models[i]
            count += 1
        return count

    @_alone
    def delete(self, ids: np.ndarray) -> int:
        """See `Store`."""
        gone = [one for one in np.unique(ids).tolist() if one in self._slots]
        for one in gone:
            slot, last = self._slots.pop(one), len(self._records) - 1
            record = self._records.pop()
            self._whole = None
            if slot != last:
                for array in (self._vectors, self._ids, self._versions):
                    array[slot] = array[last]
                self._records[slot] = record
                self._slots[int(self._ids[slot])] = slot
        return len(gone)

    @_alone
    def search(self, queries: np.ndarray, k: int, where: Where = EVERY) -> Found:
        """See `Store`; exact."""
        queries = conventions.check_queries(queries, k, self.size)
        count, found = len(self._records), conventions.no_answers(len(queries), k)
        slots: Any = self._matching(where) if where.restricts else slice(count)
        ids = self._ids[slots]
        if len(queries) and len(ids):
            most = min(k, len(ids))
            scores, nearest = self._prepared(slots, where).search(queries, most)
            found.ids[:, :most], found.scores[:, :most] = ids[nearest], scores
        return found

    def _prepared(self, slots: Any, where: Where) -> exact.Prepared:
        """Return the rows in some slots, prepared to be searched; all rows stay so until one changes."""
        if where.restricts:
            return exact.Prepared(self._vectors[slots], options=self._options)
        if self._whole is None:
            self._whole = exact.Prepared(self._vectors[slots], options=self._options)
        return self._whole

    @_alone
    def rows(
        self, where: Where = EVERY, *, after: int = -1, limit: int = 4096, vectors: bool = False
    ) -> Rows:
        """See `Store`."""
        slots = self._matching(where)
        slots = slots[self._ids[slots] > after]
        slots = slots[np.argsort(self._ids[slots])][: max(limit, 0)]
        records = [self._records[slot] for slot in slots]
        return Rows(
            keys=[one["key"] for one in records],
            versions=self._versions[slots],
            models=[one["model"] for one in records],
            contents=[one["content"] for one in records],
            payloads=[json.loads(one["payload"]) for one in records],
            vectors=self._vectors[slots] if vectors else None,
        )

    @_alone
    def counts(self) -> Mapping[int, int]:
        """See `Store`."""
        return conventions.counted(self._versions[: len(self._records)])

    def refresh(self) -> None:
        """See `Store`; nothing to do, since every row is compared."""

    def _matching(self, where: Where) -> np.ndarray:
        """Return the slots of the rows of which a condition holds, int64[m]."""
        count = len(self._records)
        mask = np.ones(count, bool)
        if where.version is not None:
            mask &= self._versions[:count] == where.version
        if where.below is not None:
            mask &= self._versions[:count] < where.below
        if where.ids is not None:
            mask &= np.isin(self._ids[:count], where.ids)
        slots = np.flatnonzero(mask)
        if not where.payload:
            return slots
        needed = set(conventions.asked(where))
        holds = [needed <= self._records[s]["facts"] for s in slots]
        return slots[np.array(holds, bool)]

    def _refuse_clashes(self, rows: Rows, ids: np.ndarray) -> None:
        known = [one for one in ids.tolist() if one in self._slots]
        present = {one: self._records[self._slots[one]]["key"] for one in known}
        conventions.refuse_clashes(rows.keys, ids.tolist(), present)

    def _new_slot(self, one: int) -> int:
        slot = len(self._records)
        if slot == len(self._ids):
            self._vectors, self._ids, self._versions = (
                np.concatenate([array, np.zeros_like(array)])
                for array in (self._vectors, self._ids, self._versions)
            )
        self._records.append({})
        self._slots[one] = slot
        self._ids[slot] = one
        return slot

    def _write(self, rows: Rows, i: int, vector: np.ndarray, *, slot: int) -> None:
        self._whole = None
        self._vectors[slot] = vector
        self._versions[slot] = rows.versions[i]
        self._records[slot] = {
            "key": rows.keys[i],
            "model": rows.models[i],
            "content": rows.contents[i],
            "payload": json.dumps(rows.payloads[i]),
            "facts": frozenset(conventions.facts(rows.payloads[i])),
        }


_NAMED: dict[str, MemoryStore] = {}
_NAMED_LOCK = threading.Lock()


def named(name: str, size: int | None = None) -> MemoryStore:
    """Return the store of a name in this process; a new one where there is none.

    Args:
      name: any text.
      size: of the features; None for that of a store that is there.

    Raises:
      UserError: no store of that name and no size, or another size.
    """
    with _NAMED_LOCK:
        if name not in _NAMED:
            if size is None:
                raise UserError(f"there is no gallery in memory of name {name!r}")
            _NAMED[name] = MemoryStore(size)
        store = _NAMED[name]
    conventions.check_size(store.size, size, f"memory:{name}")
    return store
