"""What `launch.benchmark` measures, one function a measure, each yielding lines of its table."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence

from compat_jax.benchmarks import growth, retrieval, training, work
from compat_jax.benchmarks.sides import Context, on_accelerator
from compat_jax.benchmarks.timing import Result
from compat_jax.errors import unknown
from compat_jax.interop.reference_speed import VARIANTS, Unavailable, Worker

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
    """Sizes by name: "full", of the platform, or "tiny", to see that everything runs."""
    full = work.ON_ACCELERATOR if on_accelerator() else work.Sizes()
    return SIZES[name] or full


def chosen(only: Sequence[str]) -> tuple[str, ...]:
    """The measures of these names; without any all, the protocol on accelerators only.

    Raises:
      UserError: unknown name.
    """
    for name in only:
        if name not in MEASURES:
            raise unknown("measure", name, MEASURES)
    everything = (m for m in MEASURES if m != "protocol" or on_accelerator())
    return tuple(only) or tuple(everything)


def measure(
    only: Sequence[str] = (),
    clone: str | None = None,
    dtypes: Sequence[str] = ("float32",),
    sizes_name: str = "full",
    variants: Sequence[str] = VARIANTS,
) -> Iterator[Result]:
    """Lines of the table, as they come.

    Args:
      only: names of MEASURES.
      clone: folder of the reference; None measures our side alone.
      dtypes: of the computation.
      sizes_name: see `sizes`.
      variants: of PyTorch, among VARIANTS.

    Raises:
      UserError: unknown name or variant, a folder that is no clone.
    """
    names = chosen(only)
    for variant in variants:
        if variant not in VARIANTS:
            raise unknown("variant", variant, VARIANTS)
    worker = Worker(clone)
    try:
        context = Context(
            sizes(sizes_name), sizes_name, tuple(dtypes), clone, tuple(variants), worker
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
        yield Result(name, "", math.nan, "", note=f"not run: {error}")
