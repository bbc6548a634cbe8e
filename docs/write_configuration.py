"""Write docs/configuration.md from the schema: `python docs/write_configuration.py`."""

import inspect
import os
from pathlib import Path
from types import NoneType, UnionType
from typing import get_args

from compat_jax.config_schema import schema
from compat_jax.fields import Field

PAGE = Path(__file__).with_name("configuration.md")
HEAD = """# Every field of a configuration

`--config.FIELD=VALUE` overrides a field; the last of several values counts, and `None` unsets a field
that may be unset. `ROLE` is `train`, `query` or `gallery`; its fields are those of its `source`. `loss`
has the numbers of the chosen method. Brackets name the methods, optimisers or sources that have a field.
Values are checked before any data are read. `python -m launch.train --config=FILE.py --help` lists the
fields of one file, with its values. (This page is written by `docs/write_configuration.py`.)

| field | meaning | valid | default |
|---|---|---|---|
"""
TAIL = """
## Environment variables

| variable | meaning |
|---|---|
| `COMPAT_JAX_CACHE` | folder of rendered glyphs and compiled programs; `~/.cache/compat_jax` if unset |
| `COMPAT_JAX_RATES` | measured rates of this processor, see `python -m launch.benchmark --help` |
| `GLIBC_TUNABLES` | set by the programs: [huge pages](speed.md#what-makes-it-fast) |
| `QDRANT_API_KEY` | key of a Qdrant server |
| `TFDS_DATA_DIR` | folder of TFDS data sets |
"""


def page() -> str:
    """Return the text of the page."""
    return HEAD + "".join(f"{row(field)}\n" for field in schema()) + TAIL


def row(field: Field) -> str:
    """Return a field's line of the table."""
    valid = field.rule.range().replace("|", "\\|") or _kind(field.kind)
    default = "" if field.default in (None, "", inspect.Parameter.empty) else f"`{field.default}`"
    return f"| `{field.name}` | {field.meaning.replace('|', chr(92) + '|')} | {valid} | {default} |"


def _kind(kind):
    words = {bool: "true or false", str: "text", int: "whole number", float: "number"}
    words |= {tuple[int, ...]: "list of whole numbers", tuple[float, ...]: "list of numbers"}
    words |= {tuple[str, ...]: "list of texts"}
    if isinstance(kind, UnionType):  # such as `int | None`; a path is a text here
        (kind,) = set(get_args(kind)) - {NoneType, os.PathLike[str]}
    return words[kind]


if __name__ == "__main__":
    PAGE.write_text(page())
