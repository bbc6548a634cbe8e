"""launch.benchmark from end to end on tiny sizes, without judging the speed."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import programs
import pytest

from compat_jax import Chain, methods, models
from compat_jax.data.pictures import decode
from compat_jax.errors import UserError
from launch import benchmarks
from launch.benchmarks import flops, gallery, photos, pictures, table, timing, work


def test_the_command_measures_and_writes_what_it_printed(tmp_path):
    file = tmp_path / "numbers.json"
    only = "large_k,search"
    code, out, err = programs.call("benchmark", "--sizes=tiny", f"--only={only}", f"--json={file}")
    assert (code, err) == (0, "")
    written = json.loads(file.read_text())
    assert {"device", "processor", "cores", "versions", "command", "matmul_flops"} <= {*written}
    assert written["versions"]["jax"] == jax.__version__
    assert written["matmul_flops"]["float32"] > 0
    results = written["results"]
    assert [*dict.fromkeys(r["measure"] for r in results)] == only.split(",")
    measured = [r for r in results if r["value"] is not None]
    unmeasured = [r["what"] for r in results if r["value"] is None]
    assert all(what.startswith("FAISS") for what in unmeasured)  # it may be missing
    searched = [r["what"] for r in results if r["measure"] == "search"]
    assert [s for s in searched if s.startswith("jax")] == [
        "jax, 4 queries",
        "jax, 2 queries",
        "jax, 1 query",
    ]
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


@pytest.mark.slow
def test_training_is_measured(lines):
    (step,) = lines["step"]
    assert step.what == "jax float32" and step.repeats == 2 and step.value > 0 and step.flops > 0
    (epoch,) = lines["epoch"]
    assert epoch.what == "2 epochs of 4 steps" and epoch.ratio > 0
    in_memory, streamed = lines["streaming"]
    assert in_memory.ratio is None
    assert streamed.ratio == pytest.approx(streamed.value / in_memory.value)
    assert [p.what for p in lines["protocol"]] == [f"{m} float32, 191 steps" for m in ("hoc", "er")]


@pytest.mark.slow
def test_retrieval_is_measured(lines):
    (features,) = lines["features"]
    assert features.unit == "images/s" and features.value > 0
    extractions, seconds = lines["evaluation"]
    assert (extractions.value, extractions.goal) == (6, "6")  # two a version, not one a pair
    assert 0 < seconds.ratio < 1


@pytest.fixture
def small_photos():
    """Sizes of real pictures for a network that compiles quickly."""
    photos = dataclasses.replace(
        work.TINY.photos,
        backbones=("one_conv",),
        image=8,
        trained=("one_conv", 40, 1),
        read=("one_conv", 3, 2),
        latency=(("one_conv", None),),
    )
    return dataclasses.replace(work.TINY, backbone="one_conv", photos=photos)


def test_real_pictures_are_measured(small_photos, monkeypatch):
    monkeypatch.setitem(benchmarks.SIZES, "tiny", small_photos)
    only = ("photo_features", "latency", "decoding")
    results = list(benchmarks.measure(only, sizes_name="tiny", dtypes=["float32"], variants=()))
    assert [*dict.fromkeys(r.measure for r in results)] == [*only]
    assert all(r.value > 0 and r.met is None for r in results)
    features, from_file, decoded, one, several = results
    assert features.what == "jax float32, one_conv, 8 px, batch 8"
    assert from_file.what == "from the file, float32, one_conv, 8 px" and from_file.repeats == 2
    assert decoded.what == "jax float32, one_conv, 8 px" and decoded.unit == "ms"
    cores = int(several.what.split()[1])
    assert several.ratio == pytest.approx(several.value / one.value / cores)


@pytest.mark.slow
def test_training_on_real_pictures_is_measured(small_photos, monkeypatch):
    monkeypatch.setitem(benchmarks.SIZES, "tiny", small_photos)
    only = ("photo_step", "from_disk")
    results = benchmarks.measure(only, sizes_name="tiny", dtypes=["float32"], variants=())
    step, memory, disk = results
    assert step.what == "jax float32, one_conv, 8 px, batch 8" and step.value > 0
    assert disk.ratio == pytest.approx(disk.value / memory.value)
    assert disk.goal == "at least 0.95 of the rate from memory" and disk.met is None


def test_goals_at_real_sizes_are_for_the_side_that_they_name():
    seconds = {"jax float32": 2.0, "jax bfloat16": 0.4, "torch eager": 1.0, "torch best": 0.5}
    timings = {name: timing.Timing((taken,)) for name, taken in seconds.items()}
    assert photos.beside_torch("step", "jax bfloat16", timings) == {
        "ratio": pytest.approx(0.8),
        "goal": "at most 1.0 of the fastest variant of torch",
        "met": True,
        "note": "0.40 of the time of torch eager",
    }
    assert photos.beside_torch("picture", "jax float32", timings) == {
        "ratio": 4.0,
        "note": "2.00 of the time of torch eager",
    }
    of_features = photos.beside_torch("features", "jax bfloat16", timings)
    assert of_features == {
        "ratio": pytest.approx(1.25),
        "goal": "at least 1.0 of the fastest variant of torch",
        "met": True,
        "note": "2.50 of the rate of torch eager",
    }
    alone = {side: timings[side] for side in ("jax float32", "torch best")}
    assert photos.beside_torch("features", "jax float32", alone)["met"] is False
    assert photos.beside_torch("step", "torch eager", timings) == {}
    assert photos.beside_torch("step", "jax float32", {"jax float32": timings["jax float32"]}) == {}


def test_the_program_that_reads_photos_says_its_peak(small_photos, tmp_path):
    pictures.draw(tmp_path / "photos", 3)
    frozen = work.version(small_photos.of_photos())
    Chain(tmp_path / "chain").add(frozen.variables, frozen.record, 0)
    found = pictures.read_and_embed(small_photos, str(tmp_path))
    assert found["read"] == 3 and found["bytes"] >= found["before"] > 10**7


def test_drawn_photos_are_the_same_each_time(tmp_path):
    first, again = (pictures.draw(tmp_path / name, 2) for name in "ab")
    assert [Path(p).read_bytes() for p in first] == [Path(p).read_bytes() for p in again]
    assert Path(first[0]).read_bytes() != Path(first[1]).read_bytes()
    widths = {decode(path).shape[1] for path in first}
    assert len(widths) == 2 and 460 <= min(widths) <= max(widths) <= 540


@pytest.mark.slow
def test_peak_memory_is_that_of_a_program_of_its_own():
    read, both = benchmarks.measure(["photo_memory"], sizes_name="tiny", photo={"image": 12})
    assert read.unit == both.unit == "MB" and 100 < read.value < both.value < 2000
    assert read.what == "12 photos of 12 px read"
    assert both.what == "the same, and 4 embedded by resnet_small"


@pytest.mark.slow
@pytest.mark.torch
def test_torch_is_measured_without_the_reference():
    pytest.importorskip("torchvision")
    only, variants = ("photos", "latency"), ("eager", "channels_last_bf16")
    sizes = {"backbones": ("resnet18",), "image": 32, "latency": (("resnet18", None),)}
    results = list(benchmarks.measure(only, sizes_name="tiny", variants=variants, photo=sizes))
    assert all(r.value > 0 for r in results)
    theirs = [(r.measure, r.what.split(",")[0]) for r in results if r.what.startswith("torch")]
    both = [f"torch {variant}" for variant in variants]
    assert theirs == [
        *(("photo_step", name) for name in both),
        *(("photo_features", name) for name in both),
        *(("latency", name) for name in both),
    ]
    goals = {r.measure: r.goal for r in results if r.goal}
    assert goals["photo_step"] == "at most 1.0 of the fastest variant of torch"
    assert goals["latency"] == goals["photo_step"]


@pytest.mark.slow
@pytest.mark.torch
def test_a_network_that_torch_lacks_is_one_line():
    pytest.importorskip("torchvision")
    sizes = {"backbones": ("flat:Flat",), "image": 8}
    *_, last = benchmarks.measure(
        ["photo_step"], sizes_name="tiny", variants=["eager"], photo=sizes
    )
    assert last.what == "torch eager" and last.note.startswith("not run: ")


@pytest.mark.parametrize(
    ("place", "package"),
    [
        ("memory:load", None),
        ("lance:{}/load", "lancedb"),
        ("qdrant:{}/server/load", "qdrant_client"),
        ("edge:{}/load", "qdrant_edge"),
    ],
)
def test_a_gallery_under_load_is_measured(place, package, tmp_path):
    if package:
        pytest.importorskip(package)
    sizes = work.GallerySizes(rows=120, size=9, queries=3, k=3)
    gallery.draw(tmp_path, sizes)
    settings = {"place": place.format(tmp_path), "sizes": dataclasses.asdict(sizes)}
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    lines = [timing.Result(**line) for line in gallery.one_store(str(tmp_path))]
    assert all(line.value > 0 for line in lines)
    by = {line.what.partition(", ")[2]: line for line in lines}
    assert {"ingest", "a query", "3 queries at once", "update, 10 % of the rows"} <= {*by}
    asked = [line for what, line in by.items() if what.startswith("a query")]
    assert len(asked) == (4 if package is None else 6)
    assert all(line.ratio == 1 and line.repeats == 3 for line in asked)  # so few rows have no index
    assert ("disk" in by) == (package in ("lancedb", "qdrant_edge"))
    assert "after ingest" in by["peak memory of the program"].note


@pytest.mark.slow
def test_a_gallery_is_measured_in_programs_of_their_own():
    pytest.importorskip("lancedb")
    results = list(benchmarks.measure(["gallery"], sizes_name="tiny", photo={"rows": 200}))
    engines = [*dict.fromkeys(r.what.split(",")[0] for r in results)]
    assert engines == ["memory", "lance", "edge"]
    assert "200 rows" in results[0].note and all(r.met is None for r in results)


def test_a_gallery_is_measured_in_qdrant_only_as_well():
    with pytest.raises(UserError, match="a store of Qdrant is named"):
        next(
            benchmarks.measure(
                ["gallery"], places=benchmarks.Places(gallery_url="http://localhost:6333")
            )
        )


@pytest.mark.slow
def test_what_cannot_be_measured_is_one_line(tmp_path):
    code, out, err = programs.call("benchmark", "--only=stp")
    assert (code, out) == (2, "") and "unknown measure 'stp'. Did you mean 'step'" in err
    code, out, err = programs.call("benchmark", f"--reference={tmp_path}", "--only=large_k")
    assert code == 2 and err.startswith(f"error: {tmp_path} is no clone of the reference")


def test_unknown_names_are_refused():
    with pytest.raises(UserError, match=r"unknown variant 'egaer'\. Did you mean 'eager'"):
        next(benchmarks.measure(["large_k"], variants=["egaer"]))
    left_out = {"protocol", "gallery", "forms", "processes", "step_memory"}
    assert benchmarks.chosen([]) == tuple(m for m in benchmarks.MEASURES if m not in left_out)
    assert benchmarks.chosen(["decoding", "pictures"])[:2] == ("decoding", "latency")


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


def test_a_turn_may_begin_with_a_repetition_that_does_not_count():
    order, settled, cold = [], 2.0, 9.0

    def side(name):
        def timed():
            order.append(name)
            return settled if order[-2:] == [name, name] else cold

        return timed

    result = timing.alternate({"a": side("a"), "b": side("b")}, 3, warm_up=1, settle=True)
    assert "".join(order) == "ab" + "aabb" * 3
    assert result["a"].seconds == result["b"].seconds == (settled,) * 3


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
