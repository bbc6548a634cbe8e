"""The device mesh, its named axes, and the shardings of training and retrieval."""

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from compat_jax import hosts
from compat_jax.errors import UserError, unknown

AXES = ("data", "model")


def parse_mesh(text: str) -> dict[str, int]:
    """Parse `"data:-1,model:1"` into {"data": -1, "model": 1}; a missing axis has size 1.

    Raises:
      UserError: unknown axis, a size that is not a number, or more than one -1.
    """
    sizes = dict.fromkeys(AXES, 1)
    for part in filter(None, text.replace(" ", "").split(",")):
        axis, _, size = part.partition(":")
        if axis not in AXES:
            raise unknown("mesh axis", axis, AXES, argument="mesh")
        if not re.fullmatch("-1|[1-9][0-9]*", size):
            raise UserError(
                f"mesh axis {axis!r} needs a size like {axis}:2, or {axis}:-1 for all the devices "
                f"that are left, got {part!r}",
                "mesh",
            )
        sizes[axis] = int(size)
    if list(sizes.values()).count(-1) > 1:
        raise UserError(
            f"only one mesh axis can be -1 (the rest of the devices), got {text!r}", "mesh"
        )
    return sizes


def make_mesh(text: str = "data:-1", devices=None) -> Mesh:
    """Make a mesh with the axes `data` (the batch) and `model` (the simplex's columns).

    Args:
      text: sizes, e.g. "data:-1,model:1".
      devices: devices to use; all of JAX's by default. They may belong to a compile-only topology
        (`jax.experimental.topologies`).

    Returns:
      A Mesh with Auto axes, over the first devices if the sizes need fewer than there are.

    Raises:
      UserError: the sizes need more devices than there are, leave a host without work, or a -1 does
        not divide evenly.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = parse_mesh(text)
    known = math.prod(s for s in sizes.values() if s > 0)
    if -1 in sizes.values():
        if len(devices) % known:
            raise UserError(
                f"mesh {text!r}: {len(devices)} devices do not divide by {known}", "mesh"
            )
        sizes = {a: len(devices) // known if s == -1 else s for a, s in sizes.items()}
    needed = math.prod(sizes.values())
    if needed > len(devices):
        raise UserError(f"mesh {text!r} needs {needed} devices, there are {len(devices)}", "mesh")
    idle = {d.process_index for d in devices} - {d.process_index for d in devices[:needed]}
    if idle:
        raise UserError(
            f"mesh {text!r} needs {needed} of {len(devices)} devices and leaves {len(idle)} hosts "
            "without work: use more of them, or fewer hosts",
            "mesh",
        )
    return jax.make_mesh(
        tuple(sizes.values()),
        AXES,
        axis_types=(AxisType.Auto,) * len(AXES),
        devices=devices[:needed],
    )


def host_device() -> jax.Device | None:
    """Return the CPU device; None if JAX_PLATFORMS excludes it."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None


def replicated(mesh: Mesh) -> NamedSharding:
    """Replicate an array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def along_data(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Split the array's `axis` over the data axis of the mesh."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, "data"))


def along_features(mesh: Mesh) -> NamedSharding:
    """Split the rows of features over the data axis and their columns over the model axis."""
    return NamedSharding(mesh, PartitionSpec("data", "model"))


def over_all(mesh: Mesh, size: int) -> NamedSharding:
    """Split a batch of this size over all devices if they divide it, else over the data axis."""
    axes = AXES if size % mesh.size == 0 else "data"
    return NamedSharding(mesh, PartitionSpec(axes))


def shardings(mesh: Mesh, tree: Any) -> Any:
    """Return the shardings of variables, or of a training state, by the names of the arrays.

    Args:
      mesh: devices.
      tree: leaves have shapes.

    Returns:
      The same tree of NamedShardings: columns of a `projection` kernel (and of its momentum) split over
      the model axis, everything else replicated.
    """
    columns, everywhere = NamedSharding(mesh, PartitionSpec(None, "model")), replicated(mesh)
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: columns if is_projection(path, leaf) else everywhere, tree
    )


def padded_size(mesh: Mesh, size: int) -> int:
    """Round a number of feature columns up to a multiple of the model axis."""
    parts = mesh.shape["model"]
    return -(-size // parts) * parts


def pad_projection(embedder: Any, mesh: Mesh) -> Any:
    """Widen the embedder's projection to a multiple of the model axis."""
    size = embedder.projection_size
    if size is None or padded_size(mesh, size) == size:
        return embedder
    return embedder.clone(projection_size=padded_size(mesh, size))


def shard(tree: Any, mesh: Mesh, size: int | None = None) -> Any:
    """Shard variables, or a training state, over the mesh; see `shardings`.

    Args:
      tree: arrays.
      mesh: devices.
      size: number of columns to zero-pad or cut every projection to; None leaves them as they are.

    Returns:
      The tree of global arrays; arrays that are already in place are not copied.
    """

    def put(path, leaf, sharding):
        return _put(_with_columns(leaf, size) if is_projection(path, leaf) else leaf, sharding)

    return jax.tree_util.tree_map_with_path(put, tree, shardings(mesh, tree))


def shard_like(tree: Any, like: Any) -> Any:
    """Put a tree on the devices of `like`, with as many projection columns as `like` has."""

    def put(path, leaf, old):
        size = old.shape[1] if is_projection(path, old) else None
        return _put(_with_columns(leaf, size), old.sharding)

    return jax.tree_util.tree_map_with_path(put, tree, like)


def device_put(tree: Any, sharding: NamedSharding) -> Any:
    """Put arrays, which every process holds in full, on devices with one sharding."""
    return jax.tree.map(lambda array: _put(array, sharding), tree)


def shard_batch(array: np.ndarray, mesh: Mesh, axis: int = 0) -> jax.Array:
    """Split an array over the data axis; each process contributes its own share."""
    sharding = along_data(mesh, axis)
    parts: Any = sharding.addressable_devices_indices_map(array.shape).values()
    bounds = {part[axis].indices(array.shape[axis])[:2] for part in parts}
    first, last = min(b[0] for b in bounds), max(b[1] for b in bounds)
    own = array
    if sum(stop - start for start, stop in bounds) == last - first:  # without gaps
        own = array[(*[slice(None)] * axis, slice(first, last))]
    return jax.make_array_from_process_local_data(sharding, own, array.shape)


def _put(array, sharding):
    if not hosts.is_distributed():
        return jax.device_put(array, sharding)
    if isinstance(array, jax.Array) and array.sharding == sharding:
        return array
    content = hosts.gather(array)
    return jax.make_array_from_callback(
        content.shape, sharding, lambda index: np.asarray(content[index])
    )


def _with_columns(array, size):
    if size is None or array.shape[1] == size:
        return array
    array = hosts.gather(array)[:, :size]
    return np.pad(array, ((0, 0), (0, size - array.shape[1])))


def unpad_projection(tree: Any, size: int | None) -> Any:
    """Cut every projection back to its first `size` columns, undoing the padding of `shard`."""

    def cut(path, leaf):
        return _with_columns(leaf, size) if is_projection(path, leaf) else leaf

    return jax.tree_util.tree_map_with_path(cut, tree)


def resize_projection(tree: Any, size: int) -> Any:
    """Cut or zero-pad every projection to `size` columns on its devices, also in a compiled program."""

    def resize(path, leaf):
        if not is_projection(path, leaf) or leaf.shape[1] == size:
            return leaf
        own = jnp.asarray(leaf)[:, :size]
        return jnp.pad(own, ((0, 0), (0, size - own.shape[1])))

    return jax.tree_util.tree_map_with_path(resize, tree)


def is_projection(path: tuple, leaf: Any) -> bool:
    """Return whether a leaf is an embedder's projection kernel, or has its rows and columns.

    Layers of a backbone never are, nor what an optimiser keeps of rows or columns alone. A leaf without
    dimensions, which stands for an array, goes by its path.
    """
    names = [getattr(key, "key", getattr(key, "name", None)) for key in path]
    is_named = names[-2:] == ["projection", "kernel"] and "backbone" not in names
    return is_named and getattr(leaf, "ndim", 2) == 2


def check_batch(mesh: Mesh, batch_size: int) -> None:
    """Refuse a batch size that the data axis does not divide.

    Raises:
      UserError: naming the nearest sizes that divide.
    """
    size = mesh.shape["data"]
    if batch_size % size:
        near = sorted({max(batch_size // size, 1) * size, (batch_size // size + 1) * size})
        raise UserError(
            f"batch_size {batch_size} does not divide over {size} devices of the data axis: "
            f"use {' or '.join(map(str, near))}",
            "batch_size",
        )


def round_up(mesh: Mesh, batch_size: int) -> int:
    """Round a batch size up to a multiple of the data axis."""
    size = mesh.shape["data"]
    return -(-batch_size // size) * size
