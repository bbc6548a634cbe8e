"""Values that JSON cannot hold (functions, types, arrays, optimisers of optax), told apart in JSON.

Records and working folders keep settings as JSON, and compare them: two networks, or two optimisers,
that differ must not look the same there.
"""

import dataclasses
import enum
import functools
import hashlib
import inspect
import json
import types
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

# Marks the name of a value in the place of the value.
_OBJECT = "object"
_PLAIN = (bool, int, float, complex, str, bytes, type(None))
# What their functions hold as constants is theirs, and changes with their releases.
_LIBRARIES = ("chex", "flax", "jax", "numpy", "optax")


class Nameless(Exception):
    """A value that nothing tells from another of its kind, such as a lambda."""


def as_json(value: Any) -> Any:
    """Return a value as JSON: itself, or a mapping {"object": its name, ...}.

    Args:
      value: JSON values; NumPy's scalars; types, functions that have a name, `functools.partial` and
        members of enumerations; arrays; dataclasses, Linen modules among them; lists and mappings of
        all these.

    Raises:
      Nameless: anything else.
    """
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError):
        return _described(value)


def fields_as_json(owner: Any, without: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return the fields of a dataclass instance as JSON.

    What JSON cannot hold is left out where it is the default, for which the class stands.

    Args:
      owner: the instance.
      without: names of fields to leave out.

    Raises:
      Nameless: see `as_json`.
    """
    found = {}
    for field in dataclasses.fields(owner):
        value = getattr(owner, field.name)
        if field.name in without or (value is field.default and not isinstance(value, _PLAIN)):
            continue
        try:
            found[field.name] = as_json(value)
        except Nameless as error:
            raise Nameless(f"{field.name}={error}") from error
    return found


def is_object(value: Any) -> bool:
    """Return whether `as_json` made a name of a value."""
    return isinstance(value, Mapping) and _OBJECT in value


def _described(value):
    if isinstance(value, np.generic):
        return as_json(value.item())
    if isinstance(value, float):
        return repr(value)  # infinite, or no number
    if isinstance(value, Mapping):
        return {str(key): as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(item) for item in value]
    if isinstance(value, np.ndarray | jax.Array):
        return {_OBJECT: _of_array(value)}
    if isinstance(value, functools.partial):
        rest = {"arguments": as_json(value.args), "keywords": as_json(value.keywords)}
        return {_OBJECT: _name(value.func), **rest}
    if isinstance(value, enum.Enum):
        return {_OBJECT: f"{_name(type(value))}.{value.name}"}
    if isinstance(value, np.dtype):
        return {_OBJECT: value.name}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {_OBJECT: _name(type(value)), **fields_as_json(value, ("parent", "name"))}
    return {_OBJECT: _name(value)}


def _name(value):
    """The qualified name of a type or function, with its package if that is a library.

    Libraries move things between their modules, and a program of the user is `__main__` at times.
    """
    qualified = getattr(value, "__qualname__", "")
    if not qualified or "<lambda>" in qualified:
        raise Nameless(f"{value!r:.80}")
    inner = f" {fingerprint(value)}" if "<locals>" in qualified else ""
    return ":".join(filter(None, (_library(value), qualified + inner)))


def _library(value):
    package = (getattr(value, "__module__", None) or "").partition(".")[0]
    return package if package in _LIBRARIES else ""


def _of_array(value):
    array = np.ascontiguousarray(value)
    digest = hashlib.sha256(array.tobytes()).hexdigest()[:16]
    return f"{array.dtype}{list(array.shape)} {digest}"


def fingerprint(value: Any) -> str:
    """Return a digest of what a value is made of: 16 hexadecimal digits.

    Of functions these are names, defaults and what they close over; of functions of the user (`is_own`)
    their code too, the numbers, arrays and functions of their module that it uses, and theirs. So
    `optax.sgd(0.1)` differs from `optax.sgd(0.2)` and `optax.adam(0.1)`, and is the same in every
    process. Another version of Python compiles the user's functions otherwise, which counts as a change.
    """
    return _digest(value, {})[:16]


def is_own(value: Any) -> bool:
    """Return whether a function of the user is part of a value, one of no library."""
    known, waiting = set(), [value]
    while waiting:
        part = waiting.pop()
        if isinstance(part, types.FunctionType) and not _is_of_a_library(part):
            return True
        if id(part) not in known and not isinstance(part, _PLAIN):
            known.add(id(part))
            waiting += _parts(part)
    return False


def _digest(value, known):
    """The digest of a value; `known` has those of the objects that were met, "" while they are open."""
    if isinstance(value, _PLAIN):
        return _sha256(repr(value))
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return _sha256(_of_array(value))
    if id(value) not in known:
        known[id(value)] = ""
        parts = [_digest(part, known) for part in _parts(value)]
        known[id(value)] = _sha256(" ".join([type(value).__name__, *parts]))
    return known[id(value)]


def _sha256(text):
    return hashlib.sha256(text.encode()).hexdigest()


def _parts(value) -> list[Any]:
    """Return the parts that a value is made of."""
    if isinstance(value, Mapping):
        return [part for key in sorted(value, key=repr) for part in (key, value[key])]
    if isinstance(value, list | tuple):
        return list(value)
    if isinstance(value, set | frozenset):
        return sorted(value, key=repr)
    if isinstance(value, functools.partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, types.MethodType):
        return [value.__func__, value.__self__]
    if isinstance(value, type | types.ModuleType | types.BuiltinFunctionType):
        return [value.__name__]
    inner = getattr(value, "__wrapped__", None)
    if isinstance(value, types.FunctionType) and (inner is None or not _is_of_a_library(value)):
        return [*_of_function(value), inner]
    if inner is not None:
        return [inner]
    parts = [vars(value)] if hasattr(value, "__dict__") else []
    call = inspect.getattr_static(type(value), "__call__", None)
    is_own_call = isinstance(call, types.FunctionType) and not _is_of_a_library(call)
    return [*parts, call] if is_own_call else parts


def _of_function(value):
    parts = [_library(value), value.__qualname__, value.__defaults__, value.__kwdefaults__]
    if not _is_of_a_library(value):
        parts += _of_code(value.__code__, value.__doc__)
        used = {n: value.__globals__[n] for n in _names(value.__code__) if n in value.__globals__}
        parts.append({name: part for name, part in used.items() if _is_content(part)})
    for cell in value.__closure__ or ():
        try:
            parts.append(cell.cell_contents)
        except ValueError:  # not bound yet
            continue
    return parts


def _is_of_a_library(function):
    package = (getattr(function, "__module__", None) or "").partition(".")[0]
    return package in (*_LIBRARIES, "compat_jax")


def _of_code(code, text=None):
    """List what decides what a compiled function computes: not its `text`, nor its place in a file."""
    parts: list[Any] = [code.co_code, code.co_names, code.co_varnames]
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            parts += _of_code(constant)
        elif constant is None or constant != text:
            parts.append(constant)
    return parts


def _names(code):
    """Names that a compiled function takes from its module, or from an object, and those within it."""
    inner = [c for c in code.co_consts if isinstance(c, types.CodeType)]
    return {*code.co_names, *(name for each in inner for name in _names(each))}


def _is_content(value):
    """Tell whether a value of a module is content that stays, no object that changes as it is used."""
    if isinstance(value, Mapping):
        return all(_is_content(part) for part in (*value.keys(), *value.values()))
    if isinstance(value, list | tuple | set | frozenset):
        return all(map(_is_content, value))
    return isinstance(
        value, (*_PLAIN, np.ndarray, np.generic, jax.Array, functools.partial, types.FunctionType)
    ) or hasattr(value, "__wrapped__")
