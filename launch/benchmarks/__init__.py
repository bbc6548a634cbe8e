"""The measures of `launch.benchmark`: one function each, which yields lines of the table."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax

from compat_jax import models
from compat_jax.errors import UserError, unknown
from launch.benchmarks import (
    cores,
    forms,
    gallery,
    growth,
    photos,
    pictures,
    retrieval,
    training,
    work,
)
from launch.benchmarks.sides import (
    NOWHERE,
    PHOTO_VARIANTS,
    Context,
    Places,
    on_accelerator,
)
from launch.benchmarks.timing import Result
from launch.reference.clone_speed import VARIANTS, Unavailable, Worker

MEASURES: dict[str, Callable[[Context], Iterator[Result]]] = {
    "step": training.step,
    "epoch": training.epoch,
    "first_step": training.first_step,
    "features": retrieval.features,
    "evaluation": retrieval.evaluate,
    "search": retrieval.nearest,
    "large_k": growth.large_k,
    "scaling": growth.scaling,
    "streaming": training.streaming,
    "protocol": training.protocol,
    "photo_step": photos.step,
    "photo_features": photos.features,
    "latency": photos.latency,
    "decoding": pictures.decoding,
    "from_disk": pictures.from_disk,
    "photo_memory": pictures.memory,
    "processes": cores.processes,
    "step_memory": cores.step_memory,
    "gallery": gallery.load,
    "forms": forms.measure,
}
# Names that stand for several measures.
GROUPS = {
    "photos": ("photo_step", "photo_features"),
    "pictures": ("latency", "decoding", "from_disk", "photo_memory"),
    "cores": ("processes", "step_memory"),
}
ALL_VARIANTS = tuple(dict.fromkeys((*VARIANTS, *PHOTO_VARIANTS)))
SIZES = {"full": None, "tiny": work.TINY}


def sizes(name: str, *, rows: int | None = None, **photo: Any) -> work.Sizes:
    """Return the sizes of a name: "full", for this platform, or "tiny", to try that everything runs.

    Args:
      name: of SIZES.
      rows: of the gallery; None leaves it as it is.
      **photo: fields of `work.PhotoSizes` to change; None leaves one as it is.
    """
    full = work.ON_ACCELERATOR if on_accelerator() else work.Sizes()
    found = SIZES[name] or full
    changes = {field: value for field, value in photo.items() if value is not None}
    of_gallery = found.gallery if rows is None else dataclasses.replace(found.gallery, rows=rows)
    of_photos = dataclasses.replace(found.photos, **changes)
    return dataclasses.replace(found, photos=of_photos, gallery=of_gallery)


def chosen_dtypes(given: Sequence[str], names: Iterable[str]) -> tuple[str, ...]:
    """Return the dtypes to measure in: those given, or float32 and, where it pays, bfloat16.

    Args:
      given: dtypes; none for the default.
      names: measures. On a CPU that multiplies bfloat16, those of real picture sizes take it as well.
    """
    real_sizes = {*names} & {*GROUPS["photos"], *GROUPS["cores"], "forms"}
    both = on_accelerator() or (real_sizes and models.multiplies_bfloat16(jax.default_backend()))
    return tuple(given) or (("float32", "bfloat16") if both else ("float32",))


def chosen(only: Sequence[str]) -> tuple[str, ...]:
    """Return the names of the measures to take.

    By default all but the gallery, which takes minutes and gigabytes, the forms, which are for a new
    processor, cores, which compile a network of real size several times, and, unless there is an
    accelerator, the protocol.

    Args:
      only: names in MEASURES or GROUPS.

    Raises:
      UserError: a name is in neither.
    """
    for name in only:
        if name not in MEASURES and name not in GROUPS:
            raise unknown("measure", name, (*MEASURES, *GROUPS))
    if only:
        return tuple(dict.fromkeys(m for name in only for m in GROUPS.get(name, (name,))))
    left_out = ("gallery", "forms", *GROUPS["cores"], *(() if on_accelerator() else ("protocol",)))
    return tuple(m for m in MEASURES if m not in left_out)


def measure(
    only: Sequence[str] = (),
    *,
    dtypes: Sequence[str] = (),
    sizes_name: str = "full",
    variants: Sequence[str] | None = None,
    photo: Mapping[str, Any] = MappingProxyType({}),
    places: Places = NOWHERE,
) -> Iterator[Result]:
    """Take the measures and yield the lines of the table.

    Args:
      only: names in MEASURES or GROUPS; see `chosen` for the default.
      dtypes: dtypes to compute in; those that are fast here by default.
      sizes_name: see `sizes`.
      variants: variants of PyTorch to measure, from ALL_VARIANTS; by default VARIANTS, and
        PHOTO_VARIANTS at real picture sizes.
      photo: sizes of pictures, and rows of the gallery, see `sizes`.
      places: folders and addresses.

    Raises:
      UserError: a name or a variant is unknown, the folder is no clone, or the place is not Qdrant's.
    """
    names = chosen(only)
    url = places.gallery_url
    if url is not None and not url.startswith("qdrant:"):
        raise UserError(
            f"a store of Qdrant is named, e.g. qdrant:http://localhost:6333, got {url!r:.200}",
            "gallery_url",
        )
    for variant in variants or ():
        if variant not in ALL_VARIANTS:
            raise unknown("variant", variant, ALL_VARIANTS)
    with contextlib.closing(Worker(places.clone)) as worker:
        context = Context(
            sizes=sizes(sizes_name, **photo),
            sizes_name=sizes_name,
            dtypes=chosen_dtypes(dtypes, ()),
            variants=VARIANTS if variants is None else tuple(variants),
            worker=worker,
            photo_dtypes=chosen_dtypes(dtypes, GROUPS["photos"]),
            photo_variants=PHOTO_VARIANTS if variants is None else tuple(variants),
            places=places,
        )
        for name in names:
            for result in _lines(name, context):
                judged = sizes_name == "full"
                yield result if judged else dataclasses.replace(result, met=None)


def _lines(name, context):
    try:
        yield from MEASURES[name](context)
    except Unavailable as error:
        yield Result.not_run(name, "", error)
