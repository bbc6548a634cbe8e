"""The files of a ledger's pictures: whether they are there, and whether they are what they were.

A file of the path, size and time that the ledger knows is not read again; any other one is digested.
"""

import os
from collections.abc import Sequence
from typing import NamedTuple

from etils import epath

from compat_jax.data import reading
from compat_jax.data.ledger import LEDGER, Ledger, Row
from compat_jax.data.listing import Picture
from compat_jax.data.pictures import missing
from compat_jax.errors import UserError
from compat_jax.files import in_bucket
from compat_jax.meter import Meter, counted


class Found(NamedTuple):
    """A picture of a listing, as its file is now.

    Attributes:
      digest: of the file, hexadecimal.
      picture: its path, label and split.
      size: in bytes.
      modified: time of the file in ns.
    """

    digest: str
    picture: Picture
    size: int
    modified: int


def digested(pictures: Sequence[Picture], ledger: Ledger, progress: str | None) -> list[Found]:
    """Take the digest, size and time of every file; unchanged files are not read again.

    Args:
      pictures: of a listing.
      ledger: of what is known.
      progress: label of a progress bar; None for none.

    Raises:
      BadPictures: a file is not there or cannot be read.
    """
    known = ledger.known_files()

    def one(i):
        picture = pictures[i]
        digest, size, modified = _as_it_is(picture.path, known.get(picture.path))
        return Found(digest, picture, size, modified)

    found = []
    with Meter(progress, len(pictures), units="files", keep=False) as meter:
        for item in reading.in_order(len(pictures), one, block=16):
            found.append(item)
            meter.update()
    return found


def check_unchanged(rows: Sequence[Row], remedy: str) -> None:
    """Refuse pictures whose files have other contents than the ledger says.

    Args:
      rows: of pictures that are there.
      remedy: what to do, for the error.

    Raises:
      UserError: naming how many, and the first.
      BadPictures: a file is not there or cannot be read.
    """
    now = reading.in_order(len(rows), lambda i: _as_it_is(rows[i].path, rows[i])[0], block=16)
    changed = [row.path for row, digest in zip(rows, now, strict=True) if digest != row.digest]
    if changed:
        have = "has" if len(changed) == 1 else "have"
        raise UserError(
            f"{counted(len(changed), 'picture')} {have} other contents than when {LEDGER} took them "
            f"down, such as {changed[0]}: {remedy}",
            "path",
        )


def is_there(path: str) -> bool:
    """Return whether a picture of the ledger is there, on a disk or in a bucket."""
    if in_bucket(path):
        return epath.Path(path).exists()
    return bool(path) and os.path.exists(path)


def _as_it_is(path: str, known: Row | None) -> tuple[str, int, int]:
    """Digest, bytes and time of a file; the digest is the known one where the others agree."""
    size, modified = _size_and_time(path)
    if known is not None and (known.size, known.modified) == (size, modified):
        return known.digest, size, modified
    return reading.file_digest(path).hex(), size, modified


def _size_and_time(path: str) -> tuple[int, int]:
    """Bytes and time in ns of a file.

    Raises:
      BadPictures: there is none.
    """
    try:
        if in_bucket(path):
            found = epath.Path(path).stat()
            return found.length, int(found.mtime * 1e9)
        known = os.stat(path)
        return known.st_size, known.st_mtime_ns
    except FileNotFoundError as error:
        raise missing(path) from error
