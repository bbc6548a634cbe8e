"""Devices that are not there, to compile for: TPU slices and machines with GPUs."""

import functools
import importlib.metadata
import importlib.util
import mmap
import re
from pathlib import Path

import jax
from jax.experimental import topologies

from compat_jax.errors import UserError, unknown
from compat_jax.hlo.chips import GPUS

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


def cuda_plugin() -> Path | None:
    """Return the library of JAX's CUDA plugin, None where it is not installed."""
    for package in _PLUGINS:
        try:
            found = importlib.util.find_spec(package)
        except ModuleNotFoundError:  # no plugin at all
            return None
        if found and found.origin:
            return Path(found.origin).with_name("xla_cuda_plugin.so")
    return None


def _gpus(family, chips):
    if not chips.isdigit() or not 1 <= int(chips) <= GPUS_PER_HOST:
        raise UserError(
            f"topology '{family}:{chips}' needs the GPUs of one machine, for example {family}:1 or "
            f"{family}:{GPUS_PER_HOST}"
        )
    library = cuda_plugin()
    if library is None:
        release = importlib.metadata.version("jaxlib")
        raise UserError(
            f"{family} needs the compiler of JAX's CUDA plugin, which is not installed: "
            f"pip install jax-cuda13-plugin=={release}"
        )
    machine = topologies.get_topology_desc(
        platform="cuda",
        topology_name=f"{family}:{chips}",
        topology=f"1x1x{chips}",  # partitions, hosts, GPUs of each
        target_config=_description(library, GPUS[family]),
    )
    return list(machine.devices)


@functools.cache
def _description(library: Path, name: str) -> str:
    """Return XLA's description of a GPU, which its library holds as text."""
    pattern = rb'gpu_device_info \{[ -~\n]*?device_description_str: "([^"\n]*)"\n'
    with (
        library.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
    ):
        for match in re.finditer(pattern, content):
            if match[1].decode() == name:
                return match[0].decode()
    raise UserError(f"{library} describes no {name}: install the CUDA plugin of another release")
