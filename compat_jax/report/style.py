"""Colours, marks and pictures of the report, for eyes that tell no red from green."""

import io
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:  # imported where it draws: every program imports this module, few draw
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito 2008, "Color universal design"; a line has a mark of its own as well.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKS = ("o", "^", "D", "v", "P", "X", "<")
GOOD, BAD, INK, MUTED, PALE = "#0072B2", "#D55E00", "#1b1f24", "#57606a", "#d8dee4"
WIDTH = 4.6  # inches of a picture that fills a column of the page, and a phone
_DOTS_PER_INCH = 160


def line(number: int) -> dict[str, Any]:
    """Return colour and mark of a chain's line.

    Args:
      number: of the chain; colours repeat after seven.
    """
    place = number % len(COLOURS)
    return {"color": COLOURS[place], "marker": MARKS[place], "ms": 5, "lw": 1.6}


def figure(inches: tuple[float, float]) -> "Figure":
    """Make an empty figure, whatever backend a notebook left in the environment."""
    backend = os.environ.pop("MPLBACKEND", None)  # read, and refused, when matplotlib is imported
    try:
        from matplotlib.figure import Figure
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    return Figure(figsize=inches, layout="constrained")


def tidy(axis: "Axes", grid: Literal["x", "y", "both"] | None = None) -> None:
    """Take away what carries no number: the frame at the top and at the right.

    Args:
      axis: to tidy.
      grid: "x", "y" or "both" for pale lines; None for none.
    """
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    if grid:
        axis.grid(axis=grid, color=PALE, lw=0.8)
        axis.set_axisbelow(True)


def version_axis(axis: "Axes", tasks: Sequence[str]) -> None:
    """Label the horizontal axis with versions, every fifth of many.

    Args:
      axis: whose places 0, 1, … are versions.
      tasks: label of each version.
    """
    step = 1 if len(tasks) <= 16 else 5
    axis.set_xticks(range(0, len(tasks), step), [plain(task) for task in tasks[::step]])


def legend(drawn: "Figure", entries: Mapping[str, Mapping[str, Any]], columns: int = 2) -> None:
    """Put a legend of lines below a figure.

    Args:
      drawn: the figure.
      entries: look of the line, by text.
      columns: of the legend.
    """
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], label=plain(text), **look) for text, look in entries.items()]
    options: dict[str, Any] = {"ncols": columns, "frameon": False, "fontsize": 9}
    drawn.legend(handles=handles, loc="outside lower center", **options)


def plain(text: str) -> str:
    """Return a text that matplotlib draws as it is, where a pair of $ would begin a formula."""
    return text.replace("$", r"\$")


def png(drawn: "Figure") -> bytes:
    """Return a figure as a PNG."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():  # a class may be called in letters that the font lacks
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        drawn.savefig(buffer, format="png", dpi=_DOTS_PER_INCH, metadata={"Software": None})
    return buffer.getvalue()


def file_name(text: str) -> str:
    """Return a text as a part of a file name: letters, digits, dots, hyphens and underscores."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.") or "chain"
