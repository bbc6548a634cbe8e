"""A month that was stopped, refused or renamed goes on as it began, or says what differs."""

import dataclasses
import json
import shutil
from pathlib import Path

import drawn_photos
import numpy as np
import pytest
import tiny
from ml_collections import ConfigDict

from compat_jax import update
from compat_jax.chain import Chain
from compat_jax.config import check_names
from compat_jax.data import from_arrays
from compat_jax.data.ledger import LEDGER, Ledger, Row, Splits
from compat_jax.data.photos import Photos
from compat_jax.errors import Diverged, Stopped, UserError
from compat_jax.files import absolute
from compat_jax.models import Backbone
from compat_jax.training import Adamw, Sgd

FRUIT = ("melon", "pear")
OPEN = Splits(by="class", query=0.25, gallery=0.25)


def photos(folder, **changes):
    return Photos(path=str(folder), size=tiny.SIZE, **changes)


def run(**changes):
    return tiny.run(**{"batch_size": 8, **changes})


def month(shop, run_=None, *, work="work", change=False, start=None, **fields):
    session = tiny.session(progress=False, accept_changes=change)
    pictures = photos(shop / "photos", **fields)
    return update(run_ or run(), pictures, shop / work, start=start, session=session)


def stopped(shop, run_=None, *, work="work", start=None, after=1):
    """Begin a month, and stop it once it has saved."""
    asked = iter(range(1000))
    session = tiny.session(progress=False, should_stop=lambda: next(asked) > after)
    with pytest.raises(Stopped):
        update(run_ or run(), photos(shop / "photos"), shop / work, start=start, session=session)
    assert any((shop / work / "progress").iterdir())


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    root = tmp_path_factory.mktemp("first")
    drawn_photos.draw(root / "photos", FRUIT, 12)
    month(root)
    return root


@pytest.fixture
def shop(first, tmp_path):
    shutil.copytree(first, tmp_path / "shop", copy_function=shutil.copy2)
    return tmp_path / "shop"


def names(shop, work="work"):
    return Chain(shop / work / "chain").record(-1).class_names


def test_a_start_given_after_the_month_began_is_refused(shop):
    start = Chain(shop / "work" / "chain")[0]
    stopped(shop, work="new")
    with pytest.raises(UserError, match=r"trained from one_conv with fresh weights, now from") as e:
        month(shop, work="new", start=start)
    assert e.value.argument == "start"
    assert (shop / "new" / "begun.json").exists()
    assert month(shop, work="new").version == 0
    assert not (shop / "new" / "begun.json").exists()


def test_a_stopped_replacement_leaves_later_pictures_for_the_next_version(shop):
    other = run(backbone=Backbone("one_conv", {"width": 8}))
    stopped(shop, other)
    drawn_photos.draw(shop / "photos", ["kiwi"], 12)
    done = month(shop, other)
    assert done.version == 1 and names(shop) == FRUIT
    assert month(shop, other).version == 2 and names(shop) == (*FRUIT, "kiwi")


def test_rehearsed_pictures_that_vanish_while_it_is_stopped_are_missed(shop):
    drawn_photos.draw(shop / "photos", ["apple"], 12)
    stopped(shop)
    learnt = [r for r in Ledger.read(shop / "work" / LEDGER) if r.version == 0]
    for row in learnt:
        shutil.move(row.path, row.path + ".away")
    with pytest.raises(UserError, match=r"that version 1 is learning vanished, such as .*put them"):
        month(shop)
    for row in learnt:
        shutil.move(row.path + ".away", row.path)
    assert month(shop).version == 1


@pytest.mark.parametrize("version", [0, 1])  # one that is rehearsed, and a new one
def test_a_picture_replaced_while_it_is_stopped_is_missed(shop, version):
    drawn_photos.draw(shop / "photos", ["apple"], 12)
    stopped(shop)
    begun = json.loads((shop / "work" / "begun.json").read_text())
    ledger = Ledger.read(shop / "work" / LEDGER)
    file = Path(ledger.rows[begun["new" if version else "old"][0]].path)
    assert ledger.rows[begun["new" if version else "old"][0]].version == version
    content, ledger = file.read_bytes(), (shop / "work" / LEDGER).read_bytes()
    shutil.copy(shop / "photos" / "apple" / "001.jpg", file)
    with pytest.raises(UserError, match=rf"1 picture has other .*{file}: put them back") as caught:
        month(shop)
    assert caught.value.argument == "path" and (shop / "work" / LEDGER).read_bytes() == ledger
    file.write_bytes(content)
    assert month(shop).version == 1


def test_another_optimiser_waits_for_the_version_under_way(shop):
    drawn_photos.draw(shop / "photos", ["apple"], 12)
    stopped(shop)
    with pytest.raises(UserError, match=r"optimizer\.name .*only between two versions"):
        month(shop, run(optimizer=Adamw(lr=0.01, min_lr=0.001)), change=True)
    assert month(shop).version == 1


def test_a_refused_first_call_decides_no_parts(tmp_path):
    drawn_photos.draw(tmp_path / "photos", FRUIT, 12)
    best = run(keep="accuracy")
    with pytest.raises(UserError, match="hold out some"):
        month(tmp_path, best, splits=Splits(validation=0))
    assert not (tmp_path / "work" / LEDGER).exists()
    assert month(tmp_path, best, splits=Splits(validation=0.2)).version == 0
    assert len(Ledger.read(tmp_path / "work" / LEDGER).part("validation")) >= 4


def test_an_alias_said_with_nothing_new_is_remembered(shop):
    (shop / "photos" / "pear").rename(shop / "photos" / "birne")
    assert month(shop, aliases={"birne": "pear"}).version is None
    drawn_photos.draw(shop / "photos", ["birne"], 20, first=40)
    assert month(shop).version == 1 and names(shop) == FRUIT
    with pytest.raises(UserError, match="'birne' stands for 'pear' already, not for 'melon'"):
        month(shop, aliases={"birne": "melon"})


def test_an_alias_is_known_in_any_form_of_unicode(shop):
    composed, decomposed = "p\u00eache", "pe\u0302che"
    assert photos(shop, aliases={decomposed: "pear"}).aliases == {composed: "pear"}


@pytest.mark.parametrize("of_held", [False, True])
def test_an_alias_of_an_open_set_keeps_classes_apart(tmp_path, of_held):
    drawn_photos.draw(tmp_path / "photos", [f"c{i}" for i in range(8)], 8)
    month(tmp_path, splits=OPEN)
    trained = set(names(tmp_path))
    known = {row.label for row in Ledger.read(tmp_path / "work" / LEDGER)}
    aliases = {f"also-{name}": name for name in (known - trained if of_held else trained)}
    drawn_photos.draw(tmp_path / "photos", list(aliases), 8, first=20)
    month(tmp_path, splits=OPEN, aliases=aliases)
    ledger = Ledger.read(tmp_path / "work" / LEDGER)
    assert {row.label for row in ledger} == known
    asked = {row.label for row in ledger.part("query", "gallery")}
    assert asked == known - trained and set(names(tmp_path)) == trained


def test_the_next_version_keeps_the_normalisation_of_the_one_before(shop):
    drawn_photos.draw(shop / "photos", ["apple"], 12)
    shifted = dataclasses.replace(run().preprocess, mean=(0.1, 0.2, 0.3))
    with pytest.raises(UserError, match=r"starts from weights .*give the former") as error:
        month(shop, run(preprocess=shifted))
    assert error.value.argument == "preprocess.mean"


def test_a_new_run_asks_with_no_picture_that_its_start_has_learnt(shop):
    start = Chain(shop / "work" / "chain")[0]
    learnt = {r.digest for r in Ledger.read(shop / "work" / LEDGER).part("train")}
    month(shop, work="new", start=start)
    ledger = Ledger.read(shop / "new" / LEDGER)
    assert not learnt & {row.digest for row in ledger.part("query", "gallery")}


def test_a_chain_with_a_gap_is_refused_before_anything_is_done(shop):
    for fruit in ("apple", "kiwi"):
        drawn_photos.draw(shop / "photos", [fruit], 12)
        month(shop)
    shutil.rmtree(shop / "work" / "chain" / "0001")
    with pytest.raises(UserError, match="lacks 1 of its versions"):
        month(shop)


def test_a_mask_takes_what_it_marks():
    data = tiny.dataset()
    marked = data.take(data.labels == 1)
    assert set(marked.labels.tolist()) == {1} and len(marked) == (data.labels == 1).sum()
    with pytest.raises(UserError, match="a mask of 3 for"):
        data.take(np.ones(3, bool))
    with pytest.raises(UserError, match="whole numbers"):
        data.take([0.5])


def test_a_path_may_have_any_letter(tmp_path):
    row = Row("0" * 32, "pear", "train", 0, 'a,\r\n"b".png', 1, 2)
    Ledger([row]).write(absolute(tmp_path / LEDGER))
    assert list(Ledger.read(absolute(tmp_path / LEDGER))) == [row]


def test_a_class_name_is_there_once():
    data = tiny.dataset()
    with pytest.raises(UserError, match="class 'a' is there twice"):
        from_arrays(data.images, data.labels, ["a"] * data.num_classes)


def test_the_rate_that_was_too_high_is_named(tmp_path):
    drawn_photos.draw(tmp_path / "photos", FRUIT, 12)
    wild = run(optimizer=Sgd(lr=1e30, min_lr=1e30))
    session = tiny.session(progress=False)
    with pytest.raises(Diverged) as error:
        update(run(), photos(tmp_path / "photos"), tmp_path / "work", adopt=wild, session=session)
    assert error.value.argument == "adopt.lr"


def test_a_smaller_first_simplex_is_not_for_photos(shop):
    with pytest.raises(UserError, match="leave out first_prototypes"):
        month(shop, run(first_prototypes=8))


@pytest.mark.parametrize("name", ["adopt.epoch", "backbone.nam"])
def test_a_misspelt_field_of_a_section_is_refused(name):
    config = tiny.config()
    config.adopt = ConfigDict({"epochs": 3})
    section, field = name.split(".")
    with config.unlocked():
        config[section][field] = 5
    with pytest.raises(UserError, match=f"unknown field of the configuration {name!r}"):
        check_names(config)
