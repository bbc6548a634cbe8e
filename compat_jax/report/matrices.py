"""Matrices of several methods as text, JSON and pictures."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from etils import epath

from compat_jax import compatibility, hosts, methods
from compat_jax.errors import UserError
from compat_jax.files import write_bytes, write_json
from compat_jax.matrix import Evaluation
from compat_jax.report import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DARK = 55  # per cent: above, cells are dark
_MAX_ANNOTATED = 12  # versions; beyond, numbers would not fit into the cells
# Hatches of the cells: dots are weaker than strokes, as their evidence is.
NOISE, INCOMPATIBLE = "....", "////"


def table(results: Mapping[str, Evaluation]) -> str:
    """Write the matrices in per cent: rows = query version, columns = gallery version.

    Args:
      results: evaluation by method.

    Returns:
      Text, see `Evaluation.table`.
    """
    return "\n\n".join(result.table(name) for name, result in results.items())


def sentence(results: Mapping[str, Evaluation]) -> str:
    """Say in plain words what happened to old galleries when the model was replaced.

    Args:
      results: evaluation by method.

    Returns:
      A line per method, see `Evaluation.sentence`.
    """
    return "\n".join(filter(None, (r.sentence(name) for name, r in results.items())))


def write(results: Mapping[str, Evaluation], folder: epath.Path) -> list[epath.Path]:
    """Write matrix.json, matrices.png and average_accuracy.png.

    Args:
      results: evaluation by method.
      folder: to write to.

    Returns:
      The paths written.
    """
    folder = epath.Path(folder)
    paths = [folder / name for name in ("matrix.json", "matrices.png", "average_accuracy.png")]
    write_json(paths[0], {name: result.summary() for name, result in results.items()})
    write_bytes(paths[1], style.png(heat_maps(results)))
    write_bytes(paths[2], style.png(accuracy_curves(results)))
    return paths


def check_writable(folder: epath.Path) -> None:
    """Make the folder of a report and try to write to it, before any work.

    Raises:
      UserError: it cannot be written to.
    """

    def attempt():
        try:
            write_bytes(folder / ".writable", b"")
            (folder / ".writable").unlink()
        except OSError as error:
            reason = error.strerror or str(error)
            raise UserError(f"cannot write to {folder}: {reason}", "out") from error

    hosts.on_first(attempt)


def heat_maps(results: Mapping[str, Evaluation]) -> "Figure":
    """Draw the matrices side by side on one scale; hatches mark what is not compatible.

    Args:
      results: evaluation by method.
    """
    size = max(len(r.matrix) for r in results.values())
    side = min(max(4.0, 0.62 * size), 12)
    figure = style.figure((side * len(results) + 1.2, side + 1.1))
    axes = figure.subplots(1, len(results), squeeze=False)[0]
    image_unit = ", ".join(dict.fromkeys(r.unit for r in results.values()))
    for axis, (name, result) in zip(axes, results.items(), strict=True):
        image = _heat_map(axis, methods.title(name), result, annotate=size <= _MAX_ANNOTATED)
    figure.colorbar(image, ax=list(axes), label=image_unit, shrink=0.8)
    return figure


def heat_map(title: str, result: Evaluation) -> "Figure":
    """Draw one matrix.

    Args:
      title: of the chain.
      result: its evaluation.
    """
    figure = style.figure((style.WIDTH, style.WIDTH))
    axis = figure.subplots()
    annotate = len(result.matrix) <= _MAX_ANNOTATED
    image = _heat_map(axis, title, result, annotate=annotate)
    if not annotate:
        figure.colorbar(image, ax=axis, label=result.unit, shrink=0.7)
    return figure


def _heat_map(axis: "Axes", title: str, result: Evaluation, *, annotate: bool):
    size = len(result.matrix)
    percent = np.where(np.tri(size, dtype=bool), 100 * result.matrix, np.nan)
    image = axis.imshow(percent, vmin=0, vmax=100, cmap="YlGnBu")
    good, noise = compatibility.compatible_pairs(result.matrix), result.within_noise
    for t in range(size):
        for k in range(t + 1):
            mark, dark = "", percent[t, k] > _DARK
            if noise[t, k]:
                mark = "~"
                _hatch(axis, (k, t), NOISE, "#cfe3f5" if dark else style.MUTED)
            elif k < t and not good[t, k]:
                mark = "x"
                _hatch(axis, (k, t), INCOMPATIBLE, "#ffb27a" if dark else style.BAD)
            if annotate:
                _number(axis, (k, t), f"{percent[t, k]:.0f}{mark}", image)
    _label(axis, title, result, annotate=annotate)
    return image


def _hatch(axis, cell, hatch, colour):
    from matplotlib.patches import Rectangle

    corner = (cell[0] - 0.5, cell[1] - 0.5)
    axis.add_patch(Rectangle(corner, 1, 1, fill=False, hatch=hatch, lw=0, edgecolor=colour))


def _number(axis, cell, text, image):
    value = image.get_array()[cell[1], cell[0]]
    colour = "white" if value > _DARK else "black"
    box = {"facecolor": image.cmap(image.norm(value)), "lw": 0, "pad": 1.2}
    axis.text(*cell, text, ha="center", va="center", color=colour, bbox=box)


def _label(axis, title, result, *, annotate):
    """Ticks, titles, and a legend of the marks that occur."""
    from matplotlib.patches import Patch

    size, noise = len(result.matrix), result.within_noise
    starred = zip(result.tasks, result.replaced, strict=True)
    labels = [f"{task}*" if replaced else task for task, replaced in starred]
    step = 1 if size <= 16 else 5
    axis.set_xticks(range(0, size, step), list(map(style.plain, result.tasks[::step])))
    axis.set_yticks(range(0, size, step), list(map(style.plain, labels[::step])))
    axis.set_xlabel("gallery embedded by version")
    replaced = "   (* replaced)" if any(result.replaced) else ""
    axis.set_ylabel(f"query embedded by version{replaced}")
    style.tidy(axis)
    ac = f"AC {result.average_compatibility:.2f}" if size > 1 else "AC -"
    aa = f"AA {100 * result.average_accuracy:.1f}"
    axis.set_title(f"{style.plain(title)}\n{ac}, {aa}", fontsize=11, loc="left")
    bad = np.tri(size, k=-1, dtype=bool) & ~compatibility.compatible_pairs(result.matrix) & ~noise
    sign_x, sign_noise = ("x  ", "~  ") if annotate else ("", "")
    marks = [(bad, INCOMPATIBLE, style.BAD, f"{sign_x}not compatible")]
    marks.append((noise, NOISE, style.MUTED, f"{sign_noise}within noise"))
    handles = [
        Patch(facecolor="white", edgecolor=colour, hatch=hatch, lw=0, label=text)
        for cells, hatch, colour, text in marks
        if cells.any()
    ]
    if handles:  # above the diagonal there is room
        axis.legend(handles=handles, loc="upper right", frameon=False, handlelength=2.2, fontsize=9)


def accuracy_curves(results: Mapping[str, Evaluation]) -> "Figure":
    """Draw the average accuracy of the versions so far, a curve per method; rings are replacements.

    Args:
      results: evaluation by method, or by title.
    """
    figure, axis = _curves(results, compatibility.average_accuracy_per_step, bands=True)
    axis.set_ylabel("average accuracy so far, %")
    return figure


def compatibility_curves(results: Mapping[str, Evaluation]) -> "Figure":
    """Draw the share of compatible pairs among the versions so far; rings are replacements.

    Args:
      results: evaluation by method, or by title.
    """
    figure, axis = _curves(results, compatibility.average_compatibility_per_step, bands=False)
    axis.set_ylabel("compatible pairs so far, %")
    axis.set_ylim(top=108)
    return figure


def _curves(results, values_of, *, bands):
    """A curve per method of what `values_of` makes of a matrix; `bands` are those of AA."""
    figure, entries = style.figure((style.WIDTH, 4.1)), {}
    axis = figure.subplots()
    for number, (name, result) in enumerate(results.items()):
        curve = 100 * np.asarray(values_of(result.matrix))
        if not bands:
            curve[0] = np.nan  # one version alone is compatible with nothing
        steps = np.arange(len(curve))
        look = style.line(number)
        axis.plot(steps, curve, **look)
        entries[methods.title(name)] = look
        if bands and result.intervals is not None:
            ends = [100 * x for x in result.intervals.average_accuracy_per_step]
            axis.fill_between(steps, *ends, color=look["color"], alpha=0.18, lw=0)
        at = [t for t in steps if result.replaced[t]]
        axis.plot(at, curve[at], "o", ms=12, mfc="none", mec=look["color"], mew=1.4)
    style.version_axis(axis, max((r.tasks for r in results.values()), key=len))
    axis.set_ylim(bottom=0, top=1.1 * axis.get_ylim()[1])  # room for the largest ring
    ringed = " (ring: model replaced)" if any(any(r.replaced) for r in results.values()) else ""
    axis.set_xlabel(f"version{ringed}")
    style.tidy(axis, grid="y")
    style.legend(figure, entries)
    return figure, axis
