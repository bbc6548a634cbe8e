"""The whole comparison with the reference: its parts in their order, line by line."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from compat_jax.errors import unknown
from launch.reference import cl2r as cl2r_lines
from launch.reference import clone, inputs, pieces, runs
from launch.reference.lines import PARTS, Line


def check_parts(only: Sequence[str]) -> tuple[str, ...]:
    """Return the parts to do, in their order; all of them if none is named.

    Raises:
      UserError: a name is not in PARTS.
    """
    for name in only:
        if name not in PARTS:
            raise unknown("part of the comparison", name, PARTS)
    return tuple(name for name in PARTS if not only or name in only)


def compare(
    reference: str,
    *,
    cl2r: str | None = None,
    only: Sequence[str] = (),
    data: str = "glyphs",
    seed: int = 0,
    folder: Path,
    progress: bool = False,
) -> Iterator[Line]:
    """Compare our code with clones of the reference.

    Args:
      reference: folder of a clone of iamcl2r.
      cl2r: folder of a clone of CL2R, to compare `fd` as well.
      only: parts to do, see PARTS; all by default.
      data: images to train on, "glyphs" or "cifar".
      seed: seed of the inputs, the weights and the batches.
      folder: an empty folder for the files of both sides.
      progress: show progress bars.

    Returns:
      The lines, each computed when it is asked for.

    Raises:
      UserError: a folder is no clone, PyTorch is missing, or a part or the data are unknown.
    """
    parts = check_parts(only)
    inputs.check_data(data)
    modules = clone.open_clone(reference, "iamcl2r")
    others = None if cl2r is None else clone.open_clone(cl2r, "cl2r")
    training = runs.Runs(reference, data=data, seed=seed, folder=folder, progress=progress)

    def lines():
        if "pieces" in parts:
            theirs = clone.Pieces(modules)
            yield from pieces.lines(pieces.OURS, theirs, seed=seed, progress=progress)
        if others is not None:
            yield from cl2r_lines.lines(others, parts, seed=seed)
        try:
            for name in ("steps", "protocol", "speed"):
                if name in parts:
                    yield from getattr(training, name)()
        finally:
            training.close()

    return lines()
