"""Stream images that do not fit on the devices: read and transfer them a few batches ahead."""

import dataclasses
import itertools
import operator
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np

from compat_jax.data.dataset import Images
from compat_jax.data.reading import LazyImages

_IMAGE = operator.itemgetter("image")
_AHEAD = 2  # chunks prepared while one is in use


class Records(Protocol):
    """Random access to records, such as `tfds.data_source` returns."""

    def __len__(self) -> int: ...

    def __getitems__(self, positions: Sequence[int]) -> Sequence[Any]:
        """Return the records at several positions."""


class RecordImages(LazyImages):
    """Images that stay in their records, e.g. array_record files, and are decoded on access.

    Args:
      source: random access to the records.
      shape: (height, width, channels) of every image.
      decode: (record) -> uint8 image; by default the record's "image". Called in several threads.
      positions: int[n], positions of the records in `source`; all of them, in order, by default.
    """

    def __init__(
        self,
        source: Records,
        shape: tuple[int, ...],
        decode: Callable[[Any], np.ndarray] = _IMAGE,
        positions: np.ndarray | None = None,
    ):
        super().__init__(shape, np.arange(len(source)) if positions is None else positions)
        self._source, self._decode = source, decode
        self.threads = 1 if decode is _IMAGE else None  # there is nothing to decode

    def view(self, rows: np.ndarray) -> "RecordImages":
        """Return the images of these records: int[m], repeats allowed."""
        return RecordImages(self._source, self.shape[1:], self._decode, positions=rows)

    def loader(self) -> Callable[[int], np.ndarray]:
        """Read the records, all at once, and return a function that decodes number i of them."""
        records = self._source.__getitems__(self.rows.tolist())
        return lambda i: self._decode(records[i])


@dataclasses.dataclass(frozen=True)
class Chunk:
    """The batches of consecutive steps.

    Attributes:
      stop: the step after the last one.
      images: uint8[steps * batch, h, w, c]; the batch of step s is batch number s modulo the steps
        of a chunk.
      labels: int32[steps * batch].
    """

    stop: int
    images: np.ndarray
    labels: np.ndarray


def steps_a_chunk(image_bytes: int, batch: int, budget: int) -> int:
    """Return the steps per chunk for which all chunks, in use and ahead, fit into a budget.

    Args:
      image_bytes: bytes of one image.
      batch: images per step.
      budget: bytes for all chunks together.

    Returns:
      The number of steps, at least 1 even if that exceeds the budget.
    """
    return max(1, budget // ((_AHEAD + 1) * batch * image_bytes))


def ring_plan(steps: int, batch: int, chunk: int) -> np.ndarray:
    """Return the batch plan as positions within chunks.

    Args:
      steps: number of steps of the plan.
      batch: images per step.
      chunk: steps per chunk.

    Returns:
      int32[steps, batch].
    """
    slots = np.arange(steps, dtype=np.int32) % chunk
    return slots[:, None] * np.int32(batch) + np.arange(batch, dtype=np.int32)


def chunks(
    images: Images,
    labels: np.ndarray,
    plan: np.ndarray,
    first: int,
    chunk: int,
    place: Any = lambda chunk: chunk,
) -> Iterator[Any]:
    """Read the batches of a plan ahead in a thread, from step `first` on.

    Args:
      images: uint8[n, h, w, c].
      labels: int32[n].
      plan: int32[steps, batch], positions in `images` and `labels`.
      first: step to begin with.
      chunk: steps per chunk; chunks begin at multiples of it, whatever `first` is.
      place: (Chunk) -> value to yield in its place, e.g. the chunk on a device; called in the thread.

    Yields:
      The result of `place` for each chunk, in order.
    """

    def read(start):
        # The last chunk repeats the last step, so that all chunks have the same shape.
        steps = np.clip(np.arange(start, start + chunk), 0, len(plan) - 1)
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
            for future in ahead:
                future.cancel()
