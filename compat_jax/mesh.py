"""The mesh of devices, its named axes, and the shardings that the steps use."""

import math
import re

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from compat_jax.errors import UserError, unknown

AXES = ("data", "model")


def parse_mesh(text: str) -> dict[str, int]:
    """`"data:-1,model:1"` as {"data": -1, "model": 1}; an axis left out has size 1.

    Raises:
      UserError: unknown axis, size that is no number, more than one -1.
    """
    sizes = dict.fromkeys(AXES, 1)
    for part in filter(None, text.replace(" ", "").split(",")):
        axis, _, size = part.partition(":")
        if axis not in AXES:
            raise unknown("mesh axis", axis, AXES)
        if not re.fullmatch("-1|[1-9][0-9]*", size):
            raise UserError(
                f"mesh axis {axis!r} needs a size like {axis}:2, or {axis}:-1 for all the devices "
                f"that are left, got {part!r}"
            )
        sizes[axis] = int(size)
    if list(sizes.values()).count(-1) > 1:
        raise UserError(f"only one mesh axis can be -1 (the rest of the devices), got {text!r}")
    return sizes


def make_mesh(text: str = "data:-1", devices=None) -> Mesh:
    """A mesh of devices with the axes `data` (the batch) and `model` (the simplex's columns).

    Args:
      text: sizes, e.g. "data:-1,model:1".
      devices: devices to use; all of JAX's by default. They may be devices that are not there
        (`jax.experimental.topologies`), for plans.

    Returns:
      A Mesh with Auto axes, of the first devices if the sizes need fewer than there are.

    Raises:
      UserError: sizes that need more devices than there are, or a -1 that does not come out whole.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = parse_mesh(text)
    known = math.prod(s for s in sizes.values() if s > 0)
    if -1 in sizes.values():
        if len(devices) % known:
            raise UserError(f"mesh {text!r}: {len(devices)} devices do not divide by {known}")
        sizes = {a: len(devices) // known if s == -1 else s for a, s in sizes.items()}
    needed = math.prod(sizes.values())
    if needed > len(devices):
        raise UserError(f"mesh {text!r} needs {needed} devices, there are {len(devices)}")
    return jax.make_mesh(
        tuple(sizes.values()),
        AXES,
        axis_types=(AxisType.Auto,) * len(AXES),
        devices=devices[:needed],
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def along_data(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """The array's `axis` is split over the mesh's data axis."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, "data"))


def check_batch(mesh: Mesh, batch_size: int) -> None:
    """Refuse a batch that the data axis does not divide.

    Raises:
      UserError: with the next sizes that do.
    """
    size = mesh.shape["data"]
    if batch_size % size:
        near = sorted({max(batch_size // size, 1) * size, (batch_size // size + 1) * size})
        raise UserError(
            f"batch_size {batch_size} does not divide over {size} devices of the data axis: "
            f"use {' or '.join(map(str, near))}"
        )


def round_up(mesh: Mesh, batch_size: int) -> int:
    """The smallest batch of at least this size that divides over the data axis."""
    size = mesh.shape["data"]
    return -(-batch_size // size) * size
