"""The comparison with the reference passes what agrees and fails what does not.

NumPy in float64 (`FLOAT64`) takes the part of the reference, so that neither PyTorch nor a clone is
needed. With IAMCL2R_CLONE (and CL2R_CLONE) set to the folders of clones, they are run as well.
"""

import ast
import json
import math
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import loss_formulas as formulas
import numpy as np
import pytest
from programs import call

from compat_jax.errors import UserError
from launch.reference import clone, lines, pieces
from launch.reference.lines import Line, line, row, worst
from launch.reference.pieces import OURS

ROOT = Path(__file__).resolve().parents[1]
CLONE, CL2R = os.environ.get("IAMCL2R_CLONE"), os.environ.get("CL2R_CLONE")
needs_clone = pytest.mark.skipif(
    CLONE is None, reason="IAMCL2R_CLONE names no clone of miccunifi/iamcl2r"
)


# --- the pieces, against float64


def gradient_of_normalized(gradient, features):
    """The gradient through f / |f|."""
    norm = np.linalg.norm(features, axis=1, keepdims=True)
    unit = features / norm
    return (gradient - unit * (gradient * unit).sum(1, keepdims=True)) / norm


def softmax(x):
    e = np.exp(x - x.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


class Float64:
    """The functions of the reference, written once more in double precision."""

    prototypes = staticmethod(formulas.prototypes)

    @staticmethod
    def rows(classes, num_classes):
        return num_classes - 1 - classes

    @staticmethod
    def cross_entropy(features, rows):
        prototypes = formulas.prototypes(features.shape[1] + 1)
        wide = features.astype(np.float64)
        chosen = np.eye(len(prototypes))[rows]
        gradient = (softmax(wide @ prototypes.T) - chosen) @ prototypes / len(rows)
        return formulas.cross_entropy(wide, rows).mean(), gradient

    @staticmethod
    def contrast(new, old, labels, mu):
        wide = new.astype(np.float64)
        unit = wide / np.linalg.norm(wide, axis=1, keepdims=True)
        anchors = old / np.linalg.norm(old.astype(np.float64), axis=1, keepdims=True)
        other = labels[:, None] != labels[None]
        weights = softmax(mu * (anchors @ unit.T) * other) * other - np.eye(len(new))
        gradient = mu * weights.T @ anchors / len(new)
        loss = formulas.info_nce(wide, old, labels, mu=mu, same_class="as_coded").mean()
        return loss, gradient_of_normalized(gradient, wide)

    def batch_loss(self, new, old, classes, lam, mu):
        rows = self.rows(classes, new.shape[1] + 1)
        (a, slope_a), (b, slope_b) = (
            self.cross_entropy(new, rows),
            self.contrast(new, old, rows, mu=mu),
        )
        return lam * a + (1 - lam) * b, lam * slope_a + (1 - lam) * slope_b

    @staticmethod
    def identification(query, query_labels, gallery, gallery_labels):
        means = np.stack([gallery[gallery_labels == c].mean(0) for c in np.unique(gallery_labels)])
        means /= np.linalg.norm(means, axis=1, keepdims=True)
        return float(np.mean((query @ means.T).argmax(1) == query_labels))

    @staticmethod
    def average_compatibility(matrix):
        pairs = [(t, k) for t in range(len(matrix)) for k in range(t)]
        return float(np.mean([matrix[t, k] > matrix[k, k] for t, k in pairs]))

    @staticmethod
    def average_accuracy(matrix):
        return float(100 * matrix[np.tril_indices(len(matrix))].mean())

    @staticmethod
    def learning_rates(lr, min_lr, epochs):
        done = np.arange(epochs) / epochs
        return min_lr + (lr - min_lr) * (1 + np.cos(np.pi * done)) / 2

    @staticmethod
    def batch_norm(maps, scale, bias, mean, var, unbiased=1):
        flat = maps.reshape(-1, maps.shape[-1]).astype(np.float64)
        result = (flat - flat.mean(0)) / np.sqrt(flat.var(0) + 1e-5) * scale + bias
        own = flat.var(0, ddof=unbiased)
        return result.reshape(maps.shape), 0.9 * mean + 0.1 * flat.mean(0), 0.9 * var + 0.1 * own


FLOAT64 = Float64()


def verdicts(ours, seed=0):
    """{quantity: passed} of the pieces."""
    return {x.quantity: x.passed for x in pieces.lines(ours, FLOAT64, seed=seed)}


def failing(ours):
    return {quantity for quantity, passed in verdicts(ours).items() if not passed}


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_ours_agrees_with_float64_in_every_piece(seed):
    found = verdicts(OURS, seed)
    assert len(found) == 15
    assert all(found.values()), found


WHOLE_LOSS = {
    "loss of a batch of classes (train_one_epoch)",
    "loss of a batch of classes (train_one_epoch), gradient",
}


@pytest.mark.slow
def test_swapping_lambda_and_its_complement_is_detected():
    swapped = OURS._replace(
        batch_loss=lambda *arrays, lam, mu: OURS.batch_loss(*arrays, lam=1 - lam, mu=mu)
    )
    assert failing(swapped) == WHOLE_LOSS


def test_a_reversed_label_order_is_detected():
    def reversed_loss(new, old, classes, **numbers):
        return OURS.batch_loss(new, old, new.shape[1] - classes, **numbers)

    wrong = OURS._replace(rows=lambda classes, num_classes: classes, batch_loss=reversed_loss)
    assert failing(wrong) == {"prototype row of a class", *WHOLE_LOSS}


def test_a_biased_running_variance_is_detected():
    wrong = OURS._replace(batch_norm=lambda *arrays: FLOAT64.batch_norm(*arrays, unbiased=0))
    assert failing(wrong) == {"its running variance"}


@pytest.mark.parametrize(
    ("field", "wrong", "quantities"),
    [
        (
            "contrast",
            lambda new, old, labels, mu: OURS.contrast(new, old, np.arange(len(new)), mu=mu),
            {"contrast (HocLoss, as coded)", "contrast (HocLoss, as coded), gradient"},
        ),
        ("learning_rates", lambda lr, m, n: np.full(n, lr), {"learning rates of 1, 7, 70 epochs"}),
        (
            "average_compatibility",
            lambda m: 1 - np.mean(m[np.tril_indices(len(m), -1)] < 0.5),
            {"AC of random matrices, T = 2, 3, 7, 31"},
        ),
        (
            "identification",
            lambda query, a, gallery, b: FLOAT64.identification(-query, a, gallery, b),
            {"identification, up to 2000 queries"},
        ),
    ],
)
def test_any_other_wrong_piece_is_detected(field, wrong, quantities):
    assert failing(OURS._replace(**{field: wrong})) == quantities


# --- lines


def compared(ours, theirs, tolerance=0.1, **settings):
    return line("q", ours, theirs, part="pieces", tolerance=tolerance, note="rounding", **settings)


def test_a_line_shows_the_entry_where_both_differ_most():
    one = compared([1.0, 2.0, 4.5], [1.0, 2.5, 4.0])
    assert (one.ours, one.theirs, one.difference) == (2.0, 2.5, 0.125)
    assert not one.passed
    assert compared(2.0, 2.5, tolerance=0.5, absolute=True).passed


@pytest.mark.parametrize("ours", [math.nan, [1.0, 2.0]])
def test_a_nan_and_another_shape_never_pass(ours):
    one = compared(ours, 1.0, tolerance=1e9)
    assert not one.passed
    assert "DIFFERS" in row(one)


def test_of_several_sizes_the_worst_is_shown():
    each = [compared(x, 1.0) for x in (1.01, 1.3, 1.2)]
    assert worst(each, "all").ours == 1.3
    assert math.isnan(worst([*each, compared(math.nan, 1.0)], "all").difference)


def test_zero_against_zero_passes():
    assert compared(0.0, 0.0, tolerance=0.0).passed


# --- the command


def program(found, *arguments):
    """Output and exit code of the program if its comparison finds these lines."""
    code = (
        "import runpy, sys\n"
        "from math import nan\n"
        "from launch.reference import comparison\n"
        "from launch.reference.lines import Line\n"
        f"comparison.compare = lambda *args, **settings: iter({found!r})\n"
        "sys.argv = ['compare_reference', '--reference=clone', *sys.argv[1:]]\n"
        "runpy.run_module('launch.compare_reference', run_name='__main__', alter_sys=True)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True
    )
    return done.stdout, done.returncode


GOOD = line("good", 1.0, 1.0, part="pieces", tolerance=1e-5, note="rounding")
BAD = line("bad", 1.0, 2.0, part="pieces", tolerance=1e-5, note="rounding")
SPEED = Line(
    part="speed",
    quantity="a step",
    ours=10.0,
    theirs=20.0,
    difference=0.5,
    tolerance=None,
    note="speed",
    unit="ms",
    spread=0.03,
)


def test_it_ends_with_0_when_all_is_equal_and_with_1_otherwise(tmp_path):
    file = tmp_path / "a.json"
    out, code = program([GOOD, SPEED], f"--json={file}")
    assert code == 0
    assert "1 of 1 quantities are equal within tolerance" in out
    assert "| ×0.50 ±0.03 |" in out
    content = json.loads(file.read_text())
    assert content["passed"] and content["seed"] == 0
    assert [x["quantity"] for x in content["lines"]] == ["good", "a step"]
    out, code = program([GOOD, BAD])
    assert code == 1
    assert "1 of 2 quantities are equal within tolerance; not: pieces: bad" in out


def test_every_tolerance_is_explained_below_the_table():
    text = lines.foot([GOOD, SPEED])
    for note in ("rounding", "speed"):
        assert lines.NOTES[note] in text
    assert lines.NOTES["matrix"] not in text


def fake_clone(folder, package="iamcl2r"):
    (folder / "src" / package).mkdir(parents=True)
    (folder / "src" / package / "main.py").touch()
    return folder


def test_a_folder_that_is_no_clone_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no src/iamcl2r/main\.py.*git clone.*--reference="):
        clone.open_clone(tmp_path, "iamcl2r")
    with pytest.raises(UserError, match=r"no src/cl2r/main\.py.*--cl2r="):
        clone.open_clone(tmp_path, "cl2r")


def test_without_torch_the_error_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[torch\]'"):
        clone.open_clone(fake_clone(tmp_path), "iamcl2r")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--reference is missing"),
        (["--reference={}/none"], "is no clone of https://github.com/miccunifi/iamcl2r"),
        (["--reference={}", "--only=stepps"], "'stepps'.*'?steps"),
        (["--reference={}", "--data=glyph"], "glyphs"),
    ],
)
def test_the_program_refuses_bad_input_with_exit_code_2(tmp_path, arguments, words):
    fake_clone(tmp_path)
    code, out, err = call("compare_reference", *[a.format(tmp_path) for a in arguments])
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and len(err.splitlines()) == 1
    assert re.search(words, err), err


def test_help_explains_parts_and_exit_codes():
    code, out, _ = call("compare_reference", "--help")
    assert code == 0
    for text in ("git clone", "--only", "pieces", "protocol", "Exit code: 0"):
        assert text in out


def test_the_modules_import_each_other_in_one_direction():
    folder, package = ROOT / "launch" / "reference", "launch.reference"
    imports = {path.stem: set() for path in folder.glob("[a-z]*.py")}
    for name, found in imports.items():
        for node in ast.walk(ast.parse((folder / f"{name}.py").read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == package:
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module.startswith(f"{package}."):
                found.add(node.module.removeprefix(f"{package}."))
    assert imports["comparison"] >= {"cl2r", "clone", "inputs", "lines", "pieces", "runs"}
    while imports:
        leaves = [name for name, needed in imports.items() if not needed & {*imports}]
        assert leaves, f"a circle among {sorted(imports)}"
        for name in leaves:
            del imports[name]


# --- stand-ins


def test_stand_ins_are_gone_after_the_import(monkeypatch, tmp_path):
    source = fake_clone(tmp_path, "standin") / "src"
    (source / "standin" / "user.py").write_text(
        "import wandb, faiss\nfrom continuum.datasets import CIFAR100\nvalue = CIFAR100(path='x')\n"
    )
    hidden = ("wandb", "faiss", "continuum", "continuum.datasets")
    for name in hidden:
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(clone, "is_installed", lambda name: False)
    with clone.stand_ins(source):
        import standin.user as user
    assert isinstance(user.value, clone.Nothing)
    assert not [name for name in hidden if name in sys.modules]
    assert str(source) not in sys.path
    monkeypatch.delitem(sys.modules, "standin.user")
    monkeypatch.delitem(sys.modules, "standin")


def test_the_index_that_stands_in_for_faiss_finds_the_largest_products():
    index = clone.FlatIndex(2)
    index.add(np.array([[1, 0], [0, 1], [0.6, 0.8]], np.float32))
    scores, order = index.search(np.array([[0, 1], [1, 0]], np.float32), 2)
    np.testing.assert_array_equal(order, [[1, 2], [0, 2]])
    np.testing.assert_allclose(scores, [[1, 0.8], [1, 0.6]])


def test_the_old_name_of_isin_is_given_to_one_module_only():
    module = types.ModuleType("user")
    clone.with_in1d(module)
    np.testing.assert_array_equal(module.np.in1d([1, 2, 3], [2]), [False, True, False])
    assert module.np.sqrt is np.sqrt


# --- the clones themselves


def run_program(*arguments):
    root = Path(__file__).parents[1]
    command = [sys.executable, "-m", "launch.compare_reference", "--noprogress", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


@needs_clone
@pytest.mark.torch
def test_the_pieces_of_the_clone():
    pytest.importorskip("torch", reason="PyTorch is not installed")
    code, out, err = run_program(f"--reference={CLONE}", "--only=pieces")
    assert code == 0, out + err
    assert out.count("| equal") == 15


@needs_clone
@pytest.mark.torch
@pytest.mark.parametrize(
    ("field", "quantity"),
    [("rows", "prototype row of a class"), ("batch_norm", "its running variance")],
)
def test_deliberate_errors_are_detected_with_the_clone(field, quantity):
    pytest.importorskip("torch", reason="PyTorch is not installed")
    theirs = clone.Pieces(clone.open_clone(CLONE, "iamcl2r"))
    wrong = {
        "rows": lambda classes, num_classes: classes,
        "batch_norm": lambda *arrays: FLOAT64.batch_norm(*arrays, unbiased=0),
    }
    found = pieces.lines(OURS._replace(**{field: wrong[field]}), theirs, seed=0)
    assert {x.quantity for x in found if not x.passed} == {quantity}


@pytest.mark.slow
@needs_clone
@pytest.mark.torch
def test_the_whole_comparison_with_the_clones():
    pytest.importorskip("torch", reason="PyTorch is not installed")
    others = [] if CL2R is None else [f"--cl2r={CL2R}"]
    code, out, err = run_program(f"--reference={CLONE}", *others)
    assert code == 0, out + err
