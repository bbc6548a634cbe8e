"""Methods by name. Titles, lists and help texts come from here, nowhere else."""

import copyreg
import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec

from compat_jax.errors import UserError, unknown
from compat_jax.fields import check_arguments
from compat_jax.methods.base import Method

P = ParamSpec("P")
Factory = Callable[..., Method]
_FACTORIES: dict[str, Factory] = {}
_TITLES: dict[str, str] = {}
_MADE: set[Method] = set()  # by these functions; they are pickled by name and numbers


def register(title: str, source: str) -> Callable[[Callable[P, Method]], Callable[P, Method]]:
    """Register a function that makes a method; its name is the method's.

    The function's parameters are the method's own numbers, annotated with `fields.Rule`; they are
    checked, recorded, and fields of a configuration. Equal numbers give the same object, so that
    everything compiled for a method serves again.

    Args:
      title: for tables and pictures.
      source: paper or code that the method comes from.

    Raises:
      UserError: another method has this name.
    """

    def decorate(factory: Callable[P, Method]) -> Callable[P, Method]:
        name = factory.__name__

        @functools.cache
        def made(items: tuple[tuple[str, Any], ...]) -> Method:
            arguments = dict(items)
            method = factory(**arguments)  # type: ignore[call-arg]
            method = dataclasses.replace(
                method, name=name, arguments=arguments, title=title, source=source
            )
            _MADE.add(method)
            return method

        signature = inspect.signature(factory)

        @functools.wraps(factory)
        def make(*args: P.args, **kwargs: P.kwargs) -> Method:
            known = {key: value for key, value in kwargs.items() if key in signature.parameters}
            arguments = signature.bind_partial(*args, **known).arguments | kwargs
            return made(tuple(check_arguments(factory, arguments, f"{name}.").items()))

        if name in _FACTORIES:
            raise UserError(f"there is another method called {name!r}: choose another name")
        _FACTORIES[name], _TITLES[name] = make, title
        return make

    return decorate


def names() -> tuple[str, ...]:
    """Return the names of all registered methods, in the order of their registration."""
    return tuple(_FACTORIES)


def title(name: str) -> str:
    """Return a method's title; the name itself for one that is not registered."""
    return _TITLES.get(name, name)


def factory(name: str) -> Factory:
    """Return the function that makes a method.

    Raises:
      UserError: unknown name, with the valid ones.
    """
    if name not in _FACTORIES:
        raise unknown("method", name, _FACTORIES, "method")
    return _FACTORIES[name]


def get(name: str, arguments: Mapping[str, Any] | None = None) -> Method:
    """Make the method of a name.

    Args:
      name: a registered name.
      arguments: its own numbers; defaults for those left out.

    Raises:
      UserError: unknown name or argument, or a number out of range.
    """
    return factory(name)(**(arguments or {}))


def _reduced(method: Method) -> tuple[Any, ...]:
    """Pickle a registered method by its name and numbers; another one as its functions allow."""
    if method in _MADE:
        return get, (method.name, dict(method.arguments))
    return method.__reduce_ex__(2)  # type: ignore[return-value]


copyreg.pickle(Method, _reduced)
