"""The measures of `launch.benchmark`: one function each, which yields lines of the table."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

from compat_jax.errors import unknown
from launch.benchmarks import growth, retrieval, training, work
from launch.benchmarks.sides import Context, on_accelerator
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
}
SIZES = {"full": None, "tiny": work.TINY}


def sizes(name: str) -> work.Sizes:
    """Return the sizes of a name: "full", for this platform, or "tiny", to try that everything runs."""
    full = work.ON_ACCELERATOR if on_accelerator() else work.Sizes()
    return SIZES[name] or full


def chosen(only: Sequence[str]) -> tuple[str, ...]:
    """Return the names of the measures to take; by default all, but the protocol on accelerators only.

    Raises:
      UserError: a name is not in MEASURES.
    """
    for name in only:
        if name not in MEASURES:
            raise unknown("measure", name, MEASURES)
    everything = (m for m in MEASURES if m != "protocol" or on_accelerator())
    return tuple(only) or tuple(everything)


def measure(
    only: Sequence[str] = (),
    *,
    clone: str | None = None,
    dtypes: Sequence[str] = ("float32",),
    sizes_name: str = "full",
    variants: Sequence[str] = VARIANTS,
) -> Iterator[Result]:
    """Take the measures and yield the lines of the table.

    Args:
      only: names in MEASURES; see `chosen` for the default.
      clone: folder of a clone of the reference; None to measure our side only.
      dtypes: dtypes to compute in.
      sizes_name: see `sizes`.
      variants: variants of PyTorch to measure, from VARIANTS.

    Raises:
      UserError: a name or a variant is unknown, or the folder is no clone.
    """
    names = chosen(only)
    for variant in variants:
        if variant not in VARIANTS:
            raise unknown("variant", variant, VARIANTS)
    worker = Worker(clone)
    try:
        context = Context(
            sizes=sizes(sizes_name),
            sizes_name=sizes_name,
            dtypes=tuple(dtypes),
            clone=clone,
            variants=tuple(variants),
            worker=worker,
        )
        for name in names:
            for result in _lines(name, context):
                judged = sizes_name == "full"
                yield result if judged else dataclasses.replace(result, met=None)
    finally:
        worker.close()


def _lines(name, context):
    try:
        yield from MEASURES[name](context)
    except Unavailable as error:
        yield Result.not_run(name, "", error)
