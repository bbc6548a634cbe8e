"""Which cases of a table the default suite tries, and which wait for `-m slow`."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def by_default(cases: Iterable[Any], is_tried: Callable[[Any], bool]) -> list[Any]:
    """Return the cases as parameters of a test, those that are not tried by default marked slow.

    Args:
      cases: values, or tuples of the values of several parameters.
      is_tried: whether the default suite tries a case; one of each kind, in less time than all take.
    """
    parameters = []
    for case in cases:
        values = case if isinstance(case, tuple) else (case,)
        marks = () if is_tried(case) else pytest.mark.slow
        parameters.append(pytest.param(*values, marks=marks))
    return parameters
