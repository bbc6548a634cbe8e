"""A gallery: pictures are indexed, and searched by queries of any version."""

import os

import numpy as np
import pytest
import small_gallery
import tiny

from compat_jax.data.listing import list_labelled
from compat_jax.errors import Stopped, UserError
from compat_jax.gallery import gallery as galleries
from compat_jax.gallery.gallery import Gallery
from compat_jax.gallery.memory import MemoryStore
from compat_jax.gallery.store import Where

COUNT = small_gallery.COUNT
SOME = small_gallery.SOME
chain, photos = small_gallery.kept_chain, small_gallery.kept_photos
gallery, own = small_gallery.indexed, small_gallery.own


def test_rows_carry_version_fingerprint_content_and_class(gallery, photos):
    rows = small_gallery.content(gallery.store)
    assert len(rows) == len(gallery) == COUNT
    version, model, content, payload, vector = rows[SOME]
    assert (version, payload) == (0, {"label": "pear"})
    assert model == gallery.manifest().members[0].model
    assert len(content) == 32
    np.testing.assert_allclose(vector, gallery.chain[0].embed(photos / SOME)[0], atol=1e-6)


def test_indexing_again_inserts_nothing_and_leaves_rows_alone(gallery, photos):
    before = small_gallery.content(gallery.store)
    gallery.switch(1)
    done = gallery.index(photos)
    assert (done.inserted, done.present) == (0, COUNT)
    assert done.sentence() == f"0 rows inserted, {COUNT} there before"
    assert repr(small_gallery.content(gallery.store)) == repr(before)


def test_a_stopped_index_goes_on(chain, photos):
    asked = iter([False, False, True])
    work = small_gallery.work(should_stop=lambda: next(asked))
    store = MemoryStore(tiny.K - 1)
    gallery = Gallery.create(store, chain, version=0, root=photos, work=work)
    with pytest.raises(Stopped, match="the rows that were written stay"):
        gallery.index(photos)
    assert len(gallery) == 8
    done = small_gallery.reopened(gallery, work=small_gallery.work()).index(photos)
    assert (done.inserted, done.present) == (COUNT - 8, 8)
    small_gallery.assert_consistent(gallery)


def test_hosts_index_shares_of_a_list(chain, photos):
    gallery = Gallery.create(MemoryStore(tiny.K - 1), chain, root=photos, work=small_gallery.work())
    shares = [gallery.index(photos, shard=(host, 5)).inserted for host in range(5)]
    assert shares == [3, 3, 2, 2, 2]
    with pytest.raises(UserError, match="0 <= number < count"):
        gallery.index(photos, shard=(5, 5))


def test_files_that_are_no_pictures_are_refused_or_named(own):
    bad = own.originals.find("pear/bad.jpg")
    with open(bad, "w") as file:
        file.write("no picture")
    with pytest.raises(UserError, match=r"pear/bad\.jpg is not a picture"):
        own.index(os.path.dirname(bad))
    skipping = small_gallery.reopened(own, work=small_gallery.work(on_bad="skip"))
    done = skipping.index(os.path.dirname(bad))
    assert list(done.problems) == ["pear/bad.jpg"]
    assert "1 left out:\n  pear/bad.jpg is not a picture" in done.sentence()


def test_replaced_pictures_are_written_anew_on_demand(own):
    small_gallery.repaint(own, SOME)
    folder = own.originals.root
    assert own.index(folder).replaced == 0
    done = own.index(folder, replace=True, payload={SOME: {"from": "camera"}})
    assert (done.inserted, done.replaced, done.present) == (0, 1, COUNT - 1)
    assert small_gallery.content(own.store)[SOME][3] == {"label": "pear", "from": "camera"}
    assert own.put(folder + SOME, payload={SOME: {"stars": 3}}).replaced == 1
    assert small_gallery.content(own.store)[SOME][3] == {"stars": 3}
    small_gallery.assert_consistent(own)
    with pytest.raises(UserError, match=r"the payload of pear/003\.jpg must be a mapping"):
        own.put(folder + SOME, payload=lambda key: "red")


def test_labels_that_differ_are_written_without_embedding(chain, photos, monkeypatch):
    gallery = Gallery.create(
        MemoryStore(tiny.K - 1), chain, version=0, root=photos, work=small_gallery.work()
    )
    gallery.index(photos)
    before = small_gallery.content(gallery.store)
    gallery.switch(1)
    labelled = list_labelled(photos)
    assert gallery.index(labelled).present == COUNT
    monkeypatch.setattr(galleries, "embed", None)
    assert gallery.index(labelled, replace=True).replaced == COUNT
    for key, row in small_gallery.content(gallery.store).items():
        assert row[3] == {"label": key.partition("/")[0]}
        assert (*row[:3], row[4].tolist()) == (*before[key][:3], before[key][4].tolist())
    assert gallery.index(labelled, replace=True).present == COUNT


def test_queries_of_a_new_version_search_rows_of_an_old_one(gallery, photos):
    gallery.switch(1)
    answers = gallery.search([photos / SOME, photos / "plum/001.jpg"], k=3)
    asked = gallery.chain[1].embed([photos / SOME, photos / "plum/001.jpg"])
    rows = small_gallery.content(gallery.store)
    scores = asked @ np.stack([row[4] for row in rows.values()]).T
    best = np.argsort(-scores, axis=1)[:, :3]
    assert answers.keys == [[list(rows)[i] for i in line] for line in best]
    np.testing.assert_allclose(answers.scores, np.sort(scores)[:, ::-1][:, :3], atol=1e-5)
    assert answers.version == 1
    assert answers.shares() == {0: 1.0}
    features = gallery.search(asked[0], k=3)
    assert features.keys == answers.keys[:1]
    old = gallery.search(photos / SOME, k=1, version=0)
    assert (old.version, old.keys, old.payloads) == (0, [[SOME]], [[{"label": "pear"}]])
    plum = gallery.search(photos / SOME, k=COUNT, where=Where(payload={"label": "plum"}))
    assert len(plum.keys[0]) == small_gallery.PER_CLASS
    assert plum.scores[0, -1] == -np.inf and plum.versions[0, -1] == -1


def test_a_switch_elsewhere_is_followed(gallery, photos):
    other = small_gallery.reopened(gallery)
    gallery.switch(2)
    assert other.search(photos / SOME).version == 2


def test_deleted_rows_are_gone(gallery, photos):
    assert gallery.delete([SOME, photos / "plum/001.jpg", "pear/none.jpg"]) == 2
    assert gallery.delete(SOME) == 0
    assert gallery.delete([]) == 0
    assert len(gallery) == COUNT - 2


def test_a_file_whose_name_begins_with_a_tilde_has_a_key(own):
    small_gallery.repaint(own, "~late.png")
    own.index(own.originals.root)
    assert own.delete("~late.png") == 1
    for wrong in ([1], 1, [b"a.png"], None):
        with pytest.raises(UserError, match="the key of a picture is a text or a path"):
            own.delete(wrong)
    with pytest.raises(UserError, match="give a root that all pictures are in"):
        own.delete("~/late.png")


def test_pictures_that_are_no_files_have_a_mapping(tmp_path):
    chain = small_gallery.chain(tmp_path, seeds=(0, 1), preparation={})
    images = tiny.dataset().images[:6]
    pictures = {f"number {i}": image for i, image in enumerate(images)}
    store = MemoryStore(tiny.K - 1)
    gallery = Gallery.create(store, chain, version=0, root=pictures, work=small_gallery.work())
    gallery.index(pictures)
    gallery.switch(1)
    assert gallery.backfill().updated == 6
    assert gallery.verify(None).passes
    assert gallery.search(images[2], k=1).keys == [["number 2"]]
    without = Gallery.open(store, chain, root={}, work=small_gallery.work())
    assert len(without.backfill(to=0).problems) == 6
    large = {"large": np.zeros((9, 9, 3), np.uint8)}
    with pytest.raises(UserError, match=r"large has shape \(9, 9, 3\), the gallery's pictures"):
        gallery.index(large)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda g, photo: g.search(photo, 10**9), "k must be at least 1 and at most 10,000"),
        (lambda g, photo: g.search(photo, 2.5), "k must be a whole number"),
        (lambda g, photo: g.search(photo, where={"version": 0}), "where must be a Where"),
        (
            lambda g, photo: g.search(photo, where=Where("0")),
            "where.version must be a whole number",
        ),
        (lambda g, photo: g.search(photo, where=Where(2**40)), "where.version must be at least 0"),
        (lambda g, photo: g.status(measure=-1), "measure must be at least 0"),
        (lambda g, photo: g.verify(-1), "sample must be at least 0"),
        (lambda g, photo: g.index(photo, shard=(0, 1.5)), "a shard is"),
        (lambda g, photo: g.index(photo, shard=None), "a shard is"),
        (lambda g, photo: g.put(photo, payload=[1]), "payload must be a Mapping"),
    ],
)
def test_wrong_arguments_are_refused(gallery, photos, call, message):
    with pytest.raises(UserError, match=message):
        call(gallery, photos / SOME)
