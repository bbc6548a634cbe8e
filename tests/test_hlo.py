"""Reading the text of a compiled program: work, traffic, what repeats, what waits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from compat_jax import hlo
from compat_jax.hlo.text import Array, arrays, parse
from compat_jax.models import forms
from compat_jax.models.forms import Geometry

# A step of training as XLA:GPU writes it: a loop of unknown length around a convolution of unchanging
# weights, its gradient, a transpose, and an all-reduce beside a product.
STEP = """HloModule jit_step, is_scheduled=true

%to_bf16 (p: f32[3,3,8,16]) -> bf16[3,3,8,16] {
  %p = f32[3,3,8,16]{3,2,1,0} parameter(0)
  ROOT %narrow = bf16[3,3,8,16]{3,2,1,0} convert(%p), metadata={op_name="jit(step)/teacher/conv/convert"}
}

%to_ohwi (p: f32[3,3,8,16]) -> bf16[16,3,3,8] {
  %p.1 = f32[3,3,8,16]{3,2,1,0} parameter(0)
  %turned = f32[16,3,3,8]{3,2,1,0} transpose(%p.1), dimensions={3,0,1,2}
  ROOT %narrow.1 = bf16[16,3,3,8]{3,2,1,0} convert(%turned), metadata={op_name="jit(step)/conv/convert"}
}

%rows (images: u8[100,6,6,8], all: s32[50,4], number: s32[]) -> bf16[4,6,6,8] {
  %images = u8[100,6,6,8]{3,2,1,0} parameter(0)
  %all = s32[50,4]{1,0} parameter(1)
  %count = s32[] parameter(2)
  %at = s32[1,4]{1,0} dynamic-slice(%all, %count), dynamic_slice_sizes={1,4}
  %taken = u8[4,6,6,8]{3,2,1,0} gather(%images, %at), offset_dims={1,2,3}
  ROOT %wide = bf16[4,6,6,8]{3,2,1,0} convert(%taken)
}

%update (w: f32[3,3,8,16], g: bf16[16,3,3,8]) -> f32[3,3,8,16] {
  %w = f32[3,3,8,16]{3,2,1,0} parameter(0)
  %g = bf16[16,3,3,8]{3,2,1,0} parameter(1)
  %back = bf16[3,3,8,16]{3,2,1,0} transpose(%g), dimensions={1,2,3,0}
  %as_f32 = f32[3,3,8,16]{3,2,1,0} convert(%back)
  ROOT %less = f32[3,3,8,16]{3,2,1,0} subtract(%w, %as_f32)
}

%body (state: (s32[], f32[3,3,8,16], f32[3,3,8,16], u8[100,6,6,8], s32[50,4])) -> (s32[], f32[3,3,8,16], f32[3,3,8,16], u8[100,6,6,8], s32[50,4]) {
  %state = (s32[], f32[3,3,8,16]{3,2,1,0}, f32[3,3,8,16]{3,2,1,0}, u8[100,6,6,8]{3,2,1,0}, /*index=4*/s32[50,4]{1,0}) parameter(0)
  %number = s32[] get-tuple-element(%state), index=0
  %weights = f32[3,3,8,16]{3,2,1,0} get-tuple-element(%state), index=1
  %old = f32[3,3,8,16]{3,2,1,0} get-tuple-element(%state), index=2
  %data = u8[100,6,6,8]{3,2,1,0} get-tuple-element(%state), index=3
  %plan = s32[50,4]{1,0} get-tuple-element(%state), index=4
  %one = s32[] constant(1)
  %after = s32[] add(%number, %one)
  %batch = bf16[4,6,6,8]{3,2,1,0} fusion(%data, %plan, %number), kind=kLoop, calls=%rows
  %narrow_old = bf16[3,3,8,16]{3,2,1,0} fusion(%old), kind=kLoop, calls=%to_bf16
  %taught = (bf16[4,6,6,16]{3,2,1,0}, u8[0]{0}) custom-call(%batch, %narrow_old), window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f, custom_call_target="__cudnn$convForward"
  %kernel = bf16[16,3,3,8]{3,2,1,0} fusion(%weights), kind=kInput, calls=%to_ohwi
  %out = (bf16[4,6,6,16]{3,2,1,0}, u8[0]{0}) custom-call(%batch, %kernel), window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convForward"
  %map = bf16[4,6,6,16]{3,2,1,0} get-tuple-element(%out), index=0
  %sum = ((f32[16]{0}), f32[16]{0}) all-reduce-start(%number), channel_id=1, replica_groups=mesh['data'=8,'model'=1] {'data'}
  %slope = (bf16[16,3,3,8]{3,2,1,0}, u8[0]{0}) custom-call(%batch, %map), window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convBackwardFilter"
  %summed = f32[16]{0} all-reduce-done(%sum)
  %gradient = bf16[16,3,3,8]{3,2,1,0} get-tuple-element(%slope), index=0
  %total = bf16[16,3,3,8]{3,2,1,0} all-reduce(%gradient), channel_id=2, replica_groups=[2,4]<=[8]
  %new = f32[3,3,8,16]{3,2,1,0} fusion(%weights, %total), kind=kLoop, calls=%update
  ROOT %next = (s32[], f32[3,3,8,16]{3,2,1,0}, f32[3,3,8,16]{3,2,1,0}, u8[100,6,6,8]{3,2,1,0}, s32[50,4]{1,0}) tuple(%after, %new, %old, %data, %plan)
}

%more (state: (s32[], f32[3,3,8,16], f32[3,3,8,16], u8[100,6,6,8], s32[50,4])) -> pred[] {
  %state.1 = (s32[], f32[3,3,8,16]{3,2,1,0}, f32[3,3,8,16]{3,2,1,0}, u8[100,6,6,8]{3,2,1,0}, s32[50,4]{1,0}) parameter(0)
  ROOT %yes = pred[] constant(true)
}

ENTRY %main (a: s32[], b: f32[3,3,8,16], c: f32[3,3,8,16], d: u8[100,6,6,8], e: s32[50,4]) -> f32[3,3,8,16] {
  %a = s32[] parameter(0)
  %b = f32[3,3,8,16]{3,2,1,0} parameter(1)
  %c = f32[3,3,8,16]{3,2,1,0} parameter(2)
  %d = u8[100,6,6,8]{3,2,1,0} parameter(3)
  %e = s32[50,4]{1,0} parameter(4)
  %copied = f32[3,3,8,16]{3,2,1,0} copy(%b)
  %all = (s32[], f32[3,3,8,16]{3,2,1,0}, f32[3,3,8,16]{3,2,1,0}, u8[100,6,6,8]{3,2,1,0}, s32[50,4]{1,0}) tuple(%a, %copied, %c, %d, %e)
  %loop = (s32[], f32[3,3,8,16]{3,2,1,0}, f32[3,3,8,16]{3,2,1,0}, u8[100,6,6,8]{3,2,1,0}, s32[50,4]{1,0}) while(%all), condition=%more, body=%body
  ROOT %result = f32[3,3,8,16]{3,2,1,0} get-tuple-element(%loop), index=1
}
"""  # noqa: E501
WEIGHTS = 3 * 3 * 8 * 16
BATCH = 4 * 6 * 6 * 8
MAP = 4 * 6 * 6 * 16
# Along one axis, 3 taps meet 6 positions less the 2 on the padding.
CONVOLUTION = 2 * 4 * (3 * 6 - 2) ** 2 * 8 * 16


@pytest.fixture(scope="module")
def step():
    return {kernel.name: kernel for kernel in hlo.read(STEP).kernels}


def test_arrays_have_types_sizes_orders_and_spaces():
    assert arrays("(bf16[2,3]{0,1:T(8,128)(2,1)S(1)}, pred[5]{0}, s4[6], token[])") == (
        Array("bf16", (2, 3), (0, 1), 1),
        Array("pred", (5,), (0,)),
        Array("s4", (6,)),
        Array("token", ()),
    )
    assert [array.size for array in arrays("(bf16[2,3], pred[5], s4[6], f8e4m3fn[7], token[])")] == [
        12, 5, 3, 7, 0,
    ]  # fmt: skip
    with pytest.raises(ValueError, match="no ENTRY"):
        parse("HloModule nothing")


def test_a_step_is_one_pass_through_the_loop_of_unknown_length(step):
    program = hlo.read(STEP)
    assert program.loops
    assert list(step) == [
        "batch", "narrow_old", "taught", "kernel", "out", "sum", "slope", "total", "new",
    ]  # fmt: skip
    known = STEP.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"5"}}')
    program = hlo.read(known)
    assert not program.loops
    assert [kernel.times for kernel in program.kernels] == [1] + [5] * 9
    assert program.flops == {"bf16": 15 * CONVOLUTION}


def test_kinds_of_kernels(step):
    assert {name: kernel.kind for name, kernel in step.items()} == {
        "batch": "other",  # it gathers
        "narrow_old": "convert",
        "taught": "product",
        "kernel": "transpose",
        "out": "product",
        "sum": "collective",
        "slope": "product",
        "total": "collective",
        "new": "other",
    }
    assert step["kernel"].feeds and step["total"].feeds and not step["new"].feeds
    assert [name for name, kernel in step.items() if kernel.repeats] == ["narrow_old"]
    assert step["narrow_old"].place == "jit(step)/teacher/conv/convert"


def test_bytes_are_those_that_are_used(step):
    batch = step["batch"]
    assert batch.inputs == BATCH + 4 * 4 + 4  # the rows of the batch, not the whole data
    assert batch.sizes == (2 * BATCH,)
    assert step["kernel"].inputs == 4 * WEIGHTS
    new = step["new"]
    assert (new.inputs, new.results) == (0, 4 * WEIGHTS)  # the weights were read before
    assert new.sizes == (4 * WEIGHTS, 2 * WEIGHTS)
    assert step["out"].sizes == (2 * BATCH, 2 * WEIGHTS, 2 * MAP)


def test_an_update_in_place_writes_its_slice():
    text = """
%unused (p: f32[]) -> f32[] {
  ROOT %p = f32[] parameter(0)
}, execution_thread="sparsecore"

ENTRY %main (a: f32[1000], b: f32[10], i: s32[]) -> f32[1000] {
  %a = f32[1000]{0} parameter(0)
  %b = f32[10]{0} parameter(1)
  %i = s32[] parameter(2)
  ROOT %u = f32[1000]{0} dynamic-update-slice(%a, %b, %i)
}
"""
    (kernel,) = hlo.read(text).kernels
    assert kernel.size == 40 + 4 + 40


def test_what_runs_beside_a_collective(step):
    first, second = step["sum"].collective, step["total"].collective
    assert (first.operation, first.size, first.devices) == ("all-reduce", 64, 8)
    assert [kernel.name for kernel in first.hides] == ["slope"]
    assert (second.size, second.devices, second.hides) == (2 * WEIGHTS, 4, ())
    assert hlo.read(STEP).collectives == {"all-reduce": (2, 64 + 2 * WEIGHTS)}


def test_pieces_of_one_collective_count_once_and_hide_what_lies_between():
    text = """
%piece (p: f32[4], w: f32[8,8]) -> (f32[8,8], f32[32]) {
  %p = f32[4]{0} parameter(0)
  %w = f32[8,8]{1,0} parameter(1)
  %d = f32[8,8]{1,0} dot(%w, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %g.1 = f32[32]{0} all-gather(%p), channel_id=7, replica_groups={{0,1,2,3,4,5,6,7}}
  ROOT %t = (f32[8,8]{1,0}, f32[32]{0}) tuple(%d, %g.1)
}

%end (p: f32[4]) -> f32[32] {
  %p.1 = f32[4]{0} parameter(0)
  %g.2 = f32[32]{0} all-gather(%p.1), channel_id=7, replica_groups={{0,1,2,3,4,5,6,7}}
  ROOT %done = f32[32]{0} custom-call(%g.2), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (a: f32[4], b: f32[8,8]) -> f32[32] {
  %a = f32[4]{0} parameter(0)
  %b = f32[8,8]{1,0} parameter(1)
  %g = f32[32]{0} all-gather(%a), channel_id=7, replica_groups={{0,1,2,3,4,5,6,7}}
  %n = f32[8,8]{1,0} negate(%b)
  %f = (f32[8,8]{1,0}, f32[32]{0}) fusion(%a, %n), kind=kCustom, calls=%piece
  ROOT %e = f32[32]{0} fusion(%a), kind=kCustom, calls=%end
}
"""
    program = hlo.read(text)
    assert [kernel.name for kernel in program.kernels] == ["g", "n", "f"]
    assert program.collectives == {"all-gather": (1, 128)}
    gather = program.kernels[0].collective
    assert gather.devices == 8 and [kernel.name for kernel in gather.hides] == ["n", "f"]
    assert program.flops == {"f32": 2 * 8**3}


def test_memory_spaces_of_a_tpu_and_of_the_host():
    text = """
ENTRY %main (a: f32[256,128], b: f32[64]) -> f32[256,128] {
  %a = f32[256,128]{1,0:T(8,128)} parameter(0)
  %b = f32[64]{0} parameter(1)
  %s = (f32[256,128]{1,0:T(8,128)S(1)}, f32[256,128]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%a)
  %d = f32[256,128]{1,0:T(8,128)S(1)} copy-done(%s)
  %n = f32[256,128]{1,0:T(8,128)S(1)} negate(%d)
  %h = f32[64]{0:S(5)} copy(%b)
  %o = token[] outfeed(%b)
  ROOT %r = f32[256,128]{0,1:T(8,128)} copy(%n)
}
"""
    kernels = hlo.read(text).kernels
    assert [(k.name, k.kind, k.size) for k in kernels] == [
        ("s", "prefetch", 131072),
        ("n", "other", 0),
        ("h", "host", 256),
        ("o", "host", 256),
        ("r", "transpose", 131072),
    ]


@pytest.mark.parametrize(
    ("result", "dimensions", "kind"),
    [
        ("f32[4,3,2]{2,1,0}", "2,1,0", "transpose"),
        ("f32[4,3,2]{0,1,2}", "2,1,0", "copy"),  # another name for the same bytes
        ("f32[2,4,3]{2,1,0}", "0,2,1", "transpose"),
    ],
)
def test_a_transpose_is_one_if_bytes_move(result, dimensions, kind):
    text = f"""
ENTRY %main (a: f32[2,3,4]) -> {result.split("{")[0]} {{
  %a = f32[2,3,4]{{2,1,0}} parameter(0)
  ROOT %t = {result} transpose(%a), dimensions={{{dimensions}}}
}}
"""
    (kernel,) = hlo.read(text).kernels
    assert kernel.kind == kind


GEOMETRIES = [Geometry(1, 1), Geometry(2, 3), Geometry(2, 0), Geometry(1, 2, groups=4)]


def counted(geometry, sides=(9, 3), channels=(8, 12)):
    """FLOP of a convolution, counted by the convolution of ones itself."""
    x = np.ones((2, sides[0], sides[0], channels[0]), np.float32)
    kernel = np.ones((sides[1], sides[1], channels[0] // geometry.groups, channels[1]), np.float32)
    return x, kernel, 2 * float(forms.native(x, kernel, geometry).sum())


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_flop_of_a_convolution_and_of_its_gradients(geometry):
    """Each product of the pass forward is one of each gradient."""
    x, kernel, expected = counted(geometry)

    def passes(x, kernel, slope):
        out, pull = jax.vjp(lambda x, kernel: forms.native(x, kernel, geometry), x, kernel)
        return out, *pull(slope)

    slope = jax.eval_shape(lambda: forms.native(x, kernel, geometry))
    text = jax.jit(passes).lower(x, kernel, slope).compile().as_text()
    assert sum(hlo.read(text).flops.values()) == 3 * expected


CALLS = {
    "__cudnn$convForward": "%x, %k",
    "__cudnn$convBackwardInput": "%y, %k",
    "__cudnn$convBackwardFilter": "%x, %y",
}


@pytest.mark.parametrize("target", CALLS)
def test_flop_of_the_calls_of_cudnn(target):
    *_, expected = counted(Geometry(2, 1))
    x, k, y = "bf16[2,9,9,8]", "bf16[12,3,3,8]", "bf16[2,5,5,12]"
    result = {"Forward": y, "Input": x, "Filter": k}[
        target.split("conv")[1].removeprefix("Backward")
    ]
    text = f"""
ENTRY %main (x: {x}, k: {k}, y: {y}) -> ({result}, u8[0]) {{
  %x = {x}{{3,2,1,0}} parameter(0)
  %k = {k}{{3,2,1,0}} parameter(1)
  %y = {y}{{3,2,1,0}} parameter(2)
  ROOT %c = ({result}{{3,2,1,0}}, u8[0]{{0}}) custom-call({CALLS[target]}), window={{size=3x3 stride=2x2 pad=1_1x1_1}}, dim_labels=b01f_o01i->b01f, custom_call_target="{target}"
}}
"""  # noqa: E501
    assert hlo.read(text).flops == {"bf16": expected}


def test_flop_of_matrix_products():
    @jax.jit
    def f(a, b):
        batched = lax.dot_general(a, b, (((2,), (1,)), ((0,), (0,))))
        return batched, lax.dot(a[0], b[0], precision="highest")

    a, b = jnp.ones((3, 4, 5)), jnp.ones((3, 5, 7))
    found = hlo.read(f.lower(a, b).compile().as_text()).flops
    assert found == {"f32": 2 * 3 * 4 * 5 * 7, "f32!": 2 * 4 * 5 * 7}
    call = """
ENTRY %main (a: bf16[64,32], b: bf16[32,16]) -> bf16[64,16] {
  %a = bf16[64,32]{1,0} parameter(0)
  %b = bf16[32,16]{1,0} parameter(1)
  ROOT %c = bf16[64,16]{1,0} custom-call(%a, %b), custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}
}
"""  # noqa: E501
    assert hlo.read(call).flops == {"bf16": 2 * 64 * 32 * 16}


def test_a_program_compiled_for_eight_devices():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split, whole = (NamedSharding(mesh, PartitionSpec(axis)) for axis in ("data", None))

    def f(w, x):
        return lax.fori_loop(0, x[0, 0].astype(int), lambda _, w: w - x.T @ jnp.tanh(x @ w), w)

    lowered = jax.jit(f, in_shardings=(whole, split), out_shardings=whole).lower(
        jnp.ones((16, 4)), jnp.ones((64, 16))
    )
    program = hlo.read(lowered.compile().as_text())
    assert program.loops
    assert program.collectives == {"all-reduce": (1, 16 * 4 * 4)}
    (between,) = [kernel.collective for kernel in program.kernels if kernel.collective]
    assert between.devices == 8


CHIP = hlo.Chip(
    "a chip", memory=1e9, peaks={"bf16": 1e9, "f32": 5e8}, bandwidth=1e6, cache=100, link=1e4,
    is_gpu=True,
)  # fmt: skip


def kernel(name, kind="other", **fields):
    return hlo.Kernel(name, kind, **fields)


def test_the_lower_bound():
    between = hlo.Collective("all-reduce", 400, 4)
    program = hlo.Program(
        (
            kernel("p", "product", flops={"bf16": 2e6, "f32": 1e6}, inputs=1000, sizes=(60, 300)),
            kernel("e", sizes=(300, 150), results=100, times=2),
            kernel("c", "collective", collective=between, sizes=(400, 400)),
            kernel("f", "prefetch", sizes=(50,)),
        )
    )
    least = hlo.bound(program, CHIP)
    assert least.compute == pytest.approx(2e-3 + 2e-3)
    # The arguments and results less the cache once, of the other arrays what exceeds it.
    carried, beyond = 1100 - 100, 200 + 2 * (200 + 50) + 300 + 300
    assert least.memory == pytest.approx((carried + beyond) / 1e6)
    assert least.links == pytest.approx(0.75 * 400 / 1e4)
    assert least.kernels == pytest.approx(4e-3 + 2 * 550e-6 + 0.03)
    assert (least.seconds, least.limit) == (least.links, "links")


def test_findings(step):
    chip = hlo.CHIPS["NVIDIA H100 80GB HBM3"]
    program = hlo.read(STEP)
    lines = hlo.findings(program, chip, low_precision=True)
    found = dict(line.split(": ", 1) for line in lines if ": " in line)
    assert found["kernels that only change a type"].startswith("1, 0.0 MiB, ")
    assert found["kernels that only change a type"].endswith(
        "teacher/conv/convert the largest; 1 feed a product"
    )
    assert found["kernels that only reorder an array"].endswith("1 feed a product")
    assert found["kernels that compute the same in every step"].startswith("1, ")
    assert found["smaller collectives"].startswith("2, 1 of them beside no product")
    assert found["kernels with less than 1 µs of work"].startswith("7 of 7, ")
    assert any(line.startswith("the host reads one number after each step") for line in lines)
    assert not any("float32" in line for line in lines)
    wide = hlo.read(STEP.replace("bf16[", "f32["))
    lines = hlo.findings(wide, chip, low_precision=True)
    assert any(line.startswith("products of float32 where bfloat16 was asked for: 3 of 3, 100 %")
               for line in lines)  # fmt: skip
    assert not any("float32" in line for line in hlo.findings(wide, chip, low_precision=False))


def test_gradients_that_nothing_runs_beside():
    chip = hlo.CHIPS["TPU v5 lite"]
    beside = kernel("p", "product", flops={"bf16": 197e12 * 5e-6})  # 5 µs
    between = hlo.Collective("all-reduce", 2 << 20, 8, (beside,))
    lines = hlo.findings(
        hlo.Program((kernel("g", "collective", collective=between), beside)),
        chip,
        low_precision=True,
    )
    # 7/8 of 2 MiB at 200 GB/s are 9.2 µs.
    assert "collectives of 1 MiB and more: 1, 2.0 MiB, 9.2 µs on the links, 54 % of it" in lines[1]
    assert not any("host" in line for line in lines)


def test_chips_are_those_that_are_planned_for():
    for chip in hlo.CHIPS.values():
        assert chip.memory > 7 * 2**30
        if chip.peaks:
            assert chip.peaks["bf16"] >= chip.peaks["f32"] > chip.peaks["f32!"] > 1e13
            assert chip.bandwidth > 8e11 and chip.link >= 2e11
            assert bool(chip.cache) == chip.is_gpu
