"""The manifest of a gallery: which chain, which versions embedded its rows, which one embeds queries.

A store keeps it as one JSON mapping and replaces it by compare and set. It comes from outside, maybe
from another organisation: `Manifest.read` refuses whatever `Manifest.describe` cannot have written.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Annotated, Any

from compat_jax.chain import Version
from compat_jax.errors import UserError
from compat_jax.fields import Rule, check_fields, mapping_of
from compat_jax.gallery.conventions import columns
from compat_jax.gallery.member import SHA256, Member, Text, model_of
from compat_jax.simplex import LABEL_ORDERS
from compat_jax.spaces import LEARNT, Preprocessing, order_of

FORMAT = 1
# Sanity limits: larger claims are refused before any memory is allocated.
MAX_SIZE, MAX_VERSIONS, MAX_OWNER, MAX_TIME = 2**24, 10_000, 300, 2.0**40
_NUMBER = re.compile(r"0|[1-9][0-9]{0,8}")

Size = Annotated[int, Rule("numbers in a feature", low=1, high=MAX_SIZE)]
Count = Annotated[int, Rule("prototypes of the simplex", low=1, high=2**31 - 1)]
Generation = Annotated[int, Rule("how often the manifest was replaced", low=1, high=2**53)]
Order = Annotated[str, Rule("prototype of a class", choices=(*LABEL_ORDERS, LEARNT))]
Number = Annotated[int, Rule("number of a version", low=0, high=10**9)]
Time = Annotated[float, Rule("seconds since 1970", low=0, high=MAX_TIME)]


@dataclasses.dataclass(frozen=True)
class Lease:
    """The right to embed rows again; one process has it at a time.

    Attributes:
      owner: host, process and a token, see `lease.owner`.
      until: when it ends unless it is renewed, in seconds since 1970.
    """

    owner: Text
    until: Time

    def __post_init__(self):
        check_fields(self, "lease.")
        if not 0 < len(self.owner) <= MAX_OWNER or not self.owner.isprintable():
            raise UserError(f"the owner of a lease is a short text, got {self.owner!r:.80}")


@dataclasses.dataclass(frozen=True)
class Manifest:
    """A gallery's description of itself.

    Attributes:
      generation: how often the manifest was replaced; 1 for the first.
      chain: fingerprint of the chain, see `member.chain_fingerprint`.
      num_prototypes: K of the simplex.
      order: which prototype a class has; `LEARNT` for versions with a trained classifier.
      feature_size: d.
      preprocessing: of all its versions.
      members: {number: version} that embedded rows, or embeds queries.
      query: number of the version that embeds queries and new pictures.
      previous: number of the one before the last switch; None if there is none to go back to.
      lease: of the backfill that is running; None for none.

    Raises:
      UserError: values that no gallery has.
    """

    generation: Generation
    chain: Text
    num_prototypes: Count
    order: Order
    feature_size: Size
    preprocessing: Preprocessing
    members: Mapping[int, Member]
    query: Number
    previous: Annotated[int | None, Rule("number of a version", low=0, high=10**9)] = None
    lease: Lease | None = None

    def __post_init__(self):
        check_fields(self)
        if not SHA256.fullmatch(self.chain):
            raise UserError(f"chain must be 64 hexadecimal digits, got {self.chain!r:.80}")
        if self.order != LEARNT and self.feature_size != self.num_prototypes - 1:
            raise UserError(
                f"features of a simplex of {self.num_prototypes} prototypes have "
                f"{self.num_prototypes - 1} numbers, not {self.feature_size}"
            )
        if not 0 < len(self.members) <= MAX_VERSIONS:
            raise UserError(f"a gallery has 1 to {MAX_VERSIONS} versions, not {len(self.members)}")
        for number in filter(lambda n: n is not None, (self.query, self.previous)):
            if number not in self.members:
                raise UserError(f"version {number} is in force, but not among the versions")
        counts = set()
        for number, member in self.members.items():
            if not _NUMBER.fullmatch(str(number)):  # what cannot be read must not be written
                raise UserError(f"{number!r:.80} is no number of a version")
            channels = self.preprocessing.image_shape[2]
            if {len(member.mean), len(member.std)} != {channels}:
                raise UserError(
                    f"mean and std of version {number} need a number for each of {channels} channels"
                )
            if member.model != self.fingerprint(member):
                raise UserError(
                    f"the fingerprint of version {number} is not that of its variables, preprocessing, "
                    "head and feature size"
                )
            counts.add(len(member.features(self.feature_size)))
        if len(counts) > 1:
            raise UserError(f"the versions have different numbers of canaries: {sorted(counts)}")

    @property
    def columns(self) -> int:
        """Return the columns that stores keep for a feature."""
        return columns(self.feature_size)

    def fingerprint(self, member: Member) -> str:
        """Return the fingerprint of a version of this gallery, from the rest of its entry."""
        head = (self.num_prototypes, self.order, self.feature_size)
        normalized = (member.mean, member.std)
        return model_of(member.variables, self.preprocessing, normalized=normalized, head=head)

    def replaced(self, **changes: Any) -> "Manifest":
        """Return the manifest of the next generation, with some fields changed."""
        return dataclasses.replace(self, **{"generation": self.generation + 1, **changes})

    def with_member(self, number: int, member: Member) -> "Manifest":
        """Return the manifest of the next generation, with one version more."""
        return self.replaced(members={**self.members, number: member})

    def check_fits(self, version: Version) -> None:
        """Refuse a version whose features cannot be compared with those of the gallery.

        Raises:
          UserError: another feature size, simplex, prototype order or preprocessing, or layers that
            were never trained.
        """
        record, name = version.record, f"version {version.number}"
        if record.fresh:
            raise UserError(f"{name} is to start from: its {', '.join(record.fresh)} is untrained")
        if record.feature_size != self.feature_size:
            raise UserError(
                f"{name} has features of size {record.feature_size}, the gallery of size "
                f"{self.feature_size}: they cannot be compared. Index the pictures into another store"
            )
        if record.num_prototypes != self.num_prototypes:
            raise UserError(
                f"{name} has num_prototypes={record.num_prototypes}, the gallery "
                f"{self.num_prototypes}: they share no simplex. Index the pictures into another store"
            )
        if order_of(record) != self.order:
            raise UserError(
                f"{name} has its classes' prototypes in the order {order_of(record)!r}, the gallery "
                f"{self.order!r}: one class would be compared with another"
            )
        given = None if record.preparation else self.preprocessing.preparation
        own = Preprocessing.of(record, given)
        if own != self.preprocessing:
            raise UserError(
                f"{name} takes pictures that are preprocessed in another way "
                f"({own.differences(self.preprocessing)}): index the pictures into another store"
            )

    def describe(self) -> dict[str, Any]:
        """Return everything as one JSON mapping."""
        lease = None if self.lease is None else dataclasses.asdict(self.lease)
        return {
            "format": FORMAT,
            "generation": self.generation,
            "chain": self.chain,
            "num_prototypes": self.num_prototypes,
            "order": self.order,
            "feature_size": self.feature_size,
            "columns": self.columns,
            "preprocessing": self.preprocessing.describe(),
            "versions": {str(n): m.describe() for n, m in sorted(self.members.items())},
            "query": self.query,
            "previous": self.previous,
            "lease": lease,
        }

    @classmethod
    def read(cls, content: Any) -> "Manifest":
        """Return the manifest that `describe` described.

        Args:
          content: JSON value, of whatever origin.

        Raises:
          UserError: saying what about it cannot be.
        """
        try:
            return cls._read(content)
        except UserError as error:
            raise UserError(
                f"the gallery's manifest cannot be used: {error}. Restore the store from a backup, or "
                "index the pictures into another one"
            ) from error

    @classmethod
    def _read(cls, content):
        if isinstance(content, Mapping) and content.get("format", FORMAT) != FORMAT:
            raise UserError(
                f"its format is {content['format']!r:.80}, this release reads {FORMAT}: use the "
                "release that wrote it"
            )
        names = {f.name for f in dataclasses.fields(cls)} - {"members"}
        found = mapping_of(content, "the manifest", names | {"format", "columns", "versions"})
        if type(found.pop("format")) is not int:
            raise UserError("its format must be a whole number")
        versions, padded = found.pop("versions"), found.pop("columns")
        found["members"] = _members(versions)
        found["preprocessing"] = Preprocessing.read(found["preprocessing"])
        lease = found["lease"]
        if lease is not None:
            found["lease"] = Lease(**mapping_of(lease, "lease", dataclasses.fields(Lease)))
        manifest = cls(**found)
        if type(padded) is not int or padded != manifest.columns:
            raise UserError(
                f"features of size {manifest.feature_size} take {manifest.columns} columns, not "
                f"{padded!r:.80}"
            )
        return manifest


def _members(versions) -> dict[int, Member]:
    if not isinstance(versions, Mapping):
        raise UserError(f"versions must be a mapping, got {versions!r:.80}")
    if len(versions) > MAX_VERSIONS:
        raise UserError(f"there are {len(versions)} versions, more than {MAX_VERSIONS}")
    for number in versions:
        if not isinstance(number, str) or not _NUMBER.fullmatch(number):
            raise UserError(f"{number!r:.80} is no number of a version")
    fields = dataclasses.fields(Member)
    return {
        int(number): Member(**mapping_of(member, f"version {number}", fields))
        for number, member in versions.items()
    }
