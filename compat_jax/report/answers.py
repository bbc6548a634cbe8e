"""Answers of a gallery as a page: each query, its nearest pictures, and who embedded their rows."""

import html
import os
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from etils import epath

from compat_jax.data.pictures import BadPictures, decode
from compat_jax.errors import UserError
from compat_jax.files import write_bytes, write_json
from compat_jax.report import style
from compat_jax.report.frame import Folder, compose
from compat_jax.report.tables import Column, Table, count
from compat_jax.report.wall import GAP, TILE, tile

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = 10  # answers of a query that are drawn
_ROWS = 8  # queries of a picture
_SHOWN = 200  # queries of a page
_LINE = 20  # pixels for the score below an answer
_EXPLAINED = (
    "Left of the line the query, right of it its nearest pictures with their cosines. The colour of a "
    "frame says which version embedded the row."
)


class Answer(NamedTuple):
    """A picture that answers.

    Attributes:
      picture: its path, which need not be readable here.
      score: cosine with the query.
      version: number of the version that embedded its row.
    """

    picture: str
    score: float
    version: int


def write_answers(
    asked: Sequence[str],
    found: Sequence[Sequence[Answer]],
    folder: str | os.PathLike[str],
    *,
    title: str = "Answers",
    subtitle: str = "",
) -> list[epath.Path]:
    """Write index.html, which holds everything, and its pictures, table and figures beside it.

    The first 200 queries and ten answers each are drawn; answers.json and answers.csv have all.

    Args:
      asked: paths of the queries.
      found: answers to each, the nearest first.
      folder: to write to.
      title: of the page.
      subtitle: plain text below it.

    Returns:
      The paths written, the page first.

    Raises:
      UserError: no query, or as many lists of answers as there are not queries.
    """
    if not asked or len(asked) != len(found):
        raise UserError(f"{len(asked)} queries need as many lists of answers, got {len(found)}")
    files = Folder(epath.Path(folder))
    shown = min(len(asked), _SHOWN)
    pictures = []
    for number, start in enumerate(range(0, shown, _ROWS)):
        part = slice(start, min(start + _ROWS, shown))
        drawn = answers_wall(asked[part], found[part])
        says = f"Queries {start + 1} to {part.stop} and their nearest pictures"
        pictures.append(files.picture(f"wall-{number}", drawn, says))
    table = files.table("answers", _table(asked, found))
    whole = (
        f"<details><summary>All answers</summary>{table}</details>" if len(asked) == shown else ""
    )
    wall = f'<p>{_EXPLAINED}</p><div class="grid">{"".join(pictures)}</div>{whole}'
    content = [
        {"query": query, "answers": [answer._asdict() for answer in answers]}
        for query, answers in zip(asked, found, strict=True)
    ]
    write_json(files.path / "answers.json", content)
    page = compose(title, html.escape(subtitle), [("Nearest pictures", wall)])
    write_bytes(files.path / "index.html", page.encode())
    return [files.path / "index.html", files.path / "answers.json", *files.written]


def _table(asked, found) -> Table:
    columns = (
        Column("query"),
        Column("rank", count),
        Column("picture"),
        Column("score", "{:.4f}".format),
        Column("version", count),
    )
    rows = [
        (query, rank, answer.picture, answer.score, answer.version)
        for query, answers in zip(asked, found, strict=True)
        for rank, answer in enumerate(answers, start=1)
    ]
    return Table(columns, rows)


def answers_wall(asked: Sequence[str], found: Sequence[Sequence[Answer]]) -> "Figure":
    """Draw queries, each with up to ten answers, framed in the colour of the row's version.

    Args:
      asked: paths of the queries.
      found: answers to each, the nearest first. A picture that cannot be read is a grey square.
    """
    columns = min(COLUMNS, max((len(answers) for answers in found), default=0))
    side, height = TILE + GAP, TILE + GAP + _LINE
    shape = (len(asked) * height + GAP, (columns + 1) * side + 2 * GAP, 3)
    board = np.full(shape, 255, np.uint8)
    drawn = style.figure((style.WIDTH, style.WIDTH * shape[0] / shape[1] + 0.4))
    axis = drawn.subplots()
    for row, (query, answers) in enumerate(zip(asked, found, strict=True)):
        top = GAP + row * height
        board[top : top + TILE, GAP : GAP + TILE] = _read(query)
        for column, answer in enumerate(answers[:columns]):
            left = 2 * GAP + (column + 1) * side
            board[top : top + TILE, left : left + TILE] = _read(answer.picture)
            _mark(axis, answer, (left, top))
    axis.imshow(board, interpolation="nearest")
    axis.axvline(TILE + 2 * GAP + 1, color=style.MUTED, lw=1)
    axis.set_axis_off()
    versions = sorted({answer.version for answers in found for answer in answers[:columns]})
    looks = {
        f"row of version {version}": {"color": colour(version), "lw": 3} for version in versions
    }
    if looks:
        style.legend(drawn, looks)
    return drawn


def colour(version: int) -> str:
    """Return the colour of a version's rows; colours repeat after seven."""
    return style.COLOURS[version % len(style.COLOURS)]


def _mark(axis, answer: Answer, place: tuple[int, int]) -> None:
    """Frame an answer and write its score below."""
    from matplotlib.patches import Rectangle

    left, top = place
    corner = (left - 2, top - 2)
    edge = colour(answer.version)
    axis.add_patch(Rectangle(corner, TILE + 3, TILE + 3, fill=False, edgecolor=edge, lw=1.6))
    look = {"ha": "center", "va": "center", "fontsize": 5, "color": style.INK}
    axis.text(left + TILE / 2, top + TILE + _LINE / 2 + 2, f"{answer.score:z.3f}", **look)


def _read(path: str) -> np.ndarray:
    """uint8[72, 72, 3] of a picture; grey where it cannot be read."""
    try:
        return tile(decode(path))
    except (BadPictures, OSError):
        return np.full((TILE, TILE, 3), 220, np.uint8)


def versions_of(found: Sequence[Sequence[Answer]]) -> dict[int, int]:
    """Count the answers by the version that embedded their rows, the oldest first."""
    counts = Counter(answer.version for answers in found for answer in answers)
    return dict(sorted(counts.items()))
