"""Data sets that Hugging Face's `datasets` saved on disk; needs the `huggingface` extra."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compat_jax.errors import UserError, unknown

_SAVED = ("state.json", "dataset_dict.json")  # what `save_to_disk` writes beside the data


class SavedRecords:
    """Random access to the pictures of a saved data set, such as `streaming.RecordImages` reads.

    Attributes:
      labels: class name of every record; None without labels.
    """

    def __init__(self, table: Any, image: str, labels: list[str] | None):
        self._table, self._image, self.labels = table, image, labels

    def __len__(self) -> int:
        return len(self._table)

    def __getitems__(self, positions: Sequence[int]) -> list[dict[str, Any]]:
        """Return records {"image": bytes or path of a file}."""
        stored = self._table[list(positions)][self._image] if len(positions) else []
        return [{"image": one["bytes"] or one["path"]} for one in stored]

    def files(self) -> list[str] | None:
        """Return the paths of all pictures, or None if a picture is stored in the data set itself."""
        stored = self._table[:][self._image]
        return None if any(one["bytes"] for one in stored) else [one["path"] for one in stored]


def is_saved(path: str | os.PathLike) -> bool:
    """Return whether a folder was written by `save_to_disk`."""
    return any((Path(path) / name).is_file() for name in _SAVED)


def saved_splits(path: str | os.PathLike) -> tuple[str | None, ...]:
    """Return the splits of a saved data set; (None,) for one without.

    Raises:
      UserError: see `open_saved`.
    """
    found = _load(path)
    return tuple(found) if isinstance(found, dict) else (None,)


def open_saved(path: str | os.PathLike, split: str | None) -> SavedRecords:
    """Open the pictures of a saved data set.

    Args:
      path: of the folder that `save_to_disk` wrote.
      split: e.g. "train"; None for a data set without splits.

    Raises:
      UserError: `datasets` is not installed, it cannot read the folder, an unknown split, or no column
        of pictures.
    """
    found = _load(path)
    import datasets  # there, since it has loaded

    if isinstance(found, dict):
        if split not in found:
            raise unknown(f"split of {path}", str(split), found, "split")
        found = found[split]
    elif split is not None:
        raise UserError(f"{path} has no splits: leave split out", "split")
    if not len(found):
        raise UserError(f"{path} has no rows" + (f" in {split}" if split else ""), "path")
    images = [n for n, f in found.features.items() if isinstance(f, datasets.Image)]
    if not images:
        raise UserError(f"{path} has no column of pictures: its columns are {found.column_names}")
    labels = _labels(datasets, found)
    table = found.select_columns(images[:1]).cast_column(images[0], datasets.Image(decode=False))
    return SavedRecords(table, images[0], labels)


def _labels(datasets, found) -> list[str] | None:
    """Class names of the column "label", or of the first column of classes."""
    kinds = found.features
    classes = [n for n, f in kinds.items() if isinstance(f, datasets.ClassLabel)]
    name = next((n for n in ("label", *classes) if n in kinds), None)
    if name is None:
        return None
    values, names = list(found[name]), getattr(kinds[name], "names", None)
    bad = next((row for row, v in enumerate(values) if v is None or v == -1 or v == ""), None)
    if bad is not None:
        raise UserError(f"row {bad} has no label in column {name!r}: give one or remove the row")
    return [str(value) if names is None else names[value] for value in values]


def _load(path):
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"{path} is a data set of Hugging Face: run pip install 'compat_jax[huggingface]'"
        ) from error
    try:
        return datasets.load_from_disk(os.fspath(path))
    except Exception as error:  # it raises many kinds; the reason is passed on
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{path} cannot be opened by `datasets` ({reason})", "path") from error
