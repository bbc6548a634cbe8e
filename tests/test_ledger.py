"""The ledger of pictures: parts that never change, in the shares that were asked for."""

import collections
import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compat_jax.data.ledger import PARTS, Ledger, Row, Splits
from compat_jax.errors import UserError


def digests(label, count, start=0):
    """Made-up digests of a class's pictures."""
    marks = (f"{label} {i}".encode() for i in range(start, start + count))
    return [hashlib.blake2b(mark, digest_size=16).hexdigest() for mark in marks]


def rows(assigned, new, version=0):
    """Ledger rows of assigned pictures."""
    labels = {d: label for label, ds in new.items() for d in ds}
    return [Row(d, labels[d], part, version, f"/{d}", 1, 2) for d, part in assigned.items()]


def test_shares_are_kept_class_by_class():
    splits = Splits(validation=0.1, query=0.1, gallery=0.2)
    new = {"apple": digests("apple", 40), "pear": digests("pear", 10)}
    assigned = splits.assign([], new)
    for label, count in (("apple", 40), ("pear", 10)):
        parts = collections.Counter(assigned[d] for d in new[label])
        assert parts == {
            "train": 0.6 * count,
            "validation": 0.1 * count,
            "query": 0.1 * count,
            "gallery": 0.2 * count,
        }


@settings(max_examples=30, deadline=None)
@given(
    first=st.integers(1, 12),
    more=st.integers(0, 12),
    by=st.sampled_from(["picture", "class"]),
    classes=st.integers(1, 6),
)
def test_pictures_that_are_added_move_none(first, more, by, classes):
    splits = Splits(by=by)
    names = [f"c{i}" for i in range(classes)]
    old = {n: digests(n, first) for n in names}
    before = splits.assign([], old)
    new = {n: digests(n, more, first) for n in names} | {"z": digests("z", more)}
    after = splits.assign(rows(before, old), {n: d for n, d in new.items() if d})
    assert not before.keys() & after.keys()
    assert set(before.values()) | set(after.values()) <= set(PARTS)
    # The order in which pictures are listed does not matter.
    turned = {n: list(reversed(d)) for n, d in reversed(old.items())}
    assert splits.assign([], turned) == before


def test_open_set_holds_out_whole_classes_for_good():
    splits = Splits(by="class", query=0.2, gallery=0.2, validation=0.0)
    old = {f"c{i}": digests(f"c{i}", 10) for i in range(10)}
    before = splits.assign([], old)
    kinds = {n: {before[d] == "train" for d in ds} for n, ds in old.items()}
    assert all(len(k) == 1 for k in kinds.values())  # a class is one or the other
    held = {n for n, k in kinds.items() if k == {False}}
    assert len(held) == 4
    more = {n: digests(n, 6, 10) for n in old}
    after = splits.assign(rows(before, old), more)
    for name in old:
        assert {after[d] for d in more[name]} == (
            {"query", "gallery"} if name in held else {"train"}
        )


def test_nothing_left_to_train_on_is_refused():
    with pytest.raises(UserError, match="nothing is left to train on"):
        Splits(validation=0.5, query=0.3, gallery=0.2)


def test_a_ledger_survives_its_file(tmp_path):
    odd = [
        Row("a" * 32, 'he said "hi", twice', "train", 3, "/a,b\nc.jpg", 1, 2),
        Row("b" * 32, "Äpfel", "query", -1, "/\udce4.jpg", 5, 10**18),
    ]
    path = tmp_path / "pictures.csv"
    Ledger(odd).write(path)
    assert sorted(Ledger.read(path)) == sorted(odd)
    assert Ledger.read(path).pending(3) and not Ledger.read(path).pending(4)
    assert len(Ledger.read(tmp_path / "none.csv")) == 0


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a,b\n",
        "digest,label,part,version,path,size,modified\nzz,x,train,0,/p,1,2\n",
        f"digest,label,part,version,path,size,modified\n{'a' * 32},x,test,0,/p,1,2\n",
        f"digest,label,part,version,path,size,modified\n{'a' * 32},x,train,one,/p,1,2\n",
    ],
)
def test_a_damaged_ledger_is_refused_by_name(tmp_path, text):
    path = tmp_path / "pictures.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=r"pictures\.csv is no ledger of pictures"):
        Ledger.read(path)
