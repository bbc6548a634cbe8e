"""Checkpoints of the reference as a chain, and back."""

import collections
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from networks import assert_same_bits, network, random_variables, renamed
from reference_weights import zero_variables

import compat_jax
from compat_jax.chain import Chain, Record
from compat_jax.errors import UserError
from compat_jax.interop import chains, to_torch, torch_files

WHY = "PyTorch is not installed: pip install -e '.[torch]'"
STATE = to_torch(zero_variables(network()))


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
