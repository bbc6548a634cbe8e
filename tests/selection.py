"""Which cases of a table the default suite tries, and which wait for `-m slow`."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def by_default(cases: Iterable[Any], is_tried: Callable[[Any], bool]) -> list[Any]:
    """Mark the others as slow: a fault that only they show is one of an edge, not of the rule."""
    marked = [(case, () if is_tried(case) else (pytest.mark.slow,)) for case in cases]
    return [
        pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=marks)
        for case, marks in marked
    ]
