"""The class register: append-only, checked by the chain, with aliases and a foretold end."""

import shutil
import string

import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from compat_jax import simplex
from compat_jax.chain import Chain, CorruptEntry
from compat_jax.data.class_register import Register
from compat_jax.errors import UserError

NAMES = st.lists(st.text(string.ascii_lowercase, min_size=1, max_size=3), max_size=8)


def test_a_new_class_takes_the_next_number_wherever_it_sorts():
    first = Register(num_prototypes=8).extended(["pear", "melon"])
    second = first.extended(["apple", "pear", "zucchini"])
    assert first.names == ("melon", "pear")
    assert second.names == ("melon", "pear", "apple", "zucchini")
    assert second.number("pear") == first.number("pear") == 1


@settings(max_examples=50, deadline=None)
@given(months=st.lists(NAMES, max_size=5))
def test_no_class_ever_moves(months):
    register = Register()
    for names in months:
        grown = register.extended(names)
        assert [grown.number(n) for n in register.names] == list(range(len(register)))
        assert set(grown.names) == set(register.names) | set(names)
        grown.check_continues(register)
        register = grown


def test_renamed_and_merged_classes_are_aliases():
    register = Register().extended(["apron", "pan", "pot"])
    renamed = register.extended(["aprons"], {"aprons": "apron", "pot": "pan"})
    assert renamed.names == register.names
    assert renamed.number("aprons") == renamed.number("apron") == 0
    assert renamed.number("pot") == renamed.number("pan") == 1  # merged
    assert renamed.extended([], {"apronen": "aprons", "aprons": "apron"}).number("apronen") == 0


@pytest.mark.parametrize(
    "aliases, message",
    [
        (
            {"aprons": "arpon"},
            "'aprons' is to be 'arpon', which is no class yet. Did you mean 'apron'",
        ),
        ({"a": "b", "b": "a"}, "aliases go round in a circle: a = b"),
    ],
)
def test_impossible_aliases_are_refused(aliases, message):
    with pytest.raises(UserError, match=message):
        Register().extended(["apron"]).extended([], aliases)


def test_an_alias_never_changes_its_class():
    register = Register().extended(["apron", "pan"]).extended([], {"bib": "apron"})
    with pytest.raises(UserError, match="'bib' stands for 'apron' already, not for 'pan'"):
        register.extended([], {"bib": "pan"})


def test_the_end_of_the_prototypes_is_foretold_and_met():
    register = Register(num_prototypes=10).extended("abcdefgh")
    assert register.room() == "K = 10, 8 in use (room for 2 more)"
    assert not register.is_scarce()
    scarce = register.extended("i")
    assert (
        scarce.room() == "K = 10, 9 in use (room for 1 more: move to a larger K before it is full)"
    )
    with pytest.raises(
        UserError, match="num_prototypes is 10, but there are 12 classes: move the chain"
    ):
        scarce.extended("jkl")


def test_a_head_that_grows_has_room_for_all():
    assert Register().extended("abc").room() == "3 classes"


@pytest.mark.parametrize(
    "later, message",
    [
        (("a", "c"), "class number 1 is 'b' in the chain, but 'c' here"),
        (("a",), "class number 1 is 'b' in the chain, but missing here"),
    ],
)
def test_a_chain_refuses_a_class_that_moved(tmp_path, later, message):
    chain = Chain(tmp_path / "chain")
    first = tiny.record(task=0, class_names=("a", "b"))
    chain.add(tiny.variables(first), first)
    second = tiny.record(task=1, class_names=later)
    with pytest.raises(UserError, match=message):
        chain.add(tiny.variables(second), second)
    assert chain.numbers() == [0]


def test_a_version_whose_classes_moved_is_not_opened(tmp_path):
    one, other = Chain(tmp_path / "one"), Chain(tmp_path / "other")
    for chain, names in ((one, ("a", "b")), (other, ("c", "b"))):
        for task in range(2):
            record = tiny.record(task=task, class_names=(*names, "d")[: 2 + task])
            chain.add(tiny.variables(record), record)
    (tmp_path / "other" / "0001").rename(tmp_path / "moved")
    shutil.rmtree(tmp_path / "one" / "0001")
    (tmp_path / "moved").rename(tmp_path / "one" / "0001")
    assert one.open(0).number == 0
    with pytest.raises(CorruptEntry, match="class number 0 is 'a' in the chain, but 'c' here"):
        one.open(1)


@pytest.mark.parametrize("order", simplex.LABEL_ORDERS)
def test_a_larger_simplex_keeps_scores_and_classes(order):
    small, large = 12, 40
    turn = simplex.enlargement(small, large, order)
    rng = np.random.default_rng(0)
    features = rng.normal(size=(5, small - 1))
    np.testing.assert_allclose(
        (features @ turn) @ (features @ turn).T, features @ features.T, rtol=1e-5, atol=1e-5
    )
    classes = np.arange(small)
    old = np.asarray(simplex.prototypes(small))[simplex.prototype_rows(classes, small, order)]
    new = np.asarray(simplex.prototypes(large))[simplex.prototype_rows(classes, large, order)]
    moved = old @ turn
    assert ((moved @ new.T).argmax(1) == classes).all()
    cosine = np.sqrt(1 - (large - small) / (small * (large - 1)))
    np.testing.assert_allclose((moved * new).sum(1), cosine, atol=1e-5)
