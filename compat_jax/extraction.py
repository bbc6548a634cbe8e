"""From pictures to features by a model: files, PIL images or arrays, one or a stream of them."""

import functools
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NoReturn, Protocol

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from compat_jax import hosts, memory
from compat_jax import mesh as meshes
from compat_jax.data.augment import Preprocess
from compat_jax.data.listing import list_item, list_pictures
from compat_jax.data.pictures import Preparation, decode
from compat_jax.data.reading import LazyImages, block_size, in_order
from compat_jax.errors import UserError
from compat_jax.features import Extractor, at_once
from compat_jax.files import in_bucket
from compat_jax.meter import Meter
from compat_jax.models.fold import fold_batch_norm

# Fewer pictures than a batch are padded to one of these, so that few programs are compiled.
BATCHES = (1, 8, 64)
_AHEAD = 2  # batches in flight


class Model(Protocol):
    """The part of a version that extraction needs."""

    @property
    def number(self) -> int:
        """Number in its chain."""

    @property
    def record(self) -> Any:
        """Description of the version."""

    @property
    def variables(self) -> dict[str, Any]:
        """Return {"params", "batch_stats"} as arrays."""

    def embedder(self, dtype: str = "float32") -> nn.Module:
        """Build the network."""


class Embedding:
    """A model on its devices, ready to embed; made once for a version, mesh and dtype.

    Args:
      model: the version.
      mesh: devices to spread each batch over.
      dtype: of the network's computation.
    """

    def __init__(self, model: Model, mesh: Mesh, dtype: str):
        record = model.record
        network: Any = meshes.pad_projection(model.embedder(dtype), mesh)
        put = functools.partial(meshes.device_put, sharding=meshes.replicated(mesh))
        folded = fold_batch_norm(network, model.variables, record.image_shape, put)
        self.variables = meshes.shard(folded, mesh, network.projection_size)
        preprocess = Preprocess(record.mean, record.std, crop_padding=0, flip=False)
        self.extractor, self.mesh = Extractor(network, preprocess, mesh), mesh
        self.size, self.shape = record.feature_size, record.image_shape
        self.number = model.number

    def batches(self, batches: Iterable[np.ndarray], batch_size: int) -> Iterator[np.ndarray]:
        """Embed batches, a few of them in flight.

        Args:
          batches: uint8[n, height, width, channels] each, 1 <= n <= batch_size.
          batch_size: that batches are padded to, unless a size of `BATCHES` will do for the first.

        Yields:
          float32[n, feature_size], in order.
        """
        apply = self.extractor.program(jax.tree.structure(self.variables))
        pending: list[tuple[jax.Array, int]] = []
        padded = 0
        for batch in batches:
            if not padded:
                fit = (b for b in (*BATCHES, batch_size) if len(batch) <= b <= batch_size)
                padded = meshes.round_up(self.mesh, next(fit, batch_size))
            missing = padded - len(batch)
            whole = np.pad(batch, ((0, missing), (0, 0), (0, 0), (0, 0))) if missing else batch
            found = apply(self.variables, meshes.shard_batch(whole, self.mesh))
            pending.append((found, len(batch)))
            if len(pending) > _AHEAD:
                yield self._rows(*pending.pop(0))
        for found, count in pending:
            yield self._rows(found, count)

    def _rows(self, found, count):
        return hosts.gather(found)[:count, : self.size]


def embed_pictures(
    embedding: Embedding,
    pictures: Any,
    *,
    prepare: Callable[[Any], np.ndarray] | None,
    batch_size: int,
    progress: str | None,
) -> np.ndarray:
    """Embed pictures of any kind.

    Args:
      embedding: the model on its devices.
      pictures: see `Version.embed`.
      prepare: brings a picture to the model's size; None where nobody said how.
      batch_size: pictures per batch, see `features.at_once`.
      progress: label of a progress bar; None for none.

    Returns:
      float32[n, feature_size], rows of norm 1.

    Raises:
      UserError: pictures that cannot be read, or of another size without `prepare`; a batch size that
        is no whole number of at least 1.
    """
    batch_size = at_once(embedding.mesh, batch_size, embedding.shape)
    pictures = _pictures(pictures)
    known = len(pictures) if hasattr(pictures, "__len__") else 0
    found = []
    few = memory.shortage("take a smaller batch_size")
    with few, Meter(progress, known, units="pictures", keep=False) as meter:
        batches = _prepared(pictures, embedding, prepare, batch_size=batch_size)
        for rows in embedding.batches(batches, batch_size):
            found.append(rows)
            meter.update(len(rows))
    return np.concatenate(found) if found else np.zeros((0, embedding.size), np.float32)


def checked_shard(shard: tuple[int, int]) -> tuple[int, int]:
    """Return a host's share of a list, (number, count), if it can be one: 0 <= number < count.

    Raises:
      UserError: anything else.
    """
    given = tuple(shard) if isinstance(shard, Sequence) else ()
    if len(given) == 2 and all(type(part) is int for part in given) and 0 <= given[0] < given[1]:
        return given
    raise UserError(
        f"a shard is (number, count) with 0 <= number < count, got {shard!r:.80}", "shard"
    )


def preparation_of(record: Any, given: Preparation | None) -> Preparation | None:
    """Return how pictures become the input of a version: as given, or as its record says; or None.

    Raises:
      UserError: another size than the version's.
    """
    if given is not None:
        height, width = record.image_shape[:2]
        if not given.size == height == width:
            raise UserError(
                f"preparation.size={given.size}, but the version embeds pictures of {height} x {width} "
                "px: features of another size are not comparable with its gallery's",
                "preparation",
            )
        return given
    return Preparation.from_mapping(record.preparation) if record.preparation else None


def rightly_prepared(pictures: Any, wanted: Preparation | None) -> Any:
    """Return pictures, or their files where a data set prepared them in another way than a version.

    Args:
      pictures: see `Version.embed`.
      wanted: how the version's pictures are prepared; None where nobody said.

    Raises:
      UserError: a data set of another size whose files are not known.
    """
    own = getattr(pictures, "preparation", None)
    if own is None or wanted is None or own == wanted:
        return pictures
    if pictures.files is not None:
        return list(pictures.files)
    if own.size == wanted.size:
        return pictures
    raise UserError(
        f"the pictures were brought to {own.size} px, the version was trained on {wanted.size} px: read "
        f"them with size={wanted.size}",
        "size",
    )


def _pictures(given: Any) -> Any:
    """An array of images, or an iterable of pictures."""
    given = getattr(given, "images", given)  # of a Dataset
    if isinstance(given, str | os.PathLike):
        return list_pictures(given)
    if isinstance(given, bytes | Image.Image):
        return [given]
    if isinstance(given, LazyImages):
        return given
    if hasattr(given, "__array__"):
        array = np.asarray(given)
        if array.ndim:
            return [array] if array.ndim in (2, 3) else array
    is_number = hasattr(given, "__array__")
    if is_number or not isinstance(given, Iterable) or isinstance(given, Mapping):
        raise UserError(
            f"pictures are paths, PIL images or uint8 arrays, one or many of them, got {given!r:.80}"
        )
    each = (one for item in given for one in _of_item(item))
    return list(each) if isinstance(given, Sequence) else each


def _of_item(item: Any) -> list[Any]:
    """Return the pictures of an item of a list: those of a path, or itself."""
    is_path = isinstance(item, str | os.PathLike) and not in_bucket(item)
    return list_item(item) if is_path else [item]


def _prepared(pictures, embedding, prepare, *, batch_size) -> Iterator[np.ndarray]:
    """uint8[n, height, width, channels] batches of the model's size."""
    own, shape = getattr(pictures, "shape", None), embedding.shape
    if own is not None and len(own) == 4:
        if pictures.dtype == np.uint8 and tuple(own[1:]) == tuple(shape):
            for start in range(0, own[0], batch_size):
                yield np.asarray(pictures[start : start + batch_size])
            return
        if pictures.dtype != np.uint8 or prepare is None:
            _refuse(embedding, pictures.dtype, own)
    rest, first = iter(pictures), 0
    while chunk := list(itertools.islice(rest, batch_size)):
        yield _batch(chunk, embedding, prepare, first=first)
        first += len(chunk)


def _batch(chunk, embedding, prepare, *, first) -> np.ndarray:
    shape = tuple(embedding.shape)

    def one(i):
        picture = chunk[i]
        array = np.asarray(picture) if hasattr(picture, "__array__") else None
        if array is not None and array.dtype == np.uint8 and array.shape == shape:
            return array
        if prepare is None and array is not None:
            _refuse(embedding, array.dtype, array.shape)
        where = "" if isinstance(picture, str | os.PathLike) else f"picture {first + i}"
        if prepare is not None:
            return prepare(picture, where)
        pixels = decode(picture, where)  # of the size already, or nobody said how to get there
        if pixels.shape != shape:
            _refuse(embedding, None, ())
        return pixels

    return np.stack(list(in_order(len(chunk), one, block=block_size(int(np.prod(shape))))))


def _refuse(embedding: Embedding, dtype: Any, found: Any) -> NoReturn:
    shape = ", ".join(map(str, embedding.shape))
    got = "files or images of any size" if dtype is None else f"{dtype} {list(found)}"
    wanted = f"version {embedding.number} embeds uint8 images of shape [n, {shape}], got {got}"
    if dtype is not None and dtype != np.uint8:
        raise UserError(f"{wanted}: convert them to uint8, values 0..255")
    raise UserError(
        f"{wanted}, and its record does not say how pictures were brought to that size: give "
        "preparation=Preparation(size=...), as in training",
        "preparation",
    )
