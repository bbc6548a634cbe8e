"""Command lines made from the schema: whatever a user types ends in one line and exit code 2.

Every field of every configuration gets values of other types, out of range, not finite, empty, huge,
unset. The folder of the run cannot be made, so that a value that is fine after all ends there.
"""

import inspect
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from compat_jax.config_schema import schema

ROOT = Path(__file__).parents[1]
NOWHERE = "/proc/nowhere/run"
HOSTILE = {
    int: ("-1", "0", "1.5", "10**3", "1000000000000000000000", "nan", "", "x", "None", "(1,)", "é"),
    float: ("-1", "nan", "inf", "1e400", "1e6x", "", "None", "(1,)", "é"),
    bool: ("2", "maybe", "None", "1.5", ""),
    str: ("", "nonsense", "é", "None", "a,b", "=", "~nobody/x", "s4://x", "x" * 5000, "\x01"),
    tuple: ("()", "(1", "(-1,)", "(1.5,)", "('a',)", "1", "None", "(0,1000000000)", "[nan]", "x"),
}
PROGRAMS = (
    ("launch.train", "configs/glyphs.py:replace=false", tiny.TRAIN),
    ("launch.train", "configs/iamcl2r.py:method=fd,replace=false", {}),
    ("launch.pretrain", "configs/pretrain.py:data=glyphs", tiny.PRETRAIN),
    ("launch.train", "configs/photos.py:path=/nowhere", {}),
    ("launch.pretrain", "configs/pretrain.py:data=folder", {}),
)
OTHERS = (
    ("launch.evaluate", "--chain=/nowhere/chain"),
    ("launch.evaluate", "--chain="),
    ("launch.evaluate", "--chain=s4://x/y"),
    ("launch.evaluate", "--chain=/tmp/[x]"),
    ("launch.evaluate", "--chain=/nowhere", "--metric=recall"),
    ("launch.evaluate", "--chain=/nowhere", "--metric=recall@0"),
    ("launch.evaluate", "--chain=/nowhere", "--dtype=float16"),
    ("launch.evaluate", "--chain=/nowhere", "--batch_size=0"),
    ("launch.evaluate", "--nosuchflag"),
    ("launch.evaluate", "word"),
    ("launch.train",),
    ("launch.train", "--workdir=~nobody/x"),
    ("launch.train", "--workdir=/tmp/x*y", "--config=configs/glyphs.py:replace=false"),
    ("launch.train", "--config=nowhere.py", "--workdir=/tmp/x"),
    ("launch.train", "--config=README.md", "--workdir=/tmp/x"),
    ("launch.train", "--config=configs/glyphs.py:seed=x", "--workdir=/tmp/x"),
    ("launch.train", "--config=configs/glyphs.py:sede=1", "--workdir=/tmp/x"),
    ("launch.train", "--config=configs/iamcl2r.py:tasks=8", "--workdir=/tmp/x"),
    ("launch.quickstart", "--methods="),
    ("launch.quickstart", "--methods=hoc,nonsense"),
    ("launch.quickstart", "--seed=-1"),
    ("launch.quickstart", "--workdir=/tmp/[q]"),
    ("launch.train", "--config=configs/photos.py", "--workdir=/tmp/never"),
    ("launch.train", "--config=configs/photos.py:size=0,path=.", "--workdir=/tmp/never"),
    ("launch.embed", "--chain=/nowhere", "--pictures=/nowhere", "--out=/tmp/never.npz"),
    ("launch.embed", "--chain=/nowhere", "--pictures=.", "--out=/tmp/never.txt"),
    ("launch.embed", "--chain=/nowhere", "--pictures=", "--out=/tmp/never.npz"),
    ("launch.embed", "--chain=/n", "--pictures=.", "--out=/tmp/never.npz", "--shard=2/2"),
    ("launch.embed", "--chain=/n", "--pictures=.", "--out=/tmp/never.npz", "--version=x"),
    ("launch.enlarge", "--chain=/nowhere", "--num_prototypes=4096", "--out=/tmp/never"),
    ("launch.enlarge", "--chain=/nowhere", "--num_prototypes=1", "--out=/tmp/never"),
    ("launch.enlarge", "--chain=/nowhere", "--out=/tmp/never"),
    ("launch.export_torch", "--chain=/nowhere", "--out=/tmp/x.safetensors"),
    ("launch.import_torch", "--weights=/nowhere.safetensors", "--out=/tmp/never"),
)
# Runs each command in a child of a process that has imported what it needs, but started nothing.
RUN = """
import json, os, runpy, signal, sys, warnings
import compat_jax.experiment, compat_jax.report, compat_jax.interop
warnings.simplefilter("ignore", DeprecationWarning)  # of the fork: JAX has not started any thread yet
found = []
for number, (program, *argv) in enumerate(json.loads(sys.stdin.read())):
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.close(read)
        os.dup2(write, 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        signal.alarm(60)
        sys.argv = [program, *argv]
        try:
            runpy.run_module(program, run_name="__main__", alter_sys=True)
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        except BaseException:
            import traceback
            traceback.print_exc()
            code = 99
        sys.stderr.flush()
        os._exit(code or 0)
    os.close(write)
    with os.fdopen(read, errors="replace") as pipe:
        text = pipe.read()
    found.append((os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), text))
print(json.dumps(found))
"""


def commands() -> list[tuple[str, ...]]:
    """Every program's configuration with every hostile value of each of its fields."""
    made = [*OTHERS]
    for program, config, overrides in PROGRAMS:
        begin = (program, f"--config={config}", *tiny.flags(overrides), f"--workdir={NOWHERE}")
        for field in schema():
            kind = next(k for k in HOSTILE if k.__name__ in str(field.kind))
            role = "train" if "pretrain" in program else "query"
            name = field.name.replace("ROLE", role)
            made += [(*begin, f"--config.{name}={value}") for value in HOSTILE[kind]]
    return made


def failures(chosen) -> list[str]:
    """The commands that do not end as they should, with what they said."""
    done = subprocess.run(
        [sys.executable, "-c", RUN],
        input=json.dumps(chosen),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "TFDS_DATA_DIR": "/nowhere"},
    )
    assert done.returncode == 0, done.stderr
    bad = []
    for command, (code, said) in zip(chosen, json.loads(done.stdout), strict=True):
        lines = said.strip().splitlines()
        if code != 2 or len(lines) != 1 or not lines[0].startswith("error: ") or len(said) > 6000:
            bad.append(f"{code}: {' '.join(command)[-300:]}: {said[-300:]!r}")
    return bad


def test_every_field_has_hostile_values():
    assert len(commands()) > 1000
    assert all(f.rule.help and f.default is not inspect for f in schema())


def test_some_hostile_commands_end_in_one_line():
    chosen = random.Random(0).sample(commands(), 25)
    assert not failures([*OTHERS[::4], *chosen])


@pytest.mark.slow
@pytest.mark.parametrize("part", range(8))
def test_all_hostile_commands_end_in_one_line(part):
    assert not failures(commands()[part::8])
