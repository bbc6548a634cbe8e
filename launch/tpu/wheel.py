"""Wheels for the hosts of a slice: with the programs and the configurations, which a normal one lacks.

A normal install takes in the library alone, so that it puts no packages named `launch` and `configs`
on anybody's import path; `pip wheel .` builds a wheel of the library alone for the same reason.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from launch.tpu.errors import Mistake

FOLDERS = ("compat_jax", "launch", "configs")
REMEDY = "build one in a clone with `python -m launch.tpu_vm wheel`"


def check(path: str | Path, program: Sequence[str]) -> None:
    """Refuse a wheel from which the hosts could not start a program.

    Args:
      path: file of the wheel.
      program: module that the hosts will run, e.g. "launch.train", and its arguments.

    Raises:
      Mistake: the file is no wheel, or lacks the programs, the configurations, this program or the
        configuration that it is given.
    """
    try:
        with zipfile.ZipFile(path) as file:
            names = set(file.namelist())
    except (OSError, zipfile.BadZipFile) as error:
        raise Mistake(f"--wheel={str(path)!r} is no wheel ({error}): {REMEDY}") from error
    missing = [f for f in FOLDERS if not any(name.startswith(f"{f}/") for name in names)]
    if missing:
        raise Mistake(
            f"--wheel={str(path)!r} has no {' and no '.join(missing)}, so the hosts could not run "
            f"{program[0]}: {REMEDY}"
        )
    needed = [program[0].replace(".", "/") + ".py", *config_files(program)]
    for name in needed:
        if name not in names:
            raise Mistake(f"--wheel={str(path)!r} has no {name}: {REMEDY} that has it")


def config_files(program: Sequence[str]) -> list[str]:
    """Return the file that --config names in the arguments of a program; [] without --config."""
    values = [re.fullmatch(r"--?config=([^:]+).*", a, re.S) for a in program[1:]]
    return [os.path.normpath(value[1]) for value in values if value]


def build(root: Path, out: Path) -> Path:
    """Build a wheel with the library, the programs and the configurations.

    Args:
      root: folder of a clone.
      out: folder for the wheel, made if it does not exist.

    Returns:
      Path of the wheel, which has the version of the package.

    Raises:
      Mistake: `root` is no clone, or pip cannot build there.
    """
    missing = [name for name in ("pyproject.toml", *FOLDERS) if not (root / name).exists()]
    if missing:
        raise Mistake(f"{root} is no clone, it has no {missing[0]}: build the wheel in a clone")
    with tempfile.TemporaryDirectory(prefix="compat_jax-") as name:
        copy, built = Path(name, "source"), Path(name, "wheels")
        _copy(root, copy)
        command = [sys.executable, "-m", "pip", "wheel", "--no-deps", f"--wheel-dir={built}"]
        done = subprocess.run([*command, str(copy)], capture_output=True, text=True)
        if done.returncode:
            words = (done.stderr.strip() or done.stdout.strip()).splitlines() or ["no message"]
            raise Mistake(f"pip could not build the wheel: {words[-1].strip()}")
        (wheel,) = built.glob("*.whl")
        check(wheel, ["launch.train"])
        out.mkdir(parents=True, exist_ok=True)
        return Path(shutil.copy(wheel, out))


def _copy(root, folder):
    """Copy what a build reads, with a pyproject.toml that packs all three folders."""
    folder.mkdir()
    for file in root.iterdir():
        if file.is_file() and not file.name.startswith("."):
            shutil.copy(file, folder)
    for name in FOLDERS:
        shutil.copytree(root / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    project = folder / "pyproject.toml"
    packages = ", ".join(f'"{name}*"' for name in FOLDERS)
    project.write_text(
        re.sub(r"(?m)^include = \[.*\]$", f"include = [{packages}]", project.read_text())
    )
    with (folder / "MANIFEST.in").open("a") as manifest:
        manifest.write("\nrecursive-include launch *.sh\n")
