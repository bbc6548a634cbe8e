"""Draw docs/concepts.png, the picture of docs/concepts.md.

  python docs/draw_concepts.py              # writes docs/concepts.png
  python docs/draw_concepts.py other.png

The matrix holds the first four versions of the quickstart (seed 0, d-Simplex-HOC). Nothing is drawn at
random, so the same picture comes out each time.
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, Rectangle, Wedge
from matplotlib.patheffects import withStroke

INK, MUTED, PALE, RED = "#222222", "#5f5f5f", "#d4d4d4", "#c0392b"
BLUE, LIGHT_BLUE, ORANGE, GREEN = "#1f6fb2", "#a9cbe6", "#d9822b", "#3a9a5b"
NOTE = {"color": MUTED, "fontsize": 9, "linespacing": 1.3}
MATRIX = ((39,), (43, 48), (43, 48, 63), (45, 51, 64, 66))
INCOMPATIBLE = ((2, 1),)
REPLACED = 2


def draw(path: Path) -> None:
    """Draw the three panels into a PNG.

    Args:
      path: file to write.
    """
    panels = (
        ("1  One fixed simplex", simplex),
        ("2  A chain of versions", versions),
        ("3  The compatibility matrix", matrix),
    )
    with plt.rc_context({"font.family": "DejaVu Sans", "font.size": 10, "hatch.linewidth": 0.9}):
        figure = plt.figure(figsize=(12.4, 4.6))
        for number, (title, draw_panel) in enumerate(panels):
            left = (0.005, 0.32, 0.68)[number]
            width = (0.30, 0.34, 0.315)[number]
            axis = figure.add_axes((left, 0.01, width, 0.88))
            axis.set_axis_off()
            axis.set_aspect("equal")
            draw_panel(axis)
            figure.text(
                left + width / 2,
                0.94,
                title,
                ha="center",
                fontsize=12,
                fontweight="bold",
                color=INK,
            )
        figure.savefig(path, dpi=110, metadata={"Software": None})
        plt.close(figure)


def simplex(axis: Axes) -> None:
    """Draw the features of two versions around prototypes that never move."""
    axis.set(xlim=(-1.75, 1.75), ylim=(-2.0, 1.75))
    axis.add_patch(Circle((0, 0), 1, fill=False, edgecolor=PALE, linewidth=1.2))
    for degrees, colour in ((90, BLUE), (210, ORANGE), (330, GREEN)):
        if colour != BLUE:  # the old version has not seen that class
            cap(axis, degrees, 36, colour, is_new=False)
        cap(axis, degrees, 13, colour, is_new=True)
        tip = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
        arrow(axis, (0, 0), tip, INK)
    axis.text(0, 1.5, "a class that came later", ha="center", color=BLUE, fontsize=9)
    axis.text(0.2, 0.36, "prototype\nof a class", **NOTE)
    for row, (is_new, text) in enumerate(
        ((False, "features of an old version"), (True, "of a new version"))
    ):
        y = -1.48 - 0.27 * row
        axis.scatter(-0.9, y, **dot(MUTED, is_new))
        axis.text(-0.76, y, text, va="center", color=INK, fontsize=9.5)


def cap(axis: Axes, centre: float, half: float, colour: str, is_new: bool) -> None:
    """Draw a cap of directions (degrees) and features in it, the new version's further out."""
    axis.add_patch(
        Wedge((0, 0), 1, centre - half, centre + half, color=colour, alpha=0.32 if is_new else 0.14)
    )
    angles = np.deg2rad(centre + half * np.linspace(-0.88, 0.88, 5 if is_new else 9))
    radius = 1.2 if is_new else 1.0 + 0.07 * np.array((0, 1) * 4 + (0,))
    axis.scatter(radius * np.cos(angles), radius * np.sin(angles), **dot(colour, is_new))


def dot(colour: str, is_new: bool) -> dict[str, object]:
    """Return the style of a feature: filled for the new version, hollow for the old one."""
    fill = colour if is_new else "white"
    return {"s": 28, "facecolors": fill, "edgecolors": colour, "linewidths": 1.2, "zorder": 3}


def versions(axis: Axes) -> None:
    """Draw four versions: where each starts and which classes it is trained on."""
    axis.set(xlim=(-0.3, 9.3), ylim=(-1.6, 7.9))
    for number in range(4):
        y = 6.2 - 1.9 * number
        is_replaced = number == REPLACED
        name = f"version {number}" + ("*" if is_replaced else "")
        box(axis, (3.1, y), 1.9, name, RED if is_replaced else INK)
        axis.text(5.75, y + 0.5, f"task {number}", ha="center", va="center", **NOTE)
        for task in range(4):
            square(axis, (6.5 + 0.68 * task, y + 0.22), task - number)
        if number and not is_replaced:
            arrow(axis, (4.05, y + 1.9), (4.05, y + 1.02), INK)
    y = 6.2 - 1.9 * REPLACED
    box(axis, (-0.2, y), 2.4, "better model", RED)
    arrow(axis, (2.2, y + 0.5), (3.08, y + 0.5), RED)
    axis.text(1.0, y - 0.15, "pre-trained on\nthe same simplex", ha="center", va="top", **NOTE)
    axis.text(3.85, 5.75, "fine-tuned", ha="right", va="center", **NOTE)
    axis.text(7.8, 7.4, "training images of", ha="center", **NOTE)
    axis.text(-0.2, -1.1, "* replaced", va="center", color=RED, fontsize=9)
    for left, age, text in ((3.1, 0, "new classes"), (6.2, -1, "a few of old classes")):
        square(axis, (left, -1.38), age)
        axis.text(left + 0.72, -1.1, text, va="center", **NOTE)


def square(axis: Axes, corner: tuple[float, float], age: int) -> None:
    """Draw the classes of a task: new (age 0), rehearsed (below 0) or still to come (above 0)."""
    fill = BLUE if age == 0 else LIGHT_BLUE if age < 0 else "white"
    edge = PALE if age > 0 else MUTED
    axis.add_patch(Rectangle(corner, 0.56, 0.56, facecolor=fill, edgecolor=edge, linewidth=0.8))


def box(axis: Axes, corner: tuple[float, float], width: float, text: str, colour: str) -> None:
    """Draw a rounded box of height 1 with a text in it."""
    axis.add_patch(
        FancyBboxPatch(
            corner,
            width,
            1,
            boxstyle="round,pad=0,rounding_size=0.18",
            facecolor="white",
            edgecolor=colour,
            linewidth=1.3,
        )
    )
    axis.text(corner[0] + width / 2, corner[1] + 0.5, text, ha="center", va="center", color=colour)


def arrow(axis: Axes, start: tuple[float, float], end: tuple[float, float], colour: str) -> None:
    """Draw an arrow."""
    style = {
        "arrowstyle": "-|>",
        "mutation_scale": 12,
        "linewidth": 1.3,
        "shrinkA": 0,
        "shrinkB": 0,
    }
    axis.add_patch(FancyArrowPatch(start, end, color=colour, zorder=2, **style))


def matrix(axis: Axes) -> None:
    """Draw the lower triangle, its incompatible cells, and the comparison that decides."""
    axis.set(xlim=(-1.1, 5.3), ylim=(5.5, -0.6))
    colours = matplotlib.colormaps["YlGnBu"]
    for row, cells in enumerate(MATRIX):
        name = f"{row}*" if row == REPLACED else str(row)
        axis.text(-0.15, row + 0.5, name, ha="right", va="center", color=INK)
        axis.text(row + 0.5, 4.26, name, ha="center", va="center", color=INK)
        for column, value in enumerate(cells):
            place = {"xy": (column, row), "width": 1, "height": 1}
            axis.add_patch(Rectangle(**place, facecolor=colours(value / 100), edgecolor="white"))
            if (row, column) in INCOMPATIBLE:
                axis.add_patch(Rectangle(**place, fill=False, hatch="///", color=RED, linewidth=0))
            weight = "bold" if row == column else "normal"
            middle = {"ha": "center", "va": "center", "color": INK, "fontweight": weight}
            halo = [withStroke(linewidth=3, foreground=colours(value / 100))]
            axis.text(column + 0.5, row + 0.5, str(value), **middle, path_effects=halo)
    for row in (0, REPLACED):
        axis.add_patch(Rectangle((0, row), 1, 1, fill=False, edgecolor=INK, linewidth=2, zorder=4))
    axis.text(1.2, 0.5, "43 beats 39: version 2\nis compatible with 0", va="center", **NOTE)
    axis.text(2.2, 1.5, "bold: own gallery", va="center", **NOTE)
    axis.text(3.2, 2.5, "hatched:\nnot compatible", va="center", **{**NOTE, "color": RED})
    axis.text(2, 4.75, "gallery embedded by version", ha="center", va="center", color=INK)
    along = {"ha": "center", "va": "center", "rotation": 90, "color": INK}
    axis.text(-0.75, 2, "queries embedded by version", **along)
    axis.text(2, 5.25, "% of queries identified", ha="center", va="center", **NOTE)


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "concepts.png")
