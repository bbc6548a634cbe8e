"""Spaces of features: what decides whether those of two versions can be compared, from their records."""

import dataclasses
from typing import Annotated, Any

from compat_jax.chain import Record, Version
from compat_jax.data.class_register import Register
from compat_jax.data.pictures import Preparation
from compat_jax.errors import UserError
from compat_jax.extraction import preparation_of
from compat_jax.fields import Rule, check_fields, check_types, mapping_of

LEARNT = "learnt"  # in the place of a prototype order: a classifier that is trained

Shape = Annotated[tuple[int, ...], Rule("height, width, channels")]


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


def order_of(record: Record) -> str:
    """Return what decides which prototype a class has: a label order, or `LEARNT`."""
    return record.label_order if record.head.is_fixed else LEARNT


def differences(
    old: Version, new: Version, preparation: Preparation | None = None
) -> tuple[str, ...]:
    """Say why features of two versions cannot be compared; () where they can.

    The one function that decides it. Compared are the feature size, K, the order of the prototypes, the
    classes' prototypes, and the preprocessing of pictures. Layers that were never trained compare with
    themselves only.

    Args:
      old: a version.
      new: another one, or the same.
      preparation: that the pictures of both get, whatever the records say; None for what they say.

    Raises:
      UserError: no versions, or a preparation to another size than a version's.
    """
    check_types(old=(old, Version), new=(new, Version))
    before, after = old.record, new.record
    found = []
    if before.feature_size != after.feature_size:
        found.append(_differ("features", after.feature_size, before.feature_size))
    if before.head.is_fixed != after.head.is_fixed:
        kinds = ["a learnable classifier", "a fixed simplex"]
        found.append(
            f"version {new.number} was trained with {kinds[after.head.is_fixed]}, version "
            f"{old.number} with {kinds[before.head.is_fixed]}: they share no space"
        )
    elif before.head.is_fixed:
        found += _simplex_differences(old, new)
    prepared = _preprocessing(after, preparation).differences(_preprocessing(before, preparation))
    if prepared:
        found.append(f"pictures are preprocessed in another way: {prepared}")
    if old.sha256 != new.sha256:
        found += [version.untrained for version in (old, new) if version.untrained]
    return tuple(found)


def _preprocessing(record: Record, given: Preparation | None) -> Preprocessing:
    return Preprocessing(record.image_shape, preparation_of(record, given))


def _simplex_differences(old: Version, new: Version) -> list[str]:
    before, after = old.record, new.record
    if before.num_prototypes != after.num_prototypes:
        return [
            _differ("prototypes (K)", after.num_prototypes, before.num_prototypes)
            + ": move the older one to the larger K first"
        ]
    if order_of(before) != order_of(after):
        return [_differ("orders of the prototypes", order_of(after), order_of(before))]
    if not _registered(before) or not _registered(after):
        return []
    older, newer = sorted((old, new), key=lambda version: version.number)
    try:
        Register.of(newer.record).check_continues(Register.of(older.record))
    except UserError as error:
        return [f"the classes have other prototypes: {error}"]
    return []


def _registered(record: Record) -> bool:
    """Return whether a version knows the classes of its sequence; a pre-trained model has others."""
    return bool(record.class_names) and record.task is not None


def _differ(what: str, new, old) -> str:
    return f"{what} differ: {new} of the new version, {old} of the old one"
