"""Every documented number and name: what its rule excludes is refused, what it admits is kept."""

import dataclasses
import inspect
import math
import typing
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from compat_jax import methods, models
from compat_jax.data import Preprocess, Tasks
from compat_jax.data.photos import Photos
from compat_jax.errors import UserError
from compat_jax.fields import Rule, check_arguments, describe
from compat_jax.session import Session
from compat_jax.training import Adamw, Lars, Run, Sgd

OBJECTS = (Adamw, Lars, Preprocess, Run, Session, Sgd, Tasks)
OWNERS = {owner.__name__: owner for owner in OBJECTS}
OWNERS |= {name: inspect.unwrap(methods.factory(name)) for name in ("hoc", "sce", "fd", "er")}
FIELDS = [
    pytest.param(owner, field, id=f"{owner}.{field.name}")
    for owner, documented in OWNERS.items()
    for field in describe(documented)
]
# Their range depends on another field.
TIED = ("lr", "min_lr", "mean", "std", "first_prototypes")


def make(owner, field, value):
    """The object with this value, and the value that it has then."""
    if owner in methods.names():
        made = methods.get(owner, {field.name: value})
        return made.arguments[field.name]
    return getattr(OWNERS[owner](**{field.name: value}), field.name)


def excluded(field):
    """Values of another type, that are no number, or out of range."""
    rule, kind = field.rule, typing.get_origin(field.kind) or field.kind
    anything = [None, {}, [[1]], 1j, b"1", object(), np.array([1.0, 2.0])]
    strategies = [st.sampled_from(anything if kind is not tuple else anything[:-1])]
    if kind is not str:
        strategies.append(st.text())
    if kind is bool:
        strategies.append(st.sampled_from([0, 1, 0.0, 2, math.nan]))
    if kind is str:
        strategies.append(st.text().filter(lambda text: text not in rule.choices))
        strategies.append(st.sampled_from([3, True, (), *[f"{c}\0" for c in rule.choices]]))
    if kind in (int, float):
        numbers = [True, False, math.nan, math.inf, -math.inf, np.float32("nan"), np.float64("inf")]
        numbers += [] if kind is float else [1.5, 2.0, np.float32(3)]
        strategies.append(st.sampled_from(numbers))
        strategies.append(outside(rule, kind))
    if kind is tuple:
        wrong = st.sampled_from([math.nan, math.inf, -0.1, 1.1, True, "0.5", None, 10**400])
        strategies.append(st.tuples(wrong, st.just(0.5), st.just(0.5)))
        strategies.append(st.sampled_from([3, 0.5, True, (), (0.5,), (0.5,) * 4]))
    return st.one_of(strategies)


def outside(rule, kind):
    """Numbers out of the range; whole ones of any size."""
    finite = st.integers() if kind is int else st.floats(allow_nan=False, allow_infinity=False)
    huge = st.sampled_from([-(10**400), 10**400]) if kind is float else st.nothing()
    whole = st.sampled_from([2**63, 10**400, -(10**400)]) if kind is int else st.nothing()
    edges = [b for b in (rule.above, rule.below) if b is not None]
    edges += [rule.low - 1] if rule.low is not None else []
    edges += [rule.high + 1] if rule.high is not None else []
    near = st.sampled_from([kind(e) for e in edges])
    return huge | (finite | whole | near).filter(lambda value: not rule.admits(value))


@pytest.mark.parametrize(("owner", "field"), FIELDS)
@settings(max_examples=40)
@given(data=st.data())
def test_what_a_rule_excludes_is_refused_in_one_line_that_names_the_field(owner, field, data):
    value = data.draw(excluded(field))
    with pytest.raises(UserError) as caught:
        make(owner, field, value)
    message, argument = str(caught.value), caught.value.argument
    assert argument.rpartition(".")[2] == field.name or argument == "mean"  # of mean and std
    assert field.name in message and "\n" not in message and len(message) < 1000


def admitted(field):
    """Values within the range, NumPy's scalars among them, and the edges."""
    rule, kind = field.rule, field.kind
    if kind is bool:
        return st.booleans()
    if kind is str:
        return st.sampled_from(rule.choices)
    low = rule.low if rule.low is not None else rule.above
    high = rule.high if rule.high is not None else rule.below
    if kind is int:
        numbers = st.integers(int(low), int(high))
        return numbers | st.sampled_from([int(low), int(high)]) | numbers.map(np.int64)
    bounds = {
        "exclude_min": rule.low is None,
        "exclude_max": high is not None and rule.high is None,
    }
    numbers = st.floats(low, high, allow_infinity=False, **bounds)
    inside = st.sampled_from([1, np.float32(0.5), np.int32(1), 0.25]).filter(rule.admits)
    return numbers | numbers.map(np.float64) | inside


@pytest.mark.parametrize(("owner", "field"), [p for p in FIELDS if p.values[1].name not in TIED])
@settings(max_examples=20)
@given(data=st.data())
def test_what_a_rule_admits_is_kept_as_a_plain_value(owner, field, data):
    value = data.draw(admitted(field))
    found = make(owner, field, value)
    expected = models.computed_in(value) if field.name == "dtype" else value
    assert found == expected and type(found) is field.kind


@given(lr=st.floats(0, 1e30, exclude_min=True), share=st.floats(0, 1))
def test_rates_are_kept_where_the_cosine_falls(lr, share):
    made = Sgd(lr=lr, min_lr=np.float64(share * lr))
    assert (made.lr, made.min_lr) == (lr, share * lr) and type(made.min_lr) is float


@given(st.integers(1, 5), st.data())
def test_normalisation_is_kept_as_a_tuple_of_numbers(channels, data):
    mean = data.draw(st.lists(st.floats(0, 1), min_size=channels, max_size=channels))
    deviation = st.floats(0, 1, exclude_min=True)
    std = data.draw(st.lists(deviation, min_size=channels, max_size=channels))
    made = Preprocess(mean=np.array(mean), std=std)
    assert (made.mean, made.std) == (tuple(mean), tuple(std))
    assert {type(x) for x in (*made.mean, *made.std)} == {float}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mesh": 8}, "mesh must be a Mesh or sizes, got 8"),
        ({"should_stop": True}, "should_stop must be a function, got True"),
    ],
)
def test_parts_of_a_session_of_another_type_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        Session(**changes)


@pytest.mark.parametrize("owner", OWNERS)
def test_every_field_says_in_a_sentence_what_it_is(owner):
    for field in describe(OWNERS[owner]):
        assert len(field.rule.help) >= 8 and "\n" not in field.rule.help
        assert make(owner, field, field.default) == field.default
    if dataclasses.is_dataclass(OWNERS[owner]):
        documented = {field.name for field in describe(OWNERS[owner])}
        plain = {f.name for f in dataclasses.fields(OWNERS[owner]) if f.type in (int, float, bool)}
        assert plain <= documented


def test_arguments_of_a_factory_of_ones_own_are_checked_like_the_librarys():
    def factory(width: typing.Annotated[int | None, Rule("columns", low=1)] = None, rate=0.5):
        del width, rate

    assert check_arguments(factory, {}, "mine.") == {"width": None}
    assert check_arguments(factory, {"width": np.int16(3)}, "mine.") == {"width": 3}
    for value in (0, 1.0, "3", True):
        with pytest.raises(
            UserError, match=r"mine\.width must be (at least 1|a whole number), got"
        ):
            check_arguments(factory, {"width": value}, "mine.")
    with pytest.raises(UserError, match=r"unknown argument of mine 'widht'\. Did you mean 'width'"):
        check_arguments(factory, {"widht": 3}, "mine.")


@pytest.mark.parametrize("path", ["photos", Path("photos")])
def test_a_path_may_be_a_text_or_an_object_and_is_kept_as_a_text(path):
    assert Photos(path=path).path == str(Path("photos").absolute())
    assert type(Photos(path=path).path) is str
    assert Photos(path=path) == Photos(path="photos")


def test_what_is_no_path_is_refused():
    for wrong in (3, None, b"photos", ["photos"]):
        with pytest.raises(UserError, match="path must be a text or a path, got "):
            Photos(path=wrong)
