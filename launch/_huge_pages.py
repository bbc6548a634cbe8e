"""Huge pages for the arrays of a program.

XLA takes fresh memory for each call on a CPU and gives it back: a step of ResNet-50 on eight pictures
of 224 px touches 250,000 new pages of 4 KiB, a fifth of its time. In pages of 2 MiB the same memory is
1 % of those faults. glibc asks the kernel for them if `GLIBC_TUNABLES` says so when a process begins,
hence the restart. See "Memory Allocation Tunables" in the manual of glibc.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

TUNABLE = "glibc.malloc.hugetlb"
MODES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def restart_with_huge_pages() -> None:
    """Start this program again with huge pages, where that makes a difference and nobody chose.

    Nothing is imported and printed yet, and the process keeps its number. Without `python -m launch.…`,
    for instance in a program of one's own or under a debugger, nothing happens.
    """
    if not is_program(sys.argv, sys.orig_argv) or not MODES.is_file():
        return
    chosen = tunables(os.environ, MODES.read_text())
    if chosen is not None:
        environment = {**os.environ, "GLIBC_TUNABLES": chosen}
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def is_program(argv: Sequence[str], command: Sequence[str]) -> bool:
    """Return whether Python is about to run a program of this package with `-m`.

    Args:
      argv: `sys.argv`; "-m" stands first while Python looks for the module.
      command: `sys.orig_argv`, the whole command line.
    """
    if argv[0] != "-m" or "-m" not in command:
        return False
    module = command[command.index("-m") + 1]
    return module == "launch" or module.startswith("launch.")


def tunables(environment: Mapping[str, str], modes: str) -> str | None:
    """Return the `GLIBC_TUNABLES` that ask for huge pages, or None where they change nothing.

    Args:
      environment: of the process; a choice made there stands.
      modes: what the kernel offers, the one in force in brackets: "always [madvise] never". Under
        "always" there are huge pages without asking, and under "never" there are none.
    """
    now = environment.get("GLIBC_TUNABLES", "")
    if "[madvise]" not in modes or TUNABLE in now:
        return None
    return ":".join([*filter(None, [now]), f"{TUNABLE}=1"])
