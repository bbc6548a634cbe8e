"""Weights to and from PyTorch: names, layouts, forms of files, refusals."""

import ast
import collections
import os
import subprocess
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_weights import zero_variables

import compat_jax
from compat_jax import simplex
from compat_jax.chain import Chain, Record
from compat_jax.errors import UserError
from compat_jax.interop import chains, from_torch, is_bare, to_torch, torch_files
from compat_jax.interop.weights import unwrap
from compat_jax.models import BACKBONES, Embedder, create_backbone

WHY = "PyTorch is not installed: pip install -e '.[torch]'"


def network(name="resnet_small", projection=9, head=None, **arguments):
    if name == "resnet_small":
        arguments = {"width": 4, **arguments}
    if name.startswith("vit"):
        arguments = {"patch": 8, "image_size": 32}
    return Embedder(create_backbone(name, arguments), projection, head)


def random_variables(embedder, seed=0):
    rng = np.random.default_rng(seed)
    zeros = zero_variables(embedder)
    return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), zeros)


def assert_same_bits(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.asarray(a).dtype == np.asarray(b).dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


# --- names and layouts


@pytest.mark.parametrize(
    ("backbone", "count", "names"),
    [
        (
            "resnet18",  # torchvision has 122 with its fc.weight and fc.bias
            120,
            [
                "conv1.weight",
                "bn1.running_mean",
                "layer2.0.downsample.0.weight",
                "layer2.0.downsample.1.num_batches_tracked",
                "layer4.1.bn2.bias",
            ],
        ),
        ("resnet50", 318, ["layer1.0.downsample.1.running_var", "layer3.5.conv3.weight"]),
        (
            "senet18",
            137,
            [
                "layer1.blocks.0.fc1.bias",
                "layer2.blocks.0.shortcut.0.weight",
                "layer4.blocks.1.bn2.running_var",
            ],
        ),
        (
            "regnet_y_400mf",
            514,
            [
                "layer3.blocks.6.se.se2.bias",
                "layer1.blocks.0.shortcut.1.weight",
                "layer4.blocks.11.conv2.weight",
            ],
        ),
        ("resnet32_cifar", 186, ["conv_1_3x3.weight", "bn_1.weight", "stage_3.4.conv_b.weight"]),
        ("vit_ti16", 150, ["cls_token", "pos_embed", "blocks.3.attn.proj.bias", "norm.weight"]),
    ],
)
def test_names_are_those_of_the_pytorch_modules(backbone, count, names):
    state = to_torch(zero_variables(network(backbone)))
    assert {f"backbone.{name}" for name in names} < state.keys()
    assert len(state) == count + 2
    assert state["fc1.weight"].shape[0] == 9
    assert state["fc2.weight"].shape == (10, 9)


def test_layouts():
    embedder = network("resnet18")
    variables = random_variables(embedder)
    state = to_torch(variables)
    stem = variables["params"]["backbone"]["conv1"]["kernel"]
    assert state["backbone.conv1.weight"].shape == (64, 3, 7, 7)
    assert state["backbone.conv1.weight"][60, 2, 1, 5] == stem[1, 5, 2, 60]
    projection = variables["params"]["fc1"]["kernel"]
    assert state["fc1.weight"].shape == (9, 512)
    assert state["fc1.weight"][8, 500] == projection[500, 8]
    block = variables["batch_stats"]["backbone"]["layer4_1"]["bn2"]
    np.testing.assert_array_equal(state["backbone.layer4.1.bn2.running_var"], block["var"])
    tracked = state["backbone.bn1.num_batches_tracked"]
    assert tracked.dtype == np.int64
    assert tracked.shape == ()
    assert tracked == 0
    assert all(array.flags["C_CONTIGUOUS"] for array in state.values())


@pytest.mark.parametrize(
    ("backbone", "head"), [*((name, None) for name in sorted(BACKBONES)), ("resnet_small", 6)]
)
def test_a_round_trip_returns_the_same_bits(backbone, head):
    embedder = network(backbone, None if head else 9, head)
    variables = random_variables(embedder)
    state = to_torch(variables)
    back = from_torch(state, zero_variables(embedder))
    assert_same_bits(back, variables)
    assert_same_bits(to_torch(back), state)


# --- the classifier


def test_the_fixed_classifier_is_written_as_the_prototypes():
    state = to_torch(zero_variables(network(projection=9)))
    np.testing.assert_allclose(state["fc2.weight"], simplex.prototypes(10), atol=1e-7)


def test_a_fixed_classifier_may_be_missing_but_not_another():
    embedder = network()
    template, variables = zero_variables(embedder), random_variables(embedder)
    state = to_torch(variables)
    prototypes = state.pop("fc2.weight")
    assert_same_bits(from_torch(state, template), variables)
    with pytest.raises(UserError, match="not the fixed simplex"):
        from_torch(state | {"fc2.weight": prototypes[::-1]}, template)
    with pytest.raises(UserError, match=r"shape \(12, 11\).*num_classes=10"):
        from_torch(state | {"fc2.weight": np.zeros((12, 11), np.float32)}, template)


def test_a_learnable_classifier_is_written_for_the_classes_seen():
    embedder = network(projection=None, head=6)
    variables = random_variables(embedder)
    kernel = variables["params"]["fc2"]["kernel"]
    state = to_torch(variables, classes_seen=4)
    np.testing.assert_array_equal(state["fc2.weight"], kernel[:, :4].T)
    assert "fc1.weight" not in state


# --- forms of a state dict


def renamed(state, rename):
    return {rename(name): array for name, array in state.items()}


@pytest.mark.parametrize("backbone", ["resnet_small", "senet18", "vit_ti16"])
def test_prefix_of_ddp_and_infix_of_stages_make_no_difference(backbone):
    embedder = network(backbone)
    template, variables = zero_variables(embedder), random_variables(embedder)
    state = to_torch(variables)
    for form in (
        renamed(state, lambda n: f"module.{n}"),
        renamed(state, lambda n: n.replace(".blocks.", ".")),
        renamed(state, lambda n: n.replace("layer1.0.", "layer1.blocks.0.")),
    ):
        assert_same_bits(from_torch(form, template), variables)


@pytest.mark.parametrize(
    ("backbone", "classifier"),
    [("resnet_small", "fc"), ("resnet_small", "linear"), ("vit_ti16", "head")],
)
def test_a_backbone_alone_leaves_the_projection_as_it_is(backbone, classifier):
    embedder = network(backbone)
    variables, template = random_variables(embedder, 0), random_variables(embedder, 1)
    state = to_torch({**variables, "params": {"backbone": variables["params"]["backbone"]}})
    state = renamed(state, lambda n: n.removeprefix("backbone."))
    state |= {f"{classifier}.weight": np.zeros((1000, 8)), f"{classifier}.bias": np.zeros(1000)}
    assert is_bare(state)
    back = from_torch(state, template)
    assert_same_bits(back["params"]["backbone"], variables["params"]["backbone"])
    assert_same_bits(back["batch_stats"], variables["batch_stats"])
    assert_same_bits(back["params"]["fc1"], template["params"]["fc1"])


def test_the_state_dict_inside_a_checkpoint():
    state = {"conv1.weight": np.zeros(3)}
    assert unwrap({"net": state, "best_acc": 0.5}) is state
    assert unwrap({"state_dict": state, "epoch": 3}) is state
    assert unwrap(state) is state


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_float_types_become_float32(dtype):
    embedder = network()
    state = {n: a.astype(dtype) for n, a in to_torch(random_variables(embedder)).items()}
    state["backbone.bn1.num_batches_tracked"] = np.int64(7)
    back = from_torch(state, zero_variables(embedder))
    assert {leaf.dtype for leaf in jax.tree.leaves(back)} == {np.dtype(np.float32)}
    found = back["params"]["backbone"]["bn1"]["scale"]
    np.testing.assert_array_equal(found, state["backbone.bn1.weight"].astype(np.float32))


# --- what does not fit

SMALL = network()
TEMPLATE = zero_variables(SMALL)
STATE = to_torch(TEMPLATE)
NAMES = sorted(n for n in STATE if n != "fc2.weight" and not n.endswith("num_batches_tracked"))


@settings(max_examples=50, deadline=None)
@given(
    missing=st.sets(st.sampled_from(NAMES), max_size=5),
    misshapen=st.sets(st.sampled_from(NAMES), max_size=5),
    unknown=st.sets(st.sampled_from(["fc3.weight", "backbone.layer9.weight", "old.bias"])),
)
def test_every_tensor_that_does_not_fit_is_named(missing, misshapen, unknown):
    state = {name: array for name, array in STATE.items() if name not in missing}
    state |= {name: np.zeros((1, *STATE[name].shape)) for name in misshapen - missing}
    state |= {name: np.zeros(2) for name in unknown}
    if not (missing or misshapen or unknown):
        assert_same_bits(from_torch(state, TEMPLATE), TEMPLATE)
        return
    with pytest.raises(UserError) as error:
        from_torch(state, TEMPLATE)
    groups = dict(
        part.split(": ", 1) for part in str(error.value).split(". Give ")[0].split("; ")[1:]
    )
    assert set(groups.get("missing", "").split(", ")) - {""} == missing
    assert set(groups.get("unknown", "").split(", ")) - {""} == unknown
    for name in misshapen - missing:
        shape = STATE[name].shape
        assert f"{name} (wanted {shape}, found {(1, *shape)})" in groups["misshapen"]


def test_a_long_list_is_cut():
    with pytest.raises(UserError, match=r"missing: backbone\.bn1\.bias, .*, \.\.\. \(\d+ more\)"):
        from_torch({"backbone.conv1.weight": STATE["backbone.conv1.weight"]}, TEMPLATE)


def test_names_are_told_as_the_file_and_the_network_have_them():
    embedder = network("senet18")
    state = renamed(to_torch(zero_variables(embedder)), lambda n: f"module.{n}")
    state["module.backbone.layer9.blocks.0.weight"] = np.zeros(3)
    del state["module.backbone.layer1.blocks.0.conv1.weight"]
    told = (
        r"missing: backbone\.layer1\.blocks\.0\.conv1\.weight; "
        r"unknown: module\.backbone\.layer9\.blocks\.0\.weight\."
    )
    with pytest.raises(UserError, match=told):
        from_torch(state, zero_variables(embedder))


# --- files


def test_nothing_outside_interop_imports_torch():
    package = Path(compat_jax.__file__).parent
    for file in package.rglob("*.py"):
        names = [
            name
            for node in ast.walk(ast.parse(file.read_text()))
            if isinstance(node, ast.Import | ast.ImportFrom)
            for name in [getattr(node, "module", None) or "", *(a.name for a in node.names)]
        ]
        imports_torch = any(name.split(".")[0] == "torch" for name in names)
        assert not imports_torch or file.parent == package / "interop", file


def test_without_torch_the_remedy_is_told(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "a.pt").write_bytes(b"")
    with pytest.raises(UserError, match=r"not installed: pip install -e '\.\[torch\]'"):
        torch_files.read(tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"pip install -e '\.\[torch\]'"):
        torch_files.write(tmp_path / "b.pt", {})


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no weight file at .*nothing\.pt"):
        torch_files.read(tmp_path / "nothing.pt")


def test_safetensors(tmp_path):
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    state = to_torch(random_variables(SMALL))
    torch_files.write(tmp_path / "a.safetensors", state)
    assert_same_bits(torch_files.read(tmp_path / "a.safetensors"), state)
    (tmp_path / "b.safetensors").write_bytes(b"not one")
    with pytest.raises(UserError, match=r"b\.safetensors is not a safetensors file"):
        torch_files.read(tmp_path / "b.safetensors")


@pytest.mark.torch
@pytest.mark.parametrize("wrapper", [None, "net"])
def test_files_of_torch_hold_the_same_bits(tmp_path, wrapper):
    torch = pytest.importorskip("torch", reason=WHY)
    state = to_torch(random_variables(SMALL))
    torch_files.write(tmp_path / "new" / "a.pt", state)
    saved = torch.load(tmp_path / "new" / "a.pt", weights_only=True)
    if wrapper:
        torch.save({wrapper: saved, "best_acc": 0.5, "optimizer": None}, tmp_path / "new" / "a.pt")
    assert_same_bits(torch_files.read(tmp_path / "new" / "a.pt"), state)


@pytest.mark.torch
def test_narrow_floats_of_torch_become_float32(tmp_path):
    torch = pytest.importorskip("torch", reason=WHY)
    for dtype in (torch.bfloat16, torch.float16):
        torch.save({"a": torch.tensor([1.5, -2.0], dtype=dtype)}, tmp_path / "a.pt")
        found = torch_files.read(tmp_path / "a.pt")["a"]
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, [1.5, -2.0])


class Malicious:
    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.torch
def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    torch = pytest.importorskip("torch", reason=WHY)
    victim = tmp_path / "made_by_the_pickle"
    torch.save({"net": {"a": torch.zeros(2)}, "extra": Malicious(str(victim))}, tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"would run code of \w+\.mkdir.*weights_only=False"):
        torch_files.read(tmp_path / "a.pt")
    assert not victim.exists()


@pytest.mark.torch
def test_settings_in_a_checkpoint_of_the_reference_are_passed_over(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch", reason=WHY)
    module = types.ModuleType("iamcl2r.params")
    module.ExperimentParams = type("ExperimentParams", (), {"__module__": "iamcl2r.params"})
    settings_object = module.ExperimentParams()
    settings_object.lr = 0.1
    settings_object.new_data_ids_at_task = [np.arange(10)]
    settings_object.best = np.float64(0.5)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "iamcl2r", types.ModuleType("iamcl2r"))
        patch.setitem(sys.modules, "iamcl2r.params", module)
        checkpoint = {"net": {"a": torch.arange(3.0)}, "args": settings_object}
        torch.save(checkpoint, tmp_path / "ckpt_0.pt")
    state = torch_files.read(tmp_path / "ckpt_0.pt")
    np.testing.assert_array_equal(state["a"], [0.0, 1.0, 2.0])
    assert "iamcl2r" not in sys.modules


@pytest.mark.torch
@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"no archive at all", "is not a file of torch.save"),
        ("tensor", "holds a Tensor, not a state dict"),
        ({}, "not tensors: empty"),
        ({"net": {"a": 3.0}}, "not tensors: a"),
    ],
)
def test_other_files_are_refused(tmp_path, content, told):
    torch = pytest.importorskip("torch", reason=WHY)
    if isinstance(content, bytes):
        (tmp_path / "a.pt").write_bytes(content)
    else:
        torch.save(torch.zeros(2) if content == "tensor" else content, tmp_path / "a.pt")
    with pytest.raises(UserError, match=told):
        torch_files.read(tmp_path / "a.pt")


# --- chains


def record(method="hoc", **fields):
    values = {
        "method": method,
        "backbone": "resnet_small",
        "backbone_arguments": {"width": 4},
        "image_shape": (32, 32, 3),
        "mean": (0.5,) * 3,
        "std": (0.2,) * 3,
        "feature_size": 9,
        "num_prototypes": 10,
        "label_order": "descending",
        "head_classes": None,
        "task": None,
        "classes_seen": 10,
        "parent": None,
        "replaced_by": None,
        "data_fingerprint": "",
        "seed": 3,
    }
    return Record(**(values | fields))


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A folder whose ckpt files stand for state dicts, without PyTorch: files[name] = state."""
    contents = collections.UserDict()
    contents.folder = tmp_path / "files"
    contents.folder.mkdir()

    def write(path, state):
        contents[Path(path).name] = state
        Path(path).touch()

    monkeypatch.setattr(torch_files, "read", lambda path: contents[Path(path).name])
    monkeypatch.setattr(torch_files, "write", write)
    return contents


def test_a_folder_of_checkpoints_becomes_a_chain_in_the_order_of_the_tasks(files, tmp_path):
    trained = [random_variables(network(), seed) for seed in range(11)]
    for task, variables in enumerate(trained):
        torch_files.write(files.folder / f"ckpt_{task}.pt", to_torch(variables))
    (files.folder / "events.log").touch()
    chain = Chain(tmp_path / "chain")
    seen = [10 + 5 * t for t in range(11)]
    chains.import_folder(files.folder, chain, record(), seen, replace_at=(0, 4))
    assert chain.numbers() == list(range(11))
    for task in (0, 3, 4, 10):
        version = chain.open(task)
        assert_same_bits(version.variables, trained[task])
        assert version.record.task == task
        assert version.record.classes_seen == seen[task]
        assert version.record.feature_size == 9
    parents = [chain.record(n).parent for n in range(6)]
    assert parents == [None, 0, 1, 2, None, 4]
    chains.export_version(chain, -1, files.folder / "last.pt")
    assert_same_bits(dict(files["last.pt"]), to_torch(trained[10]))


def test_a_growing_classifier_keeps_the_rows_of_each_file(files, tmp_path):
    for task, rows in enumerate((3, 5)):
        variables = random_variables(network(projection=None, head=rows))
        torch_files.write(files.folder / f"ckpt_{task}.pt", to_torch(variables))
    chain = Chain(tmp_path / "chain")
    chains.import_folder(files.folder, chain, record("er"))
    for task, rows in enumerate((3, 5)):
        version = chain.open(task)
        assert version.record.head_classes == version.record.classes_seen == rows
        assert version.record.feature_size == 16
        assert version.variables["params"]["fc2"]["kernel"].shape == (16, rows)


def test_nothing_is_written_when_one_file_does_not_fit(files, tmp_path):
    torch_files.write(files.folder / "ckpt_0.pt", STATE)
    torch_files.write(files.folder / "ckpt_1.pt", {**STATE, "odd.weight": np.zeros(3)})
    chain = Chain(tmp_path / "chain")
    with pytest.raises(UserError, match=r"ckpt_1\.pt: .*unknown: odd\.weight"):
        chains.import_folder(files.folder, chain, record())
    assert chain.numbers() == []


@pytest.mark.parametrize(
    ("names", "told"),
    [
        ([], "has no ckpt_0.pt"),
        (["ckpt_0.pt", "ckpt_2.pt"], r"checkpoints \[0, 2\].*0\.\.2"),
        (["ckpt_0.pt", "ckpt_0.safetensors"], r"checkpoints \[0, 0\]"),
    ],
)
def test_checkpoints_must_be_numbered_without_gaps(tmp_path, names, told):
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=told):
        chains.checkpoints(tmp_path)


def test_a_single_file_becomes_a_pretrained_model(files, tmp_path):
    variables = random_variables(network())
    torch_files.write(files.folder / "a.pt", to_torch(variables))
    chain = Chain(tmp_path / "chain")
    assert chains.import_file(files.folder / "a.pt", chain, record()) == []
    version = chain.open(0)
    assert_same_bits(version.variables, variables)
    assert version.record.task is None
    assert version.record.replaced_by == "imported from a.pt"
    with pytest.raises(UserError, match=r"there is a chain in .* already"):
        chains.import_file(files.folder / "a.pt", chain, record())


@pytest.mark.parametrize(("method", "part"), [("hoc", "fc1"), ("er", "fc2")])
def test_what_a_bare_backbone_lacks_is_drawn_from_the_seed(files, tmp_path, method, part):
    variables = random_variables(network(projection=None))
    state = renamed(to_torch(variables), lambda n: n.removeprefix("backbone."))
    torch_files.write(files.folder / "a.pt", state)
    drawn = []
    for number, seed in enumerate((3, 3, 4)):
        chain = Chain(tmp_path / f"chain{number}")
        fresh = chains.import_file(files.folder / "a.pt", chain, record(method, seed=seed))
        assert fresh == [part]
        drawn.append(chain.open(0).variables["params"][part]["kernel"])
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert np.abs(drawn[0] - drawn[2]).max() > 0.01


@pytest.mark.torch
def test_the_programs_import_and_export(tmp_path):
    pytest.importorskip("torch", reason=WHY)
    state = to_torch(random_variables(network("resnet_small", projection=31)))
    torch_files.write(tmp_path / "a.pt", state)

    def program(name, *flags):
        return subprocess.run(
            [sys.executable, "-m", f"launch.{name}", *flags],
            cwd=Path(compat_jax.__file__).parent.parent,
            capture_output=True,
            text=True,
        )

    network_flags = ["--backbone=resnet_small", "--backbone_arguments=width=4", "--num_classes=32"]
    chain = tmp_path / "chain"
    done = program(
        "import_torch", f"--weights={tmp_path / 'a.pt'}", f"--out={chain}", *network_flags
    )
    assert done.returncode == 0, done.stderr
    assert "1 model in" in done.stdout
    done = program("export_torch", f"--chain={chain}", f"--out={tmp_path / 'b.pt'}")
    assert done.returncode == 0, done.stderr
    assert_same_bits(torch_files.read(tmp_path / "b.pt"), state)
