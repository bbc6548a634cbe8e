"""The folder of a run: its identity, its chain, its saved state, its log."""

import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from compat_jax import hosts
from compat_jax.chain import Chain
from compat_jax.data.dataset import Dataset
from compat_jax.errors import UserError
from compat_jax.files import append, in_bucket, storage, write_bytes, write_json
from compat_jax.models import GivenBackbone
from compat_jax.training.checkpoint import Checkpointer
from compat_jax.training.run import Run


class Workdir:
    """The folder of a run: `run.json`, `chain/`, `progress/`, `log.jsonl`.

    Args:
      path: of the folder (local or gs://); made when the run claims it.
      backbone: the user's own, see `Chain`.
    """

    def __init__(self, path: str | os.PathLike[str], backbone: GivenBackbone | None = None):
        self.path = storage(path)
        self.chain = Chain(self.path / "chain", backbone)
        self.checkpointer = Checkpointer(self.path / "progress")
        self.log = Log(self.path / "log.jsonl")

    def check_writable(self) -> None:
        """Refuse a local folder that cannot be made or written to, without making it.

        Raises:
          UserError: something that is no folder is in the way, or permission is missing.
        """
        if in_bucket(self.path):
            return
        folder = self.path
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        if not folder.is_dir():
            raise UserError(f"cannot write to {self.path}: {folder} is no folder", "workdir")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise UserError(f"cannot write to {self.path}: no permission in {folder}", "workdir")

    def claim(self, identity: Mapping[str, Any]) -> None:
        """Write the run's identity into the folder, or check it against what is there.

        Also removes what killed writers left in the chain.

        Args:
          identity: JSON values that decide what the run computes.

        Raises:
          UserError: the folder belongs to another run (the differing values are named), or cannot be
            written to.
        """
        hosts.on_first(lambda: self._claim(identity))

    def _claim(self, identity):
        path = self.path / "run.json"
        mine = json.loads(json.dumps(identity))
        if path.exists():
            try:
                theirs = dict(json.loads(path.read_text()))
            except (OSError, TypeError, ValueError) as error:
                raise UserError(f"{path} is damaged: use another workdir", "workdir") from error
            if "data_fingerprint" in theirs:
                raise UserError(
                    f"{self.path} was begun with release 0.1: finish it there, or use another workdir",
                    "workdir",
                )
            differing = sorted(_differences(theirs, mine))
            if differing:
                raise UserError(
                    f"{self.path} belongs to a run with other settings: {'; '.join(differing[:6])}. "
                    "Give them as they were to go on with it, or use another workdir",
                    "workdir",
                )
            self.chain.sweep()
            return
        if self.chain.path.exists():
            raise UserError(
                f"{self.path} has a chain but no run.json: use another workdir", "workdir"
            )
        try:
            write_json(path, mine)
        except OSError as error:
            raise UserError(
                f"cannot write to {self.path}: {error.strerror or error}", "workdir"
            ) from error


def data_identity(data: Dataset) -> dict[str, Any]:
    """Return the JSON values by which a run knows its data again."""
    return {"images": len(data), "classes": data.num_classes, "sha256": data.fingerprint()}


class Log:
    """A file of one JSON line per epoch; what is logged belongs to what is saved.

    Args:
      path: of the file.
    """

    def __init__(self, path: epath.Path):
        self.path = path

    def add(self, line: Mapping[str, Any]) -> None:
        """Append a line; on the first host only."""
        if hosts.is_first():
            append(self.path, json.dumps(line, allow_nan=False))

    def rewind(self, task: int, step: int) -> None:
        """Drop the lines of steps that will be done again, and of lines cut off in the middle.

        Args:
          task: at which the run resumes.
          step: of the task at which it resumes.
        """
        hosts.on_first(lambda: self._rewind(task, step))

    def _rewind(self, task, step):
        if not self.path.exists():
            return
        text = self.path.read_text()
        kept = [
            line for line, entry in _entries(text) if entry["task"] != task or entry["step"] <= step
        ]
        content = "".join(f"{line}\n" for line in kept)
        if content != text:
            write_bytes(self.path, content.encode())


def recorded_settings(run: Run, config: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the settings that every record of a run gets: `config`, or the run's own.

    Raises:
      UserError: values that JSON cannot hold.
    """
    try:
        return json.loads(json.dumps(dict(config or run.describe()), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise UserError(f"config must be JSON values, finite ones: {error}", "config") from error


def _entries(text) -> Iterator[tuple[str, dict[str, Any]]]:
    for line in text.splitlines():
        try:
            entry = json.loads(line)
            position = (entry["task"], entry["step"])
        except (KeyError, TypeError, ValueError):
            continue
        if all(isinstance(n, int) for n in position):
            yield line, entry


def _differences(theirs, mine, prefix=""):
    for key in {*theirs, *mine}:
        a, b = theirs.get(key), mine.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            yield from _differences(a, b, f"{prefix}{key}.")
        elif a != b:
            yield f"{prefix}{key} was {a}, now {b}"
