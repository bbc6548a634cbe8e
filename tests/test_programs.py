"""The list of programs, and the commands that their help shows."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import programs
import pytest

from launch import PROGRAMS

ROOT = Path(__file__).resolve().parents[1]
OTHERS = [program.name for program in PROGRAMS if program.name != "launch.tpu_vm"]

# Parses each command in a child process: flags and overrides of a configuration are global.
PARSE = """
import importlib, json, os, sys, warnings
import compat_jax.config_schema, launch._evaluation  # what configurations and programs import
warnings.simplefilter("ignore")  # JAX warns of forks, but has not started any thread yet
for name, *argv in json.loads(sys.argv[1]):
    child = os.fork()
    if not child:
        sys.argv = [name, *argv]
        try:
            importlib.import_module(name)
            from absl import flags
            rest = flags.FLAGS(sys.argv)[1:]
            if rest:
                raise ValueError(rest)
            os._exit(0)
        except BaseException as error:
            print(name, *argv, repr(error), flush=True)
            os._exit(1)
    os.waitpid(child, 0)
"""


def examples(name: str) -> list[list[str]]:
    """The commands in the help of a program and of its commands: its name and its arguments each."""
    text = (ROOT / f"{name.replace('.', '/')}.py").read_text()
    lines = re.sub(r"\\\\\n\s*", "", text).splitlines()
    found = [line for line in lines if re.match(r"  python -m launch", line)]
    return [shlex.split(line, comments=True)[2:] for line in found]


def test_the_list_of_programs_is_complete():
    """Each file with a command line is listed, and `python -m launch` prints the list."""
    files = [p for p in (ROOT / "launch").glob("[a-z]*.py") if "__main__" in p.read_text()]
    assert {program.name for program in PROGRAMS} == {f"launch.{p.stem}" for p in files}
    done = subprocess.run(
        [sys.executable, "-m", "launch"], capture_output=True, text=True, cwd=ROOT, check=True
    )
    for program, line in zip(PROGRAMS, done.stdout.splitlines(), strict=True):
        assert line.split() == ["python", "-m", program.name, *program.summary.split()]


@pytest.mark.parametrize("name", OTHERS)
def test_the_help_shows_a_command_of_the_program(name):
    assert name in {example[0] for example in examples(name)}


@pytest.mark.parametrize("program", [program.name for program in PROGRAMS])
def test_help_is_no_failure(program):
    code, out, err = programs.call(program.removeprefix("launch."), "--help")
    assert (code, err) == (0, "")
    assert f"python -m {program}" in out and re.search(r"^ +--\S+[: ]", out, re.MULTILINE)


def test_the_commands_of_all_helps_parse():
    """Also those that would download, train for hours or need a clone; see also test_tpu_vm.py."""
    commands = [example for name in OTHERS for example in examples(name)]
    done = subprocess.run(
        [sys.executable, "-c", PARSE, json.dumps(commands)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr
