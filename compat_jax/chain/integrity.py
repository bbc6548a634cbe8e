"""Checks of an entry of a chain before it is written or read: nothing in it is believed."""

import math
import os
import re
import stat
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import traverse_util
from orbax.checkpoint import v1 as ocp

from compat_jax.chain.record import MAX_BYTES, is_count
from compat_jax.errors import UserError
from compat_jax.files import check_memory, in_bucket, sha256

_VARIABLES = re.compile(r"variables(-[0-9a-f]{8})?")


def check_finite(variables: Mapping[str, Any]) -> None:
    """Refuse variables that are not finite.

    Raises:
      UserError: naming the array.
    """
    for name, array in traverse_util.flatten_dict(variables, sep="/").items():
        if jnp.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all():
            raise UserError(
                f"{name} holds values that are not finite: the training diverged or the weights are "
                "broken, so they are not made a version"
            )


def read_text(path: epath.Path, most: int) -> str:
    """Read a regular file of at most `most` bytes as text.

    Raises:
      UserError: no regular file, or too large.
    """
    check_regular(path)
    with path.open("rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise UserError("record.json is too large")
    return content.decode()


def check_regular(path: epath.Path) -> None:
    """Refuse a FIFO, a device or a link, which could hang a reader or feed it for ever.

    Raises:
      UserError: naming the file.
    """
    if not in_bucket(path) and not stat.S_ISREG(os.lstat(path).st_mode):
        raise UserError(f"{path.name} is no regular file")


def variables_folder(files: Mapping[str, Any]) -> str:
    """Return the name of the one folder that all files of an entry are in."""
    (name,) = {relative.partition("/")[0] for relative in files}
    return name


def check_files(folder: epath.Path, files: Mapping[str, Any]) -> None:
    """Compare the files of an entry with its record's list, by size and SHA-256.

    Args:
      folder: of the entry.
      files: {path within it: {"bytes", "sha256"}}.

    Raises:
      UserError: naming the file that is missing, truncated, altered or outside of the entry.
    """
    for relative, expected in files.items():
        top = relative.partition("/")[0]
        if ".." in epath.Path(relative).parts or not _VARIABLES.fullmatch(top):
            raise UserError(f"it lists a file outside itself, {relative!r:.80}")
        path = folder / relative
        if not path.exists():
            raise UserError(f"{relative} is missing")
        check_regular(path)
        if path.stat().length != expected["bytes"]:
            raise UserError(
                f"{relative} has {path.stat().length} bytes instead of {expected['bytes']}"
            )
        if sha256(path) != expected["sha256"]:
            raise UserError(f"{relative} was altered (SHA-256)")


def targets(specs: Mapping[str, Any]) -> dict[str, Any]:
    """Make arrays that take no memory, as the targets of Orbax's read.

    Args:
      specs: {name: {"shape", "dtype"}} of the record.

    Raises:
      UserError: a shape or dtype that no version has, or more than this machine's memory.
    """
    flat, total = {}, 0
    for name, spec in specs.items():
        shape, dtype = spec["shape"], np.dtype(spec["dtype"])
        if not all(is_count(n, 0) for n in shape) or not jnp.issubdtype(dtype, np.number):
            raise UserError(f"{name} cannot have shape {shape!r:.80} and dtype {dtype}")
        total += math.prod(shape) * dtype.itemsize
        if total > MAX_BYTES:
            raise UserError(f"{name} of shape {shape!r:.80} is too large")
        flat[name] = np.broadcast_to(np.zeros((), dtype), shape)
    check_memory(total, "its variables")
    return traverse_util.unflatten_dict(flat, sep="/")


def check_stored(folder: epath.Path, template: Mapping[str, Any]) -> None:
    """Refuse a checkpoint whose own metadata differ from the record, before its data are read.

    A chunk larger than its array would make the store ask for any amount of memory.

    Args:
      folder: of the checkpoint.
      template: see `targets`.

    Raises:
      UserError: naming the array.
    """
    metadata: Any = ocp.metadata(folder).metadata
    if not isinstance(metadata, dict):
        raise UserError("its checkpoint has no readable metadata")
    stored = traverse_util.flatten_dict(metadata, sep="/")
    expected = traverse_util.flatten_dict(template, sep="/")
    if stored.keys() != expected.keys():
        raise UserError(f"it holds other arrays: {sorted(stored.keys() ^ expected.keys())[:3]}")
    for name, array in expected.items():
        found = stored[name]
        chunk = getattr(found.storage_metadata, "chunk_shape", None) or found.shape
        same = tuple(found.shape) == array.shape and np.dtype(found.dtype) == array.dtype
        fits = len(chunk) == array.ndim and all(
            c <= max(n, 1) for c, n in zip(chunk, array.shape, strict=True)
        )
        if not (same and fits):
            raise UserError(
                f"{name} is stored as {found.dtype} {tuple(found.shape)} in chunks of {tuple(chunk)}, "
                f"the record says {array.dtype} {array.shape}"
            )
