"""A grid of runs: its cells, what came out of each, and a table of means and spreads."""

import dataclasses
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from compat_jax.errors import UserError
from compat_jax.files import append, first_line

_LONGEST = 100  # letters of a cell's folder


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of a grid.

    Attributes:
      values: {name: value as text}, in the order of the grid.
    """

    values: Mapping[str, str]

    @property
    def name(self) -> str:
        """Name of the cell's folder, e.g. "method=hoc,seed=0"; long ones end in a digest."""
        text = ",".join(f"{k}={v}" for k, v in self.values.items())
        plain = re.sub(r"[^\w=,.() -]", "_", text)
        if plain == text and len(text) <= _LONGEST:
            return text
        return f"{plain[:_LONGEST]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def grid(text: str) -> list[Cell]:
    """Return the cells of a grid, e.g. "method=hoc,er;seed=0,1,2": the last name varies fastest.

    Raises:
      UserError: no name, no value, or a name twice.
    """
    axes: dict[str, list[str]] = {}
    for part in filter(None, (p.strip() for p in text.split(";"))):
        name, equals, values = (p.strip() for p in part.partition("="))
        found = _values(values)
        if not (name and equals and found):
            raise UserError(f"a grid is NAME=VALUE,VALUE;NAME=..., got {part!r:.80}", "grid")
        if name in axes:
            raise UserError(f"{name!r} is twice in the grid", "grid")
        axes[name] = found
    if not axes:
        raise UserError("the grid is empty: for example method=hoc,er;seed=0,1,2", "grid")
    chosen = itertools.product(*axes.values())
    return [Cell(dict(zip(axes, values, strict=True))) for values in chosen]


def _values(text: str) -> list[str]:
    """Split at commas outside of brackets."""
    found, depth, start = [], 0, 0
    for place, letter in enumerate(text):
        depth += (letter in "([") - (letter in ")]")
        if letter == "," and not depth:
            found.append(text[start:place].strip())
            start = place + 1
    return [value for value in (*found, text[start:].strip()) if value]


class Results:
    """Results of the cells, a JSON line each, in a file that grows.

    Args:
      path: of the file.
    """

    def __init__(self, path: epath.Path):
        self.path = path

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if not self.path.exists():
            return
        for number, line in enumerate(self.path.read_text().splitlines()):
            try:
                entry = json.loads(line)
                yield {"cell": dict(entry["cell"]), "metrics": dict(entry["metrics"]), **entry}
            except (KeyError, TypeError, ValueError) as error:
                raise UserError(
                    f"line {number + 1} of {self.path} is broken ({first_line(error)}): remove it, and "
                    "the cell is evaluated again",
                    "workdir",
                ) from error

    def of(self, cell: Cell, settings: str = "") -> dict[str, Any]:
        """Return the numbers of a cell, of all its lines: the last line wins.

        Args:
          cell: of the grid.
          settings: digest of everything that the cell was made with, as `add` was given it.

        Raises:
          UserError: a line of the cell was made with other settings.
        """
        found: dict[str, Any] = {}
        for entry in self:
            if entry["cell"] != dict(cell.values):
                continue
            if entry.get("settings", settings) != settings:
                raise UserError(
                    f"{self.path.parent} has results of {cell.name} with another configuration: give "
                    "that configuration, or another folder",
                    "workdir",
                )
            found |= entry["metrics"]
        return found

    def add(self, cell: Cell, metrics: Mapping[str, Any], **more: Any) -> None:
        """Append a line of a cell."""
        line = {"cell": dict(cell.values), "metrics": dict(metrics), **more}
        append(self.path, json.dumps(line, allow_nan=False))


def table(entries: Iterable[Mapping[str, Any]], over: Sequence[str] = ("seed",)) -> str:
    """Return a table of mean ± standard deviation, a row for each combination of the other names.

    Names that have one value in all cells are left out.

    Args:
      entries: {"cell": values of a cell, "metrics": its numbers}, see `Results.of`.
      over: names to average over.

    Returns:
      Text, rows in the order of the grid; the deviation is that of the sample (n - 1).
    """
    entries = list(entries)
    seen = {name: {e["cell"].get(name) for e in entries} for e in entries for name in e["cell"]}
    names = [name for name, values in seen.items() if len(values) > 1 and name not in over]
    groups: dict[tuple[str, ...], list[Mapping[str, float]]] = {}
    for entry in entries:
        key = tuple(entry["cell"].get(name, "") for name in names)
        groups.setdefault(key, []).append(entry["metrics"])
    if not groups:
        return "no cell has a result yet"
    columns = list(dict.fromkeys(m for found in groups.values() for one in found for m in one))
    rows = [[*names, "runs", *columns]]
    for key, found in groups.items():
        rows.append([*key, str(len(found)), *(_spread(found, column) for column in columns)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    words = len(names)
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < words else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def _spread(found: Sequence[Mapping[str, float]], column: str) -> str:
    values = np.array([one[column] for one in found if one.get(column) is not None], float)
    if not len(values):
        return "-"
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{values.mean():.3f} ± {values.std(ddof=1):.3f}"
