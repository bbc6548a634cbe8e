"""Measures at real picture sizes beside PyTorch: a training step, features, one picture."""

import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from compat_jax import Preparation, Version
from launch.benchmarks import pictures, work
from launch.benchmarks.flops import forward_flops, hoc_step_flops
from launch.benchmarks.sides import Context, best_reference, on_accelerator, torch_sides
from launch.benchmarks.timing import Result, Timing, alternate, seconds_of

_PER_CLASS = 4  # random images: a batch is all that a step reads


def step(context: Context) -> Iterator[Result]:
    """Measure a step of HOC of each backbone, beside PyTorch in all its variants."""
    for backbone in context.sizes.photos.backbones:
        yield from _step(context, context.sizes.of_photos(backbone))


def _step(context, sizes):
    sides, forward = {}, []
    for dtype in context.photo_dtypes:
        one = work.Training.create(sizes, dtype, per_class=_PER_CLASS)
        sides[f"jax {dtype}"] = seconds_of(lambda one=one: one.advance(1))
        shape = one.data.images.shape[1:]
        forward = forward_flops(one.trainer.network, one.frozen["previous"], shape)
    settings = _settings(sizes, batch=sizes.batch)
    variants = context.photo_variants
    with torch_sides(context, "photo_step", "step", variants=variants, **settings) as (
        more,
        refused,
    ):
        timings = alternate({**sides, **more}, sizes.photos.repeats, 1, settle=True)
    for name, timing in timings.items():
        yield Result.of(
            "photo_step",
            _what(name, sizes),
            timing,
            value=1e3 * timing.median,
            unit="ms",
            flops=sizes.batch * hoc_step_flops(forward) / timing.median,
            **beside_torch("step", name, timings),
        )
    yield from refused


def features(context: Context) -> Iterator[Result]:
    """Measure the images per second of frozen versions, beside PyTorch in all its variants."""
    for backbone in context.sizes.photos.backbones:
        yield from _features(context, context.sizes.of_photos(backbone))


def _features(context, sizes):
    # Whole batches, because those are what PyTorch's side computes.
    count = max(sizes.photos.features // sizes.batch, 1) * sizes.batch
    images = work.dataset(1, count, sizes.image).images
    frozen = work.version(sizes, _PER_CLASS)
    sides = {
        f"jax {dtype}": _extraction(frozen, images, dtype=dtype, batch_size=sizes.batch)
        for dtype in context.photo_dtypes
    }
    settings = _settings(sizes, batch=sizes.batch, count=count)
    variants = context.photo_variants
    with torch_sides(context, "photo_features", "features", variants=variants, **settings) as torch:
        timings = alternate({**sides, **torch[0]}, sizes.photos.repeats, 2, settle=True)
    needed = count * sum(
        forward_flops(frozen.embedder("float32"), frozen.variables, frozen.record.image_shape)
    )
    for name, timing in timings.items():
        yield Result.of(
            "photo_features",
            _what(name, sizes),
            timing,
            value=count / timing.median,
            unit="images/s",
            flops=needed / timing.median,
            **beside_torch("features", name, timings),
        )
    yield from torch[1]


def latency(context: Context) -> Iterator[Result]:
    """Measure the time from the path of one picture to its feature, and of a decoded picture."""
    photos = context.sizes.photos
    with tempfile.TemporaryDirectory() as folder:
        path = pictures.draw(Path(folder), 1)[0]
        for backbone, size in photos.latency:
            sizes = context.sizes.of_photos(backbone, size)
            frozen = work.version(sizes, _PER_CLASS)
            preparation = Preparation(sizes.image)
            from_file = {
                "from the file, float32": _extraction(frozen, path, preparation=preparation)
            }
            decoded = preparation(path)
            sides = {
                f"jax {dtype}": _extraction(frozen, decoded, dtype=dtype)
                for dtype in context.photo_dtypes
            }
            settings = _settings(sizes, path=path)
            variants = context.photo_variants
            with torch_sides(context, "latency", "picture", variants=variants, **settings) as torch:
                timings = alternate({**from_file, **sides, **torch[0]}, photos.lookups, 3)
            for name, timing in timings.items():
                yield Result.of(
                    "latency",
                    f"{name}, {sizes.backbone}, {sizes.image} px",
                    timing,
                    value=1e3 * timing.median,
                    unit="ms",
                    **beside_torch("picture", name, timings),
                )
            yield from torch[1]


def _settings(sizes, **more) -> dict[str, Any]:
    shared = {"backbone": sizes.backbone, "image": sizes.image}
    return {**shared, "num_prototypes": sizes.num_prototypes, **more}


def _extraction(frozen: Version, images: Any, **settings: Any):
    def repeat():
        began = time.perf_counter()
        frozen.embed(images, **settings)
        return time.perf_counter() - began

    return repeat


def _what(name, sizes):
    return f"{name}, {sizes.backbone}, {sizes.image} px, batch {sizes.batch}"


def beside_torch(measure: str, name: str, timings: Mapping[str, Timing]) -> dict[str, Any]:
    """Return the ratio to PyTorch, the goal and the note of a side of a measure.

    All are judged by PyTorch's fastest variant, of ours the fastest dtype. The goals are for the CPU.

    Args:
      measure: "step" or "picture", judged by their time, or "features", by their rate.
      name: of the side.
      timings: of all sides; those of ours begin with "jax", of PyTorch's with "torch".

    Returns:
      Fields of `Result`: none for PyTorch's own sides, or where there is none to compare with.
    """
    ours = [side for side in timings if side.startswith("jax")]
    eager, best, own = timings.get("torch eager"), best_reference(timings), timings[name].median
    if name not in ours or best is None:
        return {}
    by_rate = measure == "features"
    ratio = best.median / own if by_rate else own / best.median
    fields: dict[str, Any] = {"ratio": ratio}
    if eager is not None:
        beside, what = (eager.median / own, "rate") if by_rate else (own / eager.median, "time")
        fields["note"] = f"{beside:.2f} of the {what} of torch eager"
    if name == min(ours, key=lambda side: timings[side].median) and not on_accelerator():
        limit = "at least" if by_rate else "at most"
        fields["goal"] = f"{limit} 1.0 of the fastest variant of torch"
        fields["met"] = ratio >= 1.0 if by_rate else ratio <= 1.0
    return fields
