"""A gallery moves to a chain of a larger simplex without reading a picture."""

import dataclasses
import shutil

import numpy as np
import pytest
import small_gallery
import tiny

from compat_jax import enlarge as chains
from compat_jax.errors import Stopped, UserError
from compat_jax.gallery import enlarge
from compat_jax.gallery.memory import MemoryStore

COUNT, LARGER = small_gallery.COUNT, 29
SOME = small_gallery.SOME
chain, photos = small_gallery.kept_chain, small_gallery.kept_photos
gallery, own = small_gallery.indexed, small_gallery.own


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("enlarged")


@pytest.fixture
def larger(chain, folder):
    """The same versions for 29 prototypes."""
    made = small_gallery.KeptChain(folder / "larger")
    if not made.numbers():
        chains.enlarge(chain, made, LARGER)
    return made


@pytest.fixture
def store():
    return MemoryStore(LARGER - 1)


def test_answers_and_rows_stay_and_every_claim_holds(gallery, larger, store, photos):
    gallery.switch(1)
    gallery.backfill(budget=5)
    done = enlarge(gallery, larger, store)
    assert (done.moved, done.present) == (COUNT, 0)
    assert done.sentence() == (
        f"{COUNT} rows moved, 0 there before; features have 28 numbers, version 1 embeds queries"
    )
    new = done.gallery
    assert new.verify(None).passes
    assert small_gallery.versions(new) == small_gallery.versions(gallery)
    small_gallery.assert_consistent(new)
    for version in (0, 1, 2):
        before, after = (
            one.search(photos / SOME, COUNT, version=version) for one in (gallery, new)
        )
        np.testing.assert_allclose(after.scores, before.scores, atol=1e-5)
    assert _copied(new) == _copied(gallery)
    assert new.rollback().query == 0  # the way back moved with it
    assert gallery.manifest().lease is None


def _copied(gallery):
    rows = gallery.store.rows(limit=COUNT)
    return list(zip(rows.keys, rows.contents, rows.payloads, strict=True))


def test_it_resumes_and_takes_rows_that_came_meanwhile(own, larger, store):
    asked = iter([False, True])
    stopping = small_gallery.reopened(own, work=small_gallery.work(should_stop=lambda: next(asked)))
    with pytest.raises(Stopped, match="the rows that were written stay"):
        enlarge(stopping, larger, store)
    first = sum(store.counts().values())
    assert 0 < first < COUNT
    shutil.rmtree(own.originals.root)  # no picture is read
    own.store.delete(own.store.rows(limit=1).ids)
    again = enlarge(own, larger, store)
    assert (again.moved, again.present) == (COUNT - first, first - 1)
    new = again.gallery
    new.switch(2)
    assert enlarge(own, larger, store).moved == 0
    assert new.manifest().query == 2  # it is in use: left as it is


def test_a_switch_and_a_new_picture_meanwhile_come_along(own, larger, store):
    def meanwhile():
        own.switch(1)
        small_gallery.repaint(own, "pear/late.png")
        own.delete(own.store.rows(limit=COUNT).keys[-2:])  # whose rows have not been copied yet
        own.index(own.originals.root)

    done = enlarge(small_gallery.during(own, meanwhile), larger, store)
    new = done.gallery.manifest()
    assert (new.query, new.previous, done.query) == (1, 0, 1)
    assert store.counts()[1] >= 2
    assert enlarge(own, larger, store).differing == 0
    assert len(done.gallery) == COUNT + 1 and done.gallery.verify().passes


def test_what_changed_between_two_calls_is_followed_or_said(gallery, larger, store):
    new = enlarge(gallery, larger, store).gallery
    gallery.switch(1)
    gallery.backfill(budget=5)
    done = enlarge(gallery, larger, store)
    assert (new.manifest().query, new.manifest().previous) == (1, 0)
    assert (done.moved, done.present, done.differing) == (0, COUNT, 5)
    assert "5 rows are of another version than in the old gallery" in done.sentence()
    assert new.backfill().rows == {1: COUNT}
    new.switch(2)
    said = enlarge(gallery, larger, store).sentence()
    assert "version 2 embeds queries; 7 rows are" in said
    assert said.endswith("in the old gallery version 1 does: switch one of them")


def test_no_backfill_moves_rows_under_it(gallery, larger, store):
    small_gallery.lend(gallery, "elsewhere/1/x", 60)
    with pytest.raises(UserError, match="another backfill of this gallery is running"):
        enlarge(gallery, larger, store)


def test_another_chain_or_store_is_refused(gallery, chain, larger, store, tmp_path):
    with pytest.raises(UserError, match=r"num_prototypes=16, the gallery 16: write the chain"):
        enlarge(gallery, chain, store)
    strangers = small_gallery.chain(tmp_path / "strangers", seeds=(3, 4, 5))
    moved = small_gallery.KeptChain(tmp_path / "moved")
    chains.enlarge(strangers, moved, LARGER)
    with pytest.raises(UserError, match=r"version 0 of .*moved is not version 0 of .* moved to"):
        enlarge(gallery, moved, store)
    assert store.manifest() is None
    other = small_gallery.made(moved, gallery.originals.root, store=store)
    assert len(other) == COUNT
    with pytest.raises(UserError, match="the gallery is of another chain"):
        enlarge(gallery, larger, store)
    with pytest.raises(UserError, match="size 15"):
        enlarge(gallery, larger, MemoryStore(tiny.K - 1))


def test_an_enlarged_version_that_was_altered_is_refused(gallery, larger, store, monkeypatch):
    opened = larger.open(0)
    kernel = np.array(opened.variables["params"]["projection"]["kernel"])
    params = {**opened.variables["params"], "projection": {"kernel": kernel[:, ::-1]}}
    altered = dataclasses.replace(opened, variables={**opened.variables, "params": params})
    monkeypatch.setattr(larger, "open", lambda number: altered)
    with pytest.raises(UserError, match="give the chain that was made from it"):
        enlarge(gallery, larger, store)
