"""The flag --config of a program: its file, fields given twice or as None, and what may be wrong."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from compat_jax.errors import UserError
from compat_jax.files import first_line

CLONE = Path(__file__).resolve().parents[1]
_UNSET: list[str] = []  # fields given as None


def last_values(argv: Sequence[str]) -> list[str]:
    """Return arguments without repeated or unset fields; ml_collections would join their values."""
    last = {}
    for place, argument in enumerate(argv):
        if match := re.match(r"--?config\.([^=]+)=", argument):
            last[match[1]] = place
    kept = []
    for place, argument in enumerate(argv):
        match = re.match(r"--?config\.([^=]+)=(.*)", argument, re.DOTALL)
        if match and last[match[1]] != place:
            continue
        if match and match[2] == "None":
            _UNSET.append(match[1])
            continue
        kept.append(argument)
    return kept


def with_files(argv: Sequence[str]) -> list[str]:
    """Return arguments with the file of --config where it is.

    Raises:
      UserError: see `config_file`.
    """
    found = []
    for before, argument in zip(["", *argv], argv, strict=False):
        flag, equals, file = argument.partition("=")
        if before in ("--config", "-config"):
            argument = config_file(argument)
        elif flag in ("--config", "-config") and equals:
            argument = f"{flag}={config_file(file)}"
        found.append(argument)
    return found


def config_file(text: str) -> str:
    """Return FILE.py:arguments, a FILE of configs/ as that of the clone where this folder has none.

    Args:
      text: value of --config.

    Raises:
      UserError: there is no such file.
    """
    path, colon, arguments = text.partition(":")
    if Path(path).parts[:1] == ("configs",) and not os.path.exists(path):
        found = str(CLONE / path)
    else:
        found = path
    if not os.path.isfile(found):
        raise UserError(f"no configuration file {path!r}: {examples()}", "config")
    return f"{found}{colon}{arguments}"


def examples() -> str:
    """Say where there are configurations to start from."""
    folder = CLONE / "configs"
    is_here = os.path.exists("configs") and folder.exists() and os.path.samefile("configs", folder)
    return f"{'configs/' if is_here else folder} has some to start from"


def unset(args: flags.FlagValues) -> None:
    """Unset the fields that were given as None.

    Raises:
      KeyError: no such field.
    """
    for name in _UNSET:
        section, _, field = name.rpartition(".")
        place = args.config
        for part in filter(None, section.split(".")):
            place = place[part]
        if field not in place:
            raise KeyError(name)
        with place.ignore_type():
            place[field] = None


def file() -> str:
    """Return the file of --config; "" if it was neither given nor has a default."""
    try:
        return config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")[0]
    except (flags.Error, TypeError):  # the latter where it is a plain flag, as of a sweep
        return ""


def check() -> None:
    """Refuse a configuration file that failed, or made something else than a configuration.

    Raises:
      UserError: saying which.
    """
    path = file() if "config" in flags.FLAGS else ""
    if not path:
        return
    config = flags.FLAGS["config"].value
    if isinstance(error := getattr(config, "_error", None), OSError):  # ml_collections keeps it
        raise UserError(f"{path} failed ({first_line(error)})") from error
    if not isinstance(config, ConfigDict):
        raise UserError(f"get_config() of {path} must return a ConfigDict, got {config!r:.80}")


def has_field(name: str) -> bool:
    """Return whether the configuration of this program has a field, which a flag can then set."""
    place = flags.FLAGS["config"].value if "config" in flags.FLAGS else None
    *sections, field = name.split(".")
    for section in sections:
        place = place.get(section) if isinstance(place, ConfigDict) else None
    return isinstance(place, ConfigDict) and field in place
