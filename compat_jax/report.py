"""Matrices of several methods as text, JSON and pictures."""

import io
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from etils import epath

from compat_jax import compatibility, hosts, methods
from compat_jax.errors import UserError
from compat_jax.evaluation import Evaluation
from compat_jax.files import write_bytes, write_json

if TYPE_CHECKING:  # imported where it draws: every program imports this module, few draw
    from matplotlib.figure import Figure

_COLOURS = ("#c1272d", "#3b6ea5", "#3a8f5c", "#8a5a9e")


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
    write_bytes(paths[1], _png(heat_maps(results)))
    write_bytes(paths[2], _png(accuracy_curves(results)))
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
    """Draw the matrices side by side on one scale, incompatible cells hatched."""
    size = max(len(r.matrix) for r in results.values())
    side = min(max(3.6, 0.62 * size), 12)
    figure = _figure((side * len(results) + 1.2, side + 0.9))
    axes = figure.subplots(1, len(results), squeeze=False)[0]
    image_unit = ", ".join(dict.fromkeys(r.unit for r in results.values()))
    for axis, (name, result) in zip(axes, results.items(), strict=True):
        image = _heat_map(axis, name, result, annotate=size <= 12)
    figure.colorbar(image, ax=list(axes), label=image_unit, shrink=0.8)
    return figure


def _heat_map(axis, name, result, annotate):
    from matplotlib.patches import Rectangle

    size = len(result.matrix)
    percent = np.where(np.tri(size, dtype=bool), 100 * result.matrix, np.nan)
    image = axis.imshow(percent, vmin=0, vmax=100, cmap="YlGnBu")
    good = compatibility.compatible_pairs(result.matrix)
    for t in range(size):
        for k in range(t + 1):
            if k < t and not good[t, k]:
                axis.add_patch(
                    Rectangle(
                        (k - 0.5, t - 0.5),
                        1,
                        1,
                        fill=False,
                        hatch="///",
                        lw=0,
                        edgecolor=_COLOURS[0],
                    )
                )
            if annotate:
                colour = "white" if percent[t, k] > 55 else "black"
                box = {"facecolor": image.cmap(image.norm(percent[t, k])), "lw": 0, "pad": 1}
                axis.text(
                    k, t, f"{percent[t, k]:.0f}", ha="center", va="center", color=colour, bbox=box
                )
    labels = [
        f"{task}*" if r else task for task, r in zip(result.tasks, result.replaced, strict=True)
    ]
    axis.set_xticks(range(size), result.tasks)
    axis.set_yticks(range(size), labels)
    axis.set_xlabel("gallery embedded by version")
    axis.set_ylabel("query embedded by version")
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    aa, ac = 100 * result.average_accuracy, result.average_compatibility
    axis.set_title(
        f"{methods.title(name)}\nAC {ac:.2f}, AA {aa:.1f}   (* replaced, /// not compatible)",
        fontsize=10,
    )
    return image


def accuracy_curves(results: Mapping[str, Evaluation]) -> "Figure":
    """Draw the average accuracy of the versions so far, a curve per method; squares are replacements."""
    figure = _figure((6.4, 4.2))
    axis = figure.subplots()
    for colour, (name, result) in zip(_COLOURS * 9, results.items(), strict=False):
        curve = 100 * np.asarray(compatibility.average_accuracy_per_step(result.matrix))
        steps = np.arange(len(curve))
        axis.plot(steps, curve, color=colour, marker="o", ms=4, label=methods.title(name))
        at = [t for t in steps if result.replaced[t]]
        axis.plot(at, curve[at], "s", ms=9, mfc="none", mec=colour)
        axis.set_xticks(steps, result.tasks)
    axis.set_ylim(bottom=0, top=1.08 * axis.get_ylim()[1])  # room for the largest marker
    axis.set_xlabel("version (square: model replaced)")
    axis.set_ylabel("average accuracy so far, %")
    axis.grid(axis="y", color="#dddddd")
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    axis.legend(frameon=False)
    return figure


def _figure(inches: tuple[float, float]) -> "Figure":
    """An empty figure, whatever backend a notebook left in the environment."""
    backend = os.environ.pop("MPLBACKEND", None)  # read, and refused, when matplotlib is imported
    try:
        from matplotlib.figure import Figure
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    return Figure(figsize=inches, layout="constrained")


def _png(figure):
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()
