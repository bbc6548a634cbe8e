"""Writing rows of a gallery for pictures, a part at a time."""

import collections
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from compat_jax.data.pictures import BadPictures
from compat_jax.data.reading import in_order
from compat_jax.errors import Stopped, UserError
from compat_jax.fields import check_types
from compat_jax.gallery.opened import Opened, rows_of
from compat_jax.gallery.originals import Listed, content_of, embed
from compat_jax.gallery.outcome import Indexed
from compat_jax.gallery.store import Rows, Where, row_id
from compat_jax.meter import Meter

_STOPPED = "the rows that were written stay: call it again to resume"

Payload = Mapping[str, Mapping[str, Any]] | Callable[[str], Mapping[str, Any]]


class Writer:
    """Collects pictures until there are enough for a write.

    Args:
      gallery: to write to.
      version: number of the version that embeds them; None for the one in force at each write.
      payload: {key: JSON mapping}, or a function of the key; None for what the lists say.
    """

    def __init__(self, gallery: Opened, version: int | None, payload: Payload | None):
        if payload is not None and not callable(payload):
            check_types(payload=(payload, Mapping))
        self.gallery, self.payload = gallery, payload
        self.version = None if version is None else gallery.numbered(version)
        self.inserted = self.replaced = self.present = 0
        self.problems: dict[str, str] = {}
        self._fresh: collections.deque[Listed] = collections.deque()
        self._changed: collections.deque[Listed] = collections.deque()

    def add(self, fresh: Sequence[Listed], changed: Sequence[Listed], meter: Meter) -> None:
        """Take pictures without a row and pictures whose row is to be written anew."""
        self._fresh.extend(fresh)
        self._changed.extend(changed)
        for queue in (self._fresh, self._changed):
            while len(queue) >= self.gallery.work.part:
                self._write(queue, meter)

    def differing(
        self, listed: Sequence[Listed], rows: Rows
    ) -> tuple[list[Listed], dict[str, Mapping[str, Any]]]:
        """Compare pictures with their rows.

        Args:
          listed: pictures that have a row.
          rows: theirs, in any order.

        Returns:
          Those of another content, with what their rows' payloads had besides, and {key: payload} of
          others whose payload differs.
        """
        contents = dict(zip(rows.keys, rows.contents, strict=True))
        known = dict(zip(rows.keys, rows.payloads, strict=True))
        merged = [
            one._replace(payload={**known[one.key], **self._payload_of(one)}) for one in listed
        ]
        changed = _changed(merged, contents)
        keys = {one.key for one in changed}
        others = {one.key: one.payload for one in merged if one.key not in keys}
        return changed, {key: new for key, new in others.items() if new != known[key]}

    def annotate(self, payloads: Mapping[str, Mapping[str, Any]]) -> None:
        """Give rows that are there other payloads, {key: payload}; nothing is embedded."""
        if not payloads:
            return
        gallery = self.gallery
        if gallery.work.should_stop():
            raise Stopped(_STOPPED)
        ids = np.array([row_id(key) for key in payloads], np.int64)
        rows = gallery.store.rows(Where(ids=ids), limit=len(ids), vectors=True)
        new = [payloads[key] for key in rows.keys]
        gallery.store.put(dataclasses.replace(rows, payloads=new))
        self.replaced += len(rows)

    def flush(self, meter: Meter) -> None:
        """Write the rest."""
        for queue in (self._fresh, self._changed):
            while queue:
                self._write(queue, meter)

    def report(self) -> Indexed:
        """Return what was done."""
        return Indexed(self.inserted, self.replaced, self.present, self.problems)

    def _write(self, queue: collections.deque[Listed], meter: Meter) -> None:
        gallery = self.gallery
        if gallery.work.should_stop():
            raise Stopped(_STOPPED)
        some = [queue.popleft() for _ in range(min(len(queue), gallery.work.part))]
        manifest = gallery.manifest()
        number = manifest.query if self.version is None else self.version
        version, member = gallery.admit(number)
        pictures = {one.key: one.picture for one in some}
        found = embed(
            version,
            list(pictures),
            pictures.__getitem__,
            preprocessing=manifest.preprocessing,
            work=gallery.work,
            tick=meter.update,
        )
        if found.problems and gallery.work.on_bad == "stop":
            raise BadPictures(tuple(found.problems.values()), "on_bad='skip' leaves such files out")
        self.problems.update(found.problems)
        kept = [some[i] for i in found.kept]
        if not kept:
            return
        rows = rows_of(
            [one.key for one in kept],
            (number, member),
            found.contents,
            payloads=[self._payload_of(one) for one in kept],
            vectors=found.vectors,
        )
        if queue is self._fresh:
            inserted = gallery.store.insert(rows)
            self.inserted += inserted
            self.present += len(rows) - inserted
        else:
            gallery.store.put(rows)
            self.replaced += len(rows)

    def _payload_of(self, one: Listed) -> Mapping[str, Any]:
        if self.payload is None:
            return one.payload
        given = self.payload(one.key) if callable(self.payload) else self.payload.get(one.key, {})
        if not isinstance(given, Mapping):
            raise UserError(
                f"the payload of {one.key} must be a mapping, got {given!r:.80}", "payload"
            )
        return {**one.payload, **given}


def _changed(listed: Sequence[Listed], contents: Mapping[str, str]) -> list[Listed]:
    """Return the pictures whose content is no longer that of their row, or cannot be read."""

    def differs(i):
        try:
            return content_of(listed[i].picture) != contents[listed[i].key]
        except BadPictures:
            return True

    return [one for one, new in zip(listed, in_order(len(listed), differs), strict=True) if new]
