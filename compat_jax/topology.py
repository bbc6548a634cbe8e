"""Devices that are not there, to compile for: TPU slices and machines with GPUs."""

import importlib.metadata
import importlib.util
import re
from typing import NamedTuple

import jax
from jax.experimental import topologies

from compat_jax.errors import UserError, unknown
from compat_jax.hlo.chips import CHIPS, GPU_SHARE, GPUS

TPUS = ("v2", "v3", "v4", "v5e", "v5p", "v6e", "tpu7x")
GPUS_PER_HOST = 8
_PLUGINS = ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")


def devices(name: str) -> list[jax.Device]:
    """Return the devices of a topology by name, to compile for.

    Args:
      name: of a TPU slice and its chips, e.g. "v5e:4x4", or of a GPU and their number in one machine,
        e.g. "h100:8".

    Raises:
      UserError: unknown family, chips that make no slice, or no compiler for it is installed.
    """
    family, _, chips = name.partition(":")
    if family in GPUS:
        return _gpus(family, chips)
    if family not in TPUS:
        raise unknown("TPU or GPU", family, (*TPUS, *GPUS))
    if not re.fullmatch(r"\d+(x\d+)+", chips):
        raise UserError(f"topology {name!r} needs its chips, for example {family}:2x2")
    # v4 chips are one device of two cores by default, as they are on a Cloud TPU VM.
    options = {"chip_config_name": "megacore"} if family == "v4" else {}
    try:
        slice_ = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"no topology {name!r}: {str(error).splitlines()[0]}") from error
    return list(slice_.devices)


def has_cuda_plugin() -> bool:
    """Return whether JAX's CUDA plugin is installed; to compile, it needs no GPU."""
    try:
        return any(importlib.util.find_spec(package) for package in _PLUGINS)
    except ModuleNotFoundError:  # no plugin at all
        return False


def _gpus(family, chips):
    if not chips.isdigit() or not 1 <= int(chips) <= GPUS_PER_HOST:
        raise UserError(
            f"topology '{family}:{chips}' needs the GPUs of one machine, for example {family}:1 or "
            f"{family}:{GPUS_PER_HOST}"
        )
    if not has_cuda_plugin():
        release = importlib.metadata.version("jaxlib")
        raise UserError(
            f"{family} needs the compiler of JAX's CUDA plugin, which is not installed: "
            f"pip install jax-cuda13-plugin=={release}"
        )
    machine = topologies.get_topology_desc(
        platform="cuda",
        topology_name=f"{family}:{chips}",
        topology=f"1x1x{chips}",  # partitions, hosts, GPUs of each
        target_config=_description(family),
    )
    return list(machine.devices)


class _Processor(NamedTuple):
    """Facts that XLA wants of a GPU's multiprocessors.

    Attributes:
      capability: major and minor compute capability.
      number: of multiprocessors.
      lanes: float32 units of each.
      shared: KiB of shared memory of each, of which a block may have one less.
      gigahertz: highest clock.
    """

    capability: tuple[int, int]
    number: int
    lanes: int
    shared: int
    gigahertz: float


# Source: NVIDIA's architecture white papers of the H100 (SXM5) and the A100, and the table of compute
# capabilities in the CUDA C++ Programming Guide, which has the limits in `_description` as well.
_PROCESSORS = {
    "h100": _Processor((9, 0), 132, 128, shared=228, gigahertz=1.98),
    "a100": _Processor((8, 0), 108, 64, shared=164, gigahertz=1.41),
}


def _description(family):
    """Write XLA's description of a GPU: text of its protocol buffer GpuTargetConfigProto.

    jax 0.12 compiles the same program from it as from the longer one in XLA's sources.
    """
    chip, processor = CHIPS[GPUS[family]], _PROCESSORS[family]
    major, minor = processor.capability
    # The instructions that only Hopper has (wgmma, TMA).
    extension = "ACCELERATED_FEATURES" if major == 9 else "NONE"
    return f"""
gpu_device_info {{
  cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {extension} }}
  core_count: {processor.number}
  fpus_per_core: {processor.lanes}
  clock_rate_ghz: {processor.gigahertz}
  memory_bandwidth: {chip.bandwidth:.0f}
  device_memory_size: {chip.memory / GPU_SHARE:.0f}
  l2_cache_size: {chip.cache}
  shared_memory_per_core: {processor.shared << 10}
  shared_memory_per_block: {48 << 10}
  shared_memory_per_block_optin: {(processor.shared - 1) << 10}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  threads_per_warp: 32
  threads_per_core_limit: 2048
  threads_per_block_limit: 1024
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  block_dim_limit_x: {2**31 - 1}
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{GPUS[family]}"
"""
