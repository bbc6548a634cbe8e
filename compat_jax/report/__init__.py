"""Results as text, JSON, CSV and pictures, and a page that shows them all."""

from compat_jax.report.findings import Findings, collect, titles
from compat_jax.report.matrices import (
    accuracy_curves,
    check_writable,
    heat_map,
    heat_maps,
    sentence,
    table,
    write,
)
from compat_jax.report.page import write_page
from compat_jax.report.wall import wall
from compat_jax.report.ways import left_out

__all__ = [
    "Findings",
    "accuracy_curves",
    "check_writable",
    "collect",
    "heat_map",
    "heat_maps",
    "left_out",
    "sentence",
    "table",
    "titles",
    "wall",
    "write",
    "write_page",
]
