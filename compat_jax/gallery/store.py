"""The protocol of vector stores: rows, conditions on them, and ten methods."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from compat_jax.errors import UserError

# Answers take 12 bytes each before any is found: a k of a thousand million would take all memory.
MOST_ANSWERS = 10_000
LABEL = "label"  # field of a payload that names a row's class


def row_id(key: str) -> int:
    """Return the id of the row of a key: 63 bits of its BLAKE2, which every engine takes."""
    digest = hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def label_text(payload: Mapping[str, Any]) -> str:
    """Return a row's class as a text, whatever JSON its payload's "label" is; "null" without one."""
    return json.dumps(payload.get(LABEL), sort_keys=True)


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """Rows of a gallery, column by column.

    Attributes:
      keys: names of the rows, e.g. paths of pictures; a row's id is `row_id` of its key.
      versions: int32[n], numbers of the versions that embedded them.
      models: fingerprints of those versions, 16 hexadecimal digits each.
      contents: digests of the pictures' files, hexadecimal.
      payloads: JSON mappings of the caller's.
      vectors: float32[n, d]; None where they were not asked for.
    """

    keys: Sequence[str]
    versions: np.ndarray
    models: Sequence[str]
    contents: Sequence[str]
    payloads: Sequence[Mapping[str, Any]]
    vectors: np.ndarray | None = None

    def __post_init__(self):
        count = len(self.keys)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None and len(value) != count:
                raise UserError(f"{count} rows need as many {field.name}, got {len(value)}")
        if self.vectors is not None and not np.isfinite(self.vectors).all():
            raise UserError("the features of some rows are not finite")

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def ids(self) -> np.ndarray:
        """Return the rows' ids, int64[n]."""
        return np.array([row_id(key) for key in self.keys], np.int64)


class Where(NamedTuple):
    """A condition on rows; what is None or empty does not restrict.

    Attributes:
      version: number of the version that embedded them.
      below: rows of versions before this number.
      ids: int64[n], rows of these ids.
      payload: values that fields of the payload must equal.
    """

    version: int | None = None
    below: int | None = None
    ids: np.ndarray | None = None
    payload: Mapping[str, str | int | bool] | None = None

    @property
    def restricts(self) -> bool:
        """Return whether there is any row that the condition could leave out."""
        version, below, ids, payload = self
        return not (version is None and below is None and ids is None) or bool(payload)


EVERY = Where()


class Found(NamedTuple):
    """Answers to queries.

    Attributes:
      ids: int64[q, k], the nearest row first; -1 where a condition left fewer than k.
      scores: float32[q, k], inner products; -inf there.
    """

    ids: np.ndarray
    scores: np.ndarray


class Store(Protocol):
    """A place for the rows of one gallery and for its manifest.

    Every method may be called from several processes; what one has acknowledged, all see, also after
    a kill.
    """

    def manifest(self) -> Mapping[str, Any] | None:
        """Return the manifest, None in a new store."""

    def swap_manifest(self, new: Mapping[str, Any], expected: int) -> bool:
        """Put a manifest in the place of the one of a generation: compare and set.

        Args:
          new: JSON mapping; its "generation" is `expected + 1`.
          expected: generation of the manifest in place; 0 for none.

        Returns:
          Whether it was put there: False if another process was first.
        """

    def insert(self, rows: Rows) -> int:
        """Insert rows; those whose ids are there are left alone.

        Returns:
          The number of rows that are new.

        Raises:
          UserError: a key twice, features of another size than the store's, or another key that has
            the id of one that is there.
        """

    def put(self, rows: Rows) -> None:
        """Insert rows, or replace those of the same ids whole: for pictures that were replaced."""

    def update(self, rows: Rows, replaces: Where) -> int:
        """Give rows that are there another feature, version and model, in one write a row.

        A row is left alone if it was deleted meanwhile, if `replaces` does not hold of it any more, or
        if its content is no longer that of `rows`. Payloads are not touched.

        Returns:
          The number of rows that were updated.
        """

    def delete(self, ids: np.ndarray) -> int:
        """Delete rows by id; returns how many were there."""

    def search(self, queries: np.ndarray, k: int, where: Where = EVERY) -> Found:
        """Return the k rows of largest inner product with each query.

        Args:
          queries: float32[q, d].
          k: 1..MOST_ANSWERS.
          where: rows to search, before the k are taken.
        """

    def rows(
        self, where: Where = EVERY, *, after: int = -1, limit: int = 4096, vectors: bool = False
    ) -> Rows:
        """Return a page of rows, by ascending id.

        Args:
          where: rows to take.
          after: the page begins above this id.
          limit: rows of a page at most.
          vectors: whether to read the features.
        """

    def counts(self) -> Mapping[int, int]:
        """Return the number of rows of every version that has some."""

    def refresh(self) -> None:
        """Index what is not indexed, and compact; searches are right before and after."""
