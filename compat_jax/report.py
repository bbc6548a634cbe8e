"""Matrices as text, and the pictures."""

import io
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from etils import epath

from compat_jax import compatibility
from compat_jax.evaluation import Evaluation
from compat_jax.files import write_bytes, write_json

if TYPE_CHECKING:  # imported where it draws: every program imports this module, few draw
    from matplotlib.figure import Figure

TITLES = {
    "hoc": "d-Simplex-HOC",
    "sce": "d-Simplex, cross-entropy only",
    "fd": "d-Simplex-FD (CL²R)",
    "er": "ER (learnable classifier)",
}
_COLOURS = ("#c1272d", "#3b6ea5", "#3a8f5c", "#8a5a9e")


def table(results: Mapping[str, Evaluation]) -> str:
    """The matrices, in per cent: rows = query version, columns = gallery version.

    Args:
      results: evaluation by method.

    Returns:
      Text; a cell that is not above its column's self-test (an incompatible pair) is marked with "x",
      a row whose model was replaced with "*".
    """
    return "\n\n".join(_one_table(name, result) for name, result in results.items())


def _one_table(name, result):
    good = compatibility.compatible_pairs(result.matrix)
    lines = [
        f"{TITLES.get(name, name)}: {result.metric} %, rows = query version, columns = gallery "
        "version (* model replaced, x not compatible)",
        "      " + "".join(f"{task:>8}" for task in result.tasks),
    ]
    for t, row in enumerate(result.matrix):
        cells = []
        for k in range(t + 1):
            mark = "x" if k < t and not good[t, k] else " "
            cells.append(f"{100 * row[k]:7.2f}{mark}")
        star = "*" if result.replaced[t] else " "
        lines.append(f"{result.tasks[t]:>4}{star} " + "".join(cells))
    ac = f"AC {result.average_compatibility:.2f}" if len(result.matrix) > 1 else "AC -"
    lines.append(f"{ac}   AA {100 * result.average_accuracy:.2f}")
    return "\n".join(lines)


def sentence(results: Mapping[str, Evaluation]) -> str:
    """In plain words, what happened to old galleries when the model was replaced.

    Args:
      results: evaluation by method.

    Returns:
      A sentence a method, with the numbers that it rests on.
    """
    said = []
    for name, result in results.items():
        crossed = across_replacements(result.matrix, result.replaced)
        if not len(crossed):
            continue
        said.append(
            f"{TITLES.get(name, name)}: after a replacement, queries of the new model find "
            f"{100 * crossed.mean():.0f} % in galleries that older models embedded "
            f"(the new models' own galleries: {100 * _own(result).mean():.0f} %)."
        )
    return "\n".join(said)


def across_replacements(matrix: np.ndarray, replaced: tuple[bool, ...]) -> np.ndarray:
    """The cells whose query and gallery versions have a replacement between them.

    Args:
      matrix: float[T, T].
      replaced: whether each version started from a replacement.

    Returns:
      float[n], the accuracies of those cells.
    """
    epoch = np.cumsum(replaced)
    rows, columns = np.tril_indices(len(matrix), -1)
    return matrix[rows, columns][epoch[rows] != epoch[columns]]


def _own(result):
    epoch = np.cumsum(result.replaced)
    return np.diag(result.matrix)[epoch > 0]


def write(results: Mapping[str, Evaluation], folder: epath.Path) -> list[epath.Path]:
    """matrix.json, matrices.png and average_accuracy.png.

    Args:
      results: evaluation by method.
      folder: where to.

    Returns:
      The paths written.
    """
    folder = epath.Path(folder)
    paths = [folder / name for name in ("matrix.json", "matrices.png", "average_accuracy.png")]
    write_json(paths[0], {name: result.summary() for name, result in results.items()})
    write_bytes(paths[1], _png(heat_maps(results)))
    write_bytes(paths[2], _png(accuracy_curves(results)))
    return paths


def heat_maps(results: Mapping[str, Evaluation]) -> "Figure":
    """The matrices side by side on one scale, incompatible cells hatched."""
    from matplotlib.figure import Figure

    size = max(len(r.matrix) for r in results.values())
    side = min(max(3.6, 0.62 * size), 12)
    figure = Figure(figsize=(side * len(results) + 1.2, side + 0.9), layout="constrained")
    axes = figure.subplots(1, len(results), squeeze=False)[0]
    image = None
    for axis, (name, result) in zip(axes, results.items(), strict=True):
        image = _heat_map(axis, name, result, annotate=size <= 12)
    figure.colorbar(image, ax=list(axes), label="% of queries identified", shrink=0.8)
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
        f"{TITLES.get(name, name)}\nAC {ac:.2f}, AA {aa:.1f}   (* replaced, /// not compatible)",
        fontsize=10,
    )
    return image


def accuracy_curves(results: Mapping[str, Evaluation]) -> "Figure":
    """Average accuracy of the versions so far, a curve a method; squares mark replacements."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axis = figure.subplots()
    for colour, (name, result) in zip(_COLOURS * 9, results.items(), strict=False):
        curve = 100 * np.asarray(compatibility.average_accuracy_per_step(result.matrix))
        steps = np.arange(len(curve))
        axis.plot(steps, curve, color=colour, marker="o", ms=4, label=TITLES.get(name, name))
        at = [t for t in steps if result.replaced[t]]
        axis.plot(at, curve[at], "s", ms=9, mfc="none", mec=colour)
        axis.set_xticks(steps, result.tasks)
    axis.set_ylim(bottom=0)
    axis.set_xlabel("version (square: model replaced)")
    axis.set_ylabel("average accuracy so far, %")
    axis.grid(axis="y", color="#dddddd")
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    axis.legend(frameon=False)
    return figure


def _png(figure):
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
