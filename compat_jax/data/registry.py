"""Data sources by name: a function and a line that registers it; its signature is its schema."""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ParamSpec, TypeVar

from compat_jax.data.dataset import Dataset
from compat_jax.errors import UserError, unknown
from compat_jax.fields import Field, Rule, check_arguments, checked, describe

P = ParamSpec("P")
Source = Callable[..., Dataset]
S = TypeVar("S", bound=Source)
_SOURCES: dict[str, Source] = {}
# Of every source that does not select classes and pictures itself.
_SELECTION = (
    Field("classes", tuple[int, ...] | None, Rule("(start, stop) of the classes to take"), None),
    Field("per_class", int | None, Rule("first pictures of each class to take", low=1), None),
)


def register(name: str) -> Callable[[S], S]:
    """Register a function that returns a Dataset as a source.

    Its parameters, annotated with `fields.Rule`, are the fields of a data section; `progress`, if it
    has it, is whether to show a bar.

    Args:
      name: value of a data section's `source`.

    Raises:
      UserError: another source has this name.
    """

    def decorate(source: S) -> S:
        if _SOURCES.setdefault(name, source) is not source:
            raise UserError(f"there is another data source called {name!r}: choose another name")
        return source

    return decorate


def spread(group: type) -> Callable[[Callable[P, Dataset]], Callable[P, Dataset]]:
    """Give a source the fields of a dataclass as parameters of its own, and check all by their rules.

    Args:
      group: dataclass whose fields the source's `**` stands for, annotated with `fields.Rule`.

    Returns:
      A decorator of annotated functions. `source(path, *, progress, **how)` becomes
      `source(path, size, …, progress)`, with the group's fields before `progress`.
    """

    def decorate(source: Callable[P, Dataset]) -> Callable[P, Dataset]:
        own = describe(source)
        last = [field for field in own if field.name == "progress"]
        fields = [*(field for field in own if field not in last), *describe(group), *last]
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        signature = inspect.Signature(
            [inspect.Parameter(f.name, kind, default=f.default, annotation=f.kind) for f in fields]
        )

        @functools.wraps(source)
        def call(*args: P.args, **kwargs: P.kwargs) -> Dataset:
            given = dict(signature.bind(*args, **kwargs).arguments)
            return source(**check_arguments(call, given, ""))  # type: ignore[call-arg]

        del call.__wrapped__
        call.__signature__ = signature  # type: ignore[attr-defined]
        kinds = {field.name: Annotated[field.kind, field.rule] for field in fields}
        call.__annotations__ = {**kinds, "return": Dataset}
        return call

    return decorate


def source_names() -> tuple[str, ...]:
    """Return the names of all sources, sorted."""
    return tuple(sorted(_SOURCES))


def source_fields(name: str) -> tuple[Field, ...]:
    """List the fields of a source, those of every source included.

    Raises:
      UserError: unknown name.
    """
    if name not in _SOURCES:
        raise unknown("data source", name, _SOURCES, "source")
    own = tuple(field for field in describe(_SOURCES[name]) if field.name != "progress")
    names = {field.name for field in own}
    return own + tuple(field for field in _SELECTION if field.name not in names)


def load(spec: Mapping[str, Any], progress: bool = False) -> Dataset:
    """Load the data set that a section of a configuration describes.

    Args:
      spec: `source` is the name of a source; the other fields are its arguments. Everywhere,
        `classes` = (start, stop) selects classes and `per_class` the first images of each.
      progress: whether to show bars.

    Returns:
      A Dataset labelled 0.. within the selected classes.

    Raises:
      UserError: unknown source or field, missing field, no classes, and whatever the source raises.
    """
    arguments = {k: v for k, v in spec.items() if v not in (None, "")}
    name = arguments.pop("source", None)
    fields = {field.name: field for field in source_fields(str(name))}
    for key in arguments:
        if key not in fields:
            raise unknown(f"field of data source {name!r}", key, fields, key)
    missing = [
        f.name
        for f in fields.values()
        if f.default is inspect.Parameter.empty and f.name not in arguments
    ]
    if missing:
        raise UserError(f"data source {name!r} needs {', '.join(missing)}", missing[0])
    source = _SOURCES[str(name)]
    own = {field.name for field in describe(source)}
    shown = {"progress": progress} if "progress" in own else {}
    selected = {
        f.name: checked(f, arguments.pop(f.name, None)) for f in _SELECTION if f.name not in own
    }
    classes = selected.get("classes")
    if classes is not None:
        classes = class_range(classes)
    data = source(**check_arguments(source, {**arguments, **shown}, ""))
    if classes is not None:
        data = data.select(classes)
    return data.per_class(selected.get("per_class"))


def class_range(classes: Sequence[int]) -> range:
    """Return the range of a pair (start, stop).

    Raises:
      UserError: not a pair with 0 <= start < stop.
    """
    if isinstance(classes, range):
        return classes
    if len(classes) != 2 or not 0 <= classes[0] < classes[1]:
        raise UserError(
            f"classes must be (start, stop) with 0 <= start < stop, got {tuple(classes)}", "classes"
        )
    return range(*classes)
