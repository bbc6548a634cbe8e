"""The mesh of devices, its named axes, and the shardings that the steps use."""

import math
import re
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from compat_jax import hosts
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
      UserError: sizes that need more devices than there are, or leave a host out, or a -1 that does
        not come out whole.
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
    idle = {d.process_index for d in devices} - {d.process_index for d in devices[:needed]}
    if idle:
        raise UserError(
            f"mesh {text!r} needs {needed} of {len(devices)} devices and leaves {len(idle)} hosts "
            "without work: use more of them, or fewer hosts"
        )
    return jax.make_mesh(
        tuple(sizes.values()),
        AXES,
        axis_types=(AxisType.Auto,) * len(AXES),
        devices=devices[:needed],
    )


def host_device() -> jax.Device | None:
    """The CPU as a device of JAX; None where JAX_PLATFORMS leaves it out."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def along_data(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """The array's `axis` is split over the mesh's data axis."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, "data"))


def along_features(mesh: Mesh) -> NamedSharding:
    """Rows of features are split over the data axis, their columns over the model axis."""
    return NamedSharding(mesh, PartitionSpec("data", "model"))


def over_all(mesh: Mesh, size: int) -> NamedSharding:
    """A batch of this size is split over all devices, if they divide it, else as `along_data`."""
    axes = AXES if size % mesh.size == 0 else "data"
    return NamedSharding(mesh, PartitionSpec(axes))


def shardings(mesh: Mesh, tree: Any) -> Any:
    """Shardings of variables, or of a training state, by the names of the arrays.

    Args:
      mesh: devices.
      tree: whose leaves have shapes.

    Returns:
      The same tree of NamedShardings: the columns of the projection `fc1` (and of its momentum) are
      split over the model axis, everything else is on every device.
    """
    columns, everywhere = NamedSharding(mesh, PartitionSpec(None, "model")), replicated(mesh)
    return jax.tree_util.tree_map_with_path(
        lambda path, _: columns if is_projection(path) else everywhere, tree
    )


def padded(mesh: Mesh, size: int) -> int:
    """The smallest number of feature columns of at least this size that the model axis divides."""
    parts = mesh.shape["model"]
    return -(-size // parts) * parts


def fitted(embedder: Any, mesh: Mesh) -> Any:
    """The embedder with as many more columns in its projection as the model axis needs."""
    size = embedder.projection
    if size is None or padded(mesh, size) == size:
        return embedder
    return embedder.clone(projection=padded(mesh, size))


def place(tree: Any, mesh: Mesh, size: int | None = None) -> Any:
    """Variables, or a training state, on the mesh as `shardings` says.

    Args:
      tree: arrays.
      mesh: devices.
      size: columns that the projection is brought to, by zeros behind or by leaving out what is
        behind; None leaves it as it is.

    Returns:
      The tree of global arrays; those that are there already are not copied.
    """

    def put(path, leaf, sharding):
        return _put(_with_columns(leaf, size) if is_projection(path) else leaf, sharding)

    return jax.tree_util.tree_map_with_path(put, tree, shardings(mesh, tree))


def place_like(tree: Any, like: Any) -> Any:
    """The tree on the devices of `like`, its projection with as many columns as there."""

    def put(path, leaf, old):
        size = old.shape[1] if is_projection(path) else None
        return _put(_with_columns(leaf, size), old.sharding)

    return jax.tree_util.tree_map_with_path(put, tree, like)


def put(tree: Any, sharding: NamedSharding) -> Any:
    """Arrays, of which every process has the whole, on the devices that `sharding` says."""
    return jax.tree.map(lambda array: _put(array, sharding), tree)


def feed(array: np.ndarray, mesh: Mesh, axis: int = 0) -> jax.Array:
    """An array on the devices as `along_data` says; each process hands over its own share."""
    sharding = along_data(mesh, axis)
    parts = sharding.addressable_devices_indices_map(array.shape).values()
    bounds = {part[axis].indices(array.shape[axis])[:2] for part in parts}
    first, last = min(b[0] for b in bounds), max(b[1] for b in bounds)
    own = array
    if sum(stop - start for start, stop in bounds) == last - first:  # without gaps
        own = array[(*[slice(None)] * axis, slice(first, last))]
    return jax.make_array_from_process_local_data(sharding, own, array.shape)


def _put(array, sharding):
    if not hosts.several():
        return jax.device_put(array, sharding)
    if isinstance(array, jax.Array) and array.sharding == sharding:
        return array
    content = hosts.whole(array)
    return jax.make_array_from_callback(
        content.shape, sharding, lambda index: np.asarray(content[index])
    )


def _with_columns(array, size):
    if size is None or array.shape[1] == size:
        return array
    array = hosts.whole(array)[:, :size]
    return np.pad(array, ((0, 0), (0, size - array.shape[1])))


def cut_projection(tree: Any, size: int | None) -> Any:
    """Variables without the columns that `place` added behind the first `size` of the projection."""

    def cut(path, leaf):
        return _with_columns(leaf, size) if is_projection(path) else leaf

    return jax.tree_util.tree_map_with_path(cut, tree)


def is_projection(path: tuple) -> bool:
    """Whether a leaf is the kernel of `fc1`, and not of a layer of that name in the backbone."""
    names = [getattr(key, "key", getattr(key, "name", None)) for key in path]
    return names[-2:] == ["fc1", "kernel"] and "backbone" not in names


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
