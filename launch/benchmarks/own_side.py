"""Our own side in a process of its own, see `reference.clone_speed.Worker`: its cores, its memory."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from compat_jax import embed
from launch.benchmarks import work as workloads
from launch.reference.clone_speed import serve

_PER_CLASS = 4  # random images: a batch is all that a step reads


def prepare(work: str, *, dtype: str, remat: str = "none", **sizes: Any) -> Callable[[], Any]:
    """Set up a work and warm it up.

    Args:
      work: "step" of HOC, or "features" of a frozen version; over all devices of this process.
      dtype: of the computation.
      remat: of the step, see `Run`.
      **sizes: fields of `launch.benchmarks.work.Sizes`: for features also `feature_batch` and
        `features`.
    """
    found = dataclasses.replace(workloads.Sizes(), **sizes)
    repeat = _step(found, dtype, remat) if work == "step" else _features(found, dtype)
    repeat()
    return repeat


def _step(sizes, dtype, remat):
    one = workloads.Training.create(sizes, dtype, per_class=_PER_CLASS)
    one.trainer = dataclasses.replace(one.trainer, remat=remat)
    return lambda: jax.block_until_ready(one.advance(1))


def _features(sizes, dtype):
    images = workloads.dataset(1, sizes.features, sizes.image).images
    frozen = workloads.version(sizes, _PER_CLASS)
    settings = {"mesh": workloads.mesh(), "batch_size": sizes.feature_batch, "dtype": dtype}
    return lambda: embed(frozen, images, **settings)


if __name__ == "__main__":
    serve(prepare)
