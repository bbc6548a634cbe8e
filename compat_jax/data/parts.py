"""The part of the data that a picture has: kept from month to month, or shared out when it is new.

A photo keeps its part whatever becomes of its file: renamed, moved to another class, with other
contents under the same path, or with another split in its table. The one exception is a picture that
was trained on and is in a held-out class now: it is in no part, as long as it is there.
"""

import collections
import functools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from compat_jax.data.class_register import Register, resolved
from compat_jax.data.ledger import NO_PART, NOT_LEARNT, PARTS, Ledger, Row, Splits, held_out
from compat_jax.data.ledger_files import Found
from compat_jax.errors import UserError
from compat_jax.meter import counted

OTHER_PARTS = {"val": "validation", "valid": "validation", "dev": "validation", "test": "query"}
_TO_TRAIN = ("train", "validation")
# Of several pictures that one continues: what was learnt never becomes query or gallery.
_FIRST_OF = ("train", NO_PART, "validation", "query", "gallery")


def part_of(split: str | None) -> str | None:
    """Return the part that a split of a table stands for; None for none."""
    return OTHER_PARTS.get(split, split) if split else None


def first_of_each(listed: Sequence[Found], ledger: Ledger) -> tuple[dict[str, Found], list[str]]:
    """Take one copy of each picture: the first in the class that the ledger knows, else the first.

    Args:
      listed: all pictures, with the names of their classes.
      ledger: of what is known.

    Returns:
      {digest: picture}, and notes on the others.
    """
    first: dict[str, Found] = {}
    copies, torn, differing = 0, [], []

    def is_known(found):
        return (
            found.digest in ledger.rows and ledger.rows[found.digest].label == found.picture.label
        )

    for found in sorted(listed, key=lambda found: not is_known(found)):
        one, other = first.setdefault(found.digest, found).picture, found.picture
        if first[found.digest] is found:
            continue
        copies += 1
        if one.label != other.label:
            torn.append(f"{one.path} ({one.label} and {other.label})")
        if part_of(one.split) != part_of(other.split):
            differing.append(f"{one.path} ({one.split or 'none'} and {other.split or 'none'})")
    notes = [f"copies of other files, which count once: {copies}"] if copies else []
    if torn:
        notes.append(f"in two classes, and counted for the first: {len(torn)}, such as {torn[0]}")
    if differing:
        notes.append(
            f"listed with two splits, of which the first counts: {len(differing)}, such as "
            f"{differing[0]}"
        )
    return first, notes


def continued(
    first: Mapping[str, Found], listed: Iterable[Found], ledger: Ledger
) -> dict[str, Row]:
    """Find the row of the ledger that each picture continues: {digest: row}; new ones have none.

    A picture that is known continues its own. One that is not, in the file of a picture that is nowhere
    else, continues that one's: metadata were edited, or the picture replaced.

    Args:
      first: one copy of each picture.
      listed: all pictures.
      ledger: of what is known.
    """
    found = {digest: ledger.rows[digest] for digest in first if digest in ledger.rows}
    contents = {one.picture.path: one.digest for one in listed}
    for row in sorted(ledger, key=lambda row: _FIRST_OF.index(row.part)):
        now = contents.get(row.path)
        if now is not None and now not in ledger.rows and row.digest not in first:
            found.setdefault(now, row)
    return found


def kept(old: Row, now: Row, held: Collection[str]) -> Row:
    """Return the row of a picture that continues another, with its part.

    Args:
      old: the row that it continues.
      now: its digest, class and file, and the version to come.
      held: classes that no version may train on.
    """
    part = old.part
    if part in _TO_TRAIN and now.label in held:
        part = NO_PART
    elif part == NO_PART and now.label not in held:
        part = "train"
    is_same = (old.part, old.label, old.digest) == (part, now.label, now.digest)
    return now._replace(
        part=part, version=now.version if part == "train" and not is_same else old.version
    )


def notes_on(pairs: Sequence[tuple[Row, Row]], splits: Mapping[str, str | None]) -> list[str]:
    """Say what changed in pictures that continue others.

    Args:
      pairs: the old and the new row of each.
      splits: {digest: split} that the table asks for now.
    """
    notes = []
    moved = [now for old, now in pairs if old.label != now.label]
    if moved:
        notes.append(f"moved to another class: {len(moved)} pictures, {_again(moved)}")
    edited = [now for old, now in pairs if old.digest != now.digest]
    if edited:
        notes.append(
            f"other contents in files that were there before: {len(edited)}, such as "
            f"{edited[0].path}; each keeps its part, {_again(edited)}"
        )
    out = [now for old, now in pairs if now.part == NO_PART != old.part]
    if out:
        notes.append(
            f"trained on before, and now in a class that is held out: {counted(len(out), 'picture')}, "
            f"such as {out[0].path} ({out[0].label}); in no part from now on"
        )
    asked = [(now, part_of(splits.get(now.digest))) for _, now in pairs]
    other = [(now, part) for now, part in asked if part not in (None, now.part)]
    if other:
        now, part = other[0]
        notes.append(
            f"listed with another split than their part, which stays: {len(other)}, such as "
            f"{now.path} ({part}, stays {now.part})"
        )
    return notes


def _again(rows):
    return f"{sum(row.part == 'train' for row in rows)} of them learnt again"


def note_on_gone(gone: Sequence[Row]) -> list[str]:
    """Say which pictures are gone, if any are."""
    learnt = sum(row.part == "train" for row in gone)
    stay = f"; the {learnt} of them that were learnt stay learnt" if learnt else ""
    return [f"{len(gone)} pictures that were there before are gone{stay}"] if gone else []


def assigned(
    new: Mapping[str, tuple[Row, str | None]],
    splits: Splits,
    rows: Iterable[Row],
    *,
    held: Collection[str],
    trained: Collection[str],
) -> dict[str, Row]:
    """Share out new pictures: as the table says, or by the splits.

    Args:
      new: {digest: row and split}.
      splits: for those without a split.
      rows: of all others.
      held: classes that were held out before.
      trained: classes that a version has.

    Raises:
      UserError: a table that asks to train on a class that is held out.
    """
    given = {
        digest: row._replace(part=part)
        for digest, (row, split) in new.items()
        if (part := part_of(split))
    }
    _refuse_training(given.values(), held)
    open_ones: dict[str, list[str]] = collections.defaultdict(list)
    for digest, (row, _) in new.items():
        if digest not in given:
            open_ones[row.label].append(digest)
    parts = splits.assign([*rows, *given.values()], open_ones, trained)
    found = {
        digest: given.get(digest) or row._replace(part=parts[digest])
        for digest, (row, _) in new.items()
    }
    return {
        digest: row if row.part == "train" else row._replace(version=NOT_LEARNT)
        for digest, row in found.items()
    }


def _refuse_training(given, held):
    wrong = [row for row in given if row.part in _TO_TRAIN and row.label in held]
    if wrong:
        raise UserError(
            f"split of {wrong[0].path} is {wrong[0].part}, but its class {wrong[0].label!r} is held out "
            f"for query and gallery, which no version trains on ({len(wrong)} in all): make it query "
            "or gallery, or leave it empty",
            "path",
        )


def of_trained(
    aliases: Mapping[str, str], rows: Iterable[Row], register: Register
) -> dict[str, str]:
    """Leave out aliases of classes that are held out for query and gallery, which have no prototype.

    Args:
      aliases: {other name: class}.
      rows: of all pictures.
      register: of the chain.
    """
    held = held_out(rows, register.names)
    return {other: name for other, name in resolved(aliases).items() if name not in held}


def naming(aliases: Mapping[str, str], ledger: Ledger, register: Register) -> Callable[[str], str]:
    """Return the function from a label to the class that it stands for.

    Args:
      aliases: {other name: class}.
      ledger: of the run so far.
      register: of the chain so far.

    Raises:
      UserError: an alias that would merge a trained class into a held-out one.
    """
    whole = resolved(aliases)
    _refuse_merged(whole, ledger, register)
    # Aliases of classes to come are for later.
    usable = {other: name for other, name in aliases.items() if name in register.names}
    names = Register(register.names, register.aliases).extended((), usable)
    return functools.partial(_called, names, whole)


def _called(names: Register, aliases: Mapping[str, str], label: str) -> str:
    return names.name(label) or aliases.get(label, label)


def _refuse_merged(aliases, ledger, register):
    """Refuse an alias of a held-out class for one that was trained on."""
    held = held_out(ledger, register.names)
    trained = {row.label for row in ledger} - held | set(register.names)
    for other, name in aliases.items():
        if name in held and other in trained:
            raise UserError(
                f"aliases: {other!r} was trained on, and {name!r} is held out for query and gallery, "
                f"which no version trains on: merge them the other way round ({name}={other}), or leave "
                "the alias out (run.json keeps those that were given before)",
                "aliases",
            )


def refuse_renamed(
    pairs: Sequence[tuple[Row, Row]], known: Collection[str], new_labels: Iterable[str]
) -> None:
    """Refuse a class that has the pictures of another: it was renamed.

    Args:
      pairs: the old and the new row of each picture that was there before.
      known: classes that were there before.
      new_labels: the class of each new picture.

    Raises:
      UserError: naming both.
    """
    new = collections.Counter(new_labels)
    into = collections.Counter(
        (old.label, now.label)
        for old, now in pairs
        if old.label != now.label and now.label not in known
    )
    for (old, label), count in into.items():
        if count > new[label]:
            raise UserError(
                f"class {label!r} has {count} pictures of the class {old!r} and {new[label]} new ones: "
                f"if it was renamed or merged, say aliases {label}={old}, so that it keeps its "
                "prototype",
                "aliases",
            )


def counted_parts(rows: Iterable[Row]) -> dict[str, int]:
    """Count the pictures of each part that has any, in the order of the parts."""
    found = collections.Counter(row.part for row in rows)
    return {part: found[part] for part in PARTS if found[part]}
