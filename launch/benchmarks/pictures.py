"""Measures of pictures in files: decoding, training from disk, peak memory."""

import io
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from compat_jax import Chain, Dataset, Preparation, Tasks
from compat_jax.data import reading
from launch.benchmarks import work
from launch.benchmarks.sides import Context, program
from launch.benchmarks.timing import Result, alternate, peak_bytes
from launch.benchmarks.training import Epochs

_DISTINCT = 300  # pictures that are drawn; more files repeat them
_CLASSES = 10
_STREAM_BYTES = 1 << 23  # on a device, for the images that are streamed from disk
_MEMORY = 700  # MB


def draw(folder: Path, count: int, seed: int = 0) -> list[str]:
    """Write JPEG files of about 500 x 400 pixels and 45 KB: soft colours with grain.

    Args:
      folder: where to.
      count: files; those after the first few hundred repeat them.
      seed: of the pictures.

    Returns:
      Their paths, in order.
    """
    rng = np.random.default_rng(seed)
    drawn = [_jpeg(rng) for _ in range(min(count, _DISTINCT))]
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number in range(count):
        path = folder / f"{number:05d}.jpg"
        path.write_bytes(drawn[number % len(drawn)])
        paths.append(str(path))
    return paths


def _jpeg(rng):
    width, height = (int(rng.integers(low, high)) for low, high in ((460, 541), (360, 441)))
    soft, grain = (
        Image.fromarray(rng.integers(0, 256, (height // cell, width // cell, 3), np.uint8)).resize(
            (width, height), Image.Resampling.BICUBIC
        )
        for cell in (40, 2)
    )
    content = io.BytesIO()
    Image.blend(soft, grain, 0.15).save(content, "JPEG", quality=85)
    return content.getvalue()


def decoding(context: Context) -> Iterator[Result]:
    """Measure how fast Grain's threads decode, beside one thread of Pillow times the cores."""
    photos, cores = context.sizes.photos, reading.cores()
    preparation = Preparation(photos.image)
    with tempfile.TemporaryDirectory() as folder:
        files = draw(Path(folder), photos.files)

        def side(threads):
            return lambda: len(files) / reading.decode_rate(files, preparation, threads)

        one, all_of_them = "Pillow, 1 thread", f"Grain, {cores} threads"
        timings = alternate({one: side(1), all_of_them: side(cores)}, photos.repeats, 0)
    ratio = timings[one].median / timings[all_of_them].median / cores
    for name, timing in timings.items():
        judged = name == all_of_them
        yield Result.of(
            "decoding",
            f"{name}, JPEGs of about 500 x 400 to {photos.image} px",
            timing,
            value=len(files) / timing.median,
            unit="images/s",
            ratio=ratio if judged else None,
            goal="at least 0.9 of Pillow x cores" if judged else None,
            met=ratio >= 0.9 if judged else None,
        )


def from_disk(context: Context) -> Iterator[Result]:
    """Measure epochs over JPEG files that are decoded for every batch, beside pixels in memory."""
    backbone, count, repeats = context.sizes.photos.trained
    sizes = context.sizes.of_photos(backbone)
    half = _CLASSES // 2
    run = work.run(sizes, Tasks(initial=half, increment=half), 1)
    start = work.version(sizes, per_class=4)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = draw(folder / "photos", count)
        data = {
            where: _labelled(files, sizes.image, where == "memory") for where in ("memory", "disk")
        }
        budget = {"memory": 0, "disk": _STREAM_BYTES}
        sides = {
            where: Epochs(run, data[where], folder / where, start=start, budget=budget[where])
            for where in data
        }
        timings = alternate(sides, repeats, 1)
    share = timings["memory"].median / timings["disk"].median
    for where, timing in timings.items():
        judged = where == "disk"
        yield Result.of(
            "from_disk",
            f"from {where}, {backbone}, {sizes.image} px, {sides[where].steps} steps of {sizes.batch}",
            timing,
            value=sides[where].steps * sizes.batch / timing.median,
            unit="images/s",
            ratio=share if judged else None,
            goal="at least 0.95 of the rate from memory" if judged else None,
            met=share >= 0.95 if judged else None,
        )


def _labelled(files, size, in_memory):
    preparation = Preparation(size)
    images = reading.read(files, preparation, in_memory=in_memory).images
    names = tuple(f"class{c}" for c in range(_CLASSES))
    return Dataset(images, np.arange(len(files)) % _CLASSES, names, preparation=preparation)


def memory(context: Context) -> Iterator[Result]:
    """Measure the peak memory of a program that reads many photos from disk and embeds a few."""
    backbone, count, embedded = context.sizes.photos.read
    sizes = context.sizes.of_photos(backbone)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        draw(folder / "photos", count)
        frozen = work.version(sizes, per_class=4)
        Chain(folder / "chain").add(frozen.variables, frozen.record, 0)
        found = json.loads(program(context, f"photo_memory:{folder}").splitlines()[-1])
    steps = {
        f"{found['read']} photos of {sizes.image} px read": found["reading"],
        f"the same, and {embedded} embedded by {backbone}": found["bytes"],
    }
    for what, peak in steps.items():
        yield Result(
            measure="photo_memory",
            what=what,
            value=peak / 1e6,
            unit="MB",
            ratio=peak / 1e6,
            goal=f"at most {_MEMORY} MB",
            met=peak <= _MEMORY * 1e6,
            note=f"peak of the process; {found['before'] / 1e6:.0f} MB before it reads",
        )


def read_and_embed(sizes: work.Sizes, folder: str) -> dict[str, int]:
    """Read all photos of a folder and embed a few, in a process that `memory` starts.

    Args:
      sizes: sizes of the workloads.
      folder: holds "photos" and "chain".

    Returns:
      {"bytes": peak memory of this process, "reading": that after reading, "before": that before it,
      "read": how many photos}.
    """
    photos = sizes.photos
    files = sorted(map(str, (Path(folder) / "photos").iterdir()))
    before = peak_bytes()
    images = reading.read(files, Preparation(photos.image)).images
    # The kernel counts pages thread by thread: what it says of a peak may fall by a few of them.
    reading_peak = max(before, peak_bytes())
    version = Chain(Path(folder) / "chain")[0]
    version.embed(images[: photos.read[2]], batch_size=photos.batch)
    found = {"bytes": max(reading_peak, peak_bytes()), "reading": reading_peak}
    return {**found, "before": before, "read": len(images)}
