"""Say in --help which flags a program has, and which fields its configuration."""

import ast
import functools
import inspect
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

from compat_jax.config_schema import ROLES, schema
from compat_jax.fields import Field


def help_of(begins: Sequence[str], path: str) -> str:
    """List the flags of a program, and the fields of its configuration.

    Args:
      begins: how the names of the fields begin that the program reads.
      path: of the configuration file, whose fields and values are then listed, with its docstring; ""
        to list every field that there is.
    """
    fields = [field for field in schema() if field.name.startswith(tuple(begins))]
    lines = ["Flags:", *_flags()]
    if not path:
        lines.append("\nFields, --config.FIELD=VALUE (ROLE is train, query or gallery):")
        for field in fields:
            notes = _brackets(field.rule.range(), _default(field.default))
            lines.append(f"  {field.name}: {field.meaning}{notes}")
        return "\n".join(lines)
    about = ast.get_docstring(ast.parse(Path(path).read_bytes())) or ""
    lines += ["", f"{path}: {about}".rstrip(": "), "", "Its fields, --config.FIELD=VALUE:"]
    return "\n".join([*lines, *values(fields, flags.FLAGS.config)])


def _flags():
    """A line for each flag of the program and of what it shares with others."""
    by_module = flags.FLAGS.flags_by_module_dict()
    modules = [sys.argv[0], *(name for name in by_module if name.startswith("launch."))]
    for flag in (flag for name in modules for flag in by_module.get(name, [])):
        default = "" if flag.name == "config" else _default(flag.default)
        yield f"  --{flag.name}: {flag.help}" + _brackets(default)


def values(fields: Sequence[Field], config: ConfigDict) -> list[str]:
    """Write a line for each field that a configuration has, with its value there.

    Args:
      fields: of the schema.
      config: the configuration.
    """
    data = _section(config, "data")
    sources = {role: _section(data, role).get("source") for role in ROLES if role in data}
    chosen = {"loss": config.get("method"), "optim": _section(config, "optim").get("name", "sgd")}
    lines: dict[str, str] = {}
    for field in fields:
        places = {field.name: chosen.get(field.name.partition(".")[0])}
        if ".ROLE." in field.name:
            places = {field.name.replace("ROLE", role): name for role, name in sources.items()}
        for name, owner in places.items():
            *parents, last = name.split(".")
            section = functools.reduce(_section, parents, config)
            # A field of the chosen kind takes the place of that of all.
            if last in section and (owner in field.owners if field.owners else name not in lines):
                note = f"here {section[last]!r}"
                lines[name] = f"  {name}: {field.rule.help}" + _brackets(field.rule.range(), note)
    return list(lines.values())


def _section(config, name):
    """A section of a configuration; an empty one where it has none."""
    found = config.get(name)
    return found if isinstance(found, Mapping | ConfigDict) else {}


def _brackets(*notes):
    text = ", ".join(filter(None, notes))
    return f" ({text})" if text else ""


def _default(value):
    if value is inspect.Parameter.empty or value in (None, "", (), []):
        return ""
    return "default " + (",".join(value) if isinstance(value, list) else str(value))
