"""Photos that grow: a folder or table that is read again and again, and what is new in it.

`Photos` says where the pictures are, how they are brought to one size and how they are shared out
between training and evaluation; `refresh` compares them with the ledger of a run (`data.ledger`).
"""

import collections
import contextlib
import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import numpy as np

from compat_jax.data import listing, parts, reading
from compat_jax.data.class_register import Register
from compat_jax.data.dataset import Dataset
from compat_jax.data.ledger import PARTS, Ledger, Row, Splits
from compat_jax.data.ledger_files import Found, check_unchanged, digested, is_there
from compat_jax.data.listing import Picture
from compat_jax.data.pictures import FILTERS, RESIZES, Preparation
from compat_jax.data.tasks import memory_indices
from compat_jax.errors import UserError, unknown
from compat_jax.fields import PathText, Rule, check_fields
from compat_jax.files import absolute

_PUT_BACK = "put them back as they were"


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

    path: Annotated[PathText, Rule("folder of class folders, or a table (.csv, .tsv, .parquet)")]
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
            if picture.split and picture.split not in (*PARTS, *parts.OTHER_PARTS):
                raise unknown(f"split of {picture.path}", picture.split, PARTS, "path")
        return found

    def paths(self) -> list[str]:
        """List the paths of all pictures."""
        return [picture.path for picture in self.listing()]

    def dataset(
        self,
        rows: Sequence[Row],
        register: Register,
        progress: str | None,
        *,
        remedy: str = _PUT_BACK,
    ) -> Dataset:
        """Read the pictures of some rows, labelled with the numbers of a register.

        Args:
          rows: of a ledger.
          register: of the classes.
          progress: label of a progress bar; None for none.
          remedy: what to do about pictures that are not what the ledger says.

        Raises:
          UserError: pictures that vanished, cannot be read or have other contents than the ledger says.
        """
        check_unchanged(rows, remedy)
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
            for digest, picture, size, modified in digested(self.listing(), ledger, None):
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
          UserError: no class has both, or pictures have other contents than the ledger says.
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
            self.dataset(
                [r for r in roles[part] if r.label in classes],
                classes,
                progress,
                remedy="run the update again, which takes down what they are now",
            )
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
      pictures: {class: pictures to learn}.
      parts: {part: pictures that are new}.
      notes: sentences on what was passed over or changed.
    """

    ledger: Ledger
    register: Register
    classes: tuple[str, ...]
    pictures: Mapping[str, int]
    parts: Mapping[str, int]
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
        them at once), an unknown alias or one of a trained class for a held-out one, a table that asks
        to train on a held-out class, or more classes than prototypes.
    """
    listed = digested(photos.listing(), ledger, progress)
    called = parts.naming(photos.aliases, ledger, register)
    # Merged classes first: parts are shared out, and copies counted, by class.
    listed = [
        one._replace(picture=one.picture._replace(label=called(str(one.picture.label))))
        for one in listed
    ]
    ledger = Ledger(row._replace(label=called(row.label)) for row in ledger)
    first, notes = parts.first_of_each(listed, ledger)
    found = {digest: _row(one, version) for digest, one in first.items()}
    splits = {digest: one.picture.split for digest, one in first.items()}
    continued = parts.continued(first, listed, ledger)
    held = photos.splits.held_out(ledger, register.names)
    kept = {digest: parts.kept(old, found[digest], held) for digest, old in continued.items()}
    parts.refuse_renamed(
        [(old, kept[digest]) for digest, old in continued.items()],
        {*register.names, *(row.label for row in ledger)},
        (row.label for digest, row in found.items() if digest not in kept),
    )
    checked = reading.check_pictures(
        [row.path for digest, row in found.items() if digest not in ledger.rows],
        on_bad=photos.on_bad,
        progress=progress,
    )
    good = {d: row for d, row in found.items() if d in ledger.rows or row.path not in checked.bad}
    pairs = [(old, kept[digest]) for digest, old in continued.items() if digest in good]
    notes += parts.notes_on(pairs, splits)
    if checked.problems:
        notes.append(checked.summary())
    there = {old.digest for old, _ in pairs}
    gone = [row for row in ledger if row.path and row.digest not in there]
    rows = {
        **{row.digest: row._replace(path="") for row in ledger},
        **{row.digest: row for _, row in pairs},
    }
    new = {digest: (row, splits[digest]) for digest, row in good.items() if digest not in kept}
    added = parts.assigned(new, photos.splits, rows.values(), held=held, trained=register.names)
    rows |= added
    trained = [r for r in rows.values() if r.part == "train" and r.version == version]
    grown = register.extended(
        {r.label for r in trained}, parts.of_trained(photos.aliases, rows.values(), register)
    )
    return News(
        ledger=Ledger(rows.values()),
        register=grown,
        classes=grown.names[len(register) :],
        pictures=dict(collections.Counter(str(grown.name(r.label)) for r in trained)),
        parts=parts.counted_parts(added.values()),
        notes=(*notes, *parts.note_on_gone(gone)),
    )


def _row(found: Found, version: int) -> Row:
    """The row of a picture that is to be learnt."""
    digest, picture, size, modified = found
    return Row(digest, str(picture.label), "train", version, picture.path, size, modified)


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
