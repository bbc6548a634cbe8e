"""Errors of renting. Not the library's: importing that, and JAX with it, takes seconds."""

import difflib
from collections.abc import Iterable


class Mistake(ValueError):
    """The command cannot work: reported on one line, exit code 2."""


class Refused(RuntimeError):
    """The cloud refused a command: reported on one line, exit code 1."""


def unknown(kind: str, value: str, choices: Iterable[str]) -> Mistake:
    """Make the error for a name that is not among the valid ones; it lists them and the nearest."""
    choices = sorted(choices)
    near = difflib.get_close_matches(value, choices, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return Mistake(f"unknown {kind} {value!r}.{hint} Valid: {', '.join(choices)}.")
