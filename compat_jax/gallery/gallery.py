"""A gallery in a vector store, which answers queries of a new version before its rows are embedded anew.

    gallery = Gallery.create("lance:galleries/shop", chain, version=0, root="photos")
    gallery.index("photos")
    gallery.switch(1)  # from here on, version 1 embeds queries and new pictures
    answers = gallery.search("query.jpg", k=10)
    gallery.backfill(budget=10_000, order="best")

Every row knows the version and the fingerprint of the model that embedded it, and the digest of its
picture. Every call reads the manifest anew, so that several programs may use a gallery at once and a
switch in one of them is followed by all.
"""

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from compat_jax.chain import Chain
from compat_jax.data.pictures import Preparation
from compat_jax.errors import UserError
from compat_jax.extraction import checked_shard
from compat_jax.fields import Field, Rule, check_types, checked
from compat_jax.gallery.audit import Audit, audit
from compat_jax.gallery.conventions import check_where
from compat_jax.gallery.manifest import Manifest
from compat_jax.gallery.opened import DEFAULT_WORK, Opened, begin
from compat_jax.gallery.originals import Listed, Work, embed
from compat_jax.gallery.outcome import Answers, Indexed, Status, answers_of
from compat_jax.gallery.places import open_store
from compat_jax.gallery.reembed import Backfilled, backfill
from compat_jax.gallery.store import EVERY, Store, Where, row_id
from compat_jax.gallery.writing import Payload, Writer
from compat_jax.meter import Meter

_PICTURES = Field("measure", int, Rule("pictures to embed", low=0), 0)


class Gallery(Opened):
    """A gallery in a store: `Gallery.create` makes one, `Gallery.open` opens one that is there.

    Opening checks by fingerprint and by canaries that the chain is the one that the manifest means.

    Args:
      store: of the rows.
      chain: of the versions.
      root: where the pictures are, see `originals.Originals`.
      work: how they are read and embedded.
    """

    @classmethod
    def open(
        cls,
        store: Store | str | os.PathLike[str],
        chain: Chain,
        *,
        root: str | os.PathLike | Mapping[str, Any] | None = None,
        work: Work = DEFAULT_WORK,
    ) -> "Gallery":
        """Open the gallery that a store holds.

        Args:
          store: of the rows, or its place, see `places.open_store`.
          chain: of the versions.
          root: where the pictures are, see `originals.Originals`.
          work: how they are read and embedded.

        Raises:
          UserError: there is none, its manifest cannot be used, or the chain is not its own: another
            fingerprint, other weights under a forged one, or another preprocessing.
        """
        opened = open_store(store) if isinstance(store, str | os.PathLike) else store
        return cls(opened, chain, root, work)

    @classmethod
    def create(
        cls,
        store: Store | str | os.PathLike[str],
        chain: Chain,
        *,
        version: int | None = None,
        preparation: Preparation | None = None,
        root: str | os.PathLike | Mapping[str, Any] | None = None,
        work: Work = DEFAULT_WORK,
    ) -> "Gallery":
        """Make an empty gallery in an empty store.

        Args:
          store: without a row, or a place for one, see `places.open_store`.
          chain: of the versions.
          version: number of the one that embeds rows and queries at first; the last by default.
          preparation: how pictures are brought to their size, where the chain's records do not say.
          root: where the pictures are, see `originals.Originals`.
          work: how they are read and embedded.

        Raises:
          UserError: the store is not empty, or the version cannot search.
        """
        check_types(chain=(chain, Chain))
        if isinstance(store, str | os.PathLike):
            number = -1 if version is None else version
            store = open_store(store, chain.record(number).feature_size)
        begin(store, chain, version, preparation)
        return cls(store, chain, root, work)

    def __len__(self) -> int:
        return sum(self.store.counts().values())

    def index(
        self,
        pictures: Any,
        *,
        version: int | None = None,
        payload: Payload | None = None,
        replace: bool = False,
        shard: tuple[int, int] = (0, 1),
    ) -> Indexed:
        """Insert rows for pictures that have none; call it again to resume, or when pictures were added.

        Args:
          pictures: see `originals.Originals.listed`.
          version: number of the version that embeds them; the one that embeds queries by default, as
            the manifest says at each write.
          payload: {key: JSON mapping}, or a function of the key, kept beside the row.
          replace: whether to look at those that have a row too. If their content differs, they are
            embedded and the row is written anew; if only the payload does, nothing is embedded. Fields
            of the row's payload that the new one lacks stay.
          shard: (number of this host, number of hosts): each embeds its share of the list.

        Raises:
          Stopped: it was asked to stop; what was written stays.
          UserError: files that are no pictures, unless they are to be skipped; what was written before
            stays.
        """
        number, hosts = checked_shard(shard)
        listed = self._listed(pictures)[number::hosts]
        writer = Writer(self, version, payload)
        with Meter(self.work.label("index"), len(listed), units="pictures") as meter:
            for start in range(0, len(listed), self.work.part):
                some = listed[start : start + self.work.part]
                known = self.has(np.array([row_id(one.key) for one in some], np.int64))
                there = set(known.keys)
                fresh = [one for one in some if one.key not in there]
                old = [one for one in some if one.key in there]
                changed, payloads = writer.differing(old, known) if replace else ([], {})
                writer.present += len(old) - len(changed) - len(payloads)
                meter.skip(len(some) - len(fresh) - len(changed))
                writer.add(fresh, changed, meter)
                writer.annotate(payloads)
            writer.flush(meter)
        return writer.report()

    def put(
        self, pictures: Any, *, version: int | None = None, payload: Payload | None = None
    ) -> Indexed:
        """Write rows for pictures whether they have one or not: for pictures and payloads that changed.

        Args:
          pictures: see `originals.Originals.listed`.
          version: see `index`.
          payload: see `index`.

        Raises:
          Stopped, UserError: see `index`.
        """
        listed = self._listed(pictures)
        writer = Writer(self, version, payload)
        with Meter(self.work.label("put"), len(listed), units="pictures") as meter:
            writer.add([], listed, meter)
            writer.flush(meter)
        return writer.report()

    def _listed(self, pictures: Any) -> list[Listed]:
        """The pictures to write, whose keys are of the same kind as those of the rows that are there."""
        for key in self.store.rows(limit=1).keys:
            self.originals.check_beside(key)
        return self.originals.listed(pictures)

    def find(self, keys: str | Sequence[str]) -> list[str | None]:
        """Find rows by the keys or paths of their pictures.

        Args:
          keys: keys; absolute paths; or paths relative to the working folder, where no key is the same.

        Returns:
          The key of each row, None where there is none.

        Raises:
          UserError: what is neither, see `originals.Originals.key`.
        """
        several = isinstance(keys, Iterable) and not isinstance(keys, str | bytes)
        given: list[Any] = list(keys) if several else [keys]
        meant = [self.originals.spellings(key) for key in given]
        ids = np.unique(np.array([row_id(key) for each in meant for key in each], np.int64))
        there = {
            key
            for start in range(0, len(ids), self.work.part)
            for key in self.has(ids[start : start + self.work.part]).keys
        }
        return [next((key for key in each if key in there), None) for each in meant]

    def delete(self, keys: str | Sequence[str]) -> int:
        """Delete rows by the keys or paths of their pictures; returns how many were there.

        Args:
          keys: see `find`.

        Raises:
          UserError: what is neither, see `originals.Originals.key`.
        """
        ids = [row_id(key) for key in self.find(keys) if key is not None]
        return self.store.delete(np.unique(np.array(ids, np.int64))) if ids else 0

    def search(
        self, queries: Any, k: int = 10, *, version: int | None = None, where: Where = EVERY
    ) -> Answers:
        """Find the nearest rows of queries, whatever version embedded them.

        Args:
          queries: pictures, see `Version.embed`; or features of the version, float[q, d] or [d].
          k: answers to each.
          version: number of the version that embeds the queries; the one in force by default.
          where: rows to search.

        Raises:
          UserError: see `Version.embed` and the store's `search`.
        """
        check_where(where)
        manifest = self.manifest()
        number = manifest.query if version is None else self.numbered(version)
        features = self.embed(queries, number, manifest)
        found = self.store.search(features, k, where)
        ids = np.unique(found.ids[found.ids >= 0])
        rows = self.has(ids)
        return answers_of(number, found, rows)

    def embed(self, queries: Any, version: int, manifest: Manifest | None = None) -> np.ndarray:
        """Return the features of queries, float32[q, d]; those that are features already as they are."""
        given = np.asarray(queries) if hasattr(queries, "__array__") else None
        if given is not None and np.issubdtype(given.dtype, np.floating) and given.ndim <= 2:
            return np.atleast_2d(given).astype(np.float32)
        manifest = manifest or self.manifest()
        opened = self.version(version, manifest)
        prepared = manifest.preprocessing.preparation
        return opened.embed(queries, preparation=prepared, dtype=self.work.dtype)

    def switch(self, version: int) -> Manifest:
        """Let another version embed queries and new pictures: one compare and set, no row is touched.

        Args:
          version: its number; negative ones count from the end of the chain, here and elsewhere.

        Returns:
          The manifest in force, also if the version was in force before.

        Raises:
          UserError: the version does not fit, or another program switched at the same time; then its
            switch is in force.
        """
        version = self.numbered(version)
        before = self.manifest().query
        if before == version:
            return self.manifest()
        self.admit(version)
        return self._switch(before, version, previous=before)

    def rollback(self) -> Manifest:
        """Undo the last switch; rows embedded since then stay until a backfill returns them.

        Raises:
          UserError: there is no switch to undo, or another program switched at the same time.
        """
        now = self.manifest()
        if now.previous is None:
            raise UserError(
                f"there is no switch to undo: version {now.query} embeds queries. Switch to a version "
                "by its number"
            )
        self.version(now.previous)
        return self._switch(now.query, now.previous, previous=None)

    def backfill(
        self,
        *,
        budget: int | None = None,
        until: float | None = None,
        order: str = "random",
        to: int | None = None,
    ) -> Backfilled:
        """Embed rows of other versions again, while the gallery answers; see `reembed.backfill`."""
        return backfill(self, budget=budget, until=until, order=order, to=to)

    def status(self, queries: Any = None, k: int = 10, *, measure: int = 0) -> Status:
        """Say how far the gallery is.

        Args:
          queries: pictures or features, to count which versions' rows answer; None for none.
          k: answers to each.
          measure: pictures to embed, to say how long the rest takes; 0 for no such estimate.
        """
        checked(_PICTURES, measure)
        manifest, rows = self.manifest(), dict(self.store.counts())
        answers = None if queries is None else self.search(queries, k).shares()
        seconds = self._picture_seconds(manifest, measure) if measure else None
        return Status(
            generation=manifest.generation,
            query=manifest.query,
            previous=manifest.previous,
            rows=rows,
            models={number: member.model for number, member in manifest.members.items()},
            answers=answers,
            row_bytes=4 * manifest.columns,
            picture_seconds=seconds,
            lease=manifest.lease,
        )

    def verify(self, sample: int | None = 256, *, seed: int = 0) -> Audit:
        """Hold every claim of the manifest against the rows and the chain; see `audit.audit`."""
        return audit(self, sample, seed=seed)

    def refresh(self) -> None:
        """Index rows that are not indexed, and compact the store."""
        self.store.refresh()

    def _switch(self, before: int, version: int, *, previous: int | None) -> Manifest:
        def edit(now: Manifest) -> Manifest:
            if now.query != before:
                raise UserError(
                    f"another program switched to version {now.query} at the same time: that is in "
                    "force; look at the gallery's status"
                )
            return now.replaced(query=version, previous=previous)

        return self.change(edit)

    def _picture_seconds(self, manifest: Manifest, count: int) -> float | None:
        version = self.version(manifest.query)
        others = (n for n in self.store.counts() if n != manifest.query)
        where = Where(version=next(others, manifest.query))
        rows = self.store.rows(where, limit=count)
        for _ in range(2):  # the first time compiles
            began = time.monotonic()
            found = embed(
                version,
                rows.keys,
                self.originals.find,
                preprocessing=manifest.preprocessing,
                work=self.work,
            )
        return (time.monotonic() - began) / len(found.kept) if len(found.kept) else None
