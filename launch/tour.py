"""Take a tour in the plane: three classes, one step, two versions, one query. Under a minute on a CPU.

  python -m launch.tour
  python -m launch.tour --out=/tmp/tour

Runs the cells of docs/tour.ipynb one after the other, prints what they say, and writes the picture that
they draw. Nothing is downloaded.
"""

import json
import os
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import flags

from compat_jax.errors import UserError
from compat_jax.files import absolute, in_bucket
from launch import _cli as cli

flags.DEFINE_string("out", "runs/tour", "folder for the picture")

NOTEBOOK = Path(__file__).resolve().parents[1] / "docs" / "tour.ipynb"
PICTURE = "tour.png"


def main(_) -> None:
    """Run the notebook in the folder."""
    out = absolute(flags.FLAGS.out)
    if in_bucket(out):
        raise UserError(f"{out} is in a bucket: give a folder of this machine", "out")
    cli.start_jax()
    from compat_jax import report

    report.check_writable(out)
    tour(out)
    print(f"\nThe picture: {out / PICTURE}")


def tour(folder: os.PathLike[str]) -> dict[str, Any]:
    """Print the texts of the notebook and run its code; the picture goes to a folder.

    Args:
      folder: that exists.

    Returns:
      The names that the code has defined.
    """
    names: dict[str, Any] = {"__name__": "tour"}
    os.environ.setdefault("MPLBACKEND", "agg")  # the code imports pyplot
    here = os.getcwd()
    os.chdir(folder)
    try:
        for number, cell in enumerate(json.loads(NOTEBOOK.read_text("utf-8"))["cells"]):
            text = "".join(cell["source"])
            if cell["cell_type"] == "code":
                exec(compile(text, f"{NOTEBOOK.name}, cell {number}", "exec"), names)
            else:
                print(("\n" if number else "") + plain(cell) + "\n")
    finally:
        os.chdir(here)
    return names


def plain(cell: Mapping[str, Any]) -> str:
    """Return the text of a cell without marks, for a terminal."""
    paragraphs = "".join(cell["source"]).split("\n\n")
    return "\n\n".join(textwrap.fill(part.lstrip("# "), 88) for part in paragraphs)


if __name__ == "__main__":
    cli.run(main, __doc__)
