"""Answers of a gallery: to queries, to those who fill it, and to those who ask how far it is."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from compat_jax.gallery.manifest import Lease
from compat_jax.gallery.store import Found, Rows
from compat_jax.meter import counted, duration

_NAMED = 10


@dataclasses.dataclass(frozen=True)
class Indexed:
    """The outcome of `index` or `put`.

    Attributes:
      inserted: rows that are new.
      replaced: rows that were written anew.
      present: pictures that had a row already.
      problems: {key: what is wrong} with those left out.
    """

    inserted: int
    replaced: int
    present: int
    problems: Mapping[str, str]

    def sentence(self) -> str:
        """Say it in a line; the first of the problems in lines below."""
        parts = [f"{counted(self.inserted, 'row')} inserted", f"{self.present:,} there before"]
        if self.replaced:
            parts.insert(1, f"{self.replaced:,} replaced")
        if not self.problems:
            return ", ".join(parts)
        named = [f"  {problem}" for problem in list(self.problems.values())[:_NAMED]]
        return "\n".join([", ".join([*parts, f"{len(self.problems):,} left out:"]), *named])


@dataclasses.dataclass(frozen=True, eq=False)
class Answers:
    """Answers to queries, the nearest row first; fewer than k where a gallery has fewer.

    Attributes:
      version: number of the version that embedded the queries.
      keys: of the rows, for each query.
      scores: float32[q, k], inner products; -inf where there is no row.
      versions: int32[q, k], of the versions that embedded the rows; -1 there.
      payloads: of the rows, for each query.
    """

    version: int
    keys: Sequence[Sequence[str]]
    scores: np.ndarray
    versions: np.ndarray
    payloads: Sequence[Sequence[Mapping[str, Any]]]

    def shares(self) -> dict[int, float]:
        """Return the share of each version among the answers."""
        found, counts = np.unique(self.versions[self.versions >= 0], return_counts=True)
        shares = counts / max(int(counts.sum()), 1)
        return dict(zip(found.tolist(), shares.tolist(), strict=True))


@dataclasses.dataclass(frozen=True)
class Status:
    """How far a gallery is.

    Attributes:
      generation: of the manifest.
      query: number of the version that embeds queries.
      previous: number of the one that a rollback returns to; None for none.
      rows: {version: rows}.
      models: {version: fingerprint}.
      answers: {version: share} among the answers to some queries; None without.
      row_bytes: of a row's feature.
      picture_seconds: to embed one picture again; None if it was not measured.
      lease: of the backfill that is running; None for none.
    """

    generation: int
    query: int
    previous: int | None
    rows: Mapping[int, int]
    models: Mapping[int, str]
    answers: Mapping[int, float] | None
    row_bytes: int
    picture_seconds: float | None
    lease: Lease | None

    @property
    def total(self) -> int:
        """Return the number of rows."""
        return sum(self.rows.values())

    @property
    def left(self) -> int:
        """Return the number of rows that another version than the queries' embedded."""
        return self.total - self.rows.get(self.query, 0)

    @property
    def share(self) -> float:
        """Return the share of rows of the version that embeds queries; 1 for an empty gallery."""
        return 1 - self.left / self.total if self.total else 1.0

    @property
    def seconds_left(self) -> float | None:
        """Return how long the rest of the backfill takes; None if it was not measured."""
        return None if self.picture_seconds is None else self.left * self.picture_seconds

    def describe(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return {
            **dataclasses.asdict(self),
            "total": self.total,
            "left": self.left,
            "share": self.share,
            "seconds_left": self.seconds_left,
            "bytes_left": self.left * self.row_bytes,
        }

    def sentence(self) -> str:
        """Say it in lines."""
        asking = f"version {self.query} ({self.models[self.query]}) embeds queries"
        lines = [f"{asking}; {counted(self.total, 'row')}:"]
        for number, count in sorted(self.rows.items()):
            part = f"  version {number} ({self.models.get(number, 'unknown')}): {counted(count, 'row')}"
            answered = (
                "" if self.answers is None else f", {self.answers.get(number, 0.0):.1%} of answers"
            )
            lines.append(f"{part}, {count / self.total:.1%}{answered}")
        seconds = "" if self.seconds_left is None else f", about {duration(self.seconds_left)}"
        size = self.left * self.row_bytes / 2**20
        left = f"left to embed again: {counted(self.left, 'picture')}{seconds}, {size:,.1f} MiB"
        lines.append(left if self.left else "nothing is left to embed again")
        return "\n".join(lines)


def answers_of(version: int, found: Found, rows: Rows) -> Answers:
    """Join answers with what their rows hold; rows that were deleted meanwhile are left out.

    Args:
      version: that embedded the queries.
      found: by the store.
      rows: all that were found, in any order.
    """
    known = {int(one): i for i, one in enumerate(rows.ids)}
    count, k = found.ids.shape
    scores = np.full((count, k), -np.inf, np.float32)
    versions = np.full((count, k), -1, np.int32)
    keys, payloads = [], []
    for query in range(count):
        kept = [place for place in range(k) if int(found.ids[query, place]) in known]
        at = [known[int(found.ids[query, place])] for place in kept]
        scores[query, : len(at)] = found.scores[query, kept]
        versions[query, : len(at)] = rows.versions[at]
        keys.append([rows.keys[i] for i in at])
        payloads.append([rows.payloads[i] for i in at])
    return Answers(version, keys, scores, versions, payloads)
