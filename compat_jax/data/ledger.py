"""The ledger of a run's pictures: each one's class, its part of the data, the version that learnt it.

`pictures.csv` beside a chain has a row for every picture that was ever there, addressed by the BLAKE2
digest of its file: a picture that was renamed or moved is the same one, and one that was learnt stays
learnt. The part that a picture was assigned (train, validation, query, gallery) never changes when
others are added. One that was trained on and is in a held-out class now is in no part. The file is
written whole, before training starts, so that a run that was killed goes on with the pictures it began
with.
"""

import collections
import csv
import dataclasses
import hashlib
import io
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, NamedTuple

from etils import epath

from compat_jax.errors import UserError
from compat_jax.fields import Rule, check_fields
from compat_jax.files import absolute, write_bytes

PARTS = ("train", "validation", "query", "gallery")
NO_PART = "none"  # of a picture that was trained on, in a class that is held out now
_TRAINED = {"train", "validation"}
SPLIT_BY = ("picture", "class")
NOT_LEARNT = -1
LEDGER = "pictures.csv"  # name of the file, in the folder of a run


class Row(NamedTuple):
    """One picture.

    Attributes:
      digest: hexadecimal BLAKE2b-16 of the file.
      label: class name; an alias is replaced by its class.
      part: "train", "validation", "query", "gallery" or "none".
      version: number of the version that learnt it; -1 for pictures that none learns.
      path: where it is; empty for a picture that is gone.
      size: of the file in bytes.
      modified: time of the file in ns; a file of the same path, size and time is not read again.
    """

    digest: str
    label: str
    part: str
    version: int
    path: str
    size: int
    modified: int


def held_out(rows: Iterable[Row], trained: Collection[str] = ()) -> frozenset[str]:
    """Find the classes that are held out for query and gallery; the one function that decides it.

    A class with a picture to train on or for validation is none of them, whatever else it has.

    Args:
      rows: of all pictures so far.
      trained: classes that a version has, held out or not.
    """
    parts: dict[str, set[str]] = collections.defaultdict(set)
    for row in rows:
        parts[row.label].add(row.part)
    return frozenset(x for x, found in parts.items() if x not in trained and not found & _TRAINED)


@dataclasses.dataclass(frozen=True)
class Splits:
    """How pictures are shared out between training and evaluation.

    Attributes:
      validation: share of the pictures that training is watched on.
      query: share that asks in evaluation.
      gallery: share that answers in evaluation.
      by: "picture" takes pictures of every class (closed set: retrieval among classes that were
        trained on); "class" holds out whole classes for query and gallery (open set: classes that no
        version has seen).
      seed: of the assignment.
    """

    validation: Annotated[float, Rule("share of pictures for validation", low=0, below=1)] = 0.1
    query: Annotated[float, Rule("share of pictures or classes for queries", low=0, below=1)] = 0.1
    gallery: Annotated[
        float, Rule("share of pictures or classes for the gallery", low=0, below=1)
    ] = 0.2
    by: Annotated[
        str,
        Rule("pictures of every class, or whole classes, for query and gallery", choices=SPLIT_BY),
    ] = "picture"
    seed: Annotated[int, Rule("of the assignment to the parts", low=0, high=2**32 - 1)] = 0

    def __post_init__(self):
        check_fields(self, "splits.")
        if self.validation + self.query + self.gallery >= 1:
            raise UserError(
                "nothing is left to train on: validation + query + gallery must stay below 1, got "
                f"{self.validation} + {self.query} + {self.gallery}",
                "splits.validation",
            )

    def held_out(self, rows: Iterable[Row], trained: Collection[str] = ()) -> frozenset[str]:
        """Find the classes that no version may train on: none, where pictures are held out.

        Args:
          rows, trained: see `held_out`.
        """
        return held_out(rows, trained) if self.by == "class" else frozenset()

    def assign(
        self, rows: Iterable[Row], new: Mapping[str, Sequence[str]], trained: Collection[str] = ()
    ) -> dict[str, str]:
        """Share out new pictures; what was assigned before counts and stays.

        Args:
          rows: of all pictures so far.
          new: {class: digests of its new pictures}.
          trained: classes that a version has.

        Returns:
          {digest: part}.
        """
        rows = list(rows)
        counts: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
        for row in rows:
            counts[row.label][row.part] += 1
        held = self.held_out(rows, trained)
        if self.by == "class":
            undecided = new.keys() - counts.keys() - set(trained)
            decided = len(counts.keys() | new.keys()) - len(undecided)
            totals = collections.Counter(train=decided - len(held), held=len(held))
            held |= self._held_now(undecided, totals)
        found = {}
        for label in sorted(new):
            shares = self._shares(label in held)
            for digest in sorted(new[label], key=lambda d: self._order("picture", d)):
                part = _scarcest(shares, counts[label])
                counts[label][part] += 1
                found[digest] = part
        return found

    def _shares(self, is_held: bool) -> dict[str, float]:
        if self.by == "picture":
            train = 1 - self.validation - self.query - self.gallery
            shares = (train, self.validation, self.query, self.gallery)
        elif is_held:
            both = self.query + self.gallery
            shares = (0.0, 0.0, self.query / both, self.gallery / both)
        else:
            shares = (1 - self.validation, self.validation, 0.0, 0.0)
        return {part: share for part, share in zip(PARTS, shares, strict=True) if share}

    def _held_now(self, undecided, totals) -> set[str]:
        """Choose which classes of those that nothing decides yet are held out."""
        shares = {"train": 1 - self.query - self.gallery, "held": self.query + self.gallery}
        found = set()
        for label in sorted(undecided, key=lambda c: self._order("class", c)):
            kind = _scarcest({k: v for k, v in shares.items() if v}, totals)
            totals[kind] += 1
            if kind == "held":
                found.add(label)
        return found

    def _order(self, kind, text):
        return hashlib.blake2b(f"{self.seed} {kind} {text}".encode(), digest_size=16).digest()


def _scarcest(shares: Mapping[str, float], counts: Mapping[str, int]) -> str:
    """Return the part that lacks most of its share, counting the picture to come."""
    total = sum(counts.get(part, 0) for part in shares) + 1
    return max(shares, key=lambda part: round(shares[part] * total - counts.get(part, 0), 9))


class Ledger:
    """The rows of all pictures, by digest.

    Args:
      rows: of the pictures.
    """

    def __init__(self, rows: Iterable[Row] = ()):
        self.rows = {row.digest: row for row in rows}

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows.values())

    def part(self, *parts: str) -> list[Row]:
        """Return the rows of some parts, sorted by class and digest."""
        found = [row for row in self if row.part in parts]
        return sorted(found, key=lambda row: (row.label, row.digest))

    def pending(self, version: int) -> bool:
        """Return whether pictures wait for a version that is not in the chain yet."""
        return any(row.version >= version for row in self)

    def known_files(self) -> dict[str, Row]:
        """Return {path: row}, to pass over files that did not change."""
        return {row.path: row for row in self}

    def write(self, path: epath.Path) -> None:
        """Write the ledger as CSV, whole or not at all."""
        text = io.StringIO(newline="")
        # Texts in quotes: a path may have any letter but NUL.
        writer = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
        writer.writerow(Row._fields)
        ordered: list[Row] = sorted(
            self.rows.values(), key=lambda row: (row.version, row.label, row.digest)
        )
        writer.writerows(ordered)
        write_bytes(path, text.getvalue().encode("utf-8", "surrogateescape"))

    @classmethod
    def of(cls, workdir: str | os.PathLike[str]) -> "Ledger":
        """Read the ledger in the folder of a run.

        Raises:
          UserError: there is none.
        """
        path = absolute(workdir) / LEDGER
        if not path.exists():
            raise UserError(
                f"there is no {LEDGER} in {path.parent}, which says which pictures are query and "
                "gallery: name the folder of a run on photos",
                "workdir",
            )
        return cls.read(path)

    def learnt_before(self, number: int) -> "Ledger":
        """Return the ledger for a new run that starts from version `number` of this one's chain.

        Parts stay, what that version has learnt counts as learnt, and what came later is left out.
        """
        kept = [row for row in self if row.version <= number]
        return Ledger(row._replace(version=NOT_LEARNT) for row in kept)

    @classmethod
    def read(cls, path: epath.Path) -> "Ledger":
        """Read a ledger; an empty one if there is no file.

        Raises:
          UserError: the file is no ledger.
        """
        if not path.exists():
            return cls()
        try:
            text = path.read_bytes().decode("utf-8", "surrogateescape")
            header, *lines = csv.reader(io.StringIO(text, newline=""))
            if tuple(header) != Row._fields:
                raise ValueError(f"its columns are {header}")
            return cls(_row(line) for line in lines)
        except (ValueError, TypeError, csv.Error) as error:
            raise UserError(
                f"{path} is no ledger of pictures ({error}): restore it from a backup; without it, "
                "nothing says which pictures were learnt"
            ) from error


def _row(line: Sequence[Any]) -> Row:
    digest, label, part, version, path, size, modified = line
    if part not in (*PARTS, NO_PART) or len(digest) != 32 or not label:
        raise ValueError(f"a row reads {','.join(line)[:80]}")
    return Row(digest, label, part, int(version), path, int(size), int(modified))
