"""A convolution whose passes are computed in a form each, chosen by measured rates."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import programs
import pytest

from compat_jax.errors import UserError
from compat_jax.models import forms, rates
from compat_jax.models.conv import conv, cpu_form
from compat_jax.models.forms import Geometry, Passes
from compat_jax.models.passes import FORWARD, OF_INPUTS, OF_KERNEL, by_passes

# input shape, kernel side, outputs, stride; padding is half of the kernel
CASES = [
    ((2, 7, 7, 3), 1, 4, 1),
    ((2, 8, 8, 3), 1, 4, 2),
    ((2, 7, 7, 3), 1, 4, 2),
    ((2, 8, 8, 3), 3, 4, 1),
    ((2, 7, 7, 3), 3, 4, 1),
    ((2, 8, 8, 3), 3, 4, 2),
    ((2, 16, 16, 3), 7, 4, 2),
]


def applicable(table, size, stride):
    """Forms that can compute the geometry."""
    only = {"winograd": (size, stride) == (3, 1), "matmul": size == 1}
    return [name for name in table if only.get(name, True)]


@pytest.mark.parametrize(("shape", "size", "out", "stride"), CASES)
def test_each_form_of_each_pass_gives_what_the_native_form_gives(shape, size, out, stride):
    rng = np.random.default_rng(0)
    x = rng.standard_normal(shape, np.float32)
    kernel = rng.standard_normal((size, size, shape[-1], out), np.float32)
    geometry = Geometry(stride, (size - 1) // 2)
    tables = [applicable(table, size, stride) for table in (FORWARD, OF_INPUTS, OF_KERNEL)]
    chosen = [Passes(*each) for each in itertools.zip_longest(*tables, fillvalue="native")]
    upstream = rng.standard_normal(forms.native(x, kernel, geometry).shape, np.float32)

    @jax.jit
    def all_of_them(x, kernel):
        functions = [lambda x, k, p=p: by_passes(x, k, geometry, p) for p in chosen]
        native = lambda x, k: forms.native(x, k, geometry)  # noqa: E731
        return [
            (value, *pull_back(jnp.asarray(upstream)))
            for value, pull_back in (jax.vjp(f, x, kernel) for f in (native, *functions))
        ]

    expected, *results = all_of_them(x, kernel)
    for passes, result in zip(chosen, results, strict=True):
        for name, one, wanted in zip(Passes._fields, result, expected, strict=True):
            scale = np.abs(wanted).max()
            np.testing.assert_allclose(one, wanted, atol=1e-5 * scale, err_msg=f"{passes} {name}")


def test_gradients_of_bfloat16_are_summed_in_float32():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.uniform(0.5, 1, (4, 16, 16, 3)), jnp.bfloat16)
    kernel = jnp.asarray(rng.standard_normal((1, 1, 3, 4)), jnp.bfloat16)
    passes = Passes("im2col", "matmul", "columns")
    run = jax.jit(jax.grad(lambda k: by_passes(x, k, Geometry(), passes).sum(dtype=jnp.float32)))
    expected = np.broadcast_to(np.asarray(x, np.float64).sum((0, 1, 2))[:, None], (3, 4))
    np.testing.assert_allclose(np.asarray(run(kernel)[0, 0], np.float64), expected, rtol=2**-8)


def table(tmp_path, **changes):
    row = {
        "dtype": "float32",
        "side": 14,
        "inputs": 8,
        "outputs": 8,
        "kernel": 3,
        "stride": 1,
        "forward": {"native": 2, "winograd": 1},
        "of_inputs": {"native": 1, "winograd": 2},
        "of_kernel": {"native": 3, "taps": 1, "columns": 2},
        **changes,
    }
    path = tmp_path / f"{len(list(tmp_path.iterdir()))}.json"
    path.write_text(json.dumps({"shapes": [row]}))
    return str(path)


def choose(side=14, channels=(8, 8), size=3, *, stride=1, padding=1, dtype="float32", groups=1):
    shape, kernel = (2, side, side, channels[0]), (size, size, *channels)
    return rates.fastest(shape, kernel, Geometry(stride, padding, groups), dtype)


def test_the_fastest_form_of_each_pass_is_chosen_where_something_near_was_measured(
    tmp_path, monkeypatch
):
    monkeypatch.setenv(rates.VARIABLE, table(tmp_path))
    chosen = Passes("winograd", "native", "taps")
    for near in ({}, {"side": 28}, {"side": 13}, {"channels": (4, 16)}):
        assert choose(**near) == chosen, near
    for far in (
        *({"side": 29}, {"side": 12}, {"channels": (8, 17)}, {"channels": (3, 8)}),
        *({"size": 5, "padding": 2}, {"padding": 0}, {"stride": 2}, {"groups": 2}),
        *({"dtype": "bfloat16"}, {"dtype": "float64"}),
    ):
        assert choose(**far) is None, far
    assert cpu_form((2, 14, 14, 8), (3, 3, 8, 8), Geometry(1, 1)) == chosen
    assert cpu_form((2, 8, 8, 8), (3, 3, 8, 8), Geometry(1, 1)) == "winograd"  # by rule
    monkeypatch.setenv(rates.VARIABLE, table(tmp_path, side=7))
    assert choose(side=7) == chosen and choose(side=8) is None
    natives = {name: {"native": 1} for name in Passes._fields}
    monkeypatch.setenv(rates.VARIABLE, table(tmp_path, **natives))
    assert choose() is None


def test_the_package_has_rates_of_bfloat16():
    found = choose(14, (256, 256), dtype="bfloat16")
    assert found is not None and found.forward == "winograd"
    assert choose(14, (256, 256)) is None
    for shape, size in (((2, 12, 12, 64), 3), ((2, 6, 6, 128), 3), ((2, 32, 32, 3), 7)):
        form = cpu_form(shape, (size, size, shape[-1], 64), Geometry(1, size // 2))
        assert isinstance(form, str), "the quickstart's and ResNet-18's small maps keep their bits"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("no json", "is no table that launch.benchmark --rates wrote"),
        ('{"shapes": [{}]}', "is no table"),
        ('{"shapes": 3}', "is no table"),
    ],
)
def test_a_table_that_cannot_be_read_is_refused(tmp_path, monkeypatch, content, message):
    path = tmp_path / "rates.json"
    if content is not None:
        path.write_text(content)
    monkeypatch.setenv(rates.VARIABLE, str(path))
    with pytest.raises(UserError, match=message):
        choose()


@pytest.mark.parametrize(
    "changes", [{"forward": {"taps": 1}}, {"of_kernel": {}}, {"side": -7}, {"stride": 1.0}]
)
def test_a_row_that_cannot_be_is_refused(tmp_path, monkeypatch, changes):
    monkeypatch.setenv(rates.VARIABLE, table(tmp_path, **changes))
    with pytest.raises(UserError, match="is no table"):
        choose()


def test_the_program_for_other_platforms_is_their_own_convolution(tmp_path, monkeypatch):
    monkeypatch.setenv(rates.VARIABLE, table(tmp_path))
    x, kernel = np.zeros((2, 14, 14, 8), np.float32), np.zeros((3, 3, 8, 8), np.float32)
    run = jax.jit(jax.grad(lambda x, k: conv(x, k, padding=1).sum(), argnums=(0, 1))).trace
    count = lambda platform: (  # noqa: E731
        run(x, kernel)
        .lower(lowering_platforms=(platform,))
        .as_text()
        .count("stablehlo.convolution")
    )
    assert count("cuda") == count("tpu") == 2
    assert count("cpu") == 1  # the gradient of the inputs


@pytest.mark.slow
def test_the_benchmark_writes_a_table_that_is_read(tmp_path):
    path = tmp_path / "rates.json"
    flags = ("--sizes=tiny", "--only=forms", "--dtype=float32", f"--rates={path}")
    code, out, err = programs.call("benchmark", *flags)
    assert (code, err) == (0, "") and "7x7/2 8 px 8-8 float32" in out
    (row,) = rates.measured(str(path))
    assert row[:6] == ("float32", 8, 8, 8, 7, 2)
    assert set(row.milliseconds) == set(Passes._fields)
    assert all(min(times.values()) > 0 and "native" in times for times in row.milliseconds.values())
