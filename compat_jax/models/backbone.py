"""Backbones: by registered name, by import path, or as a Linen module of the user's own."""

import dataclasses
import importlib
import inspect
import json
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import flax.linen as nn

from compat_jax.errors import UserError, unknown
from compat_jax.identity import Nameless, as_json, fields_as_json, is_object
from compat_jax.models.precision import DTYPES

_LINEN = ("dtype", "parent", "name")  # fields that are no arguments
_BACKBONES: dict[str, Callable[..., nn.Module]] = {}


def register(name: str, build: Callable[..., nn.Module]) -> None:
    """Make a backbone known by name.

    Args:
      name: by which a `Run` and a chain's record refer to it.
      build: (dtype, **arguments) -> a Linen module (images, train) -> float[batch, width]. The
        parameters of its signature are the valid arguments.

    Raises:
      UserError: another backbone has this name.
    """
    if _BACKBONES.setdefault(name, build) is not build:
        raise UserError(f"there is another backbone called {name!r}: choose another name")


def registered() -> tuple[str, ...]:
    """Return the names of all registered backbones, sorted."""
    return tuple(sorted(_BACKBONES))


def parameters(name: str) -> dict[str, inspect.Parameter]:
    """Return the arguments of a registered backbone, without `dtype` and Linen's own.

    Raises:
      UserError: unknown name.
    """
    if name not in _BACKBONES:
        raise unknown("backbone", name, _BACKBONES)
    found = inspect.signature(_BACKBONES[name]).parameters
    return {key: parameter for key, parameter in found.items() if key not in _LINEN}


@dataclasses.dataclass(frozen=True)
class Backbone:
    """A backbone and the name under which a record finds it again.

    Attributes:
      name: a registered name, or an import path "package.module:Name".
      arguments: keyword arguments, JSON values; of an object, functions and the like by their names,
        see `identity.as_json`.
      module: the module itself, for a backbone given as an object.
    """

    name: str
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    module: nn.Module | None = None

    def __hash__(self) -> int:
        return hash((self.name, json.dumps(dict(self.arguments), sort_keys=True, default=repr)))

    def build(self, dtype: str = "float32") -> nn.Module:
        """Build the module.

        Args:
          dtype: "float32" or "bfloat16", of the computation.

        Raises:
          UserError: unknown name, argument or dtype, with the valid ones.
        """
        if dtype not in DTYPES:
            raise unknown("dtype", dtype, DTYPES)
        if self.module is not None:
            has_dtype = any(f.name == "dtype" for f in dataclasses.fields(self.module))
            return self.module.clone(dtype=DTYPES[dtype]) if has_dtype else self.module
        build = _imported(self.name) if ":" in self.name else _BACKBONES.get(self.name)
        if build is None:
            raise unknown("backbone", self.name, _BACKBONES, argument="backbone")
        valid = list(inspect.signature(build).parameters)
        for key in self.arguments:
            if key not in valid or key in _LINEN:
                choices = [v for v in valid if v not in _LINEN]
                if not choices:
                    raise UserError(
                        f"backbone {self.name!r} takes no arguments, got {key!r}: leave it out"
                    )
                raise unknown(f"argument of backbone {self.name!r}", key, choices)
            if is_object(self.arguments[key]):
                raise UserError(
                    f"{key} of backbone {self.name!r} was {self.arguments[key]['object']}, which a name "
                    "cannot say: hand in the object",
                    "backbone",
                )
        extra = {"dtype": DTYPES[dtype]} if "dtype" in valid else {}
        return build(**self.arguments, **extra)


GivenBackbone: TypeAlias = Backbone | str | nn.Module


def as_backbone(given: GivenBackbone) -> Backbone:
    """Return the backbone of a name, an import path, a Linen module, or a `Backbone`.

    A Linen module may be one of Flax NNX behind `flax.nnx.bridge.to_linen`.

    Raises:
      UserError: something else, or a module with a field that a record cannot name.
    """
    if isinstance(given, Backbone):
        return given
    if isinstance(given, str):
        return Backbone(given)
    if not isinstance(given, nn.Module):
        raise UserError(
            f"a backbone is a registered name ({', '.join(registered())}), an import path "
            f"'package.module:Name' or a Linen module, got {given!r:.80}"
        )
    # A module of Flax NNX behind `flax.nnx.bridge.to_linen` goes by its own name.
    kind = getattr(given, "nnx_class", None)
    try:
        arguments = as_json({**given.kwargs}) if kind else fields_as_json(given, _LINEN)
    except Nameless as error:
        raise UserError(
            f"a record cannot name {error} of the backbone: give a function that its module names",
            "backbone",
        ) from error
    kind = kind or type(given)
    return Backbone(f"{kind.__module__}:{kind.__qualname__}", arguments, given)


def recorded_backbone(
    name: str, arguments: Mapping[str, Any], given: GivenBackbone | None = None
) -> Backbone:
    """Find the backbone that a record names.

    Nothing that a record names is imported: a backbone of the user's own must be handed in.

    Args:
      name: in the record.
      arguments: in the record.
      given: the user's own backbone, as an object or by its import path.

    Raises:
      UserError: not registered and not handed in, or another one was handed in.
    """
    if name in _BACKBONES:
        return Backbone(name, arguments)
    if given is None:
        fields = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        raise UserError(
            f"its backbone {name!r} is not registered here: hand it in, "
            f"Chain(path, backbone={name.rpartition(':')[2]}({fields})), or its import path"
        )
    own = as_backbone(given)
    if own.module is None:
        return Backbone(own.name, arguments)
    registered_elsewhere = ":" not in name
    same_class = registered_elsewhere or own.name.rpartition(":")[2] == name.rpartition(":")[2]
    if not same_class or dict(own.arguments) != dict(arguments):
        raise UserError(
            f"it was trained with the backbone {name} {dict(arguments)}, but "
            f"{own.name} {dict(own.arguments)} was handed in"
        )
    return own


def _imported(path):
    """The class or function of an import path that the user gave."""
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"cannot import the backbone {path!r}: {error}") from error
