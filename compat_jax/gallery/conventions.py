"""Conventions that all stores share: padding, keys, conditions, checks, manifests, and errors."""

import contextlib
import dataclasses
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from compat_jax import files
from compat_jax.errors import UserError
from compat_jax.fields import Field, Rule, check_types, checked
from compat_jax.gallery.store import MOST_ANSWERS, Found, Rows, Where

MULTIPLE = 8

_MANIFEST = "_manifest"
_VERSION = Field("version", int | None, Rule("number of a version", low=0, high=10**9), None)
_ANSWERS = Field("k", int, Rule("answers to a query", low=1, high=MOST_ANSWERS), None)


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


def refuse_clashes(keys: Iterable[str], ids: Iterable[int], present: Mapping[int, str]) -> None:
    """Refuse to write keys over other keys of the same ids.

    Args:
      keys: to write.
      ids: of these.
      present: {id: key} of rows that are there.

    Raises:
      UserError: naming both keys.
    """
    for key, one in zip(keys, ids, strict=True):
        if present.get(one, key) != key:
            raise UserError(clash(key, present[one]))


def foreign(one: int | str, place: str, lacking: Sequence[str] = ()) -> str:
    """Return the message for a row that no store has written, by its id and the fields that it lacks."""
    what = (
        f"lacks {', '.join(lacking)}" if lacking else "has not the id that rows get from their keys"
    )
    return (
        f"row {one} of {place} {what}: another program wrote it. Delete it there, and write the picture "
        "through Gallery.put"
    )


def check_ids(rows: Rows, ids: Sequence[int | str], place: str) -> None:
    """Refuse rows that were read under other ids than those of their keys: pages would skip some.

    Raises:
      UserError: naming the first.
    """
    for found, expected in zip(ids, rows.ids.tolist(), strict=True):
        if found != expected:
            raise UserError(foreign(found, place))


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


def read_manifest(text: str) -> Mapping[str, Any] | None:
    """Return the manifest of a text from `check_swap`; None for "", where there is none yet."""
    return json.loads(text) if text else None


def counted(versions: np.ndarray) -> dict[int, int]:
    """Return the number of rows of every version that has some; see `Store.counts`."""
    found, counts = np.unique(versions, return_counts=True)
    return dict(zip(found.tolist(), counts.tolist(), strict=True))


@contextlib.contextmanager
def reported(engine: str, *errors: type[Exception], drop: str = "") -> Iterator[None]:
    """Turn what an engine raises (a full disk, no server, a folder in use) into a `UserError`.

    Args:
      engine: its name, and the place of the gallery.
      *errors: classes of its own, besides OSError, RuntimeError and ValueError.
      drop: pattern of what to leave out of its messages.
    """
    caught: tuple[type[Exception], ...] = (OSError, RuntimeError, ValueError, *errors)
    try:
        yield
    except UserError:
        raise
    except caught as error:
        told = re.sub(drop, "", files.first_line(error))
        raise UserError(f"{engine}: {told}") from error
