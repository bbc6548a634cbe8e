"""The manifest of a gallery: which chain, which versions embedded its rows, which one embeds queries.

A store keeps it as one JSON mapping and replaces it by compare and set. It comes from outside, maybe
from another organisation: `Manifest.read` refuses whatever `Manifest.describe` cannot have written.
"""

import base64
import binascii
import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from typing import Annotated, Any

import numpy as np

from compat_jax.chain import Chain, NoSuchVersion, Record, Version
from compat_jax.data.pictures import Preparation
from compat_jax.errors import UserError
from compat_jax.extraction import preparation_of
from compat_jax.fields import Rule, check_fields
from compat_jax.gallery.store import columns
from compat_jax.simplex import LABEL_ORDERS

FORMAT = 1
LEARNT = "learnt"  # in the place of a prototype order: a classifier that is trained
# Sanity limits: larger claims are refused before any memory is allocated.
MAX_SIZE, MAX_VERSIONS, MAX_OWNER, MAX_TIME = 2**24, 10_000, 300, 2.0**40
_SHA256, _MODEL = re.compile(r"[0-9a-f]{64}"), re.compile(r"[0-9a-f]{16}")
_NUMBER = re.compile(r"0|[1-9][0-9]{0,8}")
_TOLERANCE = 1e-3  # of the norm of a canary's feature

Size = Annotated[int, Rule("numbers in a feature", low=1, high=MAX_SIZE)]
Count = Annotated[int, Rule("prototypes of the simplex", low=1, high=2**31 - 1)]
Generation = Annotated[int, Rule("how often the manifest was replaced", low=1, high=2**53)]
Order = Annotated[str, Rule("prototype of a class", choices=(*LABEL_ORDERS, LEARNT))]
Number = Annotated[int, Rule("number of a version", low=0, high=10**9)]
Numbers = Annotated[tuple[float, ...], Rule("one number a channel")]
Shape = Annotated[tuple[int, ...], Rule("height, width, channels")]
Text = Annotated[str, Rule("text")]
Time = Annotated[float, Rule("seconds since 1970", low=0, high=MAX_TIME)]


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """How pictures are brought to a network's size; all versions of a gallery do the same.

    Attributes:
      image_shape: (height, width, channels) of the network's input.
      preparation: how a picture is brought to its size; None for pictures that have it.
    """

    image_shape: Shape
    preparation: Preparation | None = None

    def __post_init__(self):
        check_fields(self, "preprocessing.")
        shape = self.image_shape
        if len(shape) != 3 or not all(1 <= side <= 2**16 for side in shape):
            raise UserError(f"image_shape must be height, width and channels, got {shape!r:.80}")
        size = None if self.preparation is None else self.preparation.size
        if size is not None and shape != (size, size, 3):
            raise UserError(f"pictures are brought to {size} px, the network takes {shape}")

    @classmethod
    def of(cls, record: Record, preparation: Preparation | None = None) -> "Preprocessing":
        """Return the preprocessing of a version.

        Args:
          record: of the version.
          preparation: for a version whose record does not say how pictures are brought to its size.

        Raises:
          UserError: the record says otherwise.
        """
        own = preparation_of(record, None)
        if own is not None and preparation is not None and own != preparation:
            raise UserError(
                f"the version was trained on pictures prepared by {own}: leave preparation out",
                "preparation",
            )
        return cls(record.image_shape, own or preparation)

    def describe(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        prepared = None if self.preparation is None else dataclasses.asdict(self.preparation)
        return {
            "image_shape": list(self.image_shape),
            "preparation": prepared,
        }

    @classmethod
    def read(cls, content: Any) -> "Preprocessing":
        """Return the preprocessing that `describe` described.

        Raises:
          UserError: anything that it cannot have written.
        """
        found = _mapping(content, "preprocessing", dataclasses.fields(cls))
        given = found["preparation"]
        prepared = None
        if given is not None:
            prepared = Preparation(
                **_mapping(given, "preparation", dataclasses.fields(Preparation))
            )
        return cls(**{**found, "preparation": prepared})

    def differences(self, other: "Preprocessing") -> str:
        """Say in which fields another preprocessing differs: "preparation None here, ... there"."""
        pairs = [
            (field.name, getattr(self, field.name), getattr(other, field.name))
            for field in dataclasses.fields(self)
        ]
        return "; ".join(f"{name} {a} here, {b} there" for name, a, b in pairs if a != b)


@dataclasses.dataclass(frozen=True)
class Member:
    """A version that embeds rows or queries of a gallery.

    Attributes:
      variables: SHA-256 of its variables, 64 hexadecimal digits.
      model: its fingerprint, see `fingerprint`.
      mean: channel means of its normalisation, in 0..1; each version has its own.
      std: channel deviations, in 0..1.
      canary: features of the canaries (`canary.pictures`), float32[n, d] as little-endian bytes in
        base64.
    """

    variables: Text
    model: Text
    mean: Numbers
    std: Numbers
    canary: Text = dataclasses.field(repr=False)

    def __post_init__(self):
        check_fields(self, "version.")
        for name, pattern in (("variables", _SHA256), ("model", _MODEL)):
            value = getattr(self, name)
            if not pattern.fullmatch(value):
                raise UserError(
                    f"{name} of a version must be hexadecimal digits, got {value!r:.80}"
                )
        if min(self.std, default=0) <= 0:
            raise UserError(f"std of a version must be numbers above 0, got {self.std!r:.80}")

    @classmethod
    def of(cls, version: Version, features: np.ndarray, preprocessing: Preprocessing) -> "Member":
        """Describe a version.

        Args:
          version: the version.
          features: float32[n, d], of the canaries.
          preprocessing: of the gallery.
        """
        text = base64.b64encode(np.ascontiguousarray(features, "<f4").tobytes()).decode()
        record = version.record
        model = fingerprint(version.sha256, record, preprocessing)
        return cls(version.sha256, model, record.mean, record.std, canary=text)

    def describe(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return {**dataclasses.asdict(self), "mean": list(self.mean), "std": list(self.std)}

    def features(self, size: int) -> np.ndarray:
        """Return the features of the canaries, float32[n, size].

        Raises:
          UserError: no such array, values that are not finite, or rows of another norm than 1.
        """
        try:
            content = base64.b64decode(self.canary, validate=True)
        except (binascii.Error, ValueError) as error:
            raise UserError(f"the canary features of a version are not base64 ({error})") from error
        if not content or len(content) % (4 * size):
            raise UserError(f"the canary features of a version are no rows of {size} float32")
        found = np.frombuffer(content, "<f4").reshape(-1, size).astype(np.float32)
        with np.errstate(all="ignore"):
            norms = np.linalg.norm(found, axis=1)
        if not (np.abs(norms - 1) <= _TOLERANCE).all():
            raise UserError("the canary features of a version are not finite, or not of norm 1")
        return found


@dataclasses.dataclass(frozen=True)
class Lease:
    """The right to embed rows again; one process has it at a time.

    Attributes:
      owner: host, process and a token: HOST/PID/TOKEN.
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
    """What a gallery says of itself.

    Attributes:
      generation: how often the manifest was replaced; 1 for the first.
      chain: fingerprint of the chain, see `chain_fingerprint`.
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
        if not _SHA256.fullmatch(self.chain):
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
        return _model(member.variables, self.preprocessing, normalized=normalized, head=head)

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
        found = _mapping(content, "the manifest", names | {"format", "columns", "versions"})
        if type(found.pop("format")) is not int:
            raise UserError("its format must be a whole number")
        versions, padded = found.pop("versions"), found.pop("columns")
        found["members"] = _members(versions)
        found["preprocessing"] = Preprocessing.read(found["preprocessing"])
        lease = found["lease"]
        if lease is not None:
            found["lease"] = Lease(**_mapping(lease, "lease", dataclasses.fields(Lease)))
        manifest = cls(**found)
        if type(padded) is not int or padded != manifest.columns:
            raise UserError(
                f"features of size {manifest.feature_size} take {manifest.columns} columns, not "
                f"{padded!r:.80}"
            )
        return manifest


def order_of(record: Record) -> str:
    """Return what decides which prototype a class has: a label order, or `LEARNT`."""
    return record.label_order if record.head.is_fixed else LEARNT


def fingerprint(variables: str, record: Record, preprocessing: Preprocessing) -> str:
    """Return the fingerprint of a version: what its features depend on, in 16 hexadecimal digits.

    Names and numbers do not count: a version that was renamed needs no row embedded again.

    Args:
      variables: their SHA-256.
      record: of the version.
      preprocessing: of its pictures.
    """
    head = (record.num_prototypes, order_of(record), record.feature_size)
    normalized = (record.mean, record.std)
    return _model(variables, preprocessing, normalized=normalized, head=head)


def chain_fingerprint(chain: Chain) -> str | None:
    """Return the SHA-256 of what a chain begins with, which stays when versions are added.

    Args:
      chain: the chain.

    Returns:
      64 hexadecimal digits; None if version 0 is no longer there.

    Raises:
      CorruptEntry: version 0 is damaged.
    """
    try:
        variables = chain.digest(0)
    except NoSuchVersion:
        return None
    record = chain.record(0)
    return _sha256([variables, record.num_prototypes, order_of(record), record.feature_size])


def _model(variables: str, preprocessing: Preprocessing, *, normalized, head) -> str:
    numbers = [list(map(float, each)) for each in normalized]
    return _sha256([variables, preprocessing.describe(), *numbers, *head])[:16]


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
        int(number): Member(**_mapping(member, f"version {number}", fields))
        for number, member in versions.items()
    }


def _mapping(content, what, names) -> dict[str, Any]:
    """Return a mapping that has just these keys."""
    names = {getattr(field, "name", field) for field in names}
    if not isinstance(content, Mapping):
        raise UserError(f"{what} must be a mapping, got {content!r:.80}")
    missing = sorted(names - set(content))
    if missing:
        raise UserError(f"{what} lacks {', '.join(missing)}")
    surplus = [key for key in content if key not in names]
    if surplus:
        raise UserError(f"{what} has {surplus[0]!r:.80}, which is no field of it")
    return dict(content)


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
