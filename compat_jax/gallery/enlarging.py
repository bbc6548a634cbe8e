"""Move a gallery to a chain of a larger simplex, without reading a picture again."""

import dataclasses
import os
from collections.abc import Iterable
from typing import Any

import numpy as np

from compat_jax.chain import Chain
from compat_jax.enlarge import enlarge_features
from compat_jax.errors import Stopped, UserError
from compat_jax.fields import check_types
from compat_jax.gallery import canary
from compat_jax.gallery.gallery import Gallery
from compat_jax.gallery.lease import Holder
from compat_jax.gallery.manifest import Manifest
from compat_jax.gallery.opened import begin
from compat_jax.gallery.places import open_store
from compat_jax.gallery.store import Rows, Store
from compat_jax.meter import Meter, counted


@dataclasses.dataclass(frozen=True, eq=False)
class Enlarged:
    """The report of `enlarge`.

    Attributes:
      gallery: the new gallery.
      moved: rows that were written into it.
      present: rows that were there.
      differing: how many of these are of another version than in the old gallery.
      query: number of the version that embeds the old gallery's queries.
    """

    gallery: Gallery
    moved: int
    present: int
    differing: int
    query: int

    def sentence(self) -> str:
        """Say it in a line."""
        manifest = self.gallery.manifest()
        parts = [
            f"{counted(self.moved, 'row')} moved, {self.present:,} there before",
            f"features have {manifest.feature_size:,} numbers, version {manifest.query} embeds queries",
        ]
        if self.differing:
            parts.append(
                f"{self.differing:,} rows are of another version than in the old gallery: they stay; "
                "backfill the new one"
            )
        if self.query != manifest.query:
            parts.append(f"in the old gallery version {self.query} does: switch one of them")
        return "; ".join(parts)


def enlarge(gallery: Gallery, chain: Chain, store: Store | str | os.PathLike[str]) -> Enlarged:
    """Copy a gallery into a store of longer rows, for the chain that `compat_jax.enlarge` has written.

    Every feature is multiplied by the map that its version's projection was, so that scores stay what
    they are; keys, contents and payloads are copied. The old gallery goes on answering and stays as it
    is. Call again to resume, or for rows that came meanwhile; rows that were deleted or replaced
    meanwhile must be so in both. Backfills of the old gallery are refused meanwhile. A switch of it is
    followed at the end, unless the new gallery was switched itself.

    Args:
      gallery: to copy.
      chain: of its versions, enlarged.
      store: of the new rows, or its place, see `places.open_store`; empty, or begun by this call.

    Returns:
      What was done, and the new gallery.

    Raises:
      UserError: the chain is not the enlarged one of the gallery, the store is another gallery's, or a
        backfill is running.
      Stopped: it was asked to stop; the rows that were written stay.
    """
    check_types(chain=(chain, Chain))
    manifest = gallery.manifest()
    larger = chain.record(manifest.query).num_prototypes
    if larger <= manifest.num_prototypes:
        raise UserError(
            f"{chain.path} has num_prototypes={larger}, the gallery {manifest.num_prototypes}: write "
            "the chain for more prototypes first",
            "chain",
        )
    for number in manifest.members:
        _check_enlarged(gallery, manifest, chain, number)  # before a store is made
    if isinstance(store, str | os.PathLike):
        store = open_store(store, larger - 1)
    if store.manifest() is None:
        begin(store, chain, manifest.query, manifest.preprocessing.preparation)
    target = Gallery.open(store, chain, root=gallery.originals.root, work=gallery.work)
    copy = _Copy(gallery, target, manifest.members)
    meter = Meter(gallery.work.label("move"), len(gallery), units="rows")
    with Holder(gallery, None) as holder, meter:
        for page in gallery.pages(vectors=True):
            if gallery.work.should_stop():
                raise Stopped("the rows that were written stay: call it again to resume")
            holder.renew()
            copy.insert(page)
            meter.update(len(page))
        last = gallery.manifest()
        copy.admit(last)
    target.change(lambda now: _following(now, last))
    target.refresh()
    return Enlarged(target, copy.moved, copy.present, differing=copy.differing, query=last.query)


class _Copy:
    """Writes pages of rows into the larger gallery, and counts them.

    Args:
      gallery: the old one.
      target: the larger one.
      checked: numbers of versions that were checked; the larger gallery gets them now.
    """

    def __init__(self, gallery: Gallery, target: Gallery, checked: Iterable[int]):
        self.gallery, self.target = gallery, target
        self.moved = self.present = self.differing = 0
        self._admitted = set(checked)
        for number in self._admitted:
            target.admit(number)

    def admit(self, manifest: Manifest) -> None:
        """Check and admit those versions of the old gallery that the larger one has not yet."""
        for number in sorted(set(manifest.members) - self._admitted):
            _check_enlarged(self.gallery, manifest, self.target.chain, number)
            self.target.admit(number)
            self._admitted.add(number)

    def insert(self, page: Rows) -> None:
        """Write a page of the old gallery's rows; those that are there stay."""
        if set(page.versions.tolist()) - self._admitted:  # another program switched meanwhile
            self.admit(self.gallery.manifest())
        count = self.target.store.insert(_moved(page, self.gallery, self.target.manifest()))
        self.moved, self.present = self.moved + count, self.present + len(page) - count
        if count < len(page):
            known = self.target.has(page.ids)
            versions = dict(zip(known.keys, known.versions.tolist(), strict=True))
            own = zip(page.keys, page.versions.tolist(), strict=True)
            self.differing += sum(versions.get(key, number) != number for key, number in own)


def _check_enlarged(gallery: Gallery, manifest: Manifest, chain: Chain, number: int) -> None:
    """Refuse a version whose features are not those of the gallery's version of that number, moved."""
    old = gallery.version(number, manifest)
    new = chain.open(number)
    known = manifest.members[number].features(manifest.feature_size)
    expected = enlarge_features(known, old.record, new.record.num_prototypes)
    found = canary.features(new, manifest.preprocessing.preparation)
    if not canary.compare(found, expected).passes:
        raise UserError(
            f"version {number} of {chain.path} is not version {number} of {gallery.chain.path} moved "
            "to a larger simplex: give the chain that was made from it",
            "chain",
        )


def _moved(page: Rows, gallery: Gallery, target: Manifest) -> Rows:
    """Return a page of rows as the enlarged versions would have embedded them."""
    assert page.vectors is not None
    vectors = np.empty((len(page), target.feature_size), np.float32)
    models: list[Any] = list(page.models)
    for number in np.unique(page.versions).tolist():
        if number not in target.members:
            raise UserError(
                f"the gallery has rows of version {number}, which its manifest does not have: verify it"
            )
        of_it = np.flatnonzero(page.versions == number)
        record = gallery.chain.record(number)
        vectors[of_it] = enlarge_features(page.vectors[of_it], record, target.num_prototypes)
        for i in of_it:
            models[i] = target.members[number].model
    return dataclasses.replace(page, vectors=vectors, models=models)


def _following(now: Manifest, old: Manifest) -> Manifest | None:
    """Return the manifest with the old gallery's version and way back, unless it has one of its own."""
    if now.previous is not None or (now.query, now.previous) == (old.query, old.previous):
        return None
    return now.replaced(query=old.query, previous=old.previous)
