"""Features checked, cut into blocks of one size, and placed on devices."""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from compat_jax import mesh as meshes
from compat_jax.errors import UserError

# Scores of queries and gallery images that a metric holds at a time.
SCORES = 1 << 24


class Block(NamedTuple):
    """Gallery rows of one step.

    Attributes:
      rows: float32[size, d]; padding repeats the last row of the gallery.
      first: int32[], number of the first row.
      stop: int32[], number of rows of the whole gallery; rows numbered `stop` and up are padding.
    """

    rows: Any
    first: Any
    stop: Any


def gallery_blocks(
    gallery: np.ndarray | jax.Array, size: int, mesh: Mesh | None
) -> Iterator[Block]:
    """Yield the rows of a gallery in blocks, split over the "data" axis of a mesh.

    Args:
      gallery: float[n, d], on the host or on the device.
      size: rows of a block over all devices.
      mesh: where to place them; None for the default device.

    Raises:
      UserError: a value is not finite.
    """
    for start, rows in rows_of("gallery", gallery, size):
        yield Block(place(rows, mesh, "data"), np.int32(start), np.int32(len(gallery)))


def rows_of(
    name: str, features: np.ndarray | jax.Array, size: int
) -> Iterator[tuple[int, np.ndarray | jax.Array]]:
    """Yield features in blocks of one size.

    Args:
      name: of the features, for messages.
      features: float[n, d], on the host or on the device.
      size: rows of a block.

    Yields:
      The number of the first row, and float32[size, d]; the last block repeats its last row.

    Raises:
      UserError: a value is not finite.
    """
    for start in range(0, len(features), size):
        if isinstance(features, jax.Array):
            block = _slice(features, np.int32(start), size)
        else:
            block = np.asarray(features[start : start + size], np.float32)
            if len(block) < size:
                block = np.pad(block, ((0, size - len(block)), (0, 0)), mode="edge")
        check_finite(name, block, start)
        yield start, block


@partial(jax.jit, static_argnames="size")
def _slice(features, start, size):
    """Return rows start, start + 1, …; beyond the end, the last row."""
    rows = jnp.minimum(start + jnp.arange(size, dtype=jnp.int32), len(features) - 1)
    return features[rows].astype(jnp.float32)


def place(block: Any, mesh: Mesh | None, axis: str | None = None) -> jax.Array:
    """Place rows on the default device, or on a mesh.

    Args:
      block: [size, ...], on the host or on a device.
      mesh: where to; None for the default device.
      axis: of the mesh, to split the rows over; None for a copy on each device.
    """
    # On CPU, device_put uses an aligned host array in place, where jnp.asarray copies it.
    if mesh is None:
        return jax.device_put(block)
    if axis is not None and isinstance(block, np.ndarray):
        return meshes.shard_batch(block, mesh)
    return meshes.device_put(block, NamedSharding(mesh, PartitionSpec(axis)))


def power_of_two(n: int) -> int:
    """Return the smallest power of two that is at least n, and at least 1."""
    return 1 << max(n - 1, 0).bit_length()


def as_features(name: str, given: Any) -> np.ndarray | jax.Array:
    """Return features as an array: an array of numbers as it is, lists of them as float32.

    Args:
      name: of the features, for the message.
      given: as a user gave them.

    Raises:
      UserError: no numbers, or rows of unequal length.
    """
    if isinstance(given, jax.Array) or (
        isinstance(given, np.ndarray) and given.dtype.kind in "biufV"
    ):
        return given
    try:
        return np.asarray(given, np.float32)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{name} features must be numbers [rows, size], every row as long, got {given!r:.60}",
            name,
        ) from error


def check_finite(name: str, features, start: int = 0) -> None:
    """Refuse features with a NaN or an infinity.

    Args:
      name: name of the features, for the message.
      features: float[n, d].
      start: number of the first row, for the message.

    Raises:
      UserError: a value is not finite; names the first such row.
    """
    # A row with a value that is not finite has no finite sum, and sums are cheaper to test than values.
    with np.errstate(over="ignore", invalid="ignore"):
        sums = np.asarray(features.sum(axis=1))
    doubted = np.flatnonzero(~np.isfinite(sums))
    if not len(doubted):
        return
    # The sum of finite values may be beyond the type: of float16 from 65520 on.
    finite = np.isfinite(np.asarray(features[doubted])).all(axis=1)
    if not finite.all():
        row = start + doubted[np.argmin(finite)]
        raise UserError(
            f"{name} features have a value that is not finite in row {row}: "
            "look for a diverged version or a broken image there"
        )


def check_sizes(query, gallery) -> None:
    """Refuse features that are not two arrays [rows, size] of the same size.

    Args:
      query: float[q, d].
      gallery: float[n, d].

    Raises:
      UserError: a shape does not fit; names both.
    """
    if query.ndim != 2 or gallery.ndim != 2:
        raise UserError(
            f"retrieval takes features [rows, size], got shapes {query.shape} (query) and "
            f"{gallery.shape} (gallery)"
        )
    if query.shape[1] != gallery.shape[1]:
        raise UserError(
            f"query features have size {query.shape[1]} and gallery features {gallery.shape[1]}: "
            "versions of unequal feature size cannot be compared"
        )
