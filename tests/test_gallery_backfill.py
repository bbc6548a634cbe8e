"""A gallery: switched to another version and embedded again, while others use it."""

import dataclasses
import os
import subprocess
import sys

import numpy as np
import pytest
import small_gallery
import tiny

from compat_jax import simplex
from compat_jax.data.listing import list_labelled
from compat_jax.errors import Stopped, UserError
from compat_jax.gallery.gallery import Gallery
from compat_jax.gallery.lease import Holder, owner
from compat_jax.gallery.manifest import Lease
from compat_jax.gallery.memory import MemoryStore
from compat_jax.gallery.reembed import backfill
from compat_jax.gallery.store import EVERY

COUNT = small_gallery.COUNT
SOME = small_gallery.SOME
chain, photos = small_gallery.kept_chain, small_gallery.kept_photos
gallery, own = small_gallery.indexed, small_gallery.own


# Switching


def test_a_switch_touches_no_row_and_is_undone(gallery):
    before = repr(small_gallery.content(gallery.store))
    with pytest.raises(UserError, match="there is no switch to undo: version 0 embeds queries"):
        gallery.rollback()
    first = gallery.switch(2)
    assert (first.query, first.previous, sorted(first.members)) == (2, 0, [0, 2])
    assert gallery.switch(2).generation == first.generation
    assert gallery.rollback().query == 0
    with pytest.raises(UserError, match="no switch to undo"):
        gallery.rollback()
    assert repr(small_gallery.content(gallery.store)) == before
    with pytest.raises(UserError, match="no version 9"):
        gallery.switch(9)


def test_negative_versions_count_from_the_end(gallery, photos):
    assert gallery.switch(-1).query == 2
    assert gallery.search(photos / SOME, 1, version=-2).version == 1
    gallery.put(photos / SOME, version=-2)
    assert gallery.backfill(to=-2, budget=1).version == 1
    assert set(gallery.manifest().members) == {0, 1, 2}
    assert set(small_gallery.versions(gallery).values()) == {0, 1}
    for wrong, message in ((-4, "no version -4"), (1.0, "whole number"), ("1", "whole number")):
        with pytest.raises(UserError, match=message):
            gallery.switch(wrong)
    now = gallery.manifest()
    with pytest.raises(UserError, match="-1 is no number of a version"):
        now.with_member(-1, now.members[0])  # it could not be read again


def test_of_two_switches_at_once_one_wins(gallery, monkeypatch):
    other = small_gallery.reopened(gallery)
    swap, first = gallery.store.swap_manifest, [True]

    def slow(new, expected):
        if new["query"] == 1 and first:
            first.clear()
            other.switch(2)
        return swap(new, expected)

    monkeypatch.setattr(gallery.store, "swap_manifest", slow)
    with pytest.raises(UserError, match="another program switched to version 2 at the same time"):
        gallery.switch(1)
    assert gallery.manifest().query == 2


def test_a_lease_that_is_renewed_does_not_disturb_a_switch(gallery, monkeypatch):
    swap, first = gallery.store.swap_manifest, [True]

    def slow(new, expected):
        if new["query"] == 1 and first:
            first.clear()
            now = gallery.manifest()
            assert swap(now.replaced(lease=Lease("far/1/a", 1.0)).describe(), now.generation)
        return swap(new, expected)

    monkeypatch.setattr(gallery.store, "swap_manifest", slow)
    assert gallery.switch(1).query == 1
    monkeypatch.setattr(gallery.store, "swap_manifest", lambda new, expected: False)
    with pytest.raises(UserError, match="changed by others 100 times in a row"):
        gallery.switch(2)


# Backfill


def test_a_backfill_goes_on_where_it_stopped(gallery):
    gallery.switch(1)
    first = gallery.backfill(budget=5)
    assert (first.updated, first.rows) == (5, {0: COUNT - 5, 1: 5})
    assert gallery.backfill(until=0.75).rows == {0: 3, 1: 9}
    assert gallery.backfill(until=0.5).updated == 0
    small_gallery.assert_consistent(gallery)
    last = gallery.backfill()
    assert (last.updated, last.share) == (3, 1.0)
    assert last.sentence() == "3 rows embedded again by version 1 in 0 s: 100.0% of all are of it"
    small_gallery.assert_consistent(gallery)
    assert gallery.manifest().lease is None


def test_new_pictures_go_in_with_the_version_in_force(gallery, own):
    own.switch(1)
    small_gallery.repaint(own, "pear/new.png")
    own.index(own.originals.root)
    assert small_gallery.versions(own)["pear/new.png"] == 1
    own.rollback()
    small_gallery.repaint(own, "pear/newer.png")
    own.index(own.originals.root)
    assert small_gallery.versions(own)["pear/newer.png"] == 0


def test_rows_deleted_replaced_or_inserted_meanwhile(own):
    own.switch(1)
    first = own.store.rows(limit=4).keys
    gone, replaced, taken = first[:3]

    def meanwhile():
        own.delete(gone)
        small_gallery.repaint(own, replaced)
        own.put(own.originals.find(replaced), version=2)  # and again, as it is now
        own.put(own.originals.find(taken), version=1)
        small_gallery.repaint(own, "pear/late.png")
        own.index(own.originals.find("pear/late.png"), version=0)

    done = small_gallery.during(own, meanwhile).backfill()
    assert gone not in small_gallery.versions(own)
    assert set(small_gallery.versions(own).values()) == {1}
    assert (done.left_alone, done.changed) == (2, ())
    small_gallery.assert_consistent(own)


def test_a_replaced_picture_keeps_its_own_feature(own):
    own.switch(1)
    [key, *_] = own.store.rows(limit=4).keys

    def meanwhile():
        small_gallery.repaint(own, key)
        own.put(own.originals.find(key), version=0)

    done = small_gallery.during(own, meanwhile).backfill(budget=COUNT - 1)
    assert list(done.changed) == [key]
    assert small_gallery.versions(own)[key] == 0
    small_gallery.assert_consistent(own)


def test_pictures_that_are_gone_or_changed_are_named(own):
    own.switch(1)
    os.remove(own.originals.find(SOME))
    small_gallery.repaint(own, "plum/001.jpg")
    done = own.backfill(budget=COUNT)
    assert done.updated == COUNT - 2
    assert list(done.problems) == [SOME] and done.changed == ("plum/001.jpg",)
    assert "2 pictures could not be embedded:" in done.sentence()
    assert "pear/003.jpg is not there" in done.sentence()
    assert "plum/001.jpg is another picture than its row's: put it" in done.sentence()


def test_a_second_backfill_is_refused(gallery):
    gallery.switch(1)
    refused = []

    def meanwhile():
        with pytest.raises(UserError, match="another backfill of this gallery is running"):
            gallery.backfill()
        refused.append(True)

    assert small_gallery.during(gallery, meanwhile).backfill().updated == COUNT
    assert refused


def test_a_lease_runs_out(gallery):
    gallery.switch(1)
    small_gallery.lend(gallery, "elsewhere/1/abc", 60)
    with pytest.raises(UserError, match="its lease runs out in 60 s"):
        gallery.backfill()
    small_gallery.lend(gallery, "elsewhere/1/abc", -1)
    assert gallery.backfill(budget=1).updated == 1


def test_the_lease_of_a_process_that_ended_is_taken_over(gallery):
    gallery.switch(1)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    small_gallery.lend(gallery, owner(ended.pid, "abc"), 600)
    assert gallery.backfill(budget=1).updated == 1
    host = os.uname().nodename
    # Alive; in another container of the same name of host; and as earlier releases wrote it.
    for holder in (
        owner(os.getpid(), "abc"),
        f"{host}/{ended.pid}/0123456789ab/abc",
        f"{host}/{ended.pid}/abc",
    ):
        small_gallery.lend(gallery, holder, 600)
        with pytest.raises(UserError, match="another backfill"):
            gallery.backfill()


def test_a_lease_is_renewed_and_lost(gallery):
    with Holder(gallery, 0, seconds=0.0) as holder:
        first = gallery.manifest().lease
        holder.renew()
        assert gallery.manifest().lease.until > first.until
        small_gallery.lend(gallery, "elsewhere/1/abc", 60)
        with pytest.raises(Stopped, match="was taken over by another one"):
            holder.renew()
    assert gallery.manifest().lease.owner == "elsewhere/1/abc"


def test_a_switch_ends_a_backfill(gallery):
    gallery.switch(1)
    with pytest.raises(Stopped, match="version 2 embeds queries since a switch"):
        small_gallery.during(gallery, lambda: gallery.switch(2)).backfill()
    assert gallery.manifest().lease is None
    assert gallery.backfill().rows == {2: COUNT}


def test_a_stopped_backfill_keeps_what_it_did(gallery):
    gallery.switch(1)
    asked = iter([False, True])
    stopping = small_gallery.reopened(
        gallery, work=small_gallery.work(should_stop=lambda: next(asked))
    )
    with pytest.raises(Stopped, match="call it again to go on"):
        stopping.backfill()
    assert gallery.store.counts() == {0: COUNT - 4, 1: 4}
    assert gallery.manifest().lease is None


def test_a_backfill_is_undone_by_another(gallery):
    before = small_gallery.content(gallery.store)
    gallery.switch(2)
    gallery.backfill(budget=7)
    gallery.rollback()
    assert gallery.backfill().updated == 7
    for key, row in small_gallery.content(gallery.store).items():
        assert row[:4] == before[key][:4]
        np.testing.assert_allclose(row[4], before[key][4], atol=1e-6)
    assert gallery.backfill(to=1).rows == {1: COUNT}


@pytest.mark.parametrize(("order", "first"), [("worst", slice(3)), ("best", slice(-3, None))])
def test_the_worst_rows_come_first_or_the_best(gallery, order, first):
    gallery.switch(1)
    rows = small_gallery.content(gallery.store)
    means = {
        label: np.mean([r[4] for r in rows.values() if r[3]["label"] == label], axis=0)
        for label in small_gallery.CLASSES
    }
    cosine = {
        k: r[4] @ m / np.linalg.norm(m) for k, r in rows.items() for m in [means[r[3]["label"]]]
    }
    gallery.backfill(budget=3, order=order)
    done = {key for key, version in small_gallery.versions(gallery).items() if version == 1}
    assert done == set(sorted(cosine, key=cosine.get)[first])


@pytest.mark.parametrize("order", ["worst", "best"])
def test_a_class_that_comes_while_rows_are_ranked_comes_last(gallery, order):
    gallery.switch(1)
    store, asked = gallery.store, []

    class Busy:
        """A store into which a row of a new class is inserted between the two readings of all rows."""

        def __getattr__(self, name):
            return getattr(store, name)

        def rows(self, where=EVERY, **settings):
            found = store.rows(where, **settings)
            if settings.get("vectors") and not len(found) and not asked:
                asked.append(True)
                new = {"keys": ["kiwi.jpg"], "payloads": [{"label": "kiwi"}]}
                store.insert(dataclasses.replace(store.rows(limit=1, vectors=True), **new))
            return found

    busy = Gallery.open(
        Busy(), gallery.chain, root=gallery.originals.root, work=small_gallery.work()
    )
    done = busy.backfill(order=order, budget=COUNT)
    assert asked and done.updated == COUNT and small_gallery.versions(gallery)["kiwi.jpg"] == 0


def test_classes_may_be_any_json(gallery, photos):
    names = {"pear": ["pear", 1], "plum": {"name": "plum"}}
    gallery.put(photos, payload=lambda key: {"label": names[key.partition("/")[0]]})
    gallery.switch(1)
    assert gallery.backfill(order="worst").rows == {1: COUNT}


def test_rows_without_a_class_are_ranked_by_their_nearest_prototype(chain, photos):
    store = MemoryStore(tiny.K - 1)
    gallery = Gallery.create(store, chain, version=0, root=photos, work=small_gallery.work())
    gallery.index(photos)
    gallery.switch(1)
    prototypes = np.asarray(simplex.prototypes(tiny.K))
    best = {k: (prototypes @ r[4]).max() for k, r in small_gallery.content(store).items()}
    gallery.backfill(budget=3, order="worst")
    done = {key for key, version in small_gallery.versions(gallery).items() if version == 1}
    assert done == set(sorted(best, key=best.get)[:3])


def test_a_field_of_the_payload_decides_the_order(chain, photos):
    store = MemoryStore(tiny.K - 1)
    gallery = Gallery.create(store, chain, version=0, root=photos, work=small_gallery.work())
    files = [picture.path for picture in list_labelled(photos)]
    views = {gallery.originals.key(path): {"views": i} for i, path in enumerate(files[:8])}
    gallery.index(photos, payload=views)
    gallery.switch(1)
    gallery.backfill(budget=2, order="-views")
    assert {k for k, v in small_gallery.versions(gallery).items() if v == 1} == set(list(views)[6:])
    gallery.backfill(budget=7, order="views")
    left = {k for k, v in small_gallery.versions(gallery).items() if v == 0}
    assert len(left) == 3 and not left & set(views)
    with pytest.raises(UserError, match="field 'visits' must hold numbers, or texts"):
        gallery.backfill(order="visits")
    assert gallery.manifest().lease is None


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"budget": 3, "until": 0.5}, "a budget or a share to reach, not both"),
        ({"budget": 0}, "budget must be at least 1, got 0"),
        ({"budget": 1.5}, "budget must be a whole number, got 1.5"),
        ({"until": 1.5}, "until must be above 0 and at most 1, got 1.5"),
        ({"until": float("nan")}, "until must be a finite number"),
        ({"order": None}, "order must be a text"),
        ({"to": 7}, "no version 7"),
        ({"to": "1"}, "version must be a whole number"),
    ],
)
def test_wrong_limits_are_refused(gallery, limits, message):
    with pytest.raises(UserError, match=message):
        backfill(gallery, **limits)
