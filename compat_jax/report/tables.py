"""Tables of a report: one description for the page and for CSV."""

import csv
import dataclasses
import html
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from compat_jax import compatibility
from compat_jax.matrix import Evaluation, across_replacements
from compat_jax.report.figures import (
    VALIDATED,
    class_flips,
    figure_of,
    is_validation,
    task_starts,
)
from compat_jax.report.findings import Findings

_NOTHING = float("nan")
_LONG = 40  # characters of a text that is broken into lines
Show = Callable[[Any], str]


def _shown(pattern: str, factor: float = 1) -> Show:
    def show(value):
        missing = value is None or (isinstance(value, float) and math.isnan(value))
        return "–" if missing else pattern.format(factor * value).replace("-", "−")

    return show


percent, degrees, count = _shown("{:.1f}", 100), _shown("{:.1f}"), _shown("{:,}")
signed, share, small = _shown("{:+.1f}", 100), _shown("{:.2f}"), _shown("{:.3g}")
seconds = _shown("{:,.1f}")


class Column(NamedTuple):
    """A column of a table.

    Attributes:
      name: its heading.
      show: how a number is written; None for text.
    """

    name: str
    show: Show | None = None


@dataclasses.dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
      columns: of the table.
      rows: a value a column; numbers unrounded.
      strong: numbers of rows that stand out.

    Raises:
      ValueError: a row has another number of values than there are columns.
    """

    columns: tuple[Column, ...]
    rows: Sequence[Sequence[Any]]
    strong: frozenset[int] = frozenset()

    def __post_init__(self):
        for number, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                raise ValueError(f"row {number}: {len(row)} values, {len(self.columns)} columns")

    def without(self, name: str) -> "Table":
        """Leave a column out."""
        kept = [n for n, column in enumerate(self.columns) if column.name != name]
        rows = [tuple(row[n] for n in kept) for row in self.rows]
        return Table(tuple(self.columns[n] for n in kept), rows, self.strong)

    def csv(self) -> str:
        """Write it as CSV: shares in 0..1, headings without a unit, empty where there is no number."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(map(_plain_heading, self.columns))
        for row in self.rows:
            missing = [isinstance(value, float) and math.isnan(value) for value in row]
            writer.writerow(
                ["" if gone else value for value, gone in zip(row, missing, strict=True)]
            )
        return text.getvalue()

    def html(self) -> str:
        """Write it as HTML, numbers to the right."""
        lines = ['<div class="scroll"><table><thead><tr>']
        kinds = ["" if column.show is None else ' class="n"' for column in self.columns]
        for column, kind in zip(self.columns, kinds, strict=True):
            name = html.escape(column.name).replace(", ", ",&nbsp;")
            lines.append(f'<th scope="col"{kind}>{name}</th>')
        lines.append("</tr></thead><tbody>")
        for number, row in enumerate(self.rows):
            lines.append('<tr class="strong">' if number in self.strong else "<tr>")
            for value, column, kind in zip(row, self.columns, kinds, strict=True):
                is_text = column.show is None or isinstance(value, str)
                text = str(value) if is_text else column.show(value)  # type: ignore[misc]
                kind = kind or (' class="long"' if len(text) > _LONG else "")
                lines.append(f"<td{kind}>{html.escape(text)}</td>")
            lines.append("</tr>")
        return "".join([*lines, "</tbody></table></div>"])


def _plain_heading(column: Column) -> str:
    """A column's name without the unit in which the page, but not CSV, shows shares."""
    if column.show is None:  # what users named
        return column.name
    for unit in (", % of images", ", %", ", points"):
        if column.name.endswith(unit):
            return column.name.removesuffix(unit)
    return column.name


def averages(chains: Sequence[Findings]) -> Table:
    """AC and AA of each metric, the largest AA first."""
    columns = (
        Column("chain"),
        Column("metric"),
        Column("AA, %", percent),
        Column("AA from", percent),
        Column("AA to", percent),
        Column("AC", share),
        Column("AC from", share),
        Column("AC to", share),
        Column("within noise", count),
        Column("of pairs", count),
        Column("across replacements, %", percent),
        Column("BC, points", signed),
        Column("FC, points", signed),
        Column("versions", count),
    )
    rows = []
    metrics = list(dict.fromkeys(name for chain in chains for name in chain.evaluations))
    for metric in metrics:
        found = [(c.name, c.evaluations[metric]) for c in chains if metric in c.evaluations]
        for name, result in sorted(found, key=lambda pair: -pair[1].average_accuracy):
            rows.append(
                (name, metric, *_accuracy(result), *_compatibility(result), len(result.tasks))
            )
    return Table(columns, rows)


def _accuracy(result: Evaluation):
    ends = (_NOTHING,) * 2 if result.intervals is None else result.intervals.average_accuracy
    return (result.average_accuracy, *map(float, ends))


def _compatibility(result: Evaluation):
    """AC and what it rests on; no numbers for one version, which has no pair."""
    pairs = len(result.matrix) * (len(result.matrix) - 1) // 2
    if not pairs:
        return (*(_NOTHING,) * 4, 0, *(_NOTHING,) * 3)
    crossed = across_replacements(result.matrix, result.replaced)
    doubt = (_NOTHING,) * 3
    if result.intervals is not None:
        doubt = (*result.intervals.average_compatibility, int(result.within_noise.sum()))
    return (
        result.average_compatibility,
        *doubt,
        pairs,
        float(crossed.mean()) if len(crossed) else _NOTHING,
        compatibility.backward_compatibility(result.matrix),
        compatibility.forward_compatibility(result.matrix),
    )


def matrix(result: Evaluation) -> Table:
    """A matrix: rows = query version, columns = gallery version; "*" marks a replaced model."""
    columns = [Column("query \\ gallery", count)]
    columns += [Column(task, percent) for task in result.tasks]
    rows = []
    for t, row in enumerate(result.matrix):
        star = "*" if result.replaced[t] else ""
        cells = [float(row[k]) if k <= t else "" for k in range(len(row))]
        rows.append((result.tasks[t] + star, *cells))
    return Table(tuple(columns), rows)


def backfills(chains: Sequence[Findings]) -> Table:
    """List cost and gain of embedding the oldest gallery again, the largest area first."""
    columns = (
        Column("chain"),
        Column("order"),
        Column("before, %", percent),
        Column("after, %", percent),
        Column("mean on the way, %", percent),
        Column("99 % first reached at, % of images", percent),
        Column("images embedded", count),
    )
    found = [(chain, curve) for chain in chains for curve in chain.backfills]
    rows = []
    for chain, curve in sorted(found, key=lambda pair: -pair[1].area):
        reached = curve.reached(0.99)
        ends = float(curve.values[0]), float(curve.values[-1])
        images = round(reached * chain.gallery_size)
        rows.append((chain.name, curve.order, *ends, curve.area, reached, images))
    return Table(columns, rows)


def backfill_points(chains: Sequence[Findings]) -> Table:
    """Every point of every backfill curve."""
    names = ("chain", "order", "share", "value", "answered by new features")
    rows = [
        (chain.name, curve.order, *map(float, point))
        for chain in chains
        for curve in chain.backfills
        for point in zip(curve.shares, curve.values, curve.new_answers, strict=True)
    ]
    return Table(tuple(map(Column, names)), rows)


def updates(chains: Sequence[Findings]) -> Table:
    """The newest version's queries in each older gallery: gains, losses, and their difference."""
    columns = (
        Column("chain"),
        Column("gallery of version", count),
        Column("old queries, %", percent),
        Column("new queries, %", percent),
        Column("now right, %", percent),
        Column("now wrong, %", percent),
        Column("difference, points", signed),
        Column("verdict"),
    )
    rows = []
    for chain in chains:
        result = chain.main
        if result.flips is None:
            continue
        for k in range(len(result.matrix) - 1):
            old, new = float(result.matrix[k, k]), float(result.matrix[-1, k])
            flips = (float(part[-1, k]) for part in result.flips)
            verdict = verdict_of(result, len(result.matrix) - 1, k)
            rows.append((chain.name, result.tasks[k], old, new, *flips, new - old, verdict))
    return Table(columns, rows)


def verdict_of(result: Evaluation, t: int, k: int) -> str:
    """Say whether version t is compatible with version k < t."""
    if (t, k) in result.incomparable:
        return "other feature size"
    if result.within_noise[t, k]:
        return "within noise"
    return "compatible" if result.matrix[t, k] > result.matrix[k, k] else "not compatible"


def classes(chain: Findings) -> Table:
    """Gains and losses of every class, the largest net gain first."""
    columns = (
        Column("class"),
        Column("queries", count),
        Column("now right, %", percent),
        Column("now wrong, %", percent),
        Column("difference, points", signed),
    )
    return Table(columns, [tuple(row.values()) for row in class_flips(chain)])


def geometry(chains: Sequence[Findings]) -> Table:
    """Drift and angles of every version."""
    columns = (
        Column("chain"),
        Column("version", count),
        Column("to the first version, °", degrees),
        Column("to its other classes, °", degrees),
        Column("to the version before, °", degrees),
        Column("between class means, °", degrees),
        Column("to the prototypes, °", degrees),
        Column("scatter within classes (NC1)", small),
        Column("distance from a simplex (NC2)", small),
    )
    rows = []
    for chain in chains:
        for t, place in enumerate(chain.geometry):
            since, before = (float(chain.turns[t, k]) if t else _NOTHING for k in (0, t - 1))
            turned = (since, float(chain.others[t]), before)
            found = place.collapse
            nc = (found.angle, found.within_class, found.maximal_angles) if found else (None,) * 3
            angle, within, distance = nc
            task = chain.main.tasks[t]
            rows.append((chain.name, task, *turned, angle, place.prototype_angle, within, distance))
    return Table(columns, rows)


def training(chains: Sequence[Findings]) -> Table:
    """Steps and last figures of every chain's log."""
    columns = (
        Column("chain"),
        Column("tasks logged", count),
        Column("steps", count),
        Column("last loss", share),
        Column("last training accuracy, %", percent),
    )
    rows = []
    for chain in chains:
        lines = [line for line in chain.log if "loss" in line]
        if lines:
            last, starts = lines[-1], task_starts(chain.log)
            steps = starts[last["task"]] + last["step"]
            figures = (last.get("loss", _NOTHING), last.get("accuracy", _NOTHING))
            rows.append((chain.name, len(starts), steps, *figures))
    return Table(columns, rows)


def validation(chains: Sequence[Findings]) -> Table:
    """The last validation of every task."""
    columns = (
        Column("chain"),
        Column("task", count),
        Column("step", count),
        *(Column(f"{name}, %", percent) for name in VALIDATED),
    )
    rows = []
    for chain in chains:
        lines = {line["task"]: line for line in chain.log if is_validation(line)}
        for task, line in sorted(lines.items()):
            found = [figure_of(line, name) for name in VALIDATED]
            numbers = (_NOTHING if value is None else value for value in found)
            rows.append((chain.name, task, line["step"], *numbers))
    return Table(columns, rows)


def versions(chains: Sequence[Findings]) -> Table:
    """Where each version comes from."""
    columns = (
        Column("chain"),
        Column("version", count),
        Column("task", count),
        Column("started from"),
        Column("classes", count),
        Column("backbone"),
        Column("feature size", count),
        Column("seed", count),
        Column("SHA-256 of the weights"),
    )
    rows = []
    for chain in chains:
        parts = zip(chain.numbers, chain.records, chain.sha256, strict=True)
        for number, record, digest in parts:
            start = record.replaced_by or (
                "random weights" if record.parent is None else f"version {record.parent}"
            )
            task = "–" if record.task is None else str(record.task)
            about = (record.classes_seen, record.backbone, record.feature_size, record.seed)
            rows.append((chain.name, number, task, start, *about, digest[:12]))
    return Table(columns, rows)


def settings(chains: Sequence[Findings]) -> Table:
    """The settings of each chain's newest version; those that differ come first and stand out."""
    flat = [_flat(chain.records[-1].config) for chain in chains]
    names = sorted({name for one in flat for name in one})
    values = {name: [one.get(name, "–") for one in flat] for name in names}
    differ = [name for name in names if len(set(values[name])) > 1]
    same = [name for name in names if name not in differ]
    columns = (Column("field"), *(Column(chain.name) for chain in chains))
    rows = [(name, *values[name]) for name in differ + same]
    return Table(columns, rows, frozenset(range(len(differ))))


def _flat(config: Mapping[str, Any], above: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{above}{name}.")
        else:
            written = value if isinstance(value, str) else json.dumps(value, default=str)
            found[above + name] = written
    return found


def scored_matrix_cells(result: Evaluation) -> Table:
    """Every cell with its interval and verdict, for CSV."""
    names = (
        "query version",
        "gallery version",
        "value",
        "low",
        "high",
        "difference",
        "difference low",
        "difference high",
        "verdict",
    )
    nothing = (float("nan"),) * 2
    rows = []
    for t, k in np.argwhere(np.tri(len(result.matrix), dtype=bool)).tolist():
        value, own = float(result.matrix[t, k]), float(result.matrix[k, k])
        cell, difference = nothing, nothing
        if result.intervals is not None:
            cell, difference = (
                (float(ends.low[t, k]), float(ends.high[t, k]))
                for ends in (result.intervals.cells, result.intervals.differences)
            )
        verdict = verdict_of(result, t, k) if k < t else "own gallery"
        place = (result.tasks[t], result.tasks[k])
        rows.append((*place, value, *cell, value - own, *difference, verdict))
    return Table(tuple(map(Column, names)), rows)
