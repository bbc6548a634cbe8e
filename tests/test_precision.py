"""Which type "auto" stands for."""

import platform
from pathlib import Path

import jax
import pytest

from compat_jax import models
from compat_jax.errors import UserError


def test_a_type_that_is_named_is_taken():
    assert [models.computed_in(name) for name in models.DTYPES] == ["float32", "bfloat16"]
    with pytest.raises(UserError, match=r"float16.*auto, bfloat16, float32"):
        models.computed_in("float16")


@pytest.mark.skipif(platform.system() != "Linux", reason="reads /proc/cpuinfo")
def test_auto_is_bfloat16_where_the_processor_has_the_instructions():
    flags = Path("/proc/cpuinfo").read_text().split()
    has_them = not {"avx512_bf16", "amx_bf16"}.isdisjoint(flags)
    expected = has_them and jax.__version_info__ >= (0, 12)
    assert models.computed_in("auto") == ("bfloat16" if expected else "float32")


class _Gpu:
    def __init__(self, capability):
        self.compute_capability = capability


@pytest.mark.parametrize(
    ("platform", "capability", "expected"),
    [
        ("tpu", None, True),
        ("gpu", "7.5", False),
        ("gpu", "8.0", True),
        ("gpu", "9.0", True),
        ("gpu", "gfx942", True),
    ],
)
def test_tpus_multiply_bfloat16_and_gpus_since_ampere(monkeypatch, platform, capability, expected):
    monkeypatch.setattr(jax, "devices", lambda platform: [_Gpu(capability)])
    models.multiplies_bfloat16.cache_clear()
    assert models.multiplies_bfloat16(platform) is expected
    models.multiplies_bfloat16.cache_clear()
