"""Rows as points of Qdrant's engine: what a point carries, and how many go into one request."""

import uuid
from collections.abc import Iterator
from typing import Any, NamedTuple

from compat_jax.gallery import conventions
from compat_jax.gallery.store import Rows

_ROWS, _NUMBERS = 256, 2**20  # of a request: a server takes 32 MB of JSON, 20 bytes a number


class Point(NamedTuple):
    """A row for any client of the engine.

    Attributes:
      id: of the row.
      vector: its feature, padded.
      payload: its fields, and under "write" the token of the call that wrote it.
    """

    id: int
    vector: list[float]
    payload: dict[str, Any]


def batch(size: int) -> int:
    """Return the rows of one request, for features of a size."""
    return max(1, min(_ROWS, _NUMBERS // conventions.columns(size)))


def requests(rows: Rows, size: int) -> Iterator[list[Point]]:
    """Check rows and lay them out as points with one token, in lists of the size of one request.

    Args:
      rows: to write.
      size: of the features.

    Raises:
      UserError: see `conventions.check_rows`.
    """
    ids, vectors = conventions.check_rows(rows, size)
    vectors, token = conventions.padded(vectors), uuid.uuid4().hex
    for start in range(0, len(rows), batch(size)):
        yield [
            Point(
                int(ids[i]),
                vectors[i].tolist(),
                {
                    "key": conventions.stored_key(rows.keys[i]),
                    "version": int(rows.versions[i]),
                    "model": rows.models[i],
                    "content": rows.contents[i],
                    "payload": dict(rows.payloads[i]),
                    "facts": conventions.facts(rows.payloads[i]),
                    "write": token,
                },
            )
            for i in range(start, min(start + batch(size), len(rows)))
        ]
