"""Images that do not fit on the devices: read and put there a few batches ahead of their use."""

import dataclasses
import itertools
import operator
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from compat_jax.errors import UserError

_AHEAD = 2  # chunks that are prepared while one is in use


class RecordImages:
    """Images that stay in their records, e.g. array_record files, and are decoded where asked for.

    It stands in a `Dataset` for the array: indexing gives another such view, `np.asarray` decodes.

    Args:
      source: random access to records with an "image", many at once by `__getitems__`, e.g. what
        `tfds.data_source` gives.
      shape: (height, width, channels) of every image.
      decode: (record) -> uint8 image.
      positions: int[n] of the records; all of them, in order, by default.
    """

    ndim, dtype = 4, np.dtype(np.uint8)

    def __init__(
        self,
        source: Sequence[dict[str, Any]],
        shape: tuple[int, int, int],
        decode: Callable[[dict[str, Any]], np.ndarray] = operator.itemgetter("image"),
        positions: np.ndarray | None = None,
    ):
        self._source, self._decode = source, decode
        self._positions = np.arange(len(source)) if positions is None else positions
        self.shape = (len(self._positions), *shape)

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, index: np.ndarray | slice) -> "RecordImages":
        return RecordImages(self._source, self.shape[1:], self._decode, self._positions[index])

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        images = np.empty(self.shape, self.dtype)
        for row, record in enumerate(self._source.__getitems__(self._positions.tolist())):
            image = self._decode(record)
            if image.shape != self.shape[1:]:
                raise UserError(
                    f"image {self._positions[row]} is {image.shape}, the first one "
                    f"{self.shape[1:]}: set data.*.size"
                )
            images[row] = image
        return images if dtype is None else images.astype(dtype)


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Batches of consecutive steps.

    Attributes:
      stop: the step after the last.
      images: uint8[steps * batch, h, w, c]; the batch of step s is number s modulo the steps that a
        chunk may have.
      labels: int32[steps * batch].
    """

    stop: int
    images: np.ndarray
    labels: np.ndarray


def steps_a_chunk(image_bytes: int, batch: int, budget: int) -> int:
    """Steps a chunk may have so that those in use and in preparation fit into a budget of bytes."""
    return max(1, budget // ((_AHEAD + 1) * batch * image_bytes))


def ring_plan(steps: int, batch: int, chunk: int) -> np.ndarray:
    """The plan of batches as positions in their chunk.

    Args:
      steps: of the plan.
      batch: images a batch.
      chunk: steps that a chunk may have.

    Returns:
      int32[steps, batch].
    """
    slots = np.arange(steps, dtype=np.int32) % chunk
    return slots[:, None] * np.int32(batch) + np.arange(batch, dtype=np.int32)


def chunks(
    images: np.ndarray | RecordImages,
    labels: np.ndarray,
    plan: np.ndarray,
    first: int,
    chunk: int,
    place: Any = lambda chunk: chunk,
) -> Iterator[Any]:
    """The batches of a plan from step `first` on, read ahead by a thread.

    Args:
      images: uint8[n, h, w, c].
      labels: int32[n].
      plan: int32[steps, batch] positions in them.
      first: step to begin with.
      chunk: steps that a chunk may have; chunks begin at its multiples, whatever `first` is.
      place: (Chunk) -> what to yield for it; called in the thread.

    Yields:
      What `place` makes of each Chunk, in order.
    """

    def read(start):
        steps = np.clip(np.arange(start, start + chunk), 0, len(plan) - 1)  # all of one shape
        rows = plan[steps].reshape(-1)
        stop = min(start + chunk, len(plan))
        return place(Chunk(stop, np.asarray(images[rows]), labels[rows]))

    starts = iter(range(first // chunk * chunk, len(plan), chunk))
    with ThreadPoolExecutor(1, "streaming") as thread:
        ahead: list[Future] = [thread.submit(read, s) for s in itertools.islice(starts, _AHEAD)]
        try:
            while ahead:
                ready = ahead.pop(0).result()
                ahead += [thread.submit(read, s) for s in [next(starts, None)] if s is not None]
                yield ready
        finally:
            for one in ahead:
                one.cancel()
