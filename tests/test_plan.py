"""Plans: the planned programs are those that run, and they compile for chips that are absent."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from PIL import Image

from compat_jax import Session, experiment, hlo, slice_cost, topology
from compat_jax import mesh as meshes
from compat_jax.errors import UserError
from configs import iamcl2r
from launch.tpu import planning

ROOT = Path(__file__).resolve().parents[1]


def folder_of_classes(path, data):
    for i, (image, label) in enumerate(zip(data.images, data.labels, strict=True)):
        folder = path / data.class_names[label]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{i:03d}.png")
    return {"source": "folder", "path": str(path), "size": tiny.SIZE}


@pytest.fixture
def config(tmp_path):
    """Two tasks of three classes, with a small backbone, split over all eight devices."""
    config = iamcl2r.get_config("replace=false")
    config.backbone.name = "flat:Flat"
    config.num_prototypes, config.batch_size, config.epochs = 12, 16, 1
    config.mesh = "data:2,model:4"
    config.tasks.update(initial=3, increment=3, rehearsal=4)
    config.data.train = folder_of_classes(tmp_path / "train", tiny.dataset())
    for role, seed in (("query", 1), ("gallery", 2)):
        data = tiny.dataset(3, 86, seed, name="other")
        config.data[role] = folder_of_classes(tmp_path / role, data)
    return config


def modules(folder, name):
    """The texts of a module that JAX dumped to a folder, without source locations."""
    texts = [p.read_text() for p in Path(folder).glob(f"*jit_{name}*.mlir")]
    location = re.compile(r"^#loc.*\n| loc\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\)", re.MULTILINE)
    return {location.sub("", text) for text in texts}


def with_fresh(config, name):
    """Train the second task from fresh weights of a network."""
    with config.unlocked():
        config.tasks.fresh_at = (1,)
        config.fresh_backbone = {"name": name, "arguments": {}}


@pytest.mark.parametrize(
    ("fresh", "first_loss", "twice"),
    [
        ("", "method", ()),
        pytest.param("one_conv", "method", ("training", "features"), marks=pytest.mark.slow),
        pytest.param("", "cross_entropy", ("training",), marks=pytest.mark.slow),
    ],
)
def test_planned_programs_are_those_that_run(config, tmp_path, fresh, first_loss, twice):
    """JAX lowers the same texts in training and evaluation as in the plan."""
    config.tasks.first_loss = first_loss
    if fresh:
        with_fresh(config, fresh)
    jax.clear_caches()  # a program that another test has lowered would not be dumped
    jax.config.update("jax_dump_ir_to", str(tmp_path / "run"))
    try:
        session = Session(mesh=config.mesh, batch_size=16)
        chain = experiment.train(config, tmp_path / "work", session)
        experiment.evaluate(chain, config=config, metrics=["recall@1"], session=session)
    finally:
        jax.config.update("jax_dump_ir_to", None)
    mesh = meshes.make_mesh(config.mesh)
    labels, shape = planning.sizes_of_data(config, None, None)
    sizes = {"gallery": 258, "k": 1, "batch_size": 16}
    planned = planning.programs(config, mesh, labels=labels, image_shape=shape, **sizes)
    functions = {"training": "_planned_step", "features": "features", "search": "search_block"}
    for kind, function in functions.items():
        texts = {p.as_text() for name, p in planned.items() if name.startswith(kind)}
        assert len(texts) == (2 if kind in twice else 1)
        assert modules(tmp_path / "run", function) == texts, kind


def test_the_network_of_fresh_weights_is_planned_beside_that_of_the_run(config):
    sizes = {"gallery": 258, "k": 1, "batch_size": 16}
    sizes |= {"labels": np.arange(60) % 6, "image_shape": (8, 8, 3)}
    mesh = meshes.make_mesh(config.mesh)
    with_fresh(config, "one_conv")
    planned = planning.programs(config, mesh, **sizes)
    assert [*planned] == [
        *("training step", "features", "training step (one_conv)", "features (one_conv)"),
        "search",
    ]
    # The old model that teaches, a layer of 192 x 16, is an argument of the new one's step.
    assert "tensor<192x16xf32>" in planned["training step (one_conv)"].as_text()
    assert "tensor<192x16xf32>" not in planned["features (one_conv)"].as_text()


@pytest.mark.parametrize(("method", "steps"), [("hoc", 2), ("sce", 1)])
def test_the_step_of_a_first_task_by_cross_entropy_is_planned(config, method, steps):
    sizes = {"gallery": 258, "k": 1, "batch_size": 16}
    sizes |= {"labels": np.arange(60) % 6, "image_shape": (8, 8, 3)}
    own = iamcl2r.get_config(f"method={method}")
    config.method, config.loss = own.method, own.loss
    config.tasks.first_loss = "cross_entropy"
    planned = planning.programs(config, meshes.make_mesh(config.mesh), **sizes)
    named = ["training step", "training step (first task)"]
    assert [name for name in planned if name.startswith("training")] == named[:steps]


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [("batch_size", 15, "batch_size 15"), ("num_prototypes", 5, "num_prototypes 5 is too small")],
)
def test_what_training_refuses_is_not_planned(config, field, value, words):
    config[field] = value
    sizes = {"gallery": 258, "k": 1, "batch_size": 16}
    sizes |= {"labels": np.arange(60) % 6, "image_shape": (8, 8, 3)}
    with pytest.raises(UserError, match=words):
        planning.programs(config, meshes.make_mesh(config.mesh), **sizes)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5:2x2", "unknown TPU or GPU 'v5'. Did you mean 'v5p'"),
        ("v5e", "needs its chips, for example v5e:2x2"),
        ("v5e:2", "needs its chips"),
        ("h100", "needs the GPUs of one machine, for example h100:1 or h100:8"),
        ("a100:16", "needs the GPUs of one machine, for example a100:1 or a100:8"),
        ("a100:2x4", "needs the GPUs of one machine"),
    ],
)
def test_unknown_topologies_are_refused(name, message):
    with pytest.raises(UserError, match=message):
        topology.devices(name)


TEXT = """
ENTRY %main (a: f32[16,8], c: s32[3]) -> s32[3] {
  %a = f32[16,8]{1,0} parameter(0)
  %c = s32[3]{0} parameter(1)
  %all-reduce.1 = f32[16,8]{1,0} all-reduce(%a), channel_id=1, to_apply=%add
  %ar = (bf16[4]{0}, f32[2,2]{1,0}) all-reduce(%a, %a), channel_id=2
  %gather = (s32[3]{0:T(128)}, s32[3]{0:T(128)}) all-gather-start(%c), dimensions={0}
  %done = s32[3]{0} all-gather-done(%gather)
  %piece = f32[16,8]{1,0} all-reduce(%a), channel_id=1, to_apply=%add
  %not-one = f32[16,8]{0,1} add(%all-reduce.1, %a)
  ROOT %all-to-all = s32[3]{0} copy(%done)
}
"""


def test_collectives_are_counted_with_the_bytes_of_their_results():
    found = hlo.read(TEXT).collectives
    assert found == {"all-reduce": (2, 512 + 8 + 16), "all-gather": (1, 12)}


MIB = 2**20


def test_table():
    between = hlo.Collective("all-reduce", MIB // 2, 8)
    kernels = (
        hlo.Kernel("c", "collective", collective=between, times=2),
        hlo.Kernel("p", "product", flops={"bf16": 2e9}),
    )
    costs = [
        slice_cost.Cost("step", 3 * MIB, MIB, 4 * MIB, hlo.Program(kernels)),
        slice_cost.Cost("features", too_large="needs 24.54G, the device has 15.75G"),
    ]
    first, second, third = slice_cost.table(costs, 16 * MIB).splitlines()
    assert " ".join(first.split()) == "each device arguments outputs scratch total of HBM GFLOP"
    assert second.split("  ")[-1] == "2 all-reduce (1.00 MiB)"
    assert "8 MiB   50.0 %   2.00" in second
    assert third.endswith("needs 24.54G, the device has 15.75G")
    assert [slice_cost.fits(cost, 16 * MIB) for cost in costs] == [True, False]
    assert not slice_cost.fits(costs[0], 7 * MIB)
    head, line = slice_cost.bounds(costs, hlo.CHIPS["TPU v5 lite"]).splitlines()
    assert head.split("  ")[-2:] == ["one by one", "of peak"]
    # 2 GFLOP at 197 TFLOP/s; 7/8 of a MiB at 200 GB/s.
    numbers = "10.2 µs 0.0 µs 4.6 µs 10.2 µs 14.7 µs 68.9 %"
    assert " ".join(line.split()) == f"step 3 {numbers}"


def test_the_report_names_programs_and_findings():
    product = hlo.Kernel(
        "p", "product", "jit(f)/conv1/conv", {"bf16": 2e9, "f32": 1e9}, sizes=(MIB,)
    )
    costs = [
        slice_cost.Cost(name, program=hlo.Program((product,), loops=name != "search"))
        for name in ("training step", "search")
    ]
    chip = hlo.CHIPS["NVIDIA H100 80GB HBM3"]
    lines = planning.report(costs, chip, low_precision=True).splitlines()
    step, search = lines.index("training step"), lines.index("search")
    assert lines[step + 1] == "- one by one: 100 % products"
    assert lines[step + 2].startswith("- products of float32 where bfloat16 was asked for: 1 of 1")
    assert lines[step + 3].startswith("- the host reads one number after each step")
    assert lines[search + 1 :] == ["- one by one: 100 % products"]
    unknown = planning.report(costs, hlo.CHIPS["TPU v2"], low_precision=True)
    assert unknown == "The rates of the TPU v2 are not known here: no bounds of the time."


def test_remedies_name_what_is_large(config):
    config.num_prototypes = 1_000_000
    costs = [
        slice_cost.Cost("training step", temporary=20),
        slice_cost.Cost("search", temporary=5),
    ]
    advice = planning.remedies(config, costs, hbm=10, images=1)
    assert len(advice) == 4
    assert "a smaller --config.batch_size=8; or more chips" in advice[0]
    assert "--config.dtype=bfloat16" in advice[1]
    assert "--config.remat=blocks" in advice[2]
    assert "now --config.mesh=data:2,model:4" in advice[3]
    config.remat = "blocks"
    assert len(planning.remedies(config, costs, hbm=10, images=1)) == 3
    assert "--config.data.train.per_class" in planning.remedies(config, costs, hbm=10, images=9)[0]
    assert planning.remedies(config, costs, hbm=100, images=1) == []


def test_auto_is_the_type_of_the_chips_and_not_of_this_machine(config):
    config.dtype = "auto"
    assert planning.for_chips(config).dtype == "bfloat16" and config.dtype == "auto"
    config.dtype = "float32"
    assert planning.for_chips(config).dtype == "float32"


def test_sizes_without_the_data(config):
    config.data.train.path = "nowhere"
    labels, shape = planning.sizes_of_data(config, 10, 4)
    np.testing.assert_array_equal(labels, [0, 0, 0, 1, 1, 2, 2, 2, 3, 3])
    assert shape == (8, 8, 3)
    for numbers in ((10, None), (None, 4)):
        with pytest.raises(UserError, match=r"--images, --classes and .*size go together"):
            planning.sizes_of_data(config, *numbers)


def run_plan(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "launch.plan", *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_without_libtpu_one_line_says_what_to_install(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import sys, importlib.util as u\n"
        "find = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'libtpu' else find(name, *rest)\n"
    )
    done = run_plan("--topology=v5e:2x4", PYTHONPATH=str(tmp_path))
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith("error: ") and "pip install 'jax[tpu]'" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_without_the_cuda_plugin_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr(topology, "has_cuda_plugin", lambda: False)
    with pytest.raises(UserError) as refused:
        topology.devices("h100:8")
    assert f"pip install jax-cuda13-plugin=={jax.lib.__version__}" in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1


SMALL = (
    "--config=configs/iamcl2r.py:replace=false",
    "--config.backbone.name=resnet_small",
    "--images=3000",
    "--classes=100",
    "--gallery=5000",
)


def check_report(printed: str, devices: str) -> None:
    """Check what is printed about three programs that fit and work on several devices."""
    assert devices in printed
    step, features, search = printed.splitlines()[4:7]
    assert step.startswith("training step") and "all-reduce" in step
    assert features.startswith("features") and search.startswith("search")
    assert "all-gather" in search
    step, features, search = printed.splitlines()[11:14]
    for line in (step, features, search):
        times = [
            float(number) * {"ms": 1e3, "µs": 1}[unit]
            for number, unit in re.findall(r"([\d.]+) (ms|µs)", line)
        ]
        *parts, least, alone = times
        assert 0 < max(parts) == least <= alone and len(parts) == 3
    assert "smaller collectives: " in printed
    assert printed.endswith("Everything fits.\n")


def check_written(path: Path, topology: str, printed: str) -> None:
    """Check that the file has the bounds that were printed."""
    content = json.loads(path.read_text())
    assert content["plan"]["topology"] == topology
    run = {"method": "hoc", "backbone": "resnet_small", "image": 32, "batch_size": 128}
    assert run.items() <= content["run"].items()
    step, features, search = content["programs"]
    assert (step["batch"], features["batch"]) == (128, 256) and "batch" not in search
    for program, line in zip(content["programs"], printed.splitlines()[11:14], strict=True):
        least, alone = (hlo.duration(program[key]) for key in ("at_least", "one_by_one"))
        assert program["fits"] and line.startswith(program["name"])
        assert f"{least} {alone} " in " ".join(line.split())


@pytest.mark.tpu_aot
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install -e '.[tpu]'"
)
@pytest.mark.parametrize(
    ("topology", "devices"),
    [
        ("v5e:2x4", "8 devices (TPU v5 lite, 15.75 GiB usable), 2 hosts"),
        ("v6e:2x4", "8 devices (TPU v6 lite, 31.24 GiB usable), 2 hosts"),
        ("v4:2x2x2", "8 devices (TPU v4, 30.75 GiB usable), 2 hosts"),
    ],
)
def test_compiles_for_an_absent_slice(topology, devices, tmp_path):
    done = run_plan(
        f"--topology={topology}",
        *SMALL,
        f"--json={tmp_path}/plan.json",
        "--config.mesh=data:4,model:2",
        JAX_OPTIMIZATION_LEVEL="O0",
    )
    assert done.returncode == 0, done.stderr
    check_report(done.stdout, f"{devices}; mesh data:4,model:2")
    check_written(tmp_path / "plan.json", topology, done.stdout)


@pytest.mark.slow
@pytest.mark.cuda_aot
@pytest.mark.skipif(
    not topology.has_cuda_plugin(), reason="needs JAX's CUDA plugin: pip install jax-cuda13-plugin"
)
@pytest.mark.parametrize(
    ("chips", "devices"),
    [
        ("h100:8", "8 devices (NVIDIA H100 80GB HBM3, 59.33 GiB usable), 1 host"),
        ("a100:2", "2 devices (NVIDIA A100-SXM4-80GB, 59.44 GiB usable), 1 host"),
    ],
)
def test_compiles_for_absent_gpus(chips, devices, tmp_path):
    flags = ("--config.dtype=bfloat16", f"--json={tmp_path}/plan.json")
    done = run_plan(f"--topology={chips}", *SMALL, *flags, XLA_FLAGS="")
    assert done.returncode == 0, done.stderr
    check_report(done.stdout, f"{devices}; mesh data:{chips[-1]},model:1")
    check_written(tmp_path / "plan.json", chips, done.stdout)
    # No convolution falls back to float32; the two products are those of the contrast's float32 head.
    wide = re.search(r"products of float32 where bfloat16 was asked for: (\d+) of", done.stdout)
    assert int(wide[1]) == 2
    assert "transfers between host and device" not in done.stdout
