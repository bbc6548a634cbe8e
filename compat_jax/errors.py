"""Errors that name the input at fault and the remedy, in one line."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Report bad input: the message names the value and says what to do instead.

    Attributes:
      argument: dotted name of the argument at fault, e.g. "optimizer.lr"; None for none. A program
        translates it into its own flag.
    """

    def __init__(self, message: str, argument: str | None = None):
        super().__init__(message)
        self.argument = argument


class Diverged(UserError):
    """The loss or the weights stopped being finite; nothing of this task was published."""


class Stopped(Exception):
    """The run was asked to stop; calling again resumes it. The text says whether it saved a state."""


def unknown(
    kind: str, value: str, choices: Iterable[str], argument: str | None = None
) -> UserError:
    """Make the error for a name that is not among the valid ones.

    Args:
      kind: what the name stands for, e.g. "method".
      value: the name given.
      choices: the valid names.
      argument: see `UserError`.

    Returns:
      A UserError for the caller to raise, listing the choices and the nearest of them.
    """
    choices = sorted(choices)
    hint = nearest(value, choices)
    return UserError(f"unknown {kind} {value!r}.{hint} Valid: {', '.join(choices)}.", argument)


def nearest(value: str, choices: Iterable[str]) -> str:
    """Return " Did you mean NAME?" with the choice nearest to a value; "" where none is near."""
    near = difflib.get_close_matches(str(value), sorted(choices), n=1, cutoff=0.5)
    return f" Did you mean {near[0]!r}?" if near else ""
