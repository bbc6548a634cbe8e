"""Weight files of PyTorch and safetensors: read and written without running anything in them.

Tests of files of torch.save need PyTorch, those of safetensors its library; others run without both.
"""

import argparse
import ast
import collections
import datetime
import enum
import fractions
import json
import os
import pathlib
import sys
import types
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from networks import assert_same_bits, network, random_variables
from weight_bytes import MISSING, Call, Name, library_of, safe_file, torch_file

import compat_jax
from compat_jax.errors import UserError
from compat_jax.interop import to_torch, torch_files

STATE = to_torch(random_variables(network()))
SMALL = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.float32([1, -2])}


def need(library):
    """The library; without it, the test is skipped."""
    return pytest.importorskip(library, reason=MISSING[library.partition(".")[0]])


def load(tmp_path, content, name="a.pt", **more):
    need(library_of(content))
    (tmp_path / name).write_bytes(content)
    return torch_files.load(tmp_path / name, **more)


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


@pytest.mark.parametrize(
    ("library", "name", "message"),
    [
        (
            "torch",
            "a.pt",
            r'PyTorch, which is not installed: pip install "compat_jax\[torch\]" .* or ',
        ),
        ("safetensors", "a.safetensors", r'safetensors, .*: pip install "compat_jax\[torch\]"$'),
    ],
)
def test_a_library_that_is_missing_is_said_with_the_command(
    tmp_path, monkeypatch, library, name, message
):
    for module in [m for m in sys.modules if m.partition(".")[0] == library]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(UserError, match=rf"writing .*{name} needs {message}"):
        torch_files.write(tmp_path / name, STATE)
    with pytest.raises(UserError, match=rf"writing .*{name} needs {message}"):
        torch_files.check_writable(tmp_path / name)
    assert not os.listdir(tmp_path)
    content = {"torch": torch_file, "safetensors": safe_file}[library](STATE)
    (tmp_path / "b").write_bytes(content)
    with pytest.raises(UserError, match=rf"b: reading a file of {library}[.\w]* needs {message}"):
        torch_files.read(tmp_path / "b")


@pytest.mark.torch
def test_a_version_of_torch_that_forged_files_can_break_is_refused(tmp_path, monkeypatch):
    """CVE-2025-32434 and CVE-2026-24747: code runs in spite of weights_only."""
    monkeypatch.setattr(need("torch"), "__version__", "2.9.1+cpu")
    with pytest.raises(
        UserError, match=r"a\.pt: .* needs PyTorch 2\.10 or later, not 2\.9\.1\+cpu"
    ):
        load(tmp_path, torch_file(SMALL))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no weight file at .*nothing\.pt"):
        torch_files.read(tmp_path / "nothing.pt")


@pytest.mark.torch
@pytest.mark.parametrize("form", [{}, {"order": ">"}, {"old": True}], ids=["zip", "swapped", "old"])
@pytest.mark.parametrize("wrapper", [None, "net", "state_dict", "model", "model_state_dict"])
def test_both_formats_of_torch_hold_the_same_bits(tmp_path, wrapper, form):
    def wrap(state):
        return {wrapper: state, "best_acc": 0.5, "optimizer": None} if wrapper else state

    assert_same_bits(load(tmp_path, torch_file(STATE, wrap, **form)).tensors, STATE)


@pytest.mark.torch
def test_a_file_is_known_by_its_content_not_by_its_name(tmp_path):
    for name in ("a.pt", "a.pth", "a.bin", "a.safetensors", "a"):
        assert_same_bits(load(tmp_path, safe_file(SMALL), name).tensors, SMALL)
        assert_same_bits(load(tmp_path, torch_file(SMALL), name).tensors, SMALL)


@pytest.mark.torch
def test_files_of_many_megabytes_are_read(tmp_path):
    state = {name: np.full((3 << 20,), float(i), np.float32) for i, name in enumerate("abc")}
    for content in (safe_file(state), torch_file(state), torch_file(state, old=True)):
        assert_same_bits(load(tmp_path, content).tensors, state)


def test_what_is_written_as_safetensors_is_read_by_its_library(tmp_path):
    library, path = need("safetensors.numpy"), tmp_path / "new" / "a.safetensors"
    narrow = STATE | {"half": np.float16([1.5, -2]), "empty": np.zeros((0, 3), np.float32)}
    narrow |= {"turned": np.arange(6, dtype=np.float32).reshape(2, 3).T, "scalar": np.float32(2)}
    torch_files.write(path, narrow)
    assert_same_bits(library.load_file(path), narrow)
    wide = narrow | {"half": narrow["half"].astype(np.float32)}
    assert_same_bits(torch_files.read(path), wide)
    assert os.listdir(path.parent) == [path.name]
    library.save_file(STATE, path, {"format": "pt"})
    assert_same_bits(torch_files.read(path), STATE)


# --- plain and averaged weights


def checkpoint(**parts):
    """A checkpoint with zeros under each name, ones under those that say ema."""

    def wrap(state):
        ones = {name: tensor for name, tensor in state.items() if name.startswith("ones")}
        zeros = {name: tensor for name, tensor in state.items() if name not in ones}
        return {k: v(zeros, ones) if callable(v) else v for k, v in parts.items()}

    return torch_file({"w": np.zeros(3, np.float32), "ones": np.ones(3, np.float32)}, wrap)


def plain(zeros, _):
    return zeros


def averaged(_, ones):
    return ones


@pytest.mark.torch
@pytest.mark.parametrize("key", ["state_dict_ema", "model_ema", "ema_state_dict", "ema", "net.ema"])
@pytest.mark.parametrize("deep", [False, True])
def test_averaged_weights_beside_plain_ones_are_said(tmp_path, key, deep):
    def ema(zeros, ones):
        return {"decay": 0.99, "module": ones} if deep else ones

    content = checkpoint(model=plain, optimizer={}, **{key: ema})
    found = load(tmp_path, content)
    assert found.tensors.keys() == {"w"}
    (note,) = found.notes
    assert f"plain weights are taken; the file has averaged ones as well ({key})" in note
    found = load(tmp_path, content, ema=True)
    assert found.tensors.keys() == {"ones"}
    assert found.notes == (
        f"averaged (EMA) weights are taken, {key}; the file has plain ones as well",
    )


@pytest.mark.torch
def test_averaged_weights_alone_are_said(tmp_path):
    found = load(tmp_path, checkpoint(model_ema=averaged))
    assert found.notes == ("averaged (EMA) weights are taken, model_ema; the file has no others",)
    with pytest.raises(UserError, match=r"holds no averaged \(EMA\) weights") as caught:
        load(tmp_path, checkpoint(model=plain, ema=None), ema=True)
    assert caught.value.argument == "ema"
    assert load(tmp_path, checkpoint(model=plain, ema=None)).notes == ()


@pytest.mark.torch
def test_several_state_dicts_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"several state dicts \(net, state_dict\)"):
        load(tmp_path, checkpoint(net=plain, state_dict=plain))
    with pytest.raises(UserError, match=r"several state dicts \(ema, model_ema\)"):
        load(tmp_path, checkpoint(net=plain, ema=averaged, model_ema=averaged), ema=True)
    with pytest.raises(UserError, match=r"by other names \(student, teacher\)"):
        load(tmp_path, checkpoint(student=plain, teacher=plain))


# --- images


IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def images(tmp_path, **parts):
    found = load(tmp_path, torch_file(SMALL, lambda state: {"model": state, **parts})).images
    return found.size, found.mean, found.std


@pytest.mark.torch
def test_size_and_normalisation_are_read_where_timm_writes_them(tmp_path):
    full, text = (224, *IMAGENET.values()), '{"input_size": [3, 224, 224], "mean": [0.485, 0.456, '
    config = {"input_size": (3, 224, 224), **IMAGENET}
    assert images(tmp_path, pretrained_cfg=config) == full
    assert images(tmp_path, default_cfg=config) == full
    none = {"mean": None, "std": None, "img_size": None}
    settings = Call("argparse.Namespace", (), none | IMAGENET | {"img_size": 224}, new=True)
    assert images(tmp_path, args=settings) == full
    assert images(tmp_path, args=Call("argparse.Namespace", (), none, new=True)) == (None,) * 3
    odd = {"mean": Call("types.SimpleNamespace"), "std": ["0.2"] * 3, "img_size": True}
    assert images(tmp_path, args=Call("types.SimpleNamespace", (), odd)) == (None,) * 3
    simple = Call("types.SimpleNamespace", (), IMAGENET | {"image_size": [224, 224]})
    assert images(tmp_path, hyper={"a": [simple]}) == full
    assert images(tmp_path) == (None,) * 3
    text += '0.406], "std": [0.229, 0.224, 0.225]}'
    told = load(tmp_path, safe_file(SMALL, {"pretrained_cfg": text})).images
    assert (told.size, told.mean, told.std) == full
    (tmp_path / "config.json").write_text(
        f'{{"architecture": "resnet50", "pretrained_cfg": {text}}}'
    )
    assert images(tmp_path) == full


@pytest.mark.torch
@pytest.mark.parametrize(
    ("written", "crop", "filter"),
    [
        ({"crop_pct": 0.95, "interpolation": "bicubic"}, 0.95, "bicubic"),
        ({"crop_pct": 1, "interpolation": "random"}, 1.0, None),
        ({"crop_pct": 1.5, "interpolation": 3}, None, None),
        ({"crop_pct": True, "interpolation": None}, None, None),
        ({}, None, None),
    ],
)
def test_crop_and_filter_are_read_where_timm_writes_them(tmp_path, written, crop, filter):
    text = json.dumps({"input_size": [3, 8, 8], **written})
    found = load(tmp_path, safe_file(SMALL, {"pretrained_cfg": text})).images
    assert (found.crop, found.filter) == (crop, filter)


@pytest.mark.torch
@pytest.mark.parametrize(
    ("written", "resize"),
    [
        ({"crop_mode": "center"}, "crop"),
        ({"crop_mode": "squash"}, "squash"),
        ({"crop_mode": "border"}, "border"),
        ({"crop_mode": "b\n" * 100}, "b\\n" * 13 + "b"),
        ({"crop_mode": 3}, None),
        ({"crop_mode": ""}, None),
        ({}, None),
    ],
)
def test_the_resize_is_read_where_timm_writes_it(tmp_path, written, resize):
    text = json.dumps({"input_size": [3, 8, 8], **written})
    found = load(tmp_path, safe_file(SMALL, {"pretrained_cfg": text})).images
    assert found.resize == resize


@pytest.mark.torch
def test_size_and_normalisation_of_the_transforms_in_a_checkpoint(tmp_path):
    def transforms(mean):
        module = "torchvision.transforms.transforms"
        made = [
            Call(f"{module}.RandomCrop", (), {"size": (32, 32), "padding": 4}, new=True),
            Call(f"{module}.Normalize", (), {"mean": mean, "std": [0.2, 0.3, 0.4]}, new=True),
        ]
        return Call(f"{module}.Compose", (), {"transforms": made}, new=True)

    cifar = [0.5, 0.6, 0.7]
    found = images(tmp_path, args={"train": transforms(cifar), "test": transforms(cifar)})
    assert found == (32, (0.5, 0.6, 0.7), (0.2, 0.3, 0.4))
    differ = {"train": transforms(cifar), "test": transforms([0.1, 0.2, 0.3])}
    assert images(tmp_path, args=differ) == (32, None, (0.2, 0.3, 0.4))


# --- nothing in a file is run


CALLS = ["os.mkdir", "posix.mkdir", "builtins.eval", "__builtin__.exec", "subprocess.Popen"]
CALLS += ["importlib.import_module", "builtins.getattr", "shutil.rmtree", "pickle.loads"]


@pytest.mark.torch
@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_a_call_that_weights_do_not_need_is_refused(tmp_path, name, old):
    victim = tmp_path / "made_by_the_pickle"
    code = f"open({str(victim)!r}, 'w')"
    call = Call(name, (code if name.endswith(("eval", "exec")) else str(victim),))
    content = torch_file(SMALL, lambda state: {"net": state, "extra": call}, old=old)
    name = name.replace("__builtin__", "builtins")
    said = name.removeprefix("builtins.") if old else name
    message = rf"a\.pt is refused: opening it would run code of {said}; nothing of it was run\. If "
    with pytest.raises(UserError, match=message) as caught:
        load(tmp_path, content)
    assert "load failed" not in str(caught.value) and "\n" not in str(caught.value)
    assert not victim.exists()


@pytest.mark.torch
@pytest.mark.parametrize("old", [False, True])
def test_classes_are_neither_run_nor_imported(tmp_path, old):
    victim = tmp_path / "made_by_the_pickle"
    hostile = f"open({str(victim)!r}, 'w')\nclass Settings: pass\ndef make(): pass\n"
    (tmp_path / "hostile_module.py").write_text(hostile)
    extras = [
        Call("hostile_module.Settings", (), {"lr": 0.1}, new=True),
        Call("hostile_module.make"),
        Name("hostile_module.Settings"),
        Call("subprocess.Popen", (["touch", str(victim)],), new=True),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(tmp_path))
        for extra in extras:
            content = torch_file(SMALL, lambda state, e=extra: {"net": state, "extra": e}, old=old)
            with pytest.raises(UserError, match=r"run code of (hostile_module|subprocess)"):
                load(tmp_path, content)
    assert not victim.exists() and "hostile_module" not in sys.modules


@pytest.mark.torch
def test_known_classes_are_not_imported_either(tmp_path, monkeypatch):
    """A module of such a name on the path is not run."""
    victim = tmp_path / "made_by_the_pickle"
    hostile = f"open({str(victim)!r}, 'w')\nclass ExperimentParams: pass\n"
    (tmp_path / "iamcl2r").mkdir()
    (tmp_path / "iamcl2r" / "params.py").write_text(hostile)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [n for n in sys.modules if n.partition(".")[0] == "iamcl2r"]:
        monkeypatch.delitem(sys.modules, name)  # of a clone that another test opened
    settings = Call("iamcl2r.params.ExperimentParams", (), {"lr": 0.1}, new=True)
    content = torch_file(SMALL, lambda state: {"net": state, "args": settings})
    assert_same_bits(load(tmp_path, content).tensors, SMALL)
    assert not victim.exists() and "iamcl2r" not in sys.modules


@pytest.mark.torch
def test_the_list_of_safe_classes_is_as_before_after_a_file(tmp_path):
    torch = need("torch")
    before = torch.serialization.get_safe_globals()
    load(tmp_path, torch_file(SMALL))
    with pytest.raises(UserError, match="refused"):
        load(tmp_path, torch_file(SMALL, lambda state: {"net": state, "extra": Name("my.A")}))
    assert torch.serialization.get_safe_globals() == before


class Color(enum.Enum):
    RED = 1


class Dict(dict):
    pass


SETTINGS = {
    "namespace": argparse.Namespace(lr=0.1, nested=argparse.Namespace(a=[1])),
    "simple": types.SimpleNamespace(a=1),
    "ordered": collections.OrderedDict(a=1),
    "default": collections.defaultdict(list, a=[1]),
    "counter": collections.Counter("aab"),
    "deque": collections.deque([1, 2]),
    "path": pathlib.Path("/data"),
    "pure": pathlib.PurePosixPath("/data"),
    "scalar": np.float64(0.5),
    "integer": np.int64(5),
    "array": np.arange(3),
    "objects": np.array([{}], object),
    "dtype": np.dtype("float32"),
    "set": {1, 2},
    "frozenset": frozenset((1, 2)),
    "complex": 1 + 2j,
    "bytes": b"abc",
    "bytearray": bytearray(b"abc"),
    "slice": slice(1, 2),
    "range": range(3),
    "class": argparse.Namespace,
    "date": datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC),
}
REFUSED = {
    "enum": (Color.RED, "test_torch_files.Color"),
    "dict": (Dict(a=1), "test_torch_files.Dict"),
    "fraction": (fractions.Fraction(1, 3), "fractions.Fraction"),
    "function": (os.path.join, "posixpath.join"),
}


@pytest.mark.torch
@pytest.mark.parametrize("kind", sorted(SETTINGS))
def test_harmless_objects_beside_the_weights_are_read_inertly(tmp_path, kind):
    torch = need("torch")
    for old in (False, True):
        saved = {"state_dict": {"a": torch.arange(3.0)}, "args": SETTINGS[kind]}
        torch.save(saved, tmp_path / "a.pt", _use_new_zipfile_serialization=not old)
        np.testing.assert_array_equal(torch_files.read(tmp_path / "a.pt")["a"], [0, 1, 2])


@pytest.mark.torch
@pytest.mark.parametrize("kind", sorted(REFUSED))
def test_other_objects_beside_the_weights_are_refused_by_name(tmp_path, kind):
    torch, (value, name) = need("torch"), REFUSED[kind]
    for old in (False, True):
        saved = {"state_dict": {"a": torch.arange(3.0)}, "args": value}
        torch.save(saved, tmp_path / "a.pt", _use_new_zipfile_serialization=not old)
        with pytest.raises(UserError, match=f"refused: opening it would run code of {name}"):
            torch_files.read(tmp_path / "a.pt")


@pytest.mark.torch
def test_another_pickle_protocol_is_named(tmp_path):
    torch = need("torch")
    torch.save({"a": torch.arange(3.0)}, tmp_path / "a.pt", pickle_protocol=4)
    with pytest.raises(UserError, match="with another pickle_protocol than"):
        torch_files.read(tmp_path / "a.pt")


@pytest.mark.torch
def test_settings_in_a_checkpoint_of_the_reference_are_passed_over(tmp_path, monkeypatch):
    torch = need("torch")
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
    for name in [n for n in sys.modules if n.partition(".")[0] == "iamcl2r"]:
        monkeypatch.delitem(sys.modules, name)  # of a clone that another test opened
    state = torch_files.read(tmp_path / "ckpt_0.pt")
    np.testing.assert_array_equal(state["a"], [0.0, 1.0, 2.0])
    assert "iamcl2r" not in sys.modules


# --- beside torch


@pytest.mark.torch
@pytest.mark.parametrize("old", [False, True])
def test_tensors_are_those_of_torch(tmp_path, old):
    """Views, Parameters, shared storages and buffers, in both formats."""
    torch = need("torch")
    base = torch.arange(24.0).reshape(4, 6)
    layers = [torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Linear(4, 4)]
    state = {
        "transposed": base.T,
        "rows": base[1::2],
        "part": base[1:3, 2:5],
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(base),
        "buffer": torch.nn.parameter.Buffer(base + 1),
        "double": base.double() / 3,
        **torch.nn.Sequential(*layers).state_dict(),
    }
    state["noted"] = base.clone()
    state["noted"].remark = "tensors may have attributes"
    torch.save(state, tmp_path / "a.pt", _use_new_zipfile_serialization=not old)
    found = torch_files.read(tmp_path / "a.pt")
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        assert_same_bits(found[name], tensor.detach().numpy())


@pytest.mark.torch
def test_what_is_written_torch_reads(tmp_path):
    torch = need("torch")
    torch_files.write(tmp_path / "new" / "a.pt", STATE)
    saved = torch.load(tmp_path / "new" / "a.pt", weights_only=True)
    assert_same_bits({name: tensor.numpy() for name, tensor in saved.items()}, STATE)
    assert_same_bits(torch_files.read(tmp_path / "new" / "a.pt"), STATE)
    assert os.listdir(tmp_path / "new") == ["a.pt"]


def odd_tensors(torch):
    """Tensors that are no weights, as torch saves them, and what is said of them."""
    eye, complex_zeros = torch.eye(2), torch.zeros(2, dtype=torch.complex64)
    return {
        "sparse": (eye.to_sparse(), "is sparse"),
        "csr": (eye.to_sparse_csr(), "is sparse"),
        "meta": (torch.zeros(2, device="meta"), "is on the meta device"),
        "quantised": (torch.quantize_per_tensor(eye, 0.1, 0, torch.qint8), "is quantised"),
        "nested": (torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]), "is nested"),
        "expanded": (torch.zeros(1).expand(4, 4), "is an expanded view"),
        "endless": (torch.zeros(1).expand(10**12), "is an expanded view"),
        "conjugate": (complex_zeros.conj(), "is a lazy conjugate"),
        "negative": (torch._neg_view(torch.ones(2)), "is a lazy conjugate or negative"),
        **{
            name: (torch.zeros(2, dtype=getattr(torch, name)), f"holds {name} numbers")
            for name in (
                "bool",
                "int8",
                "uint8",
                "int16",
                "int64",
                "uint16",
                "complex64",
                "complex32",
            )
        },
        "nan": (torch.tensor([float("nan")]), "holds 1 values that float32 does not have"),
        "too large": (torch.tensor([1e300], dtype=torch.float64), "holds 1 values that"),
    }


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")  # of torch, about its own formats
def test_odd_tensors_of_torch_are_refused_by_name(tmp_path):
    torch = need("torch")
    for name, (tensor, message) in odd_tensors(torch).items():
        for old in (False, True):
            if old and name in ("nested", "uint16", "complex32"):
                continue  # PyTorch cannot read them of its older format
            saved = {"net": {"w": torch.zeros(2), "layer.odd": tensor}}
            torch.save(saved, tmp_path / "a.pt", _use_new_zipfile_serialization=not old)
            with pytest.raises(UserError, match=r"a\.pt") as caught:
                torch_files.read(tmp_path / "a.pt")
            assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
def test_a_whole_network_and_torchscript_are_refused(tmp_path):
    torch = need("torch")
    net = torch.nn.Linear(3, 2)
    for saved in (net, {"model": net, "epoch": 3}):
        torch.save(saved, tmp_path / "a.pt")
        with pytest.raises(UserError, match=r"holds a whole network.*nn\.modules\.linear\.Linear"):
            torch_files.read(tmp_path / "a.pt")
    torch.jit.script(net).save(tmp_path / "a.pt")
    with pytest.raises(UserError, match="is TorchScript, a program"):
        torch_files.read(tmp_path / "a.pt")


NARROW = ["float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz"]
NARROW += ["float8_e5m2fnuz", "float8_e8m0fnu"]


@pytest.mark.torch
@pytest.mark.parametrize("dtype", NARROW)
def test_every_value_of_a_narrow_float_becomes_float32_exactly(tmp_path, dtype):
    torch = need("torch")
    bits = 8 if "float8" in dtype else 16
    codes = torch.arange(2**bits, dtype=torch.int32).to(getattr(torch, f"uint{bits}"))
    every = codes.view(getattr(torch, dtype))
    finite = every[torch.isfinite(every.float())]
    for old in (False, True)[: bits // 8]:  # PyTorch cannot read float8 of its older format
        torch.save({"a": finite}, tmp_path / "a.pt", _use_new_zipfile_serialization=not old)
        found = torch_files.load(tmp_path / "a.pt")
        assert_same_bits(found.tensors["a"], finite.float().numpy())
        said = (f"{dtype} is widened to float32, which is exact",) if bits == 8 else ()
        assert found.notes == said


@pytest.mark.parametrize("dtype", NARROW)
def test_narrow_floats_of_safetensors_become_float32_exactly(tmp_path, dtype):
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    every = np.arange(2 ** (8 * kind.itemsize), dtype=f"u{kind.itemsize}").view(kind)
    wide = every.astype(np.float32)
    finite = np.isfinite(wide)
    found = load(tmp_path, safe_file({"a": every[finite]}))
    assert_same_bits(found.tensors["a"], wide[finite])
    assert len(found.notes) == (kind.itemsize == 1)
