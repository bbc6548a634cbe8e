"""Eight simulated devices, strict dtypes, and a cache of its own for the whole test run."""

import os
import shutil
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests compile more than they compute: LLVM's passes on the CPU cost a quarter of the suite's time,
# cutting small programs into parts to compile at once a tenth, and the newer of two ways to emit fused
# loops a quarter. An extra option that a release of XLA does not know is ignored.
# To test the code that users run: XLA_FLAGS= pytest
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_parallel_codegen_split_count=1 "
    "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters",
)
# As the programs do (launch/_huge_pages.py): for the workers of xdist, and programs that tests start.
os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")

import hypothesis
import jax
import pytest

# A save waits for the disk, 60 ms here, and tests save a thousand times: in memory, where there is room.
_MEMORY = Path("/dev/shm")
if os.access(_MEMORY, os.W_OK) and shutil.disk_usage(_MEMORY).free > 4 << 30:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(_MEMORY))

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")


# An example may have to compile, and the machine may be busy: no deadline. The same examples each time.
hypothesis.settings.register_profile("default_suite", deadline=None, derandomize=True)
hypothesis.settings.load_profile("default_suite")


# Those that take 12 to 40 s of processor time: begun first, the workers of pytest-xdist end together.
_FIRST = tuple(
    f"test_{name}.py"
    for name in (
        *("multihost", "installed", "golden_steps", "train", "resume", "signals", "tpu_vm"),
        *("backbones", "docs", "update", "rivals", "evaluation", "model_axis", "methods"),
        *("compare_reference", "losses", "search", "augment", "conv", "validation", "remat"),
    )
)


def pytest_collection_modifyitems(items):
    """Put the longest files first; the others stay in their order."""
    place = {name: i for i, name in enumerate(_FIRST)}
    items.sort(key=lambda item: place.get(item.path.name, len(_FIRST)))


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory):
    """Rendered glyphs and compiled programs of the tests: $COMPAT_JAX_CACHE, or a new folder.

    The workers of pytest-xdist share it, so that each program is compiled once.
    """
    if "COMPAT_JAX_CACHE" not in os.environ:
        base = tmp_path_factory.getbasetemp()
        shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
        os.environ["COMPAT_JAX_CACHE"] = str(shared / "cache")
    folder = os.environ["COMPAT_JAX_CACHE"]
    jax.config.update("jax_compilation_cache_dir", os.path.join(folder, "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    return folder
