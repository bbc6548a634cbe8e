"""Paths, local or in a bucket, and files that appear whole or not at all."""

import functools
import hashlib
import importlib.util
import io
import json
import uuid
from collections.abc import Iterator
from typing import Any

import numpy as np
from etils import epath

from compat_jax.errors import UserError


def absolute(path: str | epath.Path) -> epath.Path:
    """The path from the root, as Orbax wants it; one in a bucket (gs://) stays as it is.

    Raises:
      UserError: a bucket, and nothing installed that reads it.
    """
    path = epath.Path(path).expanduser()
    if not in_bucket(path):
        return path.absolute()
    _prepare_buckets(str(path))
    return path


def in_bucket(path: str | epath.Path) -> bool:
    """Whether a path is an address like gs://bucket/folder, where nothing can be renamed."""
    return "://" in str(path)


@functools.cache
def _prepare_buckets(path):
    if path.startswith("gs://") and importlib.util.find_spec("gcsfs") is None:
        raise UserError(
            f"{path} needs gcsfs, which is not installed: pip install gcsfs (or this package with "
            "its extra gcs)"
        )
    import fsspec  # comes with etils

    # Others write as well, among them TensorStore: a listing that was kept would be wrong.
    fsspec.config.conf.setdefault("gs", {})["use_listings_cache"] = False


def first_line(error: Exception) -> str:
    """Kind and beginning of an error, for the parentheses of a message."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def walk(folder: epath.Path) -> Iterator[epath.Path]:
    """All files below a folder, in the order of their names."""
    for path in sorted(folder.iterdir()):
        yield from walk(path) if path.is_dir() else [path]


def sha256(path: epath.Path) -> str:
    """SHA-256 of a file, as a hexadecimal string."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def write_bytes(path: epath.Path, content: bytes) -> None:
    """Write beside the target, then rename; in a bucket an object appears whole by itself."""
    path = epath.Path(path)
    if in_bucket(path):
        path.write_bytes(content)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.part"
    try:
        aside.write_bytes(content)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def write_json(path: epath.Path, content: Any) -> None:
    """As indented JSON."""
    write_bytes(path, (json.dumps(content, indent=1) + "\n").encode())


def create(path: epath.Path, content: bytes) -> bool:
    """Write an object of a bucket unless it is there; of several writers one is told True."""
    import fsspec

    system, inside = fsspec.core.url_to_fs(str(path))
    try:
        system.pipe_file(inside, content, mode="create")
    except FileExistsError:
        return False
    return True


def append(path: epath.Path, line: str) -> None:
    """Add a line to a text; an object of a bucket is written anew, since none can be added to."""
    if in_bucket(path):
        before = path.read_text() if path.exists() else ""
        path.write_text(f"{before}{line}\n")
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(f"{line}\n")


def write_npy(path: epath.Path, array: np.ndarray) -> None:
    """As .npy."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    write_bytes(path, buffer.getvalue())
