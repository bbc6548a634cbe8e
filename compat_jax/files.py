"""Paths, and files that appear whole or not at all."""

import io
import json
import uuid
from typing import Any

import numpy as np
from etils import epath


def absolute(path: str | epath.Path) -> epath.Path:
    """The path from the root, as Orbax wants it; one in a bucket (gs://) stays as it is."""
    path = epath.Path(path).expanduser()
    return path if "://" in str(path) else path.absolute()


def first_line(error: Exception) -> str:
    """Kind and beginning of an error, for the parentheses of a message."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def write_bytes(path: epath.Path, content: bytes) -> None:
    """Write beside the target, then rename."""
    path = epath.Path(path)
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


def write_npy(path: epath.Path, array: np.ndarray) -> None:
    """As .npy."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    write_bytes(path, buffer.getvalue())
