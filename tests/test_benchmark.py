"""launch.benchmark from end to end on tiny sizes, without judging the speed."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import tiny

from compat_jax import methods, models
from compat_jax.errors import UserError
from launch import benchmarks
from launch.benchmarks import flops, table, timing, work


def test_the_command_measures_and_writes_what_it_printed(tmp_path):
    file = tmp_path / "numbers.json"
    only = "large_k,search"
    code, out, err = tiny.call("benchmark", "--sizes=tiny", f"--only={only}", f"--json={file}")
    assert (code, err) == (0, "")
    written = json.loads(file.read_text())
    assert {"device", "processor", "cores", "versions", "command", "matmul_flops"} <= {*written}
    assert written["versions"]["jax"] == jax.__version__
    assert written["matmul_flops"]["float32"] > 0
    results = written["results"]
    assert [*dict.fromkeys(r["measure"] for r in results)] == only.split(",")
    measured = [r for r in results if r["value"] is not None]
    assert len(measured) >= len(results) - 1  # FAISS may be missing
    assert all(r["value"] > 0 and r["met"] is None for r in measured)  # tiny sizes prove nothing
    assert out.count("\n| ") == len(results) + 1
    assert "--sizes=tiny" in out and jax.__version__ in out


@pytest.fixture(scope="module")
def lines():
    """The lines of training and retrieval for a network that compiles quickly."""
    sizes = dataclasses.replace(work.TINY, backbone="flat:Flat")
    only = ("step", "epoch", "streaming", "protocol", "features", "evaluation")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(benchmarks.SIZES, "tiny", sizes)
        results = list(benchmarks.measure(only, sizes_name="tiny"))
    return {m: [r for r in results if r.measure == m] for m in only}


def test_training_is_measured(lines):
    (step,) = lines["step"]
    assert step.what == "jax float32" and step.repeats == 2 and step.value > 0 and step.flops > 0
    (epoch,) = lines["epoch"]
    assert epoch.what == "2 epochs of 4 steps" and epoch.ratio > 0
    in_memory, streamed = lines["streaming"]
    assert in_memory.ratio is None
    assert streamed.ratio == pytest.approx(streamed.value / in_memory.value)
    assert [p.what for p in lines["protocol"]] == [f"{m} float32, 191 steps" for m in ("hoc", "er")]


def test_retrieval_is_measured(lines):
    (features,) = lines["features"]
    assert features.unit == "images/s" and features.value > 0
    extractions, seconds = lines["evaluation"]
    assert (extractions.value, extractions.goal) == (6, "6")  # two a version, not one a pair
    assert 0 < seconds.ratio < 1


def test_what_cannot_be_measured_is_one_line(tmp_path):
    code, out, err = tiny.call("benchmark", "--only=stp")
    assert (code, out) == (2, "") and "unknown measure 'stp'. Did you mean 'step'" in err
    code, out, err = tiny.call("benchmark", f"--reference={tmp_path}", "--only=large_k")
    assert code == 2 and err.startswith(f"error: {tmp_path} is no clone of the reference")


def test_unknown_names_are_refused():
    with pytest.raises(UserError, match=r"unknown variant 'egaer'\. Did you mean 'eager'"):
        next(benchmarks.measure(["large_k"], variants=["egaer"]))
    assert benchmarks.chosen([]) == tuple(m for m in benchmarks.MEASURES if m != "protocol")


def test_sides_are_timed_alternately():
    order = []

    def side(name, seconds):
        return lambda: order.append(name) or next(seconds)

    ours = side("a", iter([9.0, 1.0, 2.0, 3.0, 4.0, 5.0]))
    theirs = side("b", iter([9.0, 2.0, 2.0, 2.0, 2.0, 2.0]))
    result = timing.alternate({"a": ours, "b": theirs}, 5, warm_up=1)
    assert "".join(order) == "ab" * 6
    assert result["a"].median == 3.0 and result["a"].spread == pytest.approx(1 / 3)
    assert result["b"].median == 2.0 and result["b"].spread == 0.0


def test_operations_of_resnet18_by_hand():
    backbone = models.Backbone("resnet18").build()
    network = methods.FixedSimplex(1024).embedder(backbone, models.DTYPES["float32"])
    image = np.zeros((1, 32, 32, 3), np.float32)
    variables = jax.eval_shape(lambda: network.init(jax.random.key(0), image, train=False))
    counted = flops.forward_flops(network, variables, (32, 32, 3))
    taps = {
        (size, width, stride, pad): sum(
            0 <= stride * out + tap - pad < size
            for out in range((size + 2 * pad - width) // stride + 1)
            for tap in range(width)
        )
        ** 2
        for size, width, stride, pad in [
            (32, 7, 2, 3), (8, 3, 1, 1), (8, 3, 2, 1), (4, 3, 1, 1), (4, 3, 2, 1), (2, 3, 1, 1),
            (2, 3, 2, 1), (1, 3, 1, 1), (8, 1, 2, 0), (4, 1, 2, 0), (2, 1, 2, 0),
        ]
    }  # fmt: skip
    assert taps[8, 3, 1, 1] == 22**2 and taps[1, 3, 1, 1] == 1
    macs = taps[32, 7, 2, 3] * 3 * 64 + 4 * taps[8, 3, 1, 1] * 64 * 64
    for size, width in ((8, 128), (4, 256), (2, 512)):
        macs += (taps[size, 3, 2, 1] + taps[size, 1, 2, 0]) * width // 2 * width
        macs += 3 * taps[size // 2, 3, 1, 1] * width * width
    macs += 512 * 1023
    assert sum(counted) == 2 * macs
    assert flops.hoc_step_flops(counted) == 8 * macs - 2 * taps[32, 7, 2, 3] * 3 * 64


def test_a_line_of_the_table():
    matmul = {"float32": 2e11}
    result = timing.Result(
        measure="step",
        what="jax float32",
        value=251.5,
        unit="ms",
        spread=0.031,
        repeats=15,
        flops=88e9,
        ratio=0.368,
        goal="at most 0.75",
        met=True,
    )
    assert table.line(result, matmul) == (
        "| step | jax float32 | 251.5 ms | 3 % | 15 | 88 | 44 % | 0.368 | at most 0.75 | met |"
    )
    missing = timing.Result.not_run("search", "FAISS", "no faiss")
    assert "not run: no faiss" in table.line(missing, matmul)
