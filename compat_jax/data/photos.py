"""Photos that grow: a folder or table that is read again and again, and what is new in it.

`Photos` says where the pictures are, how they are brought to one size and how they are shared out
between training and evaluation; `refresh` compares them with the ledger of a run (`data.ledger`).
"""

import collections
import contextlib
import dataclasses
import functools
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any

import numpy as np
from etils import epath

from compat_jax.data import listing, reading
from compat_jax.data.class_register import Register, resolved
from compat_jax.data.dataset import Dataset
from compat_jax.data.ledger import NOT_LEARNT, PARTS, Ledger, Row, Splits
from compat_jax.data.listing import Picture
from compat_jax.data.pictures import FILTERS, RESIZES, Preparation, missing
from compat_jax.data.tasks import memory_indices
from compat_jax.errors import UserError, unknown
from compat_jax.fields import Rule, check_fields
from compat_jax.files import absolute, in_bucket
from compat_jax.meter import Meter

_OTHER_PARTS = {"val": "validation", "valid": "validation", "dev": "validation", "test": "query"}
_NAMED = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Photos:
    """Labelled pictures in a folder or table that grows.

    Attributes:
      path: folder with one sub-folder of pictures per class; a table (.csv, .tsv, .parquet) with the
        columns path, label and, if the parts are given, split; or a Hugging Face data set on disk.
      size: side in pixels to which pictures are brought.
      resize: "crop" keeps the aspect (short side, centre crop), "squash" does not.
      filter: of the resize, antialiased.
      crop: share of the resized short side that the centre crop keeps.
      on_bad: "stop" refuses all files that cannot be read at once, "skip" lists them and goes on.
      splits: how new pictures are shared out.
      aliases: {other name: class} of classes that were renamed or merged.

    Raises:
      UserError: a value out of range.
    """

    path: Annotated[str, Rule("folder of class folders, or a table (.csv, .tsv, .parquet)")]
    size: Annotated[int, Rule("side of the pictures in pixels", low=1, high=8192)] = 224
    resize: Annotated[str, Rule("keep the aspect and crop, or squash", choices=RESIZES)] = "crop"
    filter: Annotated[str, Rule("of the resize, antialiased", choices=FILTERS)] = "bicubic"
    crop: Annotated[
        float, Rule("share of the short side that the centre crop keeps", above=0, high=1)
    ] = 1.0
    on_bad: Annotated[
        str, Rule("refuse files that cannot be read, or skip them", choices=reading.ON_BAD)
    ] = "stop"
    splits: Splits = dataclasses.field(default_factory=Splits)
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        check_fields(self)
        if not isinstance(self.splits, Splits):
            raise UserError(f"splits must be Splits, got {self.splits!r:.80}", "splits")
        if not isinstance(self.aliases, Mapping):
            raise UserError(
                f"aliases must be {{other name: class}}, got {self.aliases!r:.80}", "aliases"
            )
        object.__setattr__(self, "path", str(absolute(self.path)))
        names = [listing.class_name(str(x), f"alias {x!r}") for x in self.aliases]
        classes = [listing.class_name(str(x), f"alias {x!r}") for x in self.aliases.values()]
        object.__setattr__(self, "aliases", dict(zip(names, classes, strict=True)))

    @property
    def preparation(self) -> Preparation:
        """Return how a picture is brought to its size."""
        return Preparation(self.size, self.resize, self.filter, self.crop)

    def describe(self) -> dict[str, Any]:
        """Return what decides the content of a run, as JSON values; the path does not."""
        return {
            "preparation": self.preparation.describe(),
            "splits": dataclasses.asdict(self.splits),
        }

    def listing(self) -> list[Picture]:
        """List the pictures, with their labels.

        Raises:
          UserError: no such folder or table, pictures without a label, or an unknown split.
        """
        found = listing.list_labelled(self.path)
        for picture in found:
            if picture.label is None:
                raise UserError(f"{picture.path} has no label in {self.path}: give one", "path")
            if picture.split and picture.split not in (*PARTS, *_OTHER_PARTS):
                raise unknown(f"split of {picture.path}", picture.split, PARTS, "path")
        return found

    def paths(self) -> list[str]:
        """List the paths of all pictures."""
        return [picture.path for picture in self.listing()]

    def dataset(self, rows: Sequence[Row], register: Register, progress: str | None) -> Dataset:
        """Read the pictures of some rows, labelled with the numbers of a register.

        Args:
          rows: of a ledger.
          register: of the classes.
          progress: label of a progress bar; None for none.

        Raises:
          UserError: pictures that vanished or cannot be read.
        """
        files = tuple(row.path for row in rows)
        read = reading.read(files, self.preparation, verified=True, progress=progress)
        return Dataset(
            read.images,
            np.array([register.number(row.label) for row in rows], np.int32),
            register.names,
            preparation=self.preparation,
            files=files,
            digests=tuple(bytes.fromhex(row.digest) for row in rows),
            complete=False,
        )

    def _found_again(self, ledger: Ledger) -> Ledger:
        """The ledger with the places of pictures that were moved since, if any is not where it was.

        Raises:
          UserError: none of them is anywhere.
        """
        rows = ledger.part("query", "gallery")
        if all(is_there(row.path) for row in rows if row.path):
            return ledger
        with contextlib.suppress(UserError):  # the folder itself may be gone
            for digest, picture, size, modified in _digested(self.listing(), ledger, None):
                if digest in ledger.rows:
                    known = ledger.rows[digest]
                    ledger.rows[digest] = known._replace(
                        path=picture.path, size=size, modified=modified
                    )
        if not any(is_there(row.path) for row in ledger.part("query", "gallery")):
            raise UserError(
                f"none of the {len(rows)} pictures of query and gallery is there, such as "
                f"{rows[0].path or rows[0].label}: give the folder or table where they are now",
                "path",
            )
        return ledger

    def retrieval(
        self, ledger: Ledger | str | os.PathLike[str], progress: str | None = None
    ) -> tuple[Dataset, Dataset]:
        """Read query and gallery, of the classes that have pictures in both.

        Args:
          ledger: of the run, or the folder of the run.
          progress: label of a progress bar; None for none.

        Raises:
          UserError: no class has both.
        """
        if not isinstance(ledger, Ledger):
            ledger = Ledger.of(ledger)
        ledger = self._found_again(ledger)
        roles = {part: [r for r in ledger.part(part) if is_there(r.path)] for part in PARTS}
        present = [{row.label for row in roles[part]} for part in ("query", "gallery")]
        both = sorted(present[0] & present[1])
        if not both:
            raise UserError(
                "no class has pictures in both query and gallery: give larger shares "
                "(splits.query, splits.gallery), or more pictures",
                "splits.query",
            )
        classes = Register(tuple(both))
        query, gallery = (
            self.dataset([r for r in roles[part] if r.label in classes], classes, progress)
            for part in ("query", "gallery")
        )
        return query, gallery


@dataclasses.dataclass(frozen=True)
class News:
    """New pictures and classes of a folder or table of photos.

    Attributes:
      ledger: with the new pictures assigned.
      register: with the new classes registered.
      classes: names of the new classes.
      pictures: {class: new pictures to train on}.
      notes: sentences on what was passed over or changed.
    """

    ledger: Ledger
    register: Register
    classes: tuple[str, ...]
    pictures: Mapping[str, int]
    notes: tuple[str, ...]

    def __bool__(self) -> bool:
        return bool(self.pictures)


def refresh(
    photos: Photos, ledger: Ledger, register: Register, *, version: int, progress: str | None
) -> News:
    """Compare photos with a run's ledger, and assign what is new.

    Args:
      photos: where the pictures are.
      ledger: of the run so far.
      register: of the chain so far.
      version: number of the version that is to learn what is new.
      progress: label of a progress bar; None for none.

    Raises:
      UserError: a class that is another one under a new name, pictures that cannot be read (all of
        them at once), an unknown alias, or more classes than prototypes.
    """
    listed = _digested(photos.listing(), ledger, progress)
    aliases = photos.aliases
    names = Register(register.names, register.aliases).extended((), _usable(aliases, register))
    called = functools.partial(_called, names, resolved(aliases))
    # Merged classes first: parts are shared out, and copies counted, by class.
    listed = [
        (digest, picture._replace(label=called(str(picture.label))), size, modified)
        for digest, picture, size, modified in listed
    ]
    ledger = Ledger(row._replace(label=called(row.label)) for row in ledger)
    first, notes = _first_of_each(listed, ledger)
    known: dict[str, tuple[Row, str | None]] = {}
    new: dict[str, tuple[Row, str | None]] = {}
    for digest, (picture, size, modified) in first.items():
        found = Row(digest, str(picture.label), "train", version, picture.path, size, modified)
        (known if digest in ledger.rows else new)[digest] = (found, picture.split)
    rows = dict(ledger.rows)
    moved = _relabelled(known, ledger)
    _refuse_renamed(moved, names, (row.label for row, _ in new.values()))
    for digest, (row, _) in known.items():
        old, learnt = rows[digest], rows[digest].version
        if digest in moved and old.part == "train":
            learnt = version
        label = row.label if digest in moved else old.label
        rows[digest] = row._replace(label=label, part=old.part, version=learnt)
    if moved:
        again = sum(rows[digest].part == "train" for digest in moved)
        notes.append(f"moved to another class: {len(moved)} pictures, {again} of them learnt again")
    checked = reading.check_pictures(
        [row.path for row, _ in new.values()], on_bad=photos.on_bad, progress=progress
    )
    if checked.problems:
        notes.append(checked.summary())
    good = {d: pair for d, pair in new.items() if pair[0].path not in checked.bad}
    rows |= _assigned(good, photos.splits, rows.values())
    trained = [r for r in rows.values() if r.part == "train" and r.version == version]
    grown = register.extended(
        {r.label for r in trained}, of_trained(aliases, Ledger(rows.values()))
    )
    counts = collections.Counter(str(grown.name(r.label)) for r in trained)
    gone = [digest for digest in ledger.rows.keys() - first.keys() if rows[digest].path]
    rows |= {digest: rows[digest]._replace(path="") for digest in gone}
    if gone:
        notes.append(f"{len(gone)} pictures that were there before are gone; they stay learnt")
    added = grown.names[len(register) :]
    return News(Ledger(rows.values()), grown, added, dict(counts), tuple(notes))


def to_learn(
    ledger: Ledger,
    register: Register,
    *,
    version: int,
    rehearsal: int,
    seed: int,
    everything: bool,
) -> tuple[list[Row], list[Row]]:
    """Choose the pictures that a version learns: the new ones, and some of the old ones.

    Args:
      ledger: with the new pictures assigned.
      register: of all classes.
      version: number of the version.
      rehearsal: pictures rehearsed of each earlier class, drawn from those that are still there.
      seed: of the draw.
      everything: True for a new backbone, which learns all pictures that are still there.

    Returns:
      New rows, and rehearsed rows.

    Raises:
      UserError: new pictures that vanished since they were assigned.
    """
    rows = [row for row in ledger.part("train") if row.version <= version]
    there = [row for row in rows if is_there(row.path)]
    lost = [row for row in rows if row.version == version and not is_there(row.path)]
    if lost and not everything:
        raise UserError(
            f"{len(lost)} pictures that version {version} is learning vanished, such as "
            f"{lost[0].path or lost[0].label}: put them back",
            "path",
        )
    if everything:
        return there, []
    new = [row for row in there if row.version == version]
    old = [row for row in there if row.version < version]
    labels = np.array([register.number(row.label) for row in old], np.int64)
    kept = memory_indices(labels, range(len(register)), rehearsal, seed)
    return new, [old[i] for i in kept]


def _digested(
    pictures: Sequence[Picture], ledger: Ledger, progress: str | None
) -> list[tuple[str, Picture, int, int]]:
    """(digest, picture, bytes, time) of every file; unchanged files are not read again."""
    known = ledger.known_files()

    def digested(picture):
        size, modified = _size_and_time(picture.path)
        row = known.get(picture.path)
        if row and (row.size, row.modified) == (size, modified):
            return row.digest, picture, size, modified
        return reading.file_digest(picture.path).hex(), picture, size, modified

    found = []
    with Meter(progress, len(pictures), units="files", keep=False) as meter:
        for one in reading.in_order(len(pictures), lambda i: digested(pictures[i]), block=16):
            found.append(one)
            meter.update()
    return found


def is_there(path: str) -> bool:
    """Return whether a picture of the ledger is there, on a disk or in a bucket."""
    if in_bucket(path):
        return epath.Path(path).exists()
    return bool(path) and os.path.exists(path)


def _size_and_time(path: str) -> tuple[int, int]:
    """Bytes and time in ns of a file.

    Raises:
      BadPictures: there is none.
    """
    try:
        if in_bucket(path):
            found = epath.Path(path).stat()
            return found.length, int(found.mtime * 1e9)
        known = os.stat(path)
        return known.st_size, known.st_mtime_ns
    except FileNotFoundError as error:
        raise missing(path) from error


def _first_of_each(listed, ledger):
    """{digest: (picture, bytes, time)} of one copy of each picture, and notes on the others.

    The copy in the class that the ledger knows counts, else the first.
    """
    first: dict[str, tuple[Picture, int, int]] = {}
    copies, torn = 0, []

    def is_known(item):
        digest, picture, _, _ = item
        return digest in ledger.rows and ledger.rows[digest].label == picture.label

    listed = sorted(listed, key=lambda item: not is_known(item))
    for digest, picture, size, modified in listed:
        if digest not in first:
            first[digest] = (picture, size, modified)
            continue
        copies += 1
        if first[digest][0].label != picture.label:
            torn.append((first[digest][0], picture))
    notes = [f"copies of other files, which count once: {copies}"] if copies else []
    if torn:
        one, other = torn[0]
        notes.append(
            f"in two classes, and counted for the first: {len(torn)}, such as {one.path} "
            f"({one.label} and {other.label})"
        )
    return first, notes


def of_trained(aliases: Mapping[str, str], ledger: Ledger) -> dict[str, str]:
    """Leave out aliases of classes that are held out for query and gallery, which have no prototype."""
    parts: dict[str, set[str]] = collections.defaultdict(set)
    for row in ledger:
        parts[row.label].add(row.part)
    held = {label for label, found in parts.items() if not found & {"train", "validation"}}
    return {other: name for other, name in resolved(aliases).items() if name not in held}


def _called(names: Register, aliases: Mapping[str, str], label: str) -> str:
    """The class that a label stands for."""
    return names.name(label) or aliases.get(label, label)


def _usable(aliases, register):
    """Aliases of classes that are registered; those of classes to come are for later."""
    return {other: name for other, name in aliases.items() if name in register.names}


def _relabelled(known, ledger) -> dict[str, tuple[str, str]]:
    """{digest: (old class, new class)} of known pictures that are in another class now."""
    found = {}
    for digest, (row, _) in known.items():
        old = ledger.rows[digest].label
        if old != row.label:
            found[digest] = (old, row.label)
    return found


def _refuse_renamed(moved, names: Register, new_labels: Iterable[str]) -> None:
    """Refuse a class that has the pictures of another: it was renamed."""
    new = collections.Counter(new_labels)
    into = collections.Counter(pair for pair in moved.values() if pair[1] not in names)
    for (old, label), count in into.items():
        if count > new[label]:
            raise UserError(
                f"class {label!r} has {count} pictures of the class {old!r} and {new[label]} new ones: "
                f"if it was renamed or merged, say aliases {label}={old}, so that it keeps its "
                "prototype",
                "aliases",
            )


def _assigned(good, splits: Splits, rows: Iterable[Row]) -> dict[str, Row]:
    """The rows of new pictures, shared out: as the table says, or by the splits."""
    open_ones: dict[str, list[str]] = collections.defaultdict(list)
    given = {}
    for digest, (row, split) in good.items():
        if split:
            given[digest] = _OTHER_PARTS.get(split, split)
        else:
            open_ones[row.label].append(digest)
    parts = {**splits.assign(rows, open_ones), **given}
    return {
        digest: row._replace(
            part=parts[digest], version=row.version if parts[digest] == "train" else NOT_LEARNT
        )
        for digest, (row, _) in good.items()
    }
