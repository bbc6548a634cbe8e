"""A store that was opened as the gallery of a chain: every model that touches it is checked first."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from compat_jax.chain import Chain, Version
from compat_jax.data.pictures import Preparation
from compat_jax.errors import UserError
from compat_jax.fields import Field, Rule, check_types, checked
from compat_jax.files import first_line
from compat_jax.gallery import canary
from compat_jax.gallery.manifest import Manifest
from compat_jax.gallery.member import Member, chain_fingerprint, fingerprint
from compat_jax.gallery.originals import Originals, Work
from compat_jax.gallery.store import EVERY, Rows, Store, Where
from compat_jax.spaces import Preprocessing, order_of

DEFAULT_WORK = Work()
_ATTEMPTS = 100  # of a compare and set that others are in the way of
_NUMBER = Field("version", int, Rule("number of a version; negative ones count from the end"), None)


class Opened:
    """The rows of a store, the chain that embeds them, and the manifest that ties the two.

    Args:
      store: of the rows.
      chain: of the versions.
      root: where the pictures are, see `originals.Originals`.
      work: how they are read and embedded.

    Raises:
      UserError: the store holds no gallery, its manifest cannot be used, or it is of another chain.
    """

    def __init__(
        self,
        store: Store,
        chain: Chain,
        root: str | os.PathLike | Mapping[str, Any] | None = None,
        work: Work = DEFAULT_WORK,
    ):
        check_types(chain=(chain, Chain), work=(work, Work))
        self.store, self.chain = store, chain
        self.originals, self.work = Originals(root), work
        self._checked: dict[int, tuple[Version, str]] = {}
        manifest = self.manifest()
        found = chain_fingerprint(chain)
        if found is not None and found != manifest.chain:
            raise UserError(
                f"the gallery is of another chain than {chain.path}: its first version is "
                f"{manifest.chain[:16]}, this one's {found[:16]}. Give the chain that it was made with",
                "chain",
            )
        self.version(manifest.query)

    def manifest(self) -> Manifest:
        """Read the manifest as it is now.

        Raises:
          UserError: there is none, or it cannot be used.
        """
        try:
            content = self.store.manifest()
        except UserError:
            raise
        except (ValueError, RecursionError) as error:  # of a JSON reader
            raise UserError(
                f"the gallery's manifest is no JSON ({first_line(error)}): restore the store from a "
                "backup"
            ) from error
        if content is None:
            raise UserError("the store holds no gallery yet: make one with Gallery.create")
        return Manifest.read(content)

    def change(self, edit: Callable[[Manifest], Manifest | None]) -> Manifest:
        """Replace the manifest by compare and set, again if another process was first.

        Args:
          edit: (manifest as it is) -> the one of the next generation, or None to leave it; raises
            UserError where what it is after can no longer be done.

        Returns:
          The manifest in force afterwards.
        """
        for _ in range(_ATTEMPTS):
            now = self.manifest()
            new = edit(now)
            if new is None:
                return now
            if self.store.swap_manifest(new.describe(), now.generation):
                return new
        raise UserError(
            f"the gallery's manifest was changed by others {_ATTEMPTS} times in a row: try again when "
            "fewer programs write to it"
        )

    def version(self, number: int, manifest: Manifest | None = None) -> Version:
        """Open a version that belongs to this gallery; once for every fingerprint.

        Args:
          number: of the version in the chain.
          manifest: as it was read just now; None to read it.

        Raises:
          UserError: it does not fit the gallery, or is not the one that the manifest means: another
            fingerprint, or other features of the canaries.
        """
        manifest = manifest or self.manifest()
        member = manifest.members.get(number)
        version, model = self._checked.get(number, (None, ""))
        if version is not None and (member is None or member.model == model):
            return version
        version = self.chain.open(number)
        manifest.check_fits(version)
        model = fingerprint(version.sha256, version.record, manifest.preprocessing)
        if member is not None:
            self._check_member(version, member, manifest)
        self._checked[number] = (version, model)
        return version

    def numbered(self, number: int) -> int:
        """Return the number of a version of the chain; negative ones count from the end.

        Raises:
          UserError: no whole number, or there is no such version.
        """
        given = checked(_NUMBER, number)
        if given >= 0:
            return given
        self.chain.record(given)  # refuses one that is not there
        return self.chain.numbers()[given]

    def admit(self, number: int) -> tuple[Version, Member]:
        """Return a version and its entry in the manifest, which it gets now if it had none."""
        version = self.version(number)
        made: list[Member] = []

        def edit(now: Manifest) -> Manifest | None:
            if number in now.members:
                return None
            if not made:
                drawn = canary.features(version, now.preprocessing.preparation)
                made.append(Member.of(version, drawn, now.preprocessing))
            return now.with_member(number, made[0])

        member = self.change(edit).members[number]
        if member.variables != version.sha256:  # another chain's version was admitted meanwhile
            self.version(number)
        return version, member

    def has(self, ids: np.ndarray) -> Rows:
        """Return those rows of some ids that are there, without features."""
        if not len(ids):
            return Rows([], np.zeros(0, np.int32), [], [], [])
        return self.store.rows(Where(ids=ids), limit=len(ids))

    def pages(self, where: Where = EVERY, vectors: bool = False) -> Iterator[Rows]:
        """Yield all rows of which a condition holds, a page at a time, by ascending id."""
        after = -1
        while len(
            page := self.store.rows(where, after=after, limit=self.work.part, vectors=vectors)
        ):
            yield page
            after = int(page.ids[-1])

    def _check_member(self, version: Version, member: Member, manifest: Manifest) -> None:
        name = f"version {version.number} of {self.chain.path}"
        remedy = "Open the gallery with the chain that it was made with"
        if version.sha256 != member.variables:
            raise UserError(
                f"{name} is not the one that the gallery means: the SHA-256 of its variables is "
                f"{version.sha256[:16]}, the manifest says {member.variables[:16]}. {remedy}",
                "chain",
            )
        found = canary.features(version, manifest.preprocessing.preparation)
        compared = canary.compare(found, member.features(manifest.feature_size))
        if not compared.passes:
            raise UserError(
                f"{name} does not embed the gallery's canaries as the manifest says (cosine "
                f"{compared.cosines.min():.4f}, at least {compared.least:.4f} is needed): its "
                "fingerprint was forged, or pictures are prepared in another way than when the "
                f"gallery was made. {remedy}, and with the release that made it",
                "chain",
            )


def begin(
    store: Store, chain: Chain, number: int | None = None, preparation: Preparation | None = None
) -> None:
    """Write the first manifest of a gallery into an empty store.

    Args:
      store: without a row.
      chain: of the versions.
      number: of the version that embeds rows and queries at first; None for the last.
      preparation: of pictures, where the versions' records do not say.

    Raises:
      UserError: the store is not empty, or the version cannot search.
    """
    check_types(chain=(chain, Chain))
    if store.manifest() is not None:
        raise UserError("the store holds a gallery already: open it, or choose another place")
    if store.counts():
        raise UserError("the store holds rows of something else: choose another place")
    number = chain.require().numbers()[-1] if number is None else number
    version, anchor = chain.open(number), chain_fingerprint(chain)
    if anchor is None:
        raise UserError(f"{chain.path} lacks version 0, by which its galleries know it: restore it")
    record = version.record
    preprocessing = Preprocessing.of(record, preparation)
    drawn = canary.features(version, preprocessing.preparation)
    manifest = Manifest(
        generation=1,
        chain=anchor,
        num_prototypes=record.num_prototypes,
        order=order_of(record),
        feature_size=record.feature_size,
        preprocessing=preprocessing,
        members={version.number: Member.of(version, drawn, preprocessing)},
        query=version.number,
    )
    manifest.check_fits(version)
    store.search(np.zeros((1, record.feature_size), np.float32), 1)  # refuses another size
    if not store.swap_manifest(manifest.describe(), 0):
        raise UserError("another program made a gallery in this store at the same time: open it")


def select(rows: Rows, at: Sequence[int] | np.ndarray) -> Rows:
    """Return some of the rows, by position."""
    return Rows(
        keys=[rows.keys[i] for i in at],
        versions=rows.versions[np.asarray(at, np.int64)],
        models=[rows.models[i] for i in at],
        contents=[rows.contents[i] for i in at],
        payloads=[rows.payloads[i] for i in at],
        vectors=None if rows.vectors is None else rows.vectors[np.asarray(at, np.int64)],
    )


def rows_of(
    keys: Sequence[str],
    member: tuple[int, Member],
    contents: Sequence[str],
    *,
    payloads: Sequence[Mapping[str, Any]],
    vectors: np.ndarray,
) -> Rows:
    """Return rows that one version embedded.

    Args:
      keys: names.
      member: number of the version, and its entry in the manifest.
      contents: digests of the pictures.
      payloads: of the caller.
      vectors: float32[n, d].
    """
    number, entry = member
    return Rows(
        keys=keys,
        versions=np.full(len(keys), number, np.int32),
        models=[entry.model] * len(keys),
        contents=contents,
        payloads=payloads,
        vectors=vectors,
    )
