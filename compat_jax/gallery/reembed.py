"""A gallery's rows embedded again by another version, some at a time, while it answers.

The version of each row is the only progress there is: killed at any time and started again, a backfill
goes on with the rows that are left. Rows are updated, never inserted, and only if they are of the
version and of the picture that was read: one deleted meanwhile stays deleted, one replaced meanwhile
keeps its own feature.
"""

import dataclasses
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from compat_jax import simplex
from compat_jax.chain import Version
from compat_jax.errors import Stopped, UserError
from compat_jax.fields import Field, Rule, checked
from compat_jax.gallery.lease import SECONDS, Holder
from compat_jax.gallery.member import Member
from compat_jax.gallery.opened import Opened, rows_of, select
from compat_jax.gallery.originals import embed
from compat_jax.gallery.store import LABEL, Rows, Where, label_text
from compat_jax.meter import Meter, counted, duration
from compat_jax.spaces import LEARNT

RANDOM, WORST, BEST = "random", "worst", "best"
_NAMED = 10
_BUDGET = Field("budget", int | None, Rule("pictures to embed at most", low=1), None)
_UNTIL = Field("until", float | None, Rule("share of all rows to reach", above=0, high=1), None)
_ORDER = Field("order", str, Rule("which rows come first"), RANDOM)


@dataclasses.dataclass(frozen=True)
class Backfilled:
    """The outcome of a backfill.

    Attributes:
      version: number of the version that embedded the rows.
      updated: rows that it embedded.
      left_alone: rows that were deleted or replaced while their pictures were embedded.
      problems: {key: what is wrong} with pictures that are gone or cannot be read.
      changed: keys of pictures that are no longer those of their rows; `put` writes these.
      rows: {version: rows} at the end.
      seconds: that it took.
    """

    version: int
    updated: int
    left_alone: int
    problems: Mapping[str, str]
    changed: tuple[str, ...]
    rows: Mapping[int, int]
    seconds: float

    @property
    def share(self) -> float:
        """Return the share of rows of this version; 1 for an empty gallery."""
        total = sum(self.rows.values())
        return self.rows.get(self.version, 0) / total if total else 1.0

    def sentence(self) -> str:
        """Say it in lines: what was done, and the first of the pictures that could not be."""
        parts = [
            f"{counted(self.updated, 'row')} embedded again by version {self.version} in "
            f"{duration(self.seconds)}: {self.share:.1%} of all are of it"
        ]
        if self.left_alone:
            parts.append(f"{self.left_alone:,} were deleted or replaced meanwhile")
        named = list(self.problems.values())
        named += [f"{key} is another picture than its row's: put it" for key in self.changed]
        if not named:
            return "; ".join(parts)
        parts.append(f"{len(named):,} pictures could not be embedded:")
        return "\n".join(["; ".join(parts), *(f"  {problem}" for problem in named[:_NAMED])])


def backfill(
    gallery: Opened,
    *,
    budget: int | None = None,
    until: float | None = None,
    order: str = RANDOM,
    to: int | None = None,
    lease: float = SECONDS,
) -> Backfilled:
    """Embed rows of other versions again; call it again to go on.

    The store is refreshed at the end: until then new features cost latency, never answers.

    Args:
      gallery: whose pictures are found by their keys, see `originals.Originals`.
      budget: pictures to embed at most.
      until: share of all rows to reach, in (0, 1].
      order: which rows come first. "random": by id, which is a hash of the key. "worst": those whose
        feature has the least cosine to the mean of their class (the payload's "label") among the rows
        that are left; where some have no label, the least score at its nearest prototype. "best": the
        same from its other end. Else the
        name of a field of the payload, the smallest values first, or "-FIELD", the largest first; rows
        without it come last.
      to: number of the version that embeds; the one that embeds queries by default. An old one undoes
        a backfill.
      lease: seconds after which a process that hangs loses its right to go on.

    Returns:
      What was done.

    Raises:
      UserError: another backfill is running, both or wrong limits, or an order that has nothing to
        order by.
      Stopped: it was asked to stop, or a switch came; what was embedded stays.
    """
    _check_limits(budget, until, order)
    query = gallery.manifest().query
    number = query if to is None else gallery.numbered(to)
    version, member = gallery.admit(number)
    began = time.monotonic()
    with Holder(gallery, query, lease) as holder:
        run = _Run(gallery, (number, member), holder, budget, until)
        try:
            run.carry_out(version, order)
        except Stopped:
            run.refresh()
            raise
        run.refresh()
    return Backfilled(
        version=number,
        updated=run.updated,
        left_alone=run.left_alone,
        problems=run.problems,
        changed=tuple(run.changed),
        rows=dict(gallery.store.counts()),
        seconds=time.monotonic() - began,
    )


def _check_limits(budget: int | None, until: float | None, order: str) -> None:
    if budget is not None and until is not None:
        raise UserError("give a budget or a share to reach, not both", "until")
    for field, value in ((_BUDGET, budget), (_UNTIL, until), (_ORDER, order)):
        checked(field, value)


class _Run:
    """One backfill: what is left of it, and what was done."""

    def __init__(
        self,
        gallery: Opened,
        target: tuple[int, Member],
        holder: Holder,
        budget: int | None,
        until: float | None,
    ):
        self.gallery, self.target, self.holder = gallery, target, holder
        self.budget, self.until = budget, until
        self.updated = self.left_alone = self.embedded = 0
        self.problems: dict[str, str] = {}
        self.changed: dict[str, None] = {}  # in order
        # Rows as they were when they were tried: a missing picture is tried once.
        self._seen: set[tuple[str, int, str]] = set()

    def carry_out(self, version: Version, order: str) -> None:
        """Embed rows again in an order, as many as may be."""
        total = self.allowance()
        with Meter(self.gallery.work.label("backfill"), total, units="pictures") as meter:
            for rows in self.batches(order):
                self.embed(version, rows, meter)

    def refresh(self) -> None:
        """Have the store index what was written."""
        if self.updated:
            self.gallery.store.refresh()

    def allowance(self) -> int:
        """Return how many pictures may still be embedded."""
        counts = self.gallery.store.counts()
        total, done = sum(counts.values()), counts.get(self.target[0], 0)
        left = total - done
        if self.budget is not None:
            left = min(left, self.budget - self.embedded)
        if self.until is not None:
            left = math.ceil(self.until * total - 1e-9) - done  # .1 * 30 is a little above 3
        return max(left, 0)

    def batches(self, order: str) -> Iterator[Rows]:
        """Yield rows to embed again, until there are none or no more may be embedded."""
        part, store = self.gallery.work.part, self.gallery.store
        if order != RANDOM:
            rank = self._by_class if order in (WORST, BEST) else self._by_field
            yield from self._ranked(rank(order))
        fresh = True
        while fresh:  # once more for rows that were inserted meanwhile
            fresh = False
            for number in self._others():
                after = -1
                while (room := self.allowance()) > 0:
                    page = store.rows(Where(version=number), after=after, limit=min(part, room))
                    if not len(page):
                        break
                    after = int(page.ids[-1])
                    tried = enumerate(_as_they_are(page))
                    rows = select(page, [i for i, row in tried if row not in self._seen])
                    if len(rows):
                        fresh = True
                        yield rows

    def embed(self, version: Version, rows: Rows, meter: Meter) -> None:
        """Embed the pictures of rows again and write their features."""
        gallery = self.gallery
        if gallery.work.should_stop():
            raise Stopped("the rows that were embedded stay: call it again to go on")
        self.holder.check()

        def tick():
            self.holder.renew()
            meter.update()

        found = embed(
            version,
            rows.keys,
            gallery.originals.find,
            preprocessing=gallery.manifest().preprocessing,
            work=gallery.work,
            expected=rows.contents,
            tick=tick,
        )
        self._seen.update(_as_they_are(rows))
        for key in rows.keys:  # an earlier try may have failed
            self.problems.pop(key, None)
            self.changed.pop(key, None)
        self.problems.update(found.problems)
        self.changed.update(dict.fromkeys(found.changed))
        self.embedded += len(found.kept)
        old = rows.versions[found.kept]
        for number in np.unique(old).tolist():
            mine = np.flatnonzero(old == number)
            at = found.kept[mine]
            new = rows_of(
                [rows.keys[i] for i in at],
                self.target,
                [rows.contents[i] for i in at],
                payloads=[rows.payloads[i] for i in at],
                vectors=found.vectors[mine],
            )
            count = gallery.store.update(new, Where(version=number))
            self.updated += count
            self.left_alone += len(new) - count

    def _others(self) -> list[int]:
        return sorted(n for n in self.gallery.store.counts() if n != self.target[0])

    def _ranked(self, ids: np.ndarray) -> Iterator[Rows]:
        """Yield rows of these ids, in this order of batches, that still are of another version."""
        at = 0
        while at < len(ids) and (room := self.allowance()) > 0:
            some = ids[at : at + min(self.gallery.work.part, room)]
            at += len(some)
            rows = self.gallery.has(some)
            rows = select(rows, np.flatnonzero(rows.versions != self.target[0]))
            if len(rows):
                yield rows

    def _left(self, vectors: bool = False) -> Iterator[Rows]:
        for number in self._others():
            yield from self.gallery.pages(Where(version=number), vectors=vectors)

    def _by_field(self, order: str) -> np.ndarray:
        """Return the ids of the rows that are left, by a field of their payloads."""
        name = order.removeprefix("-")
        ids: list[np.ndarray] = []
        values: list[Any] = []
        for page in self._left():
            ids.append(page.ids)
            values += [payload.get(name) for payload in page.payloads]
        kinds = {type(v) for v in values if v is not None}
        if values and not (kinds and (kinds <= {int, float, bool} or kinds == {str})):
            raise UserError(
                f"order {order!r}: the payload's field {name!r} must hold numbers, or texts, in the "
                f"rows that are left. Others are {RANDOM!r}, {WORST!r} and {BEST!r}",
                "order",
            )
        known = [i for i, value in enumerate(values) if value is not None]
        ranked = sorted(known, key=lambda i: values[i], reverse=order.startswith("-"))
        ranked += [i for i, value in enumerate(values) if value is None]
        return _joined(ids)[np.array(ranked, np.int64)]

    def _by_class(self, order: str) -> np.ndarray:
        """Return the ids of the rows that are left by how far they lie from their class."""
        sums: dict[str, np.ndarray] = {}
        labelled = True
        for page in self._left(vectors=True):
            for vector, payload in zip(_vectors(page), page.payloads, strict=True):
                labelled &= payload.get(LABEL) is not None
                label = label_text(payload)
                sums[label] = sums.get(label, 0.0) + vector.astype(np.float64)
        manifest = self.gallery.manifest()
        if not labelled and manifest.order == LEARNT:
            raise UserError(
                f"order {order!r} needs the classes of all rows, the payload's {LABEL!r}: their "
                "versions have no fixed prototypes to compare with",
                "order",
            )
        means = {label: vector / (np.linalg.norm(vector) or 1.0) for label, vector in sums.items()}
        unknown = np.inf if order == WORST else -np.inf  # of a class that came since: ranked last
        ids, scores = [], []
        for page in self._left(vectors=True):
            if labelled:
                near = zip(_vectors(page), map(label_text, page.payloads), strict=True)
                found = [v @ means[label] if label in means else unknown for v, label in near]
                scores.append(np.array(found))
            else:
                body, last = simplex.split_logits(jnp.asarray(_vectors(page)))
                scores.append(np.maximum(np.asarray(body).max(axis=1), np.asarray(last)))
            ids.append(page.ids)
        ranked = _joined(ids)[np.argsort(_joined(scores, np.float64), kind="stable")]
        return ranked if order == WORST else ranked[::-1]


def _as_they_are(rows: Rows) -> Iterator[tuple[str, int, str]]:
    return zip(rows.keys, rows.versions.tolist(), rows.contents, strict=True)


def _vectors(page: Rows) -> np.ndarray:
    assert page.vectors is not None, "asked for"
    return page.vectors


def _joined(parts: Sequence[np.ndarray], dtype: Any = np.int64) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype), *parts]).astype(dtype)
