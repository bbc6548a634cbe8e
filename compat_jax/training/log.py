"""The log of a run: JSON lines, which belong to the saved states, and TensorBoard's files."""

import datetime
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from etils import epath

from compat_jax import hosts
from compat_jax.errors import UserError
from compat_jax.files import absolute, append, write_bytes


class Log:
    """A file of JSON lines; what is logged belongs to what is saved.

    Each line begins with `task`, `step` (steps of the task done), `epoch` (from 0, of the last of these
    steps) and `time` (ISO 8601, UTC).

    Args:
      path: of the file.
    """

    def __init__(self, path: epath.Path):
        self.path = path

    def add(self, task: int, step: int, epoch: int, values: Mapping[str, Any]) -> None:
        """Append a line; on the first host only.

        Args:
          task: number of the task.
          step: steps of the task done.
          epoch: of the last of them.
          values: JSON values behind these and the time.
        """
        if hosts.is_first():
            now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
            line = {"task": task, "step": step, "epoch": epoch, "time": now, **values}
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


def _entries(text) -> Iterator[tuple[str, dict[str, Any]]]:
    for line in text.splitlines():
        try:
            entry = json.loads(line)
            position = (entry["task"], entry["step"])
        except (KeyError, TypeError, ValueError):
            continue
        if all(isinstance(n, int) for n in position):
            yield line, entry


class Board:
    """TensorBoard's event files, a folder for each task; does nothing without a folder.

    Args:
      folder: local or gs://; None for none.

    Raises:
      UserError: tensorboardX is not installed.
    """

    def __init__(self, folder: str | os.PathLike[str] | None):
        self.folder = None if folder is None or not hosts.is_first() else absolute(folder)
        self._writer: Any = None
        if folder is not None:
            try:
                import tensorboardX  # noqa: F401
            except ImportError as error:
                raise UserError(
                    "TensorBoard's files need tensorboardX, which is not installed: pip install "
                    "tensorboardX (or this package with its extra tensorboard)",
                    "tensorboard",
                ) from error

    @property
    def is_on(self) -> bool:
        """Return whether anything is written."""
        return self.folder is not None

    def begin(self, label: str, step: int) -> None:
        """Begin the files of a task.

        Args:
          label: of the task.
          step: from which it goes on; later values of a run that was killed are hidden.
        """
        if self.folder is not None:
            from tensorboardX import SummaryWriter

            name = str(self.folder / label.replace(" ", ""))
            self._writer = SummaryWriter(name, purge_step=step + 1)

    def add(self, step: int, values: Mapping[str, Any], group: str = "") -> None:
        """Write scalars.

        Args:
          step: of the task.
          values: {name: number or None, or a mapping of these}; None is left out.
          group: put before the names.
        """
        if self._writer is None:
            return
        for name, value in values.items():
            if isinstance(value, Mapping):
                self.add(step, value, f"{group}{name}/")
            elif value is not None:
                self._writer.add_scalar(f"{group}{name}", value, step)
        self._writer.flush()

    def show(self, step: int, images: np.ndarray) -> None:
        """Write pictures, uint8[n, h, w, c]."""
        if self._writer is not None:
            self._writer.add_images("batch", images, step, dataformats="NHWC")

    def close(self) -> None:
        """Close the files of the task."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
