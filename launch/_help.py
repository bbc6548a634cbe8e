"""What --help says of a program with a configuration: its flags, and the fields that it may have."""

import ast
import inspect
import sys
from collections.abc import Iterator, Sequence
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
    about = ast.get_docstring(ast.parse(Path(path).read_text())) or ""
    lines += ["", f"{path}: {about}".rstrip(": "), "", "Its fields, --config.FIELD=VALUE:"]
    return "\n".join([*lines, *_values(fields, flags.FLAGS.config)])


def _flags():
    """A line for each flag of the program and of what it shares with others."""
    by_module = flags.FLAGS.flags_by_module_dict()
    modules = [sys.argv[0], *(name for name in by_module if name.startswith("launch."))]
    for flag in (flag for name in modules for flag in by_module.get(name, [])):
        default = "" if flag.name == "config" else _default(flag.default)
        yield f"  --{flag.name}: {flag.help}" + _brackets(default)


def _values(fields: Sequence[Field], config: ConfigDict) -> Iterator[str]:
    """A line for each field that a configuration has, with its value there."""
    data = config.get("data", {})
    sources = {role: data[role].get("source") for role in ROLES if role in data}
    chosen = {"loss": config.get("method"), "optim": config.get("optim", {}).get("name")}
    for field in fields:
        places = {field.name: chosen.get(field.name.partition(".")[0])}
        if ".ROLE." in field.name:
            places = {field.name.replace("ROLE", role): name for role, name in sources.items()}
        for name, owner in places.items():
            section = config
            *parents, last = name.split(".")
            for part in parents:
                section = section.get(part, {})
            if last in section and (not field.owners or owner in field.owners):
                note = f"here {section[last]!r}"
                yield f"  {name}: {field.rule.help}" + _brackets(field.rule.range(), note)


def _brackets(*notes):
    text = ", ".join(filter(None, notes))
    return f" ({text})" if text else ""


def _default(value):
    if value is inspect.Parameter.empty or value in (None, "", (), []):
        return ""
    return "default " + (",".join(value) if isinstance(value, list) else str(value))
