"""Lines of the comparison's table: two values, their difference, a tolerance and a verdict."""

import dataclasses
import json
import math
import sys
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from compat_jax.errors import UserError

PARTS = ("pieces", "steps", "protocol", "speed")

# Why each tolerance is what it is: the footnotes of the table.
NOTES = {
    "exact": "The same decision on the same numbers, without rounding in between. Identification may "
    "differ by one query whose two nearest templates are equally near up to rounding.",
    "rounding": "Largest difference divided by largest value. float32 rounds at 1.2e-7; summing a "
    "batch in another order makes it about 1e-6.",
    "network": "As rounding, through a network of 18 or 32 layers, where it accumulates.",
    "step": "Relative; for weights, to the largest update. Each step starts from weights that differ "
    "by the rounding of all earlier steps, and a ReLU or maximum that flips adds to it: the reference "
    "differs as much from itself when its first weights are changed by one rounding. The 20 steps "
    "start from trained weights; from random ones the difference grows tenfold a step.",
    "matrix": "In percentage points. A query whose two nearest templates are as close to each other "
    "as the two sides' versions are may be assigned to another class.",
    "pairs": "A pair of versions can only be judged differently if its margin, M[t,k] - M[k,k], is "
    "within twice the tolerance of an entry: the tolerance is the share of AC that such pairs hold.",
    "speed": "Reported, not judged. The difference is our time divided by theirs: the median over "
    "the repetitions, ± half the interquartile range.",
}


@dataclasses.dataclass(frozen=True)
class Line:
    """One quantity on both sides.

    Attributes:
      part: part of the comparison, a name in PARTS or "cl2r".
      quantity: what is compared.
      ours: our value; for an array, the entry where both sides differ most.
      theirs: the reference's value.
      difference: difference of the two, measured as the note says; for "speed", a ratio.
      tolerance: largest difference that passes; None if the line is only reported.
      note: key in NOTES.
      unit: unit of both values.
      spread: spread of a ratio, else None.
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
        """True if the difference is within the tolerance; a NaN never passes."""
        return self.tolerance is None or self.difference <= self.tolerance


def line(
    quantity: str,
    ours: Any,
    theirs: Any,
    *,
    part: str,
    tolerance: float,
    note: str,
    absolute: bool = False,
) -> Line:
    """Compare two numbers or two arrays.

    Args:
      quantity: what is compared.
      ours: a number or an array.
      theirs: the reference's value, of the same shape.
      part: part of the comparison, see `Line`.
      tolerance: largest difference that passes.
      note: key in NOTES.
      absolute: take the difference as it is, instead of divided by the largest value of `theirs`.

    Returns:
      A Line. Its difference is NaN if the shapes differ or either side has a NaN.
    """
    a, b = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    found = Line(
        part=part,
        quantity=quantity,
        ours=math.nan,
        theirs=math.nan,
        difference=math.nan,
        tolerance=tolerance,
        note=note,
    )
    if a.shape != b.shape:
        return dataclasses.replace(found, quantity=f"{quantity} {a.shape}/{b.shape}")
    gap = np.abs(a - b)
    where = np.unravel_index(np.argmax(gap), gap.shape) if gap.ndim else ()
    scale = 1.0 if absolute else float(np.abs(b).max()) or 1.0
    difference = float(gap[where]) / scale
    return dataclasses.replace(
        found, ours=float(a[where]), theirs=float(b[where]), difference=difference
    )


def worst(lines: Iterable[Line], quantity: str) -> Line:
    """Return the line closest to its tolerance, or farthest beyond it.

    Args:
      lines: the same comparison on inputs of several sizes, smallest first.
      quantity: name of the line that is returned.

    Returns:
      One of the lines, renamed: the first with a NaN if there is one; of equals, the last.
    """
    lines = list(lines)
    bad = [x for x in lines if math.isnan(x.difference)]
    key = lambda x: x.difference / (x.tolerance or 1e-300)  # noqa: E731
    chosen = bad[0] if bad else max(reversed(lines), key=key)
    return dataclasses.replace(chosen, quantity=quantity)


# --- the table

_HEAD = ("part", "quantity", "ours", "theirs", "difference", "tolerance", "verdict")
_WIDTHS = (8, 54, 13, 13, 11, 9, 7)


def head() -> str:
    """Return the first two lines of the table."""
    return _row(_HEAD) + "\n" + "|" + "|".join("-" * (w + 2) for w in _WIDTHS) + "|"


def row(one: Line) -> str:
    """Return a line as a row of the table."""
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
    """Return the footnotes that explain the tolerances, and the overall verdict."""
    texts = []
    for name in NOTES:
        noted = [x for x in lines if x.note == name]
        if not noted:
            continue
        parts = sorted({x.part for x in noted}, key=[*PARTS, "cl2r"].index)
        several = sorted({x.tolerance for x in noted if x.tolerance is not None})
        numbers = f" ({', '.join(f'{t:.2g}' for t in several)})" if several else ""
        texts.append(f"{name}{numbers}, {', '.join(parts)}: {NOTES[name]}")
    judged = [x for x in lines if x.tolerance is not None]
    failed = [x for x in judged if not x.passed]
    verdict = f"{len(judged) - len(failed)} of {len(judged)} quantities are equal within tolerance"
    if failed:
        verdict += "; not: " + "; ".join(f"{x.part}: {x.quantity}" for x in failed)
    return "\n".join(["", *texts, "", verdict])


def write(
    path: str, lines: Sequence[Line], *, command: Sequence[str], settings: dict[str, Any]
) -> None:
    """Write all lines, the command and the package versions as JSON.

    Args:
      path: file to write.
      lines: all lines of the table.
      command: argv of the program.
      settings: further entries of the file, by name.

    Raises:
      UserError: the file cannot be written.
    """
    packages = ("compat_jax", "jax", "flax", "numpy", "torch")
    content = {
        "command": list(command),
        "python": sys.version.split()[0],
        "versions": {name: _version(name) for name in packages},
        **settings,
        "passed": all(x.passed for x in lines),
        "notes": NOTES,
        "lines": [{**_finite(dataclasses.asdict(x)), "passed": x.passed} for x in lines],
    }
    try:
        Path(path).write_text(json.dumps(content, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def _version(package):
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _finite(content):
    """Replace the NaNs and infinities, which JSON does not have, by None."""
    return {
        k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in content.items()
    }
