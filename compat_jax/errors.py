"""Mistakes of a user, told in one line with the remedy."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input: the message names the value and says what to do instead.

    The programs in `launch/` print it on one line and exit with code 2; as a library, it is a
    `ValueError`.
    """


class Stopped(Exception):
    """The program was asked to stop and has saved where it stands; run it again to go on."""


def unknown(kind: str, value: str, choices: Iterable[str]) -> UserError:
    """The error for a name that is not among the valid ones.

    Args:
      kind: what the name stands for, e.g. "method".
      value: what was given.
      choices: the valid names.

    Returns:
      A UserError (to be raised by the caller) that lists the choices and the nearest of them.
    """
    choices = sorted(choices)
    near = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return UserError(f"unknown {kind} {value!r}.{hint} Valid: {', '.join(choices)}.")
