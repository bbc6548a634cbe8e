"""Ways of upgrading a gallery, side by side: pictures and tables."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from compat_jax import align
from compat_jax.afterwards import FORWARD, NAIVE, REINDEX, RESCORING, Comparison, Way
from compat_jax.report import style
from compat_jax.report.findings import Findings
from compat_jax.report.tables import Column, Table, count, percent, seconds, share

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TITLES = {
    NAIVE: "naive swap",
    "procrustes": "Procrustes",
    "ridge": "ridge",
    "low_rank": "low rank",
    "slerp": "SLERP",
    "adapter": "adapter",
    FORWARD: "rows mapped",
    RESCORING: "rescoring",
    REINDEX: "re-index",
}
_HALF = 0.5


def title(way: str) -> str:
    """Return the name of a way for readers."""
    return TITLES.get(way, way)


def measured(chains: Sequence[Findings]) -> list[tuple[Findings, Comparison]]:
    """Return the chains whose ways were measured."""
    return [(chain, chain.ways) for chain in chains if chain.ways is not None]


def left_out(chain: Findings) -> list[str]:
    """Say which ways of upgrading a chain were left out, a sentence each."""
    gone = {} if chain.ways is None else chain.ways.left_out
    return [f"{chain.name}: {title(way)} was left out: {reason}." for way, reason in gone.items()]


def curves(chain: Findings, metric: str, top: float | None = None) -> "Figure":
    """Draw a metric against the share of the gallery that was embedded again, a line a way.

    Args:
      chain: whose ways were measured.
      metric: its name.
      top: of the axis in per cent, so that pictures side by side compare; of the chain by default.
    """
    assert chain.ways is not None, chain.name
    drawn = style.figure((style.WIDTH, 4.5))
    axis = drawn.subplots()
    entries = {}
    for way in chain.ways.ways:
        if metric in way.curves:
            curve, look = way.curves[metric], _look(way.name)
            axis.plot(100 * curve.shares, 100 * curve.values, **look)
            entries[title(way.name)] = look
    axis.set_xlabel(f"embedded again, % of {chain.ways.gallery_size:,} images")
    _finish(axis, metric, top or reach([chain], metric))
    axis.set_title(style.plain(chain.name), fontsize=11, loc="left")
    style.legend(drawn, entries, columns=3)
    return drawn


def reach(chains: Sequence[Findings], metric: str) -> float:
    """Return the upper limit, per cent, up to which the curves of all chains can be drawn."""
    found = [
        way.curves[metric].values.max()
        for _, ways in measured(chains)
        for way in ways.ways
        if metric in way.curves
    ]
    return 105 * max(found, default=1.0)


def against_images(chains: Sequence[Findings], metric: str) -> "Figure":
    """Draw the naive swap and the best map of each chain against all images that were embedded.

    Args:
      chains: colours go by their place, also of those whose ways were not measured.
      metric: its name.
    """
    drawn = style.figure((style.WIDTH, 4.3))
    axis = drawn.subplots()
    entries: dict[str, dict[str, Any]] = {}
    for number, chain in enumerate(chains):
        if chain.ways is None:
            continue
        size = chain.ways.gallery_size
        for found in chain.ways.ways:
            name, look = found.name, style.line(number)
            if name == best_map(chain, metric):
                look |= {"ls": "--", "mfc": "white"}
            elif name != NAIVE:
                continue
            images = found.embedded(size, metric, chain.ways.from_gallery)
            axis.plot(100 * images / size, 100 * found.curves[metric].values, **look)
            entries[f"{chain.name}, {title(name)}"] = look
    axis.set_xlabel("images embedded, % of the gallery, pairs included")
    _finish(axis, metric, reach(chains, metric))
    style.legend(drawn, entries, columns=1 if max(map(len, entries), default=0) > 26 else 2)
    return drawn


def best_map(chain: Findings, metric: str) -> str:
    """Return the name of the map with the largest area; "" where none was measured."""
    if chain.ways is None:
        return ""
    maps = [way for way in chain.ways.ways if way.name in align.KINDS]
    return max(maps, key=lambda way: way.curves[metric].area).name if maps else ""


def quality(chains: Sequence[Findings]) -> Table:
    """Quality of every way, the largest area first."""
    found = measured(chains)
    metrics = found[0][1].metrics
    main = metrics[0]
    columns = [Column("chain"), Column("way")]
    for metric in metrics:
        places = ("mean on the way", "at 0 %", "half way", "at 100 %")
        columns += [Column(f"{metric} {place}", percent) for place in places]
    columns += [Column(f"{main} mean {end}", percent) for end in ("from", "to")]
    columns.append(Column("new answers half way", percent))
    rows = []
    for chain, ways in found:
        for way in ways.ways:
            ends = way.intervals.get(main, (float("nan"),) * 2)
            parts = [number for metric in metrics for number in _points(way, metric)]
            rows.append((chain.name, title(way.name), *parts, *ends, _new_answers(way, main)))
    order = np.argsort([-_sortable(row[2]) for row in rows], kind="stable")
    return Table(tuple(columns), [rows[n] for n in order])


def _points(way: Way, metric: str) -> tuple[float, ...]:
    if metric not in way.curves:
        return (float("nan"),) * 4
    curve = way.curves[metric]
    values = curve.values[[0, _half(curve.shares), -1]]
    return (curve.area, *map(float, values))


def _new_answers(way: Way, metric: str) -> float:
    curve = way.curves.get(metric)
    return float("nan") if curve is None else float(curve.new_answers[_half(curve.shares)])


def _half(shares):
    return int(np.abs(shares - _HALF).argmin())


def _sortable(value):
    return -1.0 if np.isnan(value) else value


def costs(chains: Sequence[Findings]) -> Table:
    """List what every way takes, in the order in which the ways are measured."""
    columns = (
        Column("chain"),
        Column("way"),
        Column("pairs to fit on", count),
        Column("images before the switch", count),
        Column("seconds before the switch", seconds),
        Column("of these, to fit", seconds),
        Column("networks a query", count),
        Column("images a query", count),
        Column("MB to keep", share),
    )
    rows = [
        (
            chain.name,
            title(way.name),
            way.cost.pairs,
            way.cost.images,
            way.cost.seconds,
            way.cost.fit_seconds,
            way.cost.networks,
            way.cost.images_a_query,
            way.cost.bytes / 1e6,
        )
        for chain, ways in measured(chains)
        for way in ways.ways
    ]
    return Table(columns, rows)


def points(chains: Sequence[Findings]) -> Table:
    """Every point of every way's curves."""
    names = ("chain", "way", "metric", "share", "value", "answered by new features", "images")
    rows = [
        (chain.name, way.name, metric, *map(float, point))
        for chain, ways in measured(chains)
        for way in ways.ways
        for metric, curve in way.curves.items()
        for point in zip(
            curve.shares,
            curve.values,
            curve.new_answers,
            way.embedded(ways.gallery_size, metric, ways.from_gallery),
            strict=True,
        )
    ]
    return Table(tuple(map(Column, names)), rows)


def _look(way: str) -> dict[str, Any]:
    """Colour and mark of a way: what needs no map stands out from the maps."""
    plain: dict[str, dict[str, Any]] = {
        NAIVE: {"color": style.INK, "marker": "X", "lw": 2.2},
        FORWARD: {"color": style.INK, "marker": "D", "ls": "--"},
        RESCORING: {"color": style.MUTED, "marker": "s", "ls": "-."},
        REINDEX: {"color": style.MUTED, "marker": "", "ls": ":"},
    }
    if way in plain:
        return {"ms": 5, "lw": 1.6, **plain[way]}
    return style.line(list(align.KINDS).index(way))


def _finish(axis: "Axes", metric: str, top: float) -> None:
    axis.set_ylabel(f"{metric}, %")
    axis.set_ylim(0, top)
    style.tidy(axis, grid="y")
