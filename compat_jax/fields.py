"""Rules for values: type, range and one sentence, written beside the field and checked in one place.

A field of a dataclass, or a parameter of a factory, is annotated `Annotated[float, Rule("...", low=0)]`.
`check_fields` and `check_arguments` hold values against their rules; `describe` lists the rules, for
help texts and documents.
"""

import dataclasses
import functools
import inspect
import math
import numbers
import os
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from compat_jax.errors import UserError, unknown

# A path as users write it. Kept as a text; `files.absolute` decides what a path is.
PathText = str | os.PathLike[str]


@dataclasses.dataclass(frozen=True)
class Rule:
    """Restriction of a value.

    Attributes:
      help: one sentence for help texts.
      low: smallest value.
      high: largest value.
      above: bound that the value must exceed.
      below: bound that the value must stay under.
      choices: the valid values; empty for no restriction.
    """

    help: str
    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None
    choices: tuple[str, ...] = ()

    def range(self) -> str:
        """Return the range in words, "" for none."""
        if self.choices:
            return " | ".join(self.choices)
        lower = f"at least {_number(self.low)}" if self.low is not None else ""
        lower = f"above {_number(self.above)}" if self.above is not None else lower
        upper = f"at most {_number(self.high)}" if self.high is not None else ""
        upper = f"below {_number(self.below)}" if self.below is not None else upper
        return " and ".join(filter(None, (lower, upper)))

    def admits(self, value: float) -> bool:
        """Return whether a number lies within the range."""
        return (
            (self.low is None or value >= self.low)
            and (self.high is None or value <= self.high)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )


def _number(value: float) -> str:
    return f"{int(value):,}" if value == int(value) else f"{value:g}"


class Group:
    """Mark a parameter that is a dataclass whose fields are given one by one."""


@dataclasses.dataclass(frozen=True)
class Field:
    """One documented value.

    Attributes:
      name: of the field or parameter.
      kind: its type, e.g. float or tuple.
      rule: of the value.
      default: its default.
      owners: names of the methods, optimisers or sources of data that have it; empty for all.
    """

    name: str
    kind: Any
    rule: Rule
    default: Any
    owners: tuple[str, ...] = ()

    @property
    def meaning(self) -> str:
        """Say what it is, and whose it is."""
        return self.rule.help + (f" ({', '.join(self.owners)})" if self.owners else "")


def check_fields(owner: Any, where: str = "") -> None:
    """Check a dataclass instance against the rules of its fields.

    Numbers of the right kind are stored in their Python type: NumPy's scalars become int and float.

    Args:
      owner: the instance, also a frozen one.
      where: prefix of the argument's name in errors, e.g. "optimizer.".

    Raises:
      UserError: naming the field, its range and the value.
    """
    kind: Any = type(owner)
    for field in describe(kind):
        value = checked(field, getattr(owner, field.name), where)
        object.__setattr__(owner, field.name, value)


def check_value(owner: type, name: str, value: Any) -> Any:
    """Return a value that keeps the rule of a dataclass's field, as a plain Python value.

    Raises:
      UserError: see `checked`.
    """
    return checked(next(field for field in describe(owner) if field.name == name), value)


def check_arguments(factory: Callable[..., Any], arguments: Mapping[str, Any], where: str) -> dict:
    """Check keyword arguments against the rules of a factory's signature.

    Args:
      factory: annotated function.
      arguments: given by keyword.
      where: prefix of the argument's name in errors.

    Returns:
      All arguments, defaults filled in.

    Raises:
      UserError: unknown argument (with the nearest), or a value against its rule.
    """
    fields = {field.name: field for field in describe(factory)}
    for key in arguments:
        if key not in fields:
            if not fields:
                raise UserError(f"{where}{key}: there is no such argument", where + key)
            kind = f"argument of {where.rstrip('.')}" if where else "argument"
            raise unknown(kind, key, fields, where + key)
    found = {
        name: checked(field, arguments.get(name, field.default), where)
        for name, field in fields.items()
    }
    for name, group in _groups(factory):
        found[name] = group(**{f.name: found.pop(f.name) for f in describe(group)})
    return found


@functools.cache
def describe(owner: Any) -> tuple[Field, ...]:
    """List the documented fields of a dataclass or parameters of a function, in order."""
    return tuple(_fields(owner))


def _fields(owner) -> Iterator[Field]:
    hints = typing.get_type_hints(owner, include_extras=True)
    defaults = {name: p.default for name, p in inspect.signature(owner).parameters.items()}
    for name, default in defaults.items():
        hint = hints.get(name)
        if typing.get_origin(hint) is not typing.Annotated:
            continue
        kind, *notes = typing.get_args(hint)
        if any(isinstance(note, Group) for note in notes):
            yield from describe(kind)
        for rule in (note for note in notes if isinstance(note, Rule)):
            yield Field(name, kind, rule, default)


def check_types(**values: tuple[Any, type]) -> None:
    """Refuse arguments of another type: name=(value, type).

    Raises:
      UserError: naming the argument and both types.
    """
    for name, (value, kind) in values.items():
        if not isinstance(value, kind):
            raise UserError(
                f"{name} must be a {kind.__name__}, got {type(value).__name__} {value!r:.60}", name
            )


def mapping_of(content, what, names) -> dict[str, Any]:
    """Return a JSON mapping that has just these keys.

    Args:
      content: JSON value, of whatever origin.
      what: name of it, for messages.
      names: of the keys; or fields of a dataclass.

    Raises:
      UserError: no mapping, a key that is missing, or one too many.
    """
    names = {getattr(field, "name", field) for field in names}
    if not isinstance(content, Mapping):
        raise UserError(f"{what} must be a mapping, got {content!r:.80}")
    missing = sorted(names - set(content))
    if missing:
        raise UserError(f"{what} lacks {', '.join(missing)}")
    surplus = [key for key in content if key not in names]
    if surplus:
        raise UserError(f"{what} has {surplus[0]!r:.80}, which is no field of it")
    return dict(content)


def _groups(owner) -> Iterator[tuple[str, Any]]:
    for name, hint in typing.get_type_hints(owner, include_extras=True).items():
        kind, *notes = typing.get_args(hint) or (None,)
        if any(isinstance(note, Group) for note in notes):
            yield name, kind


def checked(field: Field, value: Any, where: str = "") -> Any:
    """Return a value that keeps its field's rule, as a plain Python value.

    Raises:
      UserError: naming the field, what it must be and the value.
    """
    name = where + field.name
    kinds = typing.get_args(field.kind) if _is_union(field.kind) else (field.kind,)
    if value is None and types.NoneType in kinds:
        return None
    kinds = tuple(k for k in kinds if k is not types.NoneType)
    for kind in kinds:
        found = _as(kind, value)
        if found is None:
            continue
        if field.rule.choices and found not in field.rule.choices:
            raise unknown(name, str(found), field.rule.choices, name)
        is_number = isinstance(found, int | float) and not isinstance(found, bool)
        if is_number and not field.rule.admits(found):
            raise UserError(f"{name} must be {field.rule.range()}, got {value!r:.80}", name)
        return found
    words = " or ".join(_WORDS.get(typing.get_origin(k) or k, str(k)) for k in kinds)
    raise UserError(f"{name} must be {words}, got {value!r:.80}", name)


_WORDS = {
    int: "a whole number",
    float: "a finite number",
    bool: "true or false",
    str: "a text",
    os.PathLike: "a path",
    tuple: "a list of numbers",
}


def _is_union(kind):
    return typing.get_origin(kind) in (typing.Union, types.UnionType)


def _as(kind, value):
    """The value as a Python value of this kind; None if it is of another."""
    if kind is bool:
        return value if isinstance(value, bool) else None
    if kind is int:
        whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
        return int(value) if whole else None
    if kind is float:
        real = isinstance(value, numbers.Real) and not isinstance(value, bool)
        return _finite(value) if real else None
    if kind is str:
        return value if isinstance(value, str) and "\0" not in value else None
    if typing.get_origin(kind) is os.PathLike:
        text = os.fspath(value) if isinstance(value, str | os.PathLike) else None
        return text if isinstance(text, str) else None
    if typing.get_origin(kind) is tuple:
        inner = typing.get_args(kind)[0]
        if isinstance(value, str) or not hasattr(value, "__iter__"):
            return None
        parts = [_as(inner, part) for part in value]
        return None if None in parts else tuple(parts)
    return value if isinstance(value, kind) else None


def _finite(value):
    try:
        number = float(value)
    except OverflowError:  # a whole number that no float can hold
        return None
    return number if math.isfinite(number) else None
