"""The program that the hosts of a slice run, and the code that they install for it."""

import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from launch import PROGRAMS, Program
from launch.tpu import wheel
from launch.tpu.errors import Mistake, unknown

# What a program writes, and what to give in place of a folder on a host.
_BUCKET = "which outlives the slice: --{flag}=gs://BUCKET/RUN/"
OUTPUTS = {
    "chain": f"leave it out for --workdir's chain, or give one in a bucket, {_BUCKET}chain",
    "out": f"leave it out for the folder beside the chain, or give one in a bucket, {_BUCKET}results",
    "config.tensorboard": f"give a folder in a bucket, {_BUCKET}tensorboard",
}
ROOT = Path(__file__).resolve().parents[2]  # the clone; site-packages where a wheel is installed


@dataclass(frozen=True)
class Code:
    """The code that the hosts install.

    Attributes:
      source: ("archive", gs:// path, ""), ("repo", git address, branch) or ("wheel", gs:// path, "").
      commands: commands to run before a slice is made; they bring the code to the bucket.
      unchecked: path of a wheel that the commands download, to be checked after them; else empty.
    """

    source: tuple[str, str, str]
    commands: tuple[list[str], ...] = ()
    unchecked: str = ""


def check_program(program: list[str], foreign: bool) -> Program:
    """Look up the program to run on the hosts.

    Args:
      program: its name and its arguments.
      foreign: the hosts get other code than this clone's, which may have programs of its own.

    Raises:
      Mistake: no such program, one that does not run on a slice, a --workdir among its
        arguments, or an output that is not in a bucket.
    """
    if not program:
        raise Mistake("no program: end the command with -- launch.train --config=...")
    name = program[0]
    known = {p.name: p for p in PROGRAMS if p.folder}
    if name not in known:
        if any(p.name == name for p in PROGRAMS):
            raise Mistake(f"{name} does not run on a slice: choose one of {', '.join(known)}")
        own = ROOT / name.replace(".", "/")
        here = own.is_dir() or own.with_suffix(".py").exists()
        if here or not foreign or not re.fullmatch(r"launch\.[a-z]\w*", name):
            raise unknown("program", name, known)
    if any(re.fullmatch(r"--?workdir(=.*)?", argument, re.S) for argument in program[1:]):
        raise Mistake("--workdir comes before the lone --: the hosts are given it from there")
    _check_outputs(program[1:])
    return known.get(name, Program(name, "", "workdir"))


def _check_outputs(arguments: list[str]) -> None:
    """Refuse outputs on the disk of a host, which is deleted with the slice."""
    for argument, following in zip_longest(arguments, arguments[1:], fillvalue=""):
        match = re.fullmatch(r"--?([\w.]+)(?:=(.*))?", argument, re.S)
        if match is None or match[1] not in OUTPUTS:
            continue
        flag, value = match[1], following if match[2] is None else match[2]
        unset = value in ("", "None") and flag != "chain"  # then the program has its default
        if not unset and not value.startswith("gs://"):
            remedy = OUTPUTS[flag].format(flag=flag)
            raise Mistake(f"--{flag}={value} would be deleted with the slice: {remedy}")


def pick(
    repo: str | None,
    wheel_file: str | None,
    *,
    program: Sequence[str],
    bucket: str,
    folder: str,
) -> Code:
    """Choose the code for the hosts: a repository, a wheel, or else this clone's last commit.

    Args:
      repo: git address, optionally with #BRANCH.
      wheel_file: path of a wheel, on this machine or on gs://.
      program: the program that the hosts will run, and its arguments; the code must have it.
      bucket: gs:// folder for what has to be sent.
      folder: folder on this machine for temporary files.

    Raises:
      Mistake: both are given, neither is given and this is no clone, or the program or its
        configuration is not in the wheel or in the last commit.
    """
    if repo and wheel_file:
        raise Mistake("--repo and --wheel are both given: keep one")
    copy = ["gcloud", "storage", "cp"]
    if repo:
        address, _, revision = repo.partition("#")
        return Code(("repo", address, revision))
    if wheel_file:
        name = Path(wheel_file).name
        if wheel_file.startswith("gs://"):
            here = f"{folder}/{name}"
            return Code(("wheel", wheel_file, ""), ([*copy, wheel_file, here],), here)
        wheel.check(wheel_file, program)
        there = f"{bucket}/{name}"
        return Code(("wheel", there, ""), ([*copy, wheel_file, there],))
    if not (ROOT / ".git").exists():
        raise Mistake(f"{ROOT} is no git clone to send: give --repo=URL or --wheel=FILE")
    git = ["git", "-C", str(ROOT)]
    for name in wheel.config_files(program):
        found = subprocess.run([*git, "cat-file", "-e", f"HEAD:{name}"], capture_output=True)
        if found.returncode:
            raise Mistake(f"{name} is not in the last commit, which the hosts get: commit it")
    archive, there = f"{folder}/source.tar.gz", f"{bucket}/source.tar.gz"
    pack = [*git, "archive", "--format=tar.gz", f"--output={archive}", "HEAD"]
    return Code(("archive", there, ""), (pack, [*copy, archive, there]))
