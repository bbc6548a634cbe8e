"""The versions of a gallery in its manifest: preprocessing, normalisation and fingerprints."""

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

LEARNT = "learnt"  # in the place of a prototype order: a classifier that is trained
SHA256 = re.compile(r"[0-9a-f]{64}")
_MODEL = re.compile(r"[0-9a-f]{16}")
_TOLERANCE = 1e-3  # of the norm of a canary's feature

Numbers = Annotated[tuple[float, ...], Rule("one number a channel")]
Shape = Annotated[tuple[int, ...], Rule("height, width, channels")]
Text = Annotated[str, Rule("text")]


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
        found = mapping_of(content, "preprocessing", dataclasses.fields(cls))
        given = found["preparation"]
        prepared = None
        if given is not None:
            prepared = Preparation(
                **mapping_of(given, "preparation", dataclasses.fields(Preparation))
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
        for name, pattern in (("variables", SHA256), ("model", _MODEL)):
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
    return model_of(variables, preprocessing, normalized=normalized, head=head)


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


def model_of(variables: str, preprocessing: Preprocessing, *, normalized, head) -> str:
    """Return the fingerprint of a version from its parts.

    Args:
      variables: their SHA-256.
      preprocessing: of its pictures.
      normalized: (mean, std) of its channels.
      head: (number of prototypes, their order, feature size).
    """
    numbers = [list(map(float, each)) for each in normalized]
    return _sha256([variables, preprocessing.describe(), *numbers, *head])[:16]


def mapping_of(content, what, names) -> dict[str, Any]:
    """Return a JSON mapping that has just these keys.

    Args:
      content: JSON value, of whatever origin.
      what: name of it, for messages.
      names: of the keys; or fields of a dataclass.

    Raises:
      UserError: no mapping, a key that is missing, or one too many.
    """
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
