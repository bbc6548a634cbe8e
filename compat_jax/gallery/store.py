"""What a gallery asks of a vector store: rows, conditions, and ten methods."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from compat_jax.errors import UserError
from compat_jax.fields import Field, Rule, check_types, checked

MULTIPLE = 8
# Answers take 12 bytes each before any is found: a k of a thousand million would take all memory.
MOST_ANSWERS = 10_000

_MANIFEST = "_manifest"
_VERSION = Field("version", int | None, Rule("number of a version", low=0, high=10**9), None)
_ANSWERS = Field("k", int, Rule("answers to a query", low=1, high=MOST_ANSWERS), None)


def row_id(key: str) -> int:
    """Return the id of the row of a key: 63 bits of its BLAKE2, which every engine takes."""
    digest = hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def columns(size: int) -> int:
    """Return the columns that a store keeps for features of a size: the next multiple of 8.

    K - 1 is often a prime (127 = 2^7 - 1) or nearly one; product quantisation then has no equal parts
    to divide a vector into. Zeros change no inner product.
    """
    return -(-size // MULTIPLE) * MULTIPLE


def padded(vectors: np.ndarray) -> np.ndarray:
    """Pad float[n, d] with zero columns to float32[n, columns(d)]."""
    vectors = np.asarray(vectors, np.float32)
    return np.pad(vectors, ((0, 0), (0, columns(vectors.shape[1]) - vectors.shape[1])))


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


def stored_key(key: str) -> str:
    r"""Return a key as UTF-8 text for an engine: bytes that are not UTF-8 become \xff, \ becomes \\.

    Names of files may hold such bytes (Python's lone surrogates), which engines refuse as text.
    """
    doubled = key.replace("\\", "\\\\").encode("utf-8", "surrogateescape")
    return doubled.decode("utf-8", "backslashreplace")


def key_of(text: str) -> str:
    """Return the key of a `stored_key`."""

    def unescape(found):
        return b"\\" if found[1] == b"\\" else bytes.fromhex(found[1][1:].decode())

    plain = re.sub(rb"\\(\\|x[0-9a-f]{2})", unescape, text.encode())
    return plain.decode("utf-8", "surrogateescape")


def recall(exact: np.ndarray, found: np.ndarray) -> float:
    """Return the share of answers that are as good as the exact ones.

    Scores are compared, not ids: of pictures that are there twice, either is right.

    Args:
      exact: float32[q, k], scores of an exact search.
      found: float32[q, k], scores of the search to judge.
    """
    worst = exact[:, -1:]
    return float((found >= worst - 1e-5 * np.maximum(1, np.abs(worst))).mean())


def no_answers(num_queries: int, k: int) -> Found:
    """Return `Found` without a single row: ids -1, scores -inf; a store fills in what it has."""
    return Found(
        np.full((num_queries, k), -1, np.int64), np.full((num_queries, k), -np.inf, np.float32)
    )


def facts(payload: Mapping[str, Any]) -> list[str]:
    """Return one text per field of a payload that `Where.payload` can ask for, e.g. '["label", 3]'.

    A store keeps these beside the payload and compares whole texts: 1, "1" and true stay different,
    and no field's name needs quoting in an engine's own path language.
    """
    return [
        json.dumps([name, value])
        for name, value in payload.items()
        if isinstance(value, str | int)  # bool is an int
    ]


def check_where(where: Where) -> None:
    """Refuse a condition that no store can ask.

    Raises:
      UserError: another type, numbers of versions that are none, or see `asked`.
    """
    check_types(where=(where, Where))
    for name in ("version", "below"):
        checked(dataclasses.replace(_VERSION, name=f"where.{name}"), getattr(where, name))
    asked(where)


def asked(where: Where) -> list[str]:
    """Return the `facts` that a row's payload must hold under a condition.

    Raises:
      UserError: a value that is no text, whole number or bool.
    """
    for name, value in (where.payload or {}).items():
        if not isinstance(name, str) or not isinstance(value, str | int):
            raise UserError(
                f"a condition on the payload compares with a text, a whole number or true/false, got "
                f"{name!r:.80}: {value!r:.80}"
            )
    return facts(where.payload or {})


def check_rows(rows: Rows, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Check rows before they are written.

    Args:
      rows: to write.
      size: of the store's features.

    Returns:
      int64[n], the rows' ids, and float32[n, d], their features.

    Raises:
      UserError: features missing or of another size, a key twice, two keys of one id, or a payload
        that is no JSON or has characters that are not UTF-8.
    """
    if rows.vectors is None:
        raise UserError("rows without features cannot be written: read them with vectors=True")
    vectors = np.asarray(rows.vectors, np.float32)
    if vectors.ndim != 2 or vectors.shape[1] != size:
        raise UserError(
            f"the store holds features of size {size}, got an array of shape {list(vectors.shape)}: "
            "embed with a version of the gallery's own chain"
        )
    try:
        ids = rows.ids
    except UnicodeEncodeError as error:
        raise UserError(f"a key is no name that a file can have: {error.object!r:.200}") from error
    known: dict[int, str] = {}
    for key, one in zip(rows.keys, ids.tolist(), strict=True):
        if one in known:
            raise UserError(
                f"key {key!r:.200} comes twice in one write"
                if known[one] == key
                else clash(key, known[one])
            )
        known[one] = key
    for key, payload in zip(rows.keys, rows.payloads, strict=True):
        try:
            json.dumps(payload, allow_nan=False, ensure_ascii=False).encode()
            if not all(isinstance(name, str) for name in payload):
                raise TypeError("names of fields must be texts")
        except (TypeError, ValueError) as error:
            raise UserError(f"the payload of {key!r:.200} is no JSON in UTF-8: {error}") from error
    return ids, vectors


def clash(key: str, present: str) -> str:
    """Return the message for a key that has the id of another one."""
    return f"keys {key!r:.200} and {present!r:.200} have the same id: rename one of them"


def check_queries(queries: np.ndarray, k: int, size: int) -> np.ndarray:
    """Check queries and k.

    Args:
      queries: float[q, d].
      k: answers to each.
      size: of the store's features.

    Returns:
      The queries, float32[q, d].

    Raises:
      UserError: another size, a value that is not finite, or k below 1 or above `MOST_ANSWERS`.
    """
    queries = np.asarray(queries, np.float32)
    if queries.ndim != 2 or queries.shape[1] != size:
        raise UserError(
            f"the store holds features of size {size}, the queries have shape {list(queries.shape)}: "
            "embed them with a version of the gallery's own chain"
        )
    if not np.isfinite(queries).all():
        raise UserError("the features of some queries are not finite")
    checked(_ANSWERS, k)
    return queries


def check_size(present: int, wanted: int | None, place: str) -> None:
    """Refuse to open a store for features of another size than its own; None fits every store.

    Raises:
      UserError: naming both sizes.
    """
    if wanted not in (None, present):
        raise UserError(
            f"{place} holds features of size {present}, not {wanted}: it belongs to another chain, so "
            "choose another place",
            "size",
        )


def manifest_name(name: str) -> str:
    """Return the name of what holds the manifest of a gallery, beside the table of its rows.

    Raises:
      UserError: the gallery's own name is one that this function returns: another gallery's manifest
        would lie among its rows.
    """
    if name.endswith(_MANIFEST):
        raise UserError(
            f"the name {name!r:.200} is kept for the manifest of {name.removesuffix(_MANIFEST)!r:.200}: "
            f"choose one that does not end in {_MANIFEST}"
        )
    return name + _MANIFEST


def check_swap(new: Mapping[str, Any], expected: int) -> str:
    """Check a manifest and the generation that it replaces; return its JSON text.

    Raises:
      UserError: no JSON, or its generation is not the next one.
    """
    if new.get("generation") != expected + 1:
        raise UserError(
            f"a manifest that replaces generation {expected} must have generation {expected + 1}, got "
            f"{new.get('generation')!r:.40}"
        )
    try:
        return json.dumps(new, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UserError(f"the manifest is no JSON: {error}") from error


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
