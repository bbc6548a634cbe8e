"""Programs of users under `mypy --strict`: right ones pass, wrong ones are reported."""

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from compat_jax.chain import Version
from compat_jax.data import sources
from compat_jax.fields import describe
from compat_jax.retrieval.embedding import EmbedOptions

ROOT = Path(__file__).parents[1]

RIGHT = '''
from pathlib import Path

import numpy as np
from typing_extensions import assert_type

import compat_jax as cj

photos = cj.Photos(path=Path("photos"), size=64)
run = cj.Run(method=cj.methods.hoc(lam=0.2, mu=3.0), optimizer=cj.Sgd(lr=0.01))
data = cj.data.from_folder(Path("photos"), 64, resize="squash", classes=(0, 5), progress=True)
assert_type(data, cj.Dataset)
assert_type(cj.data.from_table("list.csv", split="train", size=8), cj.Dataset)
assert_type(cj.data.from_pictures("photos/*.jpg", size=8, in_memory=False), cj.Dataset)
assert_type(cj.methods.er(), cj.Method)
assert_type(cj.methods.get("hoc", {"mu": 3.0}), cj.Method)
chain: cj.Chain = cj.train(run, data, Path("runs"))
version = chain[0]
height: int = data.images.shape[1]
first: np.ndarray = data.need_labels()[:3]
index = cj.Index(version, data.images, batch_size=8, progress=None)
scores, rows = index.search(chain[-1], ["query.jpg", Path("other.jpg")], k=3)
assert_type(index.search(version, data), tuple[np.ndarray, np.ndarray])
features: np.ndarray = cj.embed(version, "photos", dtype="float32", preparation=cj.Preparation(64))
engine = cj.ExactIndex()
engine.add(features)
vectors: cj.VectorIndex = engine
mapped: float = cj.evaluate(chain, data, data).main.matrix[0, 0]


@cj.data.register("noise")
def noise(size: int = 8) -> cj.Dataset:
    """Pictures of nothing."""
    return cj.data.from_arrays(np.zeros((2, size, size, 3), np.uint8), [0, 1])


@cj.methods.register("Mine", "here")
def mine(weight: float = 1.0) -> cj.Method:
    """Train with a cross-entropy."""
    return cj.Method("mine", lambda inputs: weight * inputs.cross_entropy(), fixed_simplex=False)


assert_type(noise(size=4), cj.Dataset)
assert_type(mine(weight=2.0), cj.Method)
'''

# Each line is wrong, in the way that the second text names.
WRONG = {
    'cj.data.from_folder("photos", size="64")': 'incompatible type "str"; expected "int | None"',
    'cj.data.from_folder("photos", siz=64)': 'Unexpected keyword argument "siz"',
    'cj.data.from_folder("photos", resise="crop")': 'Unexpected keyword argument "resise"',
    'cj.data.from_folder("photos", crop="all")': 'incompatible type "str"; expected "float"',
    'cj.data.from_table("list.csv").imgs': '"Dataset" has no attribute "imgs"',
    "cj.methods.hoc(lam='much')": 'incompatible type "str"; expected "float"',
    "cj.methods.hoc(lambda_=0.1)": 'Unexpected keyword argument "lambda_"',
    "cj.Photos(path=3)": 'incompatible type "int"; expected "str | PathLike[str]"',
    "cj.Index(version, batchsize=3)": 'Unexpected keyword argument "batchsize"',
    "cj.Index('runs/chain')": 'incompatible type "str"; expected "Version"',
    "index.search(version, 'a.jpg', k='3')": 'incompatible type "str"; expected "int"',
    "index.search(version, 'a.jpg').rows": "has no attribute",
    "cj.embed(version, 'a.jpg', batchsize=3)": 'Unexpected keyword argument "batchsize"',
    "cj.embed(version, 'a.jpg', batch_size='3')": 'incompatible type "str"; expected "int"',
    "cj.Dataset([1, 2])": 'expected "Images"',
    "data.images.shape.rows": "has no attribute",
    "data.labels.of_class(3)": 'has no attribute "of_class"',
    "noise(sise=4)": 'Unexpected keyword argument "sise"',
    "mine(weight='much')": 'incompatible type "str"; expected "float"',
}


def reported(folder, text):
    """Ask mypy about a program outside of the clone: {number of the line: messages}."""
    (folder / "program.py").write_text(text)
    (folder / "mypy.ini").write_text("[mypy]\nstrict = True\nfollow_imports = silent\n")
    # Its cache serves later runs of the test.
    command = ["-m", "mypy", "--cache-dir", ROOT / ".mypy_cache" / "users", "program.py"]
    done = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env={**os.environ, "MYPYPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode in (0, 1), done.stdout + done.stderr
    found = re.findall(r"^program\.py:(\d+): error: (.*)", done.stdout, re.MULTILINE)
    lines: dict[int, str] = {}
    for line, message in found:
        lines[int(line)] = f"{lines.get(int(line), '')}{message}\n"
    return lines


@pytest.mark.slow  # mypy reads JAX as well: half a minute without a cache
def test_programs_of_users_are_checked(tmp_path):
    right = len(RIGHT.splitlines())
    found = reported(tmp_path, RIGHT + "\n".join(WRONG) + "\n")
    assert {line: text for line, text in found.items() if line <= right} == {}
    for line, (wrong, message) in enumerate(WRONG.items(), start=right + 1):
        assert message in found.get(line, ""), wrong


def test_the_types_name_what_there_is():
    assert list(sources.ReadingFields.__annotations__) == [
        field.name for field in describe(sources.Reading)
    ]
    parameters = inspect.signature(Version.embed).parameters.values()
    keywords = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    assert list(EmbedOptions.__annotations__) == keywords
