"""Peak rates of chips, from their makers' documents."""

import dataclasses
from collections.abc import Mapping

GIB = 2**30
# JAX takes this share of a GPU's memory at the start, unless XLA_PYTHON_CLIENT_MEM_FRACTION says
# otherwise.
GPU_SHARE = 0.75


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device, as JAX counts devices.

    Attributes:
      name: as people call it.
      memory: bytes that a program may use.
      peaks: {type of the factors: FLOP/s of dense matrix products}; "f32" at the default precision,
        "f32!" at the highest. Empty where we know no numbers.
      bandwidth: bytes/s of its main memory.
      cache: bytes of the cache before it; 0 where the compiler moves data explicitly.
      link: bytes/s that it sends to its neighbours in all.
      is_gpu: whether every kernel is launched by the host, or by a graph that the host launches.
    """

    name: str
    memory: float
    peaks: Mapping[str, float] = dataclasses.field(default_factory=dict)
    bandwidth: float = 0.0
    cache: int = 0
    link: float = 0.0
    is_gpu: bool = False


def _tpu(name, gib, teraflops=0.0, *, bandwidth=0.0, link=0.0):
    # A product of float32 takes one pass of the bfloat16 unit by default, six at full precision.
    rates = {"bf16": teraflops, "f16": teraflops, "f32": teraflops, "f32!": teraflops / 6}
    peaks = {kind: rate * 1e12 for kind, rate in rates.items()} if teraflops else {}
    return Chip(name, gib * GIB, peaks, bandwidth=bandwidth * 1e9, link=link * 1e9)


def _gpu(name, memory, teraflops, *, bandwidth, cache, link):
    half, tensor_float, single = teraflops
    rates = {"bf16": half, "f16": half, "f32": tensor_float, "f32!": single}
    return Chip(
        name,
        memory=GPU_SHARE * memory,
        peaks={kind: rate * 1e12 for kind, rate in rates.items()},
        bandwidth=bandwidth * 1e9,
        cache=cache << 20,
        link=link * 1e9,
        is_gpu=True,
    )


# By JAX's `device_kind`. The memory of a TPU is what the compiler lets a program use, a little less
# than the chip has: taken from its refusals (libtpu 0.0.50). Sources of the rates, all for dense
# products, and links in one direction:
# - docs.cloud.google.com/tpu/docs/v4, v5e, v5p and v6e;
# - NVIDIA H100 Tensor Core GPU data sheet and architecture white paper (SXM5): half the printed
#   rates, which are with sparsity; NVLink 900 GB/s in both directions together;
# - NVIDIA A100 Tensor Core GPU data sheet (80 GB SXM) and architecture white paper; NVLink 600 GB/s.
CHIPS = {
    "TPU v2": _tpu("TPU v2", 7.48),
    "TPU v3": _tpu("TPU v3", 15.48),
    "TPU v4": _tpu("TPU v4", 30.75, 275, bandwidth=1200, link=300),
    "TPU v5": _tpu("TPU v5p", 95.73, 459, bandwidth=2765, link=600),
    "TPU v5 lite": _tpu("TPU v5e", 15.75, 197, bandwidth=819, link=200),
    "TPU v6 lite": _tpu("TPU v6e", 31.24, 918, bandwidth=1638, link=400),
    "TPU7x": _tpu("TPU7x", 94.74),
    "NVIDIA H100 80GB HBM3": _gpu(
        "H100 SXM", 84942979072, (989.4, 494.7, 66.9), bandwidth=3352, cache=50, link=450
    ),
    "NVIDIA A100-SXM4-80GB": _gpu(
        "A100 SXM", 85100068864, (312, 156, 19.5), bandwidth=2039, cache=40, link=300
    ),
}
# By family of topologies, JAX's `device_kind`.
GPUS = {"h100": "NVIDIA H100 80GB HBM3", "a100": "NVIDIA A100-SXM4-80GB"}
