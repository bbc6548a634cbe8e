"""Draw the growth of time and memory: measured points, and a line of proportional growth beside them."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from etils import epath

from compat_jax.errors import UserError
from compat_jax.files import absolute, write_bytes
from compat_jax.report import style
from launch.benchmarks.timing import Growth

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# By quantity: place among the colours and marks, label of the axis, and its unit's size.
_LOOKS = {"time": (0, "time, s", 1.0), "memory": (1, "memory, MB", 1e6)}
_PANEL = (2.4, 2.3)  # inches


def folder(path: str) -> epath.Path:
    """Make the folder of the charts, before any work.

    Args:
      path: of the folder.

    Raises:
      UserError: it cannot be made.
    """
    place = absolute(path)
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {path}: {error.strerror or error}", "charts") from error
    return place


def growths(contents: Iterable[Mapping[str, Any]]) -> list[Growth]:
    """Return the growths of files that `table.write` wrote, without those that could not be measured.

    Args:
      contents: of the files, see `table.read`.

    Raises:
      UserError: there are none.
    """
    lines = [line.get("growth") for content in contents for line in content.get("results", ())]
    found = [
        Growth(line["of"], line["what"], tuple((n, value) for n, value in line["points"]))
        for line in lines
        if line
    ]
    if not found:
        raise UserError(
            "no growth among these numbers: python -m launch.benchmark --only=scaling --json=FILE "
            "measures it",
            "charts",
        )
    return found


def write(place: epath.Path, found: Sequence[Growth]) -> list[str]:
    """Draw growth.png, with a column for each thing that grows, and growth-THING.png for each alone.

    Args:
      place: folder to write to.
      found: at least one growth.

    Returns:
      The names of the files.
    """
    pictures = {"growth": found}
    for growth in found:
        pictures.setdefault(f"growth-{style.file_name(growth.of)}", []).append(growth)
    for name, shown in pictures.items():
        write_bytes(place / f"{name}.png", style.png(draw(shown)))
    return [f"{name}.png" for name in pictures]


def draw(found: Sequence[Growth]) -> "Figure":
    """Draw growths, a column for each thing that grows: time above, memory below.

    All axes are logarithmic, and those of a row share their scale. Titles name the exponent of the last
    decade. Of one thing, the two panels stand side by side.

    Args:
      found: at least one growth.
    """
    things = list(dict.fromkeys(growth.of for growth in found))
    rows = [what for what in _LOOKS if any(growth.what == what for growth in found)]
    across, down = (len(things), len(rows)) if len(things) > 1 else (len(rows), 1)
    drawn = style.figure((_PANEL[0] * across + 0.5, _PANEL[1] * down + 0.4))
    axes = drawn.subplots(down, across, sharey="row" if len(things) > 1 else False, squeeze=False)
    by = {(growth.what, growth.of): growth for growth in found}
    cells = [(what, thing) for what in rows for thing in things]
    for axis, (what, thing) in zip(axes.flat, cells, strict=True):
        if (what, thing) not in by:
            axis.set_axis_off()
            continue
        _panel(axis, by[what, thing])
        if thing == things[0]:
            axis.set_ylabel(_LOOKS[what][1])
        if what == rows[-1] or down == 1:
            axis.set_xlabel(style.plain(thing))
    entries: dict[str, dict[str, Any]] = {what: style.line(_LOOKS[what][0]) for what in rows}
    entries["in proportion (exponent 1)"] = _PROPORTION
    style.legend(drawn, entries, columns=len(entries))
    return drawn


_PROPORTION = {"color": style.MUTED, "ls": "--", "lw": 1.2}


def _panel(axis: "Axes", growth: Growth) -> None:
    number, _, unit = _LOOKS[growth.what]
    counts, values = zip(*((n, value / unit) for n, value in growth.points), strict=True)
    last = values[-1] / counts[-1]
    axis.plot(counts, [n * last for n in counts], **_PROPORTION)
    axis.plot(counts, values, **style.line(number))
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xticks(counts, [_short(n) for n in counts])
    axis.minorticks_off()
    axis.set_title(f"last exponent {growth.last:.2f}", fontsize=10, loc="left")
    style.tidy(axis, grid="both")


def _short(count):
    """A count as a label: 400, 4k, 40k, 1M."""
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:g}{letter}"
    return f"{count:g}"
