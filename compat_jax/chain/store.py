"""The chain of model versions on disk.

A chain is a folder with one entry per version, `0000`, `0001`, …; an entry holds `record.json` and, in
`variables/`, an Orbax checkpoint. The record describes the version in full, so that opening needs
only the path, also when architectures differ along the chain. It lists size and SHA-256 of every file
and the SHA-256 of the variables: a truncated or altered entry is named and refused before Orbax reads
it, and the others stay readable. Entries are written aside and renamed, so a reader never sees half of
one; nothing in a chain is ever executed.

In a bucket (gs://) nothing can be renamed: an entry exists once its `record.json` does, which is
created last, once, and names the folder `variables-TOKEN` that its writer filled.
"""

import json
import numbers
import os
import re
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from compat_jax import hosts
from compat_jax.chain.integrity import (
    check_files,
    check_finite,
    check_stored,
    read_text,
    targets,
    variables_folder,
)
from compat_jax.chain.record import (
    FORMAT_1_LAYERS,
    MAX_RECORD_BYTES,
    Record,
    Version,
    decode,
    encode,
    variables_sha256,
)
from compat_jax.data.class_register import Register
from compat_jax.errors import UserError
from compat_jax.files import create, first_line, in_bucket, sha256, storage, walk
from compat_jax.models import Backbone, GivenBackbone, recorded_backbone, renamed_layers

# Orbax in two threads at once lost a file that was there (NOT_FOUND); two programs do not disturb each
# other.
_ORBAX = threading.Lock()
_ENTRY = re.compile(r"[0-9]{4,9}")
_ASIDE = re.compile(r"\.adding-[0-9]{4,9}-[0-9a-f]{8}")
_ABANDONED_SECONDS = 24 * 3600.0


class CorruptEntry(UserError):
    """An entry that differs from what was written: truncated, altered, or of another format."""


class Chain:
    """A chain of versions in a folder (local or gs://).

    `chain[0]` and `chain[-1]` open a version, `len(chain)` counts them, iteration opens them in turn.

    Args:
      path: of the folder; the first `add` makes it.
      backbone: the user's own backbone, as a Linen module or by its import path, for versions whose
        backbone is not registered.
    """

    def __init__(self, path: str | os.PathLike[str], backbone: GivenBackbone | None = None):
        self.path = storage(path)
        self.backbone = backbone

    def __repr__(self) -> str:
        return f"Chain({str(self.path)!r}, versions={self.numbers()})"

    def __len__(self) -> int:
        return len(self.numbers())

    def __getitem__(self, number: int) -> Version:
        if not isinstance(number, numbers.Integral):
            raise TypeError(f"a chain is indexed by a whole number, got {number!r}")
        try:
            return self.open(int(number))
        except NoSuchVersion as error:
            raise IndexError(str(error)) from error

    def __iter__(self) -> Iterator[Version]:
        return (self.open(number) for number in self.numbers())

    def numbers(self) -> list[int]:
        """Return the numbers of the entries, ascending."""
        if not self.path.is_dir():
            return []
        if in_bucket(self.path):
            names = [p.parent.name for p in self.path.glob("*/record.json")]
        else:
            names = [p.name for p in self.path.iterdir()]
        # `00003`, a copy of `0003`, is no entry: a number has one name.
        found = [int(n) for n in names if _ENTRY.fullmatch(n) and n == _entry(int(n))]
        return sorted(found)

    def require(self) -> "Chain":
        """Return this chain if it has an entry.

        Raises:
          UserError: no folder or no entry.
        """
        if not self.numbers():
            raise UserError(
                f"no chain at {self.path}: training writes one to the folder chain of its workdir"
            )
        return self

    def require_whole(self) -> "Chain":
        """Return this chain if it has entries and none is missing between them.

        Raises:
          UserError: naming the gap.
        """
        numbers = self.require().numbers()
        gaps = sorted(set(range(numbers[-1])) - set(numbers))
        if gaps:
            raise UserError(
                f"{self.path} lacks {_named(gaps)} of its versions 0..{numbers[-1]}: restore them, or "
                "name the versions to use"
            )
        return self

    def add(self, variables: Mapping[str, Any], record: Record, number: int | None = None) -> int:
        """Append a version; it appears only when complete, and is read back once.

        Args:
          variables: {"params", "batch_stats"} of arrays.
          record: its description.
          number: that the version must get; None for the next free one.

        Returns:
          The number of the new version.

        Raises:
          UserError: values that are not finite, K differs from the chain's, a class has another number
            than before, another program added this number first, or the folder cannot be written
            to. The chain is then what it was.
        """
        numbers = self.numbers()
        record.check()
        if number is None:
            number = numbers[-1] + 1 if numbers else 0
        if numbers:
            self._check_fits(record, numbers[0])
            self._check_register(number, record)
        host = jax.tree.map(hosts.gather, dict(variables))
        check_finite(host)
        if hosts.broadcast(self._has(number)):
            raise self._taken(number)
        try:
            self._write(number, record, dict(variables), host=host)
        except Exception as error:  # Orbax and TensorStore raise many kinds
            if isinstance(error, _Taken) or self._has(number):
                raise self._taken(number) from error
            raise UserError(
                f"cannot write version {number} to {self.path} ({first_line(error)}): "
                "make room or choose another folder; the versions before it are untouched"
            ) from error
        self.open(number)
        return number

    def _write(self, number, record, variables, *, host):
        """Save the variables aside, then publish the entry by its record."""
        final, token, published = self.path / _entry(number), hosts.token(), []
        bucket = in_bucket(self.path)
        aside = self.path / f".adding-{_entry(number)}-{token}"
        if bucket:
            aside = final / f"variables-{token}"
        folder = aside if bucket else aside / "variables"

        def prepare():
            self.path.mkdir(parents=True, exist_ok=True)
            if not bucket:
                aside.mkdir()
                (aside / "writer.json").write_text(json.dumps(_this_writer()))

        def publish():
            files = {
                str(p.relative_to(folder.parent)): {"bytes": p.stat().length, "sha256": sha256(p)}
                for p in walk(folder)
            }
            text = encode(number, record, host, files=files)
            if bucket:
                if not create(final / "record.json", text.encode()):
                    raise _Taken
            else:
                (aside / "record.json").write_text(text)
                (aside / "writer.json").unlink()
                aside.rename(final)  # refuses an entry that appeared meanwhile: it is not empty
            published.append(number)

        try:
            hosts.on_first(prepare)
            tree = variables if hosts.is_distributed() else host  # each process writes a share
            with _ORBAX:
                ocp.save(folder, {k: v for k, v in tree.items() if v})
            hosts.on_first(publish)
        finally:
            if hosts.is_first() and not published:
                _remove(aside)

    def sweep(self) -> None:
        """Remove what killed writers left: folders whose writer has ended, or a day old."""
        if in_bucket(self.path) or not self.path.is_dir():
            return
        for aside in self.path.iterdir():
            if _ASIDE.fullmatch(aside.name) and _is_abandoned(aside):
                _remove(aside)

    def record(self, number: int) -> Record:
        """Read a version's description, without its variables.

        Args:
          number: of the version; negative counts from the end.

        Raises:
          NoSuchVersion, CorruptEntry: see `open`.
        """
        return self._read(self._number(number))[0]

    def digest(self, number: int) -> str:
        """Read the SHA-256 of a version's variables from its record; the variables are not read.

        Args:
          number: of the version; negative counts from the end.

        Raises:
          NoSuchVersion, CorruptEntry: see `open`.
        """
        return self._read(self._number(number))[1]["variables_sha256"]

    def open(self, number: int) -> Version:
        """Open a version with its variables, after checking every byte.

        Args:
          number: of the version; negative counts from the end.

        Raises:
          NoSuchVersion: there is none of this number.
          CorruptEntry: missing, truncated or altered files, or a format that this release cannot
            read.
          UserError: the backbone is not registered and was not handed in.
        """
        number = self._number(number)
        record, content = self._read(number)
        folder = self.path / _entry(number)
        try:
            self._check_register(number, record)
            check_files(folder, content["files"])
            template = targets(content["variables"])
            saved = folder / variables_folder(content["files"])
            with _ORBAX:
                check_stored(saved, template)
                variables = ocp.load(saved, template)
            variables = {k: variables.get(k, {}) for k in ("params", "batch_stats")}
            if variables_sha256(variables) != content["variables_sha256"]:
                raise UserError("the variables differ from those that were added (SHA-256)")
        except UserError as error:
            raise CorruptEntry(f"{self._name(number)}: {error}") from error
        except Exception as error:  # many kinds: Orbax, TensorStore, a forged list
            raise CorruptEntry(f"{self._name(number)}: {first_line(error)}") from error
        if content["format"] == 1:
            variables["params"] = renamed_layers(variables["params"], FORMAT_1_LAYERS)
        digest = content["variables_sha256"]
        backbone = self._backbone(number, record)
        return Version(number, record, variables, sha256=digest, backbone=backbone, home=self.path)

    def verify(self) -> dict[int, str | None]:
        """Open every version: {number: None if it is whole, else the reason why it is not}."""
        return {number: self._problem(number) for number in self.require().numbers()}

    def _number(self, number):
        numbers = self.require().numbers()
        known = number in numbers if number >= 0 else -number <= len(numbers)
        if not known:
            raise NoSuchVersion(f"no version {number} in {self.path}: it has {_named(numbers)}")
        return number if number >= 0 else numbers[number]

    def _backbone(self, number, record) -> Backbone:
        try:
            return recorded_backbone(record.backbone, record.backbone_arguments, self.backbone)
        except UserError as error:
            raise UserError(f"{self._name(number)}: {error}") from error

    def _has(self, number):
        entry = self.path / _entry(number)
        return (entry / "record.json" if in_bucket(entry) else entry).exists()

    def _problem(self, number):
        try:
            self.open(number)
        except UserError as error:
            return str(error)
        return None

    def _name(self, number):
        return f"version {number} of {self.path} cannot be used"

    def _taken(self, number):
        return UserError(
            f"version {number} of {self.path} was added by another program; nothing was "
            "overwritten: run one program per chain, or start again to go on from that version"
        )

    def _check_fits(self, record, first):
        before = self.record(first)
        if before.num_prototypes != record.num_prototypes:
            raise UserError(
                f"num_prototypes {record.num_prototypes} differs from the chain's "
                f"{before.num_prototypes} ({self.path}): all versions share one simplex; "
                f"use num_prototypes={before.num_prototypes} or another folder",
                "num_prototypes",
            )

    def _check_register(self, number, record):
        """Refuse a version in which a class of the version before has another prototype."""
        if not number or record.task is None or not record.class_names:
            return
        try:
            before = self.record(number - 1)
        except UserError:  # none, or damaged, which is its own reader's to hear
            return
        same_head = before.head.is_fixed == record.head.is_fixed
        if before.task is None or not same_head or before.label_order != record.label_order:
            return
        Register.of(record).check_continues(Register.of(before))

    def _read(self, number) -> tuple[Record, dict[str, Any]]:
        path = self.path / _entry(number) / "record.json"
        try:
            return decode(read_text(path, MAX_RECORD_BYTES), number)
        except UserError as error:
            raise CorruptEntry(f"{self._name(number)}: {error}") from error
        except Exception as error:  # whatever a forged record may raise
            raise CorruptEntry(
                f"{self._name(number)}: record.json is missing or broken ({first_line(error)})"
            ) from error


class NoSuchVersion(UserError):
    """A number that the chain does not have."""


class _Taken(Exception):
    """Another writer published this number first."""


def _entry(number):
    return f"{number:04d}"


def _this_writer():
    return {"host": socket.gethostname(), "pid": os.getpid()}


def _is_abandoned(aside):
    """Return whether a folder's writer has ended: known on its own host, else assumed after a day."""
    try:
        writer = json.loads(read_text(aside / "writer.json", 4096))
        if writer["host"] == socket.gethostname():
            os.kill(int(writer["pid"]), 0)
    except ProcessLookupError:
        return True
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        pass  # of another user, or the writer was killed before it said who it is
    return time.time() - aside.stat().mtime > _ABANDONED_SECONDS


def _remove(folder):
    try:
        if folder.exists():
            folder.rmtree()
    except OSError:
        pass  # a read-only file system; readers pass over it


def _named(numbers):
    contiguous = numbers[-1] - numbers[0] + 1 == len(numbers)
    if contiguous and len(numbers) > 1:
        return f"{numbers[0]}..{numbers[-1]}"
    return ", ".join(map(str, numbers))
