"""Reading pictures: decoded in parallel by Grain's threads, always in the same order.

Pictures that fit into a budget are read into memory; larger collections stay in their files, as a
`FileImages` that decodes the rows it is asked for. Either way every file is decoded once at the start,
so that a broken one is known before training begins.
"""

import dataclasses
import hashlib
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from etils import epath

from compat_jax.data.pictures import BadPictures, Preparation, decode, missing
from compat_jax.errors import UserError, unknown
from compat_jax.meter import Meter

BUDGET = 256 * 2**20  # bytes of pictures that are kept in memory
ON_BAD = ("stop", "skip")
_LISTED = 10
_BLOCK_BYTES = 2**19  # pixels that a thread decodes before it is given more

T = TypeVar("T")


def cores() -> int:
    """Count the processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def in_order(
    count: int, work: Callable[[int], T], *, block: int = 1, threads: int | None = None
) -> Iterator[T]:
    """Compute work(0), work(1), … in parallel.

    Args:
      count: how often to call `work`.
      work: called in several threads; worth it where it leaves Python's lock, as Pillow does.
      block: calls that a thread makes in a row.
      threads: as many as cores by default.

    Yields:
      The results in order; what `work` raises is raised in its place.

    Source: `grain.MapDataset`, whose order does not depend on threads.
    """
    threads = cores() if threads is None else threads
    if threads < 2 or count <= block:
        yield from map(work, range(count))
        return
    import grain  # slow to import

    def some(start):
        return [_attempt(work, i) for i in range(start, min(start + block, count))]

    blocks = grain.MapDataset.source(range(0, count, block)).map(some)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    for results in blocks.to_iter_dataset(options):
        for result, error in results:
            if error is not None:
                raise error
            yield result


def _attempt(work, i):
    try:
        return work(i), None
    except Exception as error:  # raised again where the result is asked for
        return None, error


def block_size(image_bytes: int) -> int:
    """Return how many pictures of so many bytes a thread decodes in a row."""
    return min(max(_BLOCK_BYTES // max(image_bytes, 1), 1), 64)


class LazyImages:
    """Images that are decoded on access: uint8[n, height, width, channels].

    It takes the place of the image array in a `Dataset`: indexing with rows or a slice returns another
    view, with a number the image; `np.asarray` decodes.

    Args:
      shape: (height, width, channels) of every image.
      rows: int[n], which images of the collection this view holds.
    """

    ndim, dtype = 4, np.dtype(np.uint8)
    threads: int | None = None  # that decode; as many as cores

    def __init__(self, shape: Sequence[int], rows: np.ndarray):
        self.rows = np.asarray(rows)
        self.shape = (len(self.rows), *shape)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        rows = self.rows[index]
        return self.view(rows) if rows.ndim else np.asarray(self.view(rows[None]))[0]

    def view(self, rows: np.ndarray) -> "LazyImages":
        """Return the images of these rows of the collection: int[m], repeats allowed."""
        raise NotImplementedError

    def loader(self) -> Callable[[int], np.ndarray]:
        """Return a function that decodes the image number i of this view, called in threads."""
        raise NotImplementedError

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        images = np.empty(self.shape, self.dtype)
        block = block_size(math.prod(self.shape[1:]))
        found = in_order(len(self), self.loader(), block=block, threads=self.threads)
        for i, image in enumerate(found):
            if image.shape != self.shape[1:]:
                raise UserError(
                    f"image {self.rows[i]} has shape {image.shape}, the first one "
                    f"{self.shape[1:]}: give a size, to bring all images to it",
                    "size",
                )
            images[i] = image
        return images if dtype is None else images.astype(dtype, copy=False)


class FileImages(LazyImages):
    """Images that stay in their files and are decoded on access; see `LazyImages`.

    Args:
      files: paths.
      shape: (height, width, channels) of every image.
      preparation: what is done to each; None leaves their size as it is.
      rows: int[n], positions in `files`; all of them, in order, by default.
    """

    def __init__(
        self,
        files: Sequence[str],
        shape: Sequence[int],
        preparation: Preparation | None = None,
        rows: np.ndarray | None = None,
    ):
        super().__init__(shape, np.arange(len(files)) if rows is None else rows)
        self._files, self._preparation = files, preparation

    def view(self, rows: np.ndarray) -> "FileImages":
        """Return the images of these files: int[m], repeats allowed."""
        return FileImages(self._files, self.shape[1:], self._preparation, rows=rows)

    def loader(self) -> Callable[[int], np.ndarray]:
        """Return a function that decodes the file number i of this view."""
        prepare = self._preparation or decode
        return lambda i: prepare(self._files[self.rows[i]])

    def files(self) -> tuple[str, ...]:
        """Return the path of every image."""
        return tuple(self._files[row] for row in self.rows)

    def digests(self) -> tuple[bytes, ...]:
        """Return the BLAKE2b-16 digest of every file, read now."""
        return tuple(in_order(len(self), lambda i: file_digest(self._files[self.rows[i]])))


@dataclasses.dataclass(frozen=True)
class Checked:
    """Result of checking or reading the files of a list.

    Attributes:
      kept: int[m], positions of those that are pictures.
      digests: BLAKE2b-16 of the bytes of each picture kept.
      problems: {path: what is wrong with it} of the others.
      shapes: of the pictures kept.
      count: how many files there were.
      images: the pictures kept, uint8[m, height, width, 3], an array or a view of their files; None if
        they were only checked.
    """

    kept: np.ndarray
    digests: tuple[bytes, ...]
    problems: Mapping[str, str]
    shapes: frozenset[tuple[int, ...]]
    count: int
    images: Any = None

    @property
    def bad(self) -> frozenset[str]:
        """Return the paths of the files that are no pictures."""
        return frozenset(self.problems)

    def refuse(self, one_size: bool = True) -> None:
        """Raise BadPictures if there are pictures and none is good, UserError if sizes differ."""
        if self.problems and not len(self.kept):
            raise BadPictures(tuple(self.problems.values()))
        if one_size and len(self.shapes) > 1:
            some = ", ".join(f"{w} x {h}" for h, w, _ in sorted(self.shapes)[:3])
            raise UserError(f"the pictures have several sizes ({some}, ...): set size", "size")
        if self.problems:
            print(self.summary(), file=sys.stderr, flush=True)

    def summary(self) -> str:
        """Return what was skipped, in lines: how many, and the first of them."""
        lines = [f"skipped {len(self.problems)} of {self.count} pictures, which cannot be read:"]
        lines += [f"  {problem}" for problem in list(self.problems.values())[:_LISTED]]
        more = len(self.problems) - _LISTED
        return "\n".join(lines + ([f"  and {more} more"] if more > 0 else []))


def digest(data: bytes) -> bytes:
    """Return the BLAKE2b-16 digest of a file's bytes."""
    return hashlib.blake2b(data, digest_size=16).digest()


def file_digest(path: str) -> bytes:
    """Return the BLAKE2b-16 digest of a file, local or in a bucket.

    Raises:
      BadPictures: it cannot be read.
    """
    return digest(content(path))


def check_pictures(
    files: Sequence[str], *, on_bad: str = "stop", progress: str | None = None
) -> Checked:
    """Decode every file once, in parallel, and keep none of the pixels.

    Args:
      files: paths.
      on_bad: "stop" refuses the files that are no pictures, all at once; "skip" reports them.
      progress: label of a progress bar; None for none.

    Raises:
      BadPictures: on_bad is "stop" and there are some.
    """
    files = tuple(map(os.fspath, files))
    return gather(files, _loader(files, None), on_bad=on_bad, keep=False, progress=progress)


def read(
    files: Sequence[str],
    preparation: Preparation | None,
    *,
    on_bad: str = "stop",
    in_memory: bool | None = None,
    budget: int = BUDGET,
    verified: bool = False,
    progress: str | None = None,
) -> Checked:
    """Read pictures: into memory if they fit into a budget, else as a view of their files.

    Every file is decoded once, in parallel, and its digest taken, unless it is `verified`.

    Args:
      files: paths.
      preparation: what is done to each; None requires pictures of one size and leaves them as they are.
      on_bad: "stop" refuses the files that are no pictures, all at once; "skip" leaves them out and
        says so on stderr.
      in_memory: True or False decide, whatever the budget.
      budget: bytes of pixels to keep in memory at most.
      verified: True for files that are known to be pictures, and need a preparation: those that stay
        where they are are not decoded now, and have no digests here.
      progress: label of a progress bar; None for none.

    Raises:
      BadPictures: on_bad is "stop" and there are some, or no file is a picture.
      UserError: pictures of several sizes without a preparation, unknown on_bad.
    """
    files = tuple(map(os.fspath, files))
    shape = _first_shape(files, preparation)
    keep = len(files) * math.prod(shape) <= budget if in_memory is None else in_memory
    if verified and not keep:
        images = FileImages(files, shape, preparation)
        return Checked(images.rows, (), {}, frozenset({shape}), count=len(files), images=images)
    load = _loader(files, preparation if keep else None)
    checked = gather(
        files, load, on_bad=on_bad, keep=keep, progress=progress, block=block_size(math.prod(shape))
    )
    checked.refuse(one_size=preparation is None)
    if checked.images is not None:
        return checked
    images = FileImages(files, shape, preparation, rows=checked.kept)
    return dataclasses.replace(checked, images=images)


def gather(
    names: Sequence[str],
    load: Callable[[int], tuple[bytes, np.ndarray]],
    *,
    on_bad: str,
    keep: bool,
    progress: str | None,
    block: int = 4,
) -> Checked:
    """Load every picture once, in parallel, and take down which are none.

    Args:
      names: what to call each picture.
      load: (number) -> digest and pixels uint8[h, w, 3]; raises BadPictures.
      on_bad: see `read`.
      keep: whether to keep the pixels, in one array; those of another size than the first are not.
      progress: label of a progress bar; None for none.
      block: see `in_order`.

    Raises:
      BadPictures: on_bad is "stop" and there are some.
      UserError: unknown on_bad.
    """
    if on_bad not in ON_BAD:
        raise unknown("on_bad", on_bad, ON_BAD, "on_bad")

    def one(i):
        try:
            mark, image = load(i)
        except BadPictures as error:
            return None, None, "; ".join(error.problems)
        return mark, image if keep else image.shape, None

    images: Any = None
    kept: list[int] = []
    shapes, marks, problems = set(), [], {}
    with Meter(progress, len(names), units="pictures", keep=False) as meter:
        for i, (mark, image, problem) in enumerate(in_order(len(names), one, block=block)):
            meter.update()
            if problem is not None:
                problems[names[i]] = problem
                continue
            shapes.add(image.shape if keep else image)
            if keep and images is None:
                images = np.empty((len(names), *image.shape), np.uint8)
            if images is not None and image.shape == images.shape[1:]:
                images[len(kept)] = image
            kept.append(i)
            marks.append(mark)
    if problems and on_bad == "stop":
        error = BadPictures(tuple(problems.values()), "on_bad='skip' leaves such files out")
        error.argument = "on_bad"
        raise error
    return Checked(
        kept=np.array(kept, np.int64),
        digests=tuple(marks),
        problems=problems,
        shapes=frozenset(shapes),
        images=None if images is None else images[: len(kept)],
        count=len(names),
    )


def _loader(files, preparation):
    """(number) -> digest and pixels of a file, which is read once."""
    prepare = preparation or decode

    def load(i):
        data = content(files[i])
        return digest(data), prepare(data, files[i])

    return load


def content(path: str) -> bytes:
    """Return the bytes of a file, local or in a bucket.

    Raises:
      BadPictures: it cannot be read.
    """
    try:
        if "://" in path:
            return epath.Path(path).read_bytes()
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError as error:
        raise missing(path) from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or error
        raise BadPictures([f"{path} cannot be read ({reason})"]) from error


def _first_shape(files, preparation):
    """The shape of the first picture that is one; zeros if there is none."""
    if preparation is not None:
        return (preparation.size, preparation.size, 3)
    for file in files:
        try:
            return decode(file).shape
        except BadPictures:
            continue
    return (0, 0, 3)


def decode_rate(
    files: Sequence[str], preparation: Preparation, threads: int | None = None
) -> float:
    """Measure how many pictures a second are read and decoded, in so many threads.

    Args:
      files: paths; read once before the clock starts, so that no disk is measured.
      preparation: what is done to each.
      threads: as many as cores by default; 1 is plain Pillow, without Grain.
    """
    load = _loader(tuple(map(os.fspath, files)), preparation)
    block = block_size(3 * preparation.size**2)
    for _ in in_order(len(files), load, block=block, threads=threads):
        pass
    began = time.perf_counter()
    for _ in in_order(len(files), load, block=block, threads=threads):
        pass
    return len(files) / (time.perf_counter() - began)
