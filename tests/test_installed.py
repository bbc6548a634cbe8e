"""An installed wheel, without the clone: trains, resumes, evaluates, searches and reports."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LEFT_OUT = (
    ".git",
    ".venv",
    "build",
    "*.egg-info",
    "__pycache__",
    "runs",
    ".*_cache",
    ".hypothesis",
)

NETWORK = """
import flax.linen as nn


class Small(nn.Module):  # compiles in a tenth of the time of the library's smallest
    @nn.compact
    def __call__(self, images, train):
        layer = nn.Conv(16, (4, 4), strides=4, use_bias=False)(images)
        norm = nn.BatchNorm(use_running_average=not train, momentum=0.9)
        return nn.relu(norm(layer)).mean((1, 2))
"""

SCRIPT = """
import importlib.util, sys
from pathlib import Path
import numpy as np
from PIL import Image
import compat_jax as cj
from compat_jax import report
from small import Small

assert Path(cj.__file__).is_relative_to(sys.prefix), cj.__file__
for name in ("launch", "configs", "tests"):
    assert importlib.util.find_spec(name) is None, name


def draw(role, classes, count):
    for c in classes:
        folder = Path("photos", role, f"class {c}")
        folder.mkdir(parents=True)
        plain = np.random.default_rng(c).integers(0, 256, (4, 4, 3))
        for i in range(count):
            noise = np.random.default_rng([c, i]).normal(0, 25, (20, 24, 3))
            picture = np.clip(np.kron(plain, np.ones((5, 6, 1))) + noise, 0, 255)
            Image.fromarray(picture.astype(np.uint8)).save(folder / f"{i}.png")


draw("train", range(6), 10)
draw("query", range(6, 9), 4)
draw("gallery", range(6, 9), 4)
data, query, gallery = (
    cj.data.from_folder(f"photos/{role}", size=16) for role in ("train", "query", "gallery")
)
run = cj.Run(
    method="hoc",
    backbone=Small(),
    tasks=cj.Tasks(initial=2, increment=2),
    num_prototypes=32,
    epochs=2,
    batch_size=8,
)
asked = []


def in_the_second_task():
    if Path("runs/hoc/chain/0000").exists():
        asked.append(1)
    return len(asked) >= 4


try:
    cj.train(run, data, "runs/hoc", session=cj.Session(should_stop=in_the_second_task))
    raise SystemExit("was not stopped")
except cj.Stopped:
    assert len(cj.Chain("runs/hoc/chain")) == 1 and list(Path("runs/hoc/progress").iterdir())
chain = cj.train(run, data, "runs/hoc")
unbroken = cj.train(run, data, "runs/unbroken")
assert [v.sha256 for v in chain] == [v.sha256 for v in unbroken]
result = cj.evaluate(chain, query, gallery, metrics=["identification", "recall@1"])
print(result)
index = cj.Index(chain[0], gallery.images)
scores, rows = index.search(chain[-1], query.images, k=10)
assert scores.shape == rows.shape == (12, 10) and (np.diff(scores) <= 0).all()
paths = report.write({"hoc": result.main}, Path("report"))
assert all(path.exists() for path in paths)
"""


def run(*command, **options):
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{command}: {done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel that `pip wheel --no-deps .` builds of a copy of the tree."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, folder / "tree", ignore=shutil.ignore_patterns(*LEFT_OUT))
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, folder / "tree")
    (built,) = folder.glob("compat_jax-*.whl")
    return built


def install(wheel, folder, *, dependencies):
    """A new environment with the wheel: with its dependencies, or with those of this one."""
    venv.create(folder, with_pip=dependencies)
    python = folder / "bin" / "python"
    if dependencies:
        run(python, "-m", "pip", "install", "-q", wheel)
        return python
    # By a path alone: the .pth file of this environment's editable install is not read there.
    site = sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)})
    (Path(site) / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    run(sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", wheel)
    return python


def environment(cache):
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    return {**kept, "JAX_PLATFORMS": "cpu", "COMPAT_JAX_CACHE": str(cache)}


def check(python, folder, cache):
    folder.mkdir()
    (folder / "small.py").write_text(NETWORK)
    (folder / "script.py").write_text(SCRIPT)
    out = run(python, "-W", "error", "script.py", cwd=folder, env=environment(cache))
    assert "d-Simplex-HOC: identification %" in out and "recall@1 %" in out and "AC: in " in out


def test_an_installed_wheel_does_the_whole_work(wheel, tmp_path, cache_folder):
    python = install(wheel, tmp_path / "venv", dependencies=False)
    check(python, tmp_path / "work", cache_folder)


@pytest.mark.slow
def test_an_installed_wheel_brings_its_dependencies(wheel, tmp_path, cache_folder):
    python = install(wheel, tmp_path / "venv", dependencies=True)
    check(python, tmp_path / "work", cache_folder)
