"""Weight files of PyTorch: read and written without running anything that they contain."""

import ast
import os
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from networks import assert_same_bits, network, random_variables

import compat_jax
from compat_jax.errors import UserError
from compat_jax.interop import to_torch, torch_files

WHY = "PyTorch is not installed: pip install -e '.[torch]'"
SMALL = network()


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
    for name in [n for n in sys.modules if n.partition(".")[0] == "iamcl2r"]:
        monkeypatch.delitem(sys.modules, name)  # of a clone that another test opened
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
