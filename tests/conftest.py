"""Eight simulated devices, strict dtypes, and a cache of its own for the whole test run."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory):
    """Rendered glyphs and compiled programs of the tests: $COMPAT_JAX_CACHE, or a new folder."""
    if "COMPAT_JAX_CACHE" not in os.environ:
        os.environ["COMPAT_JAX_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    return os.environ["COMPAT_JAX_CACHE"]
