"""The comparison with the reference: lines of a table, each with its tolerance and verdict."""

import dataclasses
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from compat_jax.errors import UserError, unknown

PARTS = ("pieces", "steps", "protocol", "speed")

# Why a tolerance is what it is; the table's footnotes.
NOTES = {
    "exact": "The same decision on the same numbers: no rounding in between. Identification may differ "
    "by one query, where two templates are equally near to rounding.",
    "rounding": "Largest difference over largest value. float32 has 1.2e-7; sums over a batch in "
    "another order make it some 1e-6.",
    "network": "The same through a network of 18 or 32 layers, whose rounding adds up.",
    "step": "Relative; of weights, to the largest update. A step starts from weights that differ by "
    "the rounding of all steps before, and a ReLU or a maximum that falls the other way adds to it: the "
    "reference differs as much from itself when its first weights are changed by a rounding. The 20 "
    "steps start from trained weights; from random ones that difference grows tenfold a step.",
    "matrix": "In points. A query whose two nearest templates are as near as the versions of both sides "
    "are apart may be counted for another class.",
    "pairs": "A pair of versions can be judged otherwise only if its margin, M[t,k] - M[k,k], is within "
    "twice the tolerance of an entry: so much of AC is open.",
    "speed": "Reported only. Difference is the time of ours over that of theirs: the median over the "
    "turns, ± half of what lies between the quartiles.",
}


@dataclasses.dataclass(frozen=True)
class Line:
    """One quantity on both sides.

    Attributes:
      part: of the comparison, a name in PARTS or "cl2r".
      quantity: what it is.
      ours: the value here; of an array, where both differ most.
      theirs: the value there.
      difference: between them, in the measure that the note tells; a ratio for "speed".
      tolerance: the largest difference that passes; None for what is only reported.
      note: key in NOTES.
      unit: of the values.
      spread: of a ratio; None else.
    """

    part: str
    quantity: str
    ours: float
    theirs: float
    difference: float
    tolerance: float | None
    note: str
    unit: str = ""
    spread: float | None = None

    @property
    def passed(self) -> bool:
        """Whether the difference is within the tolerance; NaN is not."""
        return self.tolerance is None or self.difference <= self.tolerance


def line(
    part: str,
    quantity: str,
    ours: Any,
    theirs: Any,
    tolerance: float,
    note: str,
    absolute: bool = False,
) -> Line:
    """Compare numbers or arrays.

    Args:
      part: see `Line`.
      quantity: see `Line`.
      ours: a number or an array.
      theirs: the same of the reference.
      tolerance: see `Line`.
      note: see `Line`.
      absolute: whether the difference is taken as it is; else over the largest value of theirs.

    Returns:
      A Line; another shape, or a NaN on one side, is a difference of NaN.
    """
    a, b = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    if a.shape != b.shape:
        return Line(part, f"{quantity} {a.shape}/{b.shape}", *[math.nan] * 3, tolerance, note)
    gap = np.abs(a - b)
    where = np.unravel_index(np.argmax(gap), gap.shape) if gap.ndim else ()
    largest = float(gap[where])
    scale = 1.0 if absolute else float(np.abs(b).max()) or 1.0
    return Line(part, quantity, float(a[where]), float(b[where]), largest / scale, tolerance, note)


def worst(lines: Iterable[Line], quantity: str) -> Line:
    """Of the same comparison at several sizes, the one nearest to (or farthest beyond) its tolerance."""
    lines = list(lines)
    bad = [x for x in lines if math.isnan(x.difference)]
    key = lambda x: x.difference / (x.tolerance or 1e-300)  # noqa: E731
    # Of equals the last, which is the largest.
    chosen = bad[0] if bad else max(reversed(lines), key=key)
    return dataclasses.replace(chosen, quantity=quantity)


def check_parts(only: Sequence[str]) -> tuple[str, ...]:
    """The parts to do, in their order; all if none are named.

    Raises:
      UserError: an unknown part.
    """
    for name in only:
        if name not in PARTS:
            raise unknown("part of the comparison", name, PARTS)
    return tuple(name for name in PARTS if not only or name in only)


def compare(
    reference: str,
    cl2r: str | None = None,
    only: Sequence[str] = (),
    data: str = "glyphs",
    seed: int = 0,
    folder: Path | None = None,
    progress: bool = False,
) -> Iterator[Line]:
    """The lines of the comparison, as they come.

    Args:
      reference: folder of a clone of iamcl2r.
      cl2r: folder of a clone of CL2R, to compare `fd` as well.
      only: parts to do, see PARTS; all by default.
      data: "glyphs" or "cifar".
      seed: of inputs, weights and batches.
      folder: empty, for both sides' files.
      progress: whether to show bars.

    Yields:
      Lines.

    Raises:
      UserError: no clones, PyTorch missing, an unknown part or data.
    """
    from compat_jax.interop import (
        comparison_cl2r,
        comparison_inputs,
        comparison_pieces,
        comparison_runs,
    )
    from compat_jax.interop import reference as clones

    parts = check_parts(only)
    comparison_inputs.check_data(data)
    modules = clones.open_clone(reference, "iamcl2r")
    others = None if cl2r is None else clones.open_clone(cl2r, "cl2r")
    return _lines(
        parts,
        lambda: comparison_pieces.lines(
            comparison_pieces.OURS, clones.Pieces(modules), seed, progress
        ),
        comparison_runs.Runs(reference, data, seed, folder, progress),
        None if others is None else lambda: comparison_cl2r.lines(others, parts, seed, progress),
    )


def _lines(parts, pieces: Callable[[], Iterator[Line]], runs, cl2r) -> Iterator[Line]:
    if "pieces" in parts:
        yield from pieces()
    if cl2r is not None:
        yield from cl2r()
    try:
        for name in ("steps", "protocol", "speed"):
            if name in parts:
                yield from getattr(runs, name)()
    finally:
        runs.close()


# --- the table

_HEAD = ("part", "quantity", "ours", "theirs", "difference", "tolerance", "verdict")
_WIDTHS = (8, 54, 13, 13, 11, 9, 7)


def head() -> str:
    """First lines of the table."""
    return _row(_HEAD) + "\n" + "|" + "|".join("-" * (w + 2) for w in _WIDTHS) + "|"


def row(one: Line) -> str:
    """A line of the table."""
    unit = f" {one.unit}" if one.unit else ""
    if one.tolerance is None:
        spread = "" if one.spread is None else f" ±{one.spread:.2f}"
        cells = (f"×{one.difference:.2f}{spread}", "", "")
    else:
        verdict = "equal" if one.passed else "DIFFERS"
        cells = (f"{one.difference:.2g}", f"{one.tolerance:.2g}", verdict)
    values = (f"{one.ours:.6g}{unit}", f"{one.theirs:.6g}{unit}")
    return _row((one.part, one.quantity, *values, *cells))


def _row(cells):
    padded = (f"{c:<{w}}" for c, w in zip(cells, _WIDTHS, strict=True))
    return "| " + " | ".join(padded) + " |"


def foot(lines: Sequence[Line]) -> str:
    """What the tolerances rest on, and the verdict on all."""
    used = [name for name in NOTES if any(x.note == name for x in lines)]
    texts = []
    for name in used:
        of = sorted({x.part for x in lines if x.note == name}, key=[*PARTS, "cl2r"].index)
        several = sorted({x.tolerance for x in lines if x.note == name and x.tolerance is not None})
        numbers = f" ({', '.join(f'{t:.2g}' for t in several)})" if several else ""
        texts.append(f"{name}{numbers}, {', '.join(of)}: {NOTES[name]}")
    judged = [x for x in lines if x.tolerance is not None]
    failed = [x for x in judged if not x.passed]
    verdict = f"{len(judged) - len(failed)} of {len(judged)} quantities are equal within tolerance"
    if failed:
        verdict += "; not: " + "; ".join(f"{x.part}: {x.quantity}" for x in failed)
    return "\n".join(["", *texts, "", verdict])


def write(path: str, command: Sequence[str], settings: dict[str, Any], lines: Sequence[Line]):
    """Everything as JSON.

    Raises:
      UserError: the file cannot be written.
    """
    from importlib import metadata

    def version(package):
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return None

    content = {
        "command": list(command),
        "python": sys.version.split()[0],
        "versions": {n: version(n) for n in ("compat_jax", "jax", "flax", "numpy", "torch")},
        **settings,
        "passed": all(x.passed for x in lines),
        "notes": NOTES,
        "lines": [{**_finite(dataclasses.asdict(x)), "passed": x.passed} for x in lines],
    }
    try:
        Path(path).write_text(json.dumps(content, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def _finite(content):
    return {
        k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in content.items()
    }
