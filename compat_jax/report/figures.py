"""Pictures of a report: backfill, flips, drift, training."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from compat_jax.report import style
from compat_jax.report.findings import Findings

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_BARS = 24  # classes in a picture; the table has all of them


def backfill_curves(chains: Sequence[Findings], order: str = "random") -> "Figure":
    """Draw retrieval against the share of the oldest gallery that was embedded again.

    Args:
      chains: colours go by their place, also of those without a backfill.
      order: of the backfill.
    """
    drawn = style.figure((style.WIDTH, 4.1))
    axis = drawn.subplots()
    entries, most = {}, 0.0
    for number, chain in enumerate(chains):
        look = style.line(number)
        for curve in chain.backfills:
            most = max(most, 100 * curve.values.max())
            if curve.order == order:
                axis.plot(100 * curve.shares, 100 * curve.values, **look)
                entries[chain.name] = look
    sizes = {chain.gallery_size for chain in chains}
    images = f" of {sizes.pop():,} images" if len(sizes) == 1 else " of the gallery"
    axis.set_xlabel(f"embedded again, %{images}")
    axis.set_ylabel(style.plain(chains[0].main.unit))
    axis.set_ylim(0, 1.05 * most)
    axis.set_title(f"order: {style.plain(order)}", fontsize=11, loc="left")
    style.tidy(axis, grid="y")
    style.legend(drawn, entries)
    return drawn


def reach_of_flips(chains: Sequence[Findings]) -> tuple[float, float]:
    """Return the limits, per cent, between which the flips of all chains can be drawn."""
    rows = [row for chain in chains for row in class_flips(chain)]
    lost, gained = (max((row[key] for row in rows), default=0) for key in ("lost", "gained"))
    return -105 * max(lost, 0.01), 105 * max(gained, 0.01)


def flips_by_class(chain: Findings, reach: tuple[float, float] | None = None) -> "Figure":
    """Draw what each class's queries gain and lose in the oldest gallery by the newest version.

    Args:
      chain: with at least two versions whose features have one size.
      reach: limits of the axis, so that pictures side by side compare; those of the chain by default.
    """
    rows = class_flips(chain)
    if len(rows) > MAX_BARS:
        rows = rows[: MAX_BARS // 2] + rows[-MAX_BARS // 2 :]
    drawn = style.figure((style.WIDTH, 1.3 + 0.19 * len(rows)))
    axis = drawn.subplots()
    places = np.arange(len(rows))[::-1]
    gains, losses = (np.array([100 * row[key] for row in rows]) for key in ("gained", "lost"))
    edge: dict[str, Any] = {"edgecolor": "white", "lw": 0}
    axis.barh(places, gains, color=style.GOOD, label="now right", height=0.74)
    axis.barh(places, -losses, color=style.BAD, label="now wrong", height=0.74, hatch="///", **edge)
    axis.axvline(0, color=style.INK, lw=0.8)
    names = [style.plain(str(row["class"])[:18]) for row in rows]
    axis.set_yticks(places, names, fontsize=9)
    axis.set_ylim(-0.6, len(rows) - 0.4)
    axis.set_xlim(reach or reach_of_flips([chain]))
    axis.xaxis.set_major_formatter(lambda value, _: f"{abs(value):g}")
    axis.set_xlabel("% of the class's queries that changed")
    axis.set_title(style.plain(chain.name), fontsize=11, loc="left")
    style.tidy(axis, grid="x")
    drawn.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return drawn


def class_flips(chain: Findings) -> list[dict[str, Any]]:
    """Return gains and losses of each class in the oldest gallery by the newest version, sorted.

    Returns:
      {"class", "queries", "gained", "lost", "net"} with shares in 0..1, the largest net gain first;
      [] for one version, unequal feature sizes, or an evaluation without scores.
    """
    result = chain.main
    if len(result.matrix) < 2 or not result.scores or result.labels is None:
        return []
    flips = result.flips_by_class()
    gained, lost = (part[-1, 0] for part in flips)
    counts = np.bincount(result.labels, minlength=len(gained))
    names = dict(enumerate(result.class_names))
    rows: list[dict[str, Any]] = [
        {
            "class": names.get(int(c), str(c)),
            "queries": int(counts[c]),
            "gained": float(gained[c]),
            "lost": float(lost[c]),
            "net": float(gained[c] - lost[c]),
        }
        for c in np.flatnonzero(~np.isnan(gained))
    ]
    return sorted(rows, key=lambda row: -row["net"])


def turns_since_first(chains: Sequence[Findings]) -> "Figure":
    """Draw the angle of the class means to those of the first version: of their class, of others.

    Args:
      chains: colours go by their place.
    """
    drawn = style.figure((style.WIDTH, 4.3))
    axis = drawn.subplots()
    entries: dict[str, dict[str, Any]] = {}
    for number, chain in enumerate(chains):
        look = style.line(number)
        steps = np.arange(len(chain.turns))
        axis.plot(steps, chain.turns[:, 0], **look)
        axis.plot(steps, chain.others, **{**look, "ls": ":", "mfc": "white"})
        axis.fill_between(steps, chain.turns[:, 0], chain.others, color=look["color"], alpha=0.08)
        entries[chain.name] = look
    entries["to its own class"] = {"color": style.MUTED, "ls": "-"}
    entries["to other classes"] = {"color": style.MUTED, "ls": ":"}
    _finish_turns(axis, chains, "angle to the first version's means, °")
    style.legend(drawn, entries)
    return drawn


def turns_since_before(chains: Sequence[Findings]) -> "Figure":
    """Draw how far the class means have turned since the version before.

    Args:
      chains: colours go by their place.
    """
    drawn = style.figure((style.WIDTH, 4.3))
    axis = drawn.subplots()
    entries = {}
    for number, chain in enumerate(chains):
        count = len(chain.turns)
        before = [chain.turns[t, t - 1] for t in range(1, count)]
        axis.plot(np.arange(1, count), before, **style.line(number))
        entries[chain.name] = style.line(number)
    _finish_turns(axis, chains, "turn since the version before, °")
    style.legend(drawn, entries)
    return drawn


def _finish_turns(axis, chains, label):
    style.version_axis(axis, max((chain.main.tasks for chain in chains), key=len))
    axis.set_ylim(bottom=0)
    axis.set_xlabel("version")
    axis.set_ylabel(label)
    style.tidy(axis, grid="y")


VALIDATED = ("validation accuracy", "validation recall@1", "validation cross")
_UNITS = {"loss": ("loss", 1), "accuracy": ("training accuracy, %", 100)}


def figure_of(line: Mapping[str, Any], key: str) -> float | None:
    """Return a figure of a line of the log, None where the line has none.

    Args:
      line: of the log.
      key: "loss", "accuracy", or one of `VALIDATED`.
    """
    owner: Any = line
    name = key
    if key in VALIDATED:
        owner, name = line.get("validation"), key.removeprefix("validation ")
    value = owner.get(name) if isinstance(owner, Mapping) else None
    return value if is_number(value) else None


def is_validation(line: Mapping[str, Any]) -> bool:
    """Return whether a line of the log has a validation's figure."""
    return any(figure_of(line, key) is not None for key in VALIDATED)


def training_curves(chains: Sequence[Findings], key: str = "loss") -> "Figure":
    """Draw a figure of the training log against the steps of the whole run.

    Args:
      chains: colours go by their place, also of those without a log.
      key: "loss", "accuracy", or one of `VALIDATED`.
    """
    label, factor = _UNITS.get(key, (f"{key}, %", 100))
    drawn = style.figure((style.WIDTH, 3.9))
    axis = drawn.subplots()
    entries, borders, least = {}, set(), 0.0
    for number, chain in enumerate(chains):
        look = style.line(number)
        look |= {"ms": 4} if key in VALIDATED else {"marker": ""}
        for task, begin in task_starts(chain.log).items():
            lines = [line for line in chain.log if line["task"] == task]
            found = [(begin + line["step"], figure_of(line, key)) for line in lines]
            points = [(step, factor * value) for step, value in found if value is not None]
            if points:
                axis.plot(*zip(*points, strict=True), **look)
                entries[chain.name] = look
                borders.add(begin)
                least = min(least, *(value for _, value in points))
    for begin in borders - {0}:
        axis.axvline(begin, color=style.PALE, lw=1, zorder=0)
    if least >= 0:  # a contrast without its positive pair in the denominator falls below
        axis.set_ylim(bottom=0)
    axis.set_ylabel(label)
    axis.set_xlabel("step (grey lines: a new task)")
    style.tidy(axis)
    style.legend(drawn, entries)
    return drawn


def task_starts(log: Sequence[Mapping[str, Any]]) -> dict[int, int]:
    """Return the number of steps before each task of a log, by task."""
    lengths: dict[int, int] = {}
    for line in log:
        lengths[line["task"]] = max(lengths.get(line["task"], 0), line["step"])
    starts, total = {}, 0
    for task in sorted(lengths):
        starts[task] = total
        total += lengths[task]
    return starts


def is_number(value: Any) -> bool:
    """Return whether a value of a log can be drawn."""
    return isinstance(value, int | float) and bool(np.isfinite(value))
