"""Reasons why features of two versions cannot be compared, from their records."""

from compat_jax.chain import Record, Version
from compat_jax.data.class_register import Register
from compat_jax.errors import UserError
from compat_jax.gallery.member import Preprocessing, order_of


def differences(old: Version, new: Version) -> tuple[str, ...]:
    """Say why features of two versions cannot be compared; () where they can.

    Compared are the feature size, K, the order of the prototypes, the classes' prototypes, and the
    preprocessing of pictures.
    """
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
    prepared = Preprocessing.of(after).differences(Preprocessing.of(before))
    if prepared:
        found.append(f"pictures are preprocessed in another way: {prepared}")
    found += [version.untrained for version in (old, new) if version.untrained]
    return tuple(found)


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
