"""The pictures of a version, and the note of what was begun: a stopped call goes on with the same."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from etils import epath

from compat_jax.data.ledger import Ledger, Row
from compat_jax.data.ledger_files import is_there
from compat_jax.errors import UserError
from compat_jax.files import write_json

_FILE = "begun.json"  # in the folder of a run


@dataclasses.dataclass(frozen=True)
class Lesson:
    """Pictures of a version.

    Attributes:
      rows: of the ledger, new ones first.
      num_new: how many are new.
    """

    rows: list[Row]
    num_new: int


@dataclasses.dataclass(frozen=True)
class Begun:
    """A version that is being trained: the pictures and classes that it learns, and its start.

    Attributes:
      version: its number.
      start: what it starts from, as JSON values.
      new: digests of its new pictures, in order.
      old: digests of the pictures that it rehearses, in order.
    """

    version: int
    start: Mapping[str, Any]
    new: list[str]
    old: list[str]

    @classmethod
    def of(cls, version: int, start: Mapping[str, Any], lesson: Lesson) -> "Begun":
        """Describe a lesson."""
        digests = [row.digest for row in lesson.rows]
        return cls(version, dict(start), digests[: lesson.num_new], digests[lesson.num_new :])

    @classmethod
    def read(cls, folder: epath.Path, version: int) -> "Begun | None":
        """Read what was begun of a version; None where nothing says so.

        Raises:
          UserError: the file is damaged.
        """
        path = folder / _FILE
        if not path.exists():
            return None
        try:
            found = cls(**json.loads(path.read_text()))
        except (OSError, TypeError, ValueError) as error:
            raise UserError(
                f"{path} is damaged: remove it, and {folder / 'progress'}; the version begins again",
                "workdir",
            ) from error
        return found if found.version == version else None

    def write(self, folder: epath.Path) -> None:
        """Write it into the folder of a run."""
        write_json(folder / _FILE, dataclasses.asdict(self))

    @staticmethod
    def remove(folder: epath.Path) -> None:
        """Remove it from the folder of a run, whose version is done."""
        (folder / _FILE).unlink(missing_ok=True)

    def check(self, start: Mapping[str, Any], folder: epath.Path) -> None:
        """Refuse another start than the one it was begun with.

        Raises:
          UserError: naming both.
        """
        if json.loads(json.dumps(start)) != self.start:
            raise UserError(
                f"version {self.version} is being trained from {_said(self.start)}, now from "
                f"{_said(start)}: give it as it was to go on with it, or remove "
                f"{folder / 'progress'} to begin that version again",
                "start",
            )

    def lesson(self, ledger: Ledger) -> Lesson:
        """Find its pictures again.

        Raises:
          UserError: some are gone.
        """
        rows = [ledger.rows.get(digest) for digest in self.new + self.old]
        lost = [row for row in rows if row is None or not is_there(row.path)]
        if lost:
            known = [row.path or row.label for row in lost if row is not None]
            such = f", such as {known[0]}" if known else ""
            raise UserError(
                f"{len(lost)} pictures that version {self.version} is learning vanished{such}: put them "
                "back",
                "path",
            )
        return Lesson([row for row in rows if row is not None], len(self.new))


def _said(start: Mapping[str, Any]) -> str:
    """A start in words."""
    backbone = start["backbone"]["name"]
    if start["weights"] is None:
        return f"{backbone} with fresh weights"
    return f"{backbone} with the weights {start['weights'][:12]}"
