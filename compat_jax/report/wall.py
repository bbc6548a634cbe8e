"""The retrieval wall: queries of the newest version and what they find in the oldest gallery."""

from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from compat_jax.data.dataset import Dataset
from compat_jax.errors import UserError
from compat_jax.report import style
from compat_jax.report.findings import Findings

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TILE, GAP = 72, 10  # pixels of a picture on the wall, and between two


def wall(chain: Findings, query: Dataset, gallery: Dataset) -> "Figure":
    """Draw the queries, each with its five nearest images; those of the query's class are framed.

    Args:
      chain: with answers.
      query: that the answers are of; only the images shown are read.
      gallery: that the answers are of.

    Raises:
      UserError: a chain without answers.
    """
    answers = chain.answers
    if answers is None:
        raise UserError(f"{chain.name}: the newest version has no answers in the oldest gallery")
    asked = _tiles(query, answers.rows)
    found = _tiles(gallery, answers.found.reshape(-1))
    rows, columns = answers.found.shape
    side = TILE + GAP
    board = np.full((rows * side + GAP, (columns + 1) * side + 2 * GAP, 3), 255, np.uint8)
    drawn = style.figure((style.WIDTH, style.WIDTH * board.shape[0] / board.shape[1] + 0.55))
    axis = drawn.subplots()
    right = gallery.need_labels()[answers.found] == query.need_labels()[answers.rows, None]
    for row in range(rows):
        top = GAP + row * side
        board[top : top + TILE, GAP : GAP + TILE] = asked[row]
        for column in range(columns):
            left = 2 * GAP + (column + 1) * side
            board[top : top + TILE, left : left + TILE] = found[row * columns + column]
            if right[row, column]:
                _frame(axis, left, top)
    axis.imshow(board, interpolation="nearest")
    axis.axvline(TILE + 2 * GAP + 1, color=style.MUTED, lw=1)
    axis.set_axis_off()
    first, last = chain.main.tasks[0], chain.main.tasks[-1]
    axis.set_title(
        f"{style.plain(chain.name)}\nquery by version {style.plain(last)}   |   "
        f"gallery of version {style.plain(first)}, nearest first",
        fontsize=10,
        loc="left",
    )
    return drawn


def _frame(axis, left, top):
    from matplotlib.patches import Rectangle

    corner = (left - 4, top - 4)
    axis.add_patch(Rectangle(corner, TILE + 7, TILE + 7, fill=False, edgecolor=style.GOOD, lw=2.6))


def _tiles(data: Dataset, rows: np.ndarray) -> list[np.ndarray]:
    """uint8[72, 72, 3] of each row, aspect kept by a white margin."""
    return [tile(np.asarray(data.images[int(row) : int(row) + 1])[0]) for row in rows]


def tile(picture: np.ndarray) -> np.ndarray:
    """Bring a picture, uint8[h, w, 1] or [h, w, 3], to uint8[72, 72, 3] with white margins."""
    shown = np.repeat(picture, 3, axis=2) if picture.shape[2] == 1 else picture[..., :3]
    height, width = shown.shape[:2]
    scale = TILE / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    # Small pictures show their pixels; blurred ones would look better than what the network saw.
    filter_ = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
    tile = Image.new("RGB", (TILE, TILE), "white")
    resized = Image.fromarray(np.ascontiguousarray(shown)).resize(size, filter_)
    tile.paste(resized, ((TILE - size[0]) // 2, (TILE - size[1]) // 2))
    return np.asarray(tile)
