"""Programs take huge pages where the kernel gives them on request, and leave a choice alone."""

import os
import subprocess
import sys

import pytest

from launch import _huge_pages as pages

MADVISE = "always [madvise] never\n"


@pytest.mark.parametrize(
    ("now", "modes", "chosen"),
    [
        (None, MADVISE, "glibc.malloc.hugetlb=1"),
        ("", MADVISE, "glibc.malloc.hugetlb=1"),
        ("glibc.malloc.arena_max=2", MADVISE, "glibc.malloc.arena_max=2:glibc.malloc.hugetlb=1"),
        ("glibc.malloc.hugetlb=0", MADVISE, None),
        ("glibc.malloc.hugetlb=1", MADVISE, None),
        (None, "[always] madvise never\n", None),
        (None, "always madvise [never]\n", None),
    ],
)
def test_huge_pages_are_asked_for_where_they_come_on_request(now, modes, chosen):
    environment = {} if now is None else {"GLIBC_TUNABLES": now}
    assert pages.tunables(environment, modes) == chosen


@pytest.mark.parametrize(
    ("argv", "command", "is_program"),
    [
        (["-m", "--help"], ["python", "-m", "launch.train", "--help"], True),
        (["-m"], ["python", "-X", "dev", "-m", "launch"], True),
        (["-m"], ["python", "-m", "pytest"], False),
        (["-m"], ["python", "-m", "launcher"], False),
        (["/x/pdb.py"], ["python", "-m", "pdb", "-m", "launch.train"], False),
        (["-c"], ["python", "-c", "import launch"], False),
        ([""], ["python"], False),
    ],
)
def test_only_programs_of_this_package_start_again(argv, command, is_program):
    assert pages.is_program(argv, command) is is_program


def _starts(tmp_path, *command, **extra):
    """Return what GLIBC_TUNABLES held at each start of Python in a command, and its exit code."""
    tmp_path.joinpath("sitecustomize.py").write_text(
        "import os\nwith open(os.environ['SEEN'], 'a') as out:\n"
        "    print(os.environ.get('GLIBC_TUNABLES'), os.getpid(), file=out)\n"
    )
    seen = tmp_path / "seen"
    environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    path = os.pathsep.join([str(tmp_path), os.getcwd()])
    environment |= {"PYTHONPATH": path, "SEEN": str(seen), **extra}
    code = subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True
    ).returncode
    values, processes = zip(*map(str.split, seen.read_text().splitlines()), strict=True)
    assert len(set(processes)) == 1  # a restart keeps the process
    return values, code


@pytest.mark.skipif(
    not pages.MODES.is_file() or "[madvise]" not in pages.MODES.read_text(),
    reason="this kernel does not give huge pages on request",
)
def test_a_program_starts_again_once(tmp_path):
    assert _starts(tmp_path, "-m", "launch") == (("None", "glibc.malloc.hugetlb=1"), 0)


def test_a_choice_and_other_programs_are_left_alone(tmp_path):
    off = "glibc.malloc.hugetlb=0"
    assert _starts(tmp_path, "-m", "launch", GLIBC_TUNABLES=off) == ((off,), 0)
    tmp_path.joinpath("seen").unlink()
    assert _starts(tmp_path, "-c", "import launch") == (("None",), 0)
