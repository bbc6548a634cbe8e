"""A gallery: indexed, searched across versions, switched, embedded again; refused to the wrong model."""

import contextlib
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import small_gallery
import tiny
from PIL import Image

from compat_jax import simplex
from compat_jax.data import Preparation
from compat_jax.data.listing import list_labelled
from compat_jax.errors import Stopped, UserError
from compat_jax.gallery import canary
from compat_jax.gallery.gallery import Gallery
from compat_jax.gallery.lease import Holder
from compat_jax.gallery.manifest import Lease
from compat_jax.gallery.memory import MemoryStore
from compat_jax.gallery.places import open_store
from compat_jax.gallery.reembed import backfill
from compat_jax.gallery.store import Rows, Where, row_id

COUNT = small_gallery.COUNT
SOME = "pear/003.jpg"


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """Three versions."""
    return small_gallery.chain(tmp_path_factory.mktemp("chain"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Photos that no test changes."""
    return small_gallery.photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture
def gallery(chain, photos):
    """Indexed by version 0, four rows a write."""
    return small_gallery.made(chain, photos)


@pytest.fixture
def own(chain, photos, tmp_path):
    """A gallery whose photos a test may change."""
    shutil.copytree(photos, tmp_path / "photos")
    return small_gallery.made(chain, tmp_path / "photos")


def during(gallery, act):
    """Open the gallery with a hook that acts once, after the first rows of a backfill were read."""
    acts = [act]

    def hook():
        if acts:
            acts.pop()()
        return False

    return reopened(gallery, work=small_gallery.work(should_stop=hook))


def reopened(gallery, **changes):
    """Open the same store again."""
    given = {"root": gallery.originals.root, "work": gallery.work, **changes}
    return Gallery.open(gallery.store, gallery.chain, **given)


def versions(gallery):
    """{key: version}."""
    return {key: row[0] for key, row in small_gallery.content(gallery.store).items()}


def repaint(gallery, key, colour="red"):
    """Put another picture in the place of a row's."""
    Image.new("RGB", (30, 40), colour).save(gallery.originals.find(key))


# Indexing and searching


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
    assert done.sentence() == f"0 rows inserted, {COUNT} were there"
    assert repr(small_gallery.content(gallery.store)) == repr(before)


def test_a_stopped_index_goes_on(chain, photos):
    asked = iter([False, False, True])
    work = small_gallery.work(should_stop=lambda: next(asked))
    store = MemoryStore(tiny.K - 1)
    gallery = Gallery.create(store, chain, version=0, root=photos, work=work)
    with pytest.raises(Stopped, match="the rows that were written stay"):
        gallery.index(photos)
    assert len(gallery) == 8
    done = reopened(gallery, work=small_gallery.work()).index(photos)
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
    skipping = reopened(own, work=small_gallery.work(on_bad="skip"))
    done = skipping.index(os.path.dirname(bad))
    assert list(done.problems) == ["pear/bad.jpg"]
    assert "1 left out:\n  pear/bad.jpg is not a picture" in done.sentence()


def test_replaced_pictures_are_written_anew_on_demand(own):
    repaint(own, SOME)
    folder = own.originals.root
    assert own.index(folder).replaced == 0
    done = own.index(folder, replace=True, payload=lambda key: {"from": "camera"})
    assert (done.inserted, done.replaced, done.present) == (0, 1, COUNT - 1)
    assert small_gallery.content(own.store)[SOME][3] == {"from": "camera"}
    assert own.put(folder + SOME, payload={SOME: {"stars": 3}}).replaced == 1
    assert small_gallery.content(own.store)[SOME][3] == {"stars": 3}
    small_gallery.assert_consistent(own)
    with pytest.raises(UserError, match=r"the payload of pear/003\.jpg must be a mapping"):
        own.put(folder + SOME, payload=lambda key: "red")


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
    other = reopened(gallery)
    gallery.switch(2)
    assert other.search(photos / SOME).version == 2


def test_deleted_rows_are_gone(gallery, photos):
    assert gallery.delete([SOME, photos / "plum/001.jpg", "pear/none.jpg"]) == 2
    assert gallery.delete(SOME) == 0
    assert gallery.delete([]) == 0
    assert len(gallery) == COUNT - 2


def test_a_folder_of_pictures_may_move(gallery, photos, tmp_path):
    shutil.copytree(photos, tmp_path / "moved")
    moved = reopened(gallery, root=tmp_path / "moved")
    assert moved.verify(None).passes
    with pytest.raises(
        UserError, match=r"is not in .*moved/: give a root that all pictures are in"
    ):
        moved.index(photos)
    assert "is not in" in moved.verify(1).sentence() or moved.verify(1).passes


def test_keys_lead_nowhere_else(gallery):
    for key in ("../secret.jpg", "/etc/passwd", "gs://other/a.jpg"):
        with pytest.raises(UserError, match="give a root that all pictures are in"):
            gallery.originals.find(key)


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


def test_a_preparation_is_given_where_records_have_none(tmp_path, photos):
    chain = small_gallery.chain(tmp_path, seeds=(0,), preparation={})
    store = MemoryStore(tiny.K - 1)
    given = {"root": photos, "work": small_gallery.work()}
    gallery = Gallery.create(store, chain, preparation=small_gallery.PREPARATION, **given)
    assert gallery.index(photos / SOME).inserted == 1
    again = Gallery.open(store, chain, **given)
    expected = chain[0].embed(photos / SOME, preparation=small_gallery.PREPARATION)
    np.testing.assert_allclose(again.embed(photos / SOME, 0), expected, atol=1e-6)


# Refusals


def test_a_store_is_created_once(gallery, chain):
    with pytest.raises(UserError, match="holds a gallery already: open it"):
        Gallery.create(gallery.store, chain)
    with pytest.raises(UserError, match=r"holds no gallery yet: make one with Gallery\.create"):
        Gallery.open(MemoryStore(tiny.K - 1), chain)
    store = MemoryStore(tiny.K - 1)
    store.insert(Rows(["a"], np.int32([0]), ["m"], ["c"], [{}], np.zeros((1, tiny.K - 1))))
    with pytest.raises(UserError, match="holds rows of something else"):
        Gallery.create(store, chain)


def test_a_store_is_named_by_its_place(chain, photos, tmp_path):
    place = f"memory:{tmp_path}"
    made = Gallery.create(place, chain, version=1, root=photos, work=small_gallery.work())
    made.index(photos / SOME)
    assert Gallery.open(place, chain).search(photos / SOME, k=1).keys == [[SOME]]
    with pytest.raises(UserError, match="there is no gallery in memory of name 'none'"):
        Gallery.open("memory:none", chain)
    with pytest.raises(UserError, match="features of size 7"):
        Gallery.create(MemoryStore(7), chain)


def test_a_place_may_be_a_path_and_says_what_is_wrong_with_it(chain, photos, tmp_path):
    pytest.importorskip("lancedb")
    place = tmp_path / "shop.lance"
    Gallery.create(place, chain, version=0, work=small_gallery.work()).index(photos / SOME)
    opened = Gallery.open(place, chain)
    assert len(opened) == 1 and not len(opened.store.rows(limit=0))
    shutil.rmtree(place)
    for make in (Gallery.open, Gallery.create):
        with pytest.raises(
            UserError, match=r"is gone, but its manifest .*shop_manifest\.lance is there"
        ):
            make(place, chain)
    (tmp_path / "file.lance").touch()
    with pytest.raises(UserError, match=r"file\.lance is a file, not a table"):
        Gallery.create(tmp_path / "file.lance", chain)
    with pytest.raises(
        UserError, match="begins with http:// or https://: qdrant:http://localhost:6"
    ):
        Gallery.create("qdrant:localhost:6333/shop", chain)
    with pytest.raises(UserError, match="None names no gallery"):
        open_store(None)
    with pytest.raises(UserError, match="size must be at least 1"):
        open_store(place, 0)


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "package"), [("lance", "lancedb"), ("qdrant", "qdrant_client")])
def test_no_gallery_lies_where_another_ones_manifest_does(tmp_path, engine, package):
    pytest.importorskip(package)
    with pytest.raises(UserError, match="is kept for the manifest of 'shop'"):
        open_store(f"{engine}:{tmp_path}/shop_manifest", 3)
    if engine == "lance":
        import lancedb

        lancedb.connect(tmp_path).create_table("shop_manifest", [{"x": 1}])
        (tmp_path / "shop.lance").mkdir()
    else:
        import qdrant_client

        with contextlib.closing(qdrant_client.QdrantClient(path=str(tmp_path))) as client:
            vectors = qdrant_client.models.VectorParams(size=2, distance="Dot")
            client.create_collection("shop_manifest", vectors)
    with pytest.raises(UserError, match=r"shop_manifest.* is somebody else's"):
        open_store(f"{engine}:{tmp_path}/shop", 3)


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "package"), [("lance", "lancedb"), ("qdrant", "qdrant_client")])
def test_other_engines_hold_a_gallery(chain, photos, tmp_path, engine, package):
    pytest.importorskip(package)
    place = f"{engine}:{tmp_path}/rows"
    gallery = Gallery.create(place, chain, version=0, root=photos, work=small_gallery.work())
    gallery.index(list_labelled(photos))
    gallery.switch(1)
    assert gallery.backfill(budget=5, order="worst").rows == {0: COUNT - 5, 1: 5}
    gallery.rollback()
    assert gallery.backfill().updated == 5
    answers = gallery.search(photos / SOME, k=2)
    assert answers.keys[0][0] == SOME and answers.payloads[0][0] == {"label": "pear"}
    assert gallery.delete(SOME) == 1
    assert gallery.verify(None).passes and len(gallery) == COUNT - 1


def test_a_manifest_that_is_no_json_is_refused(gallery, monkeypatch):
    monkeypatch.setattr(gallery.store, "manifest", lambda: json.loads("{broken"))
    with pytest.raises(UserError, match=r"the gallery's manifest is no JSON \(JSONDecodeError"):
        gallery.manifest()
    monkeypatch.setattr(gallery.store, "manifest", lambda: json.loads("[" * 100_000))
    with pytest.raises(UserError, match=r"is no JSON \(RecursionError"):
        gallery.manifest()


def test_another_chain_is_refused(gallery, tmp_path):
    other = small_gallery.chain(tmp_path, seeds=(5, 1))
    with pytest.raises(UserError, match="the gallery is of another chain than"):
        Gallery.open(gallery.store, other)


def test_other_weights_of_the_same_number_are_refused(gallery, tmp_path):
    gallery.switch(1)
    other = small_gallery.chain(tmp_path, seeds=(0, 7))
    with pytest.raises(UserError, match="is not the one that the gallery means: the SHA-256"):
        Gallery.open(gallery.store, other)


def forge(gallery, number, **changes):
    """Have the manifest mean another member, consistently but for the canaries."""
    manifest = gallery.manifest()
    member = dataclasses.replace(manifest.members[number], **changes)
    assert gallery.store.swap_manifest(
        manifest.with_member(number, member).describe(), manifest.generation
    )


def test_a_forged_fingerprint_is_found_by_the_canaries(gallery, tmp_path):
    gallery.switch(1)
    other = small_gallery.chain(tmp_path, seeds=(0, 7))
    sha256 = other.digest(1)
    manifest = gallery.manifest()
    forged = dataclasses.replace(manifest.members[1], variables=sha256)
    forge(gallery, 1, variables=sha256, model=manifest.fingerprint(forged))
    with pytest.raises(
        UserError, match="does not embed the gallery's canaries as the manifest says"
    ):
        Gallery.open(gallery.store, other)


@pytest.mark.parametrize("how", [{"resize": "squash"}, {"crop": 0.875}, {"filter": "box"}])
def test_another_preprocessing_is_found_by_the_canaries(gallery, monkeypatch, how):
    prepare = Preparation(tiny.SIZE, **how)
    monkeypatch.setattr(Preparation, "__call__", lambda self, picture, where="": prepared(picture))

    def prepared(picture):
        monkeypatch.undo()
        found = prepare(picture)
        monkeypatch.setattr(
            Preparation, "__call__", lambda self, picture, where="": prepared(picture)
        )
        return found

    with pytest.raises(UserError, match="pictures are prepared in another way"):
        reopened(gallery)


def test_canaries_bear_other_devices_but_not_other_weights(chain):
    version, preparation = chain[0], small_gallery.PREPARATION
    expected = canary.features(version, preparation)
    drawn = canary.pictures(preparation, (tiny.SIZE, tiny.SIZE, 3))
    assert len({picture.shape for picture in drawn}) > 3
    rounded = version.embed(drawn, dtype="bfloat16", mesh=tiny.one_device())
    assert canary.compare(rounded, expected).passes
    rng = np.random.default_rng(0)
    moved = jax.tree.map(
        lambda x: x * (1 + 0.1 * rng.normal(size=x.shape)).astype(np.float32), version.variables
    )
    other = canary.features(dataclasses.replace(version, variables=moved), preparation)
    assert not canary.compare(other, expected).passes
    assert not canary.compare(expected[:3], expected).passes


def test_canaries_are_the_same_for_ever():
    drawn = canary.pictures(None, (4, 3, 1))
    assert [int(picture.astype(int).sum()) for picture in drawn] == [
        1299,
        2051,
        1649,
        1310,
        1681,
        1736,
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_prototypes": 8, "feature_size": 7}, "features of size 7, the gallery of size 15"),
        ({"label_order": "ascending"}, "in the order 'ascending', the gallery 'descending'"),
        ({"preparation": Preparation(8, resize="squash").describe()}, "resize='squash'"),
        ({"head_classes": 3, "num_prototypes": 16}, "in the order 'learnt'"),
        ({"fresh": ("projection",)}, "its projection is untrained"),
    ],
)
def test_versions_that_do_not_fit_are_refused(gallery, changes, message):
    version = gallery.chain[0]
    record = dataclasses.replace(version.record, **changes)
    with pytest.raises(UserError, match=message):
        gallery.manifest().check_fits(dataclasses.replace(version, record=record))


def test_a_version_with_means_of_its_own_fits(gallery):
    version = gallery.chain[0]  # as another backbone's, which was pre-trained by other people
    other = dataclasses.replace(version.record, mean=(0.4,) * 3, std=(0.2,) * 3)
    gallery.manifest().check_fits(dataclasses.replace(version, record=other))


def test_a_chain_of_a_learnt_head_has_a_gallery(tmp_path, photos):
    chain = small_gallery.chain(
        tmp_path, seeds=(0, 1), method="er", head_classes=2, feature_size=16
    )
    gallery = small_gallery.made(chain, photos, store=MemoryStore(16))
    gallery.switch(1)
    assert gallery.backfill(order="worst", budget=2).updated == 2
    assert gallery.manifest().order == "learnt"
    gallery.put(photos / SOME, version=0)  # without a class
    with pytest.raises(UserError, match="order 'worst' needs the classes of all rows"):
        gallery.backfill(order="worst")


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
    assert set(versions(gallery).values()) == {0, 1}
    for wrong, message in ((-4, "no version -4"), (1.0, "whole number"), ("1", "whole number")):
        with pytest.raises(UserError, match=message):
            gallery.switch(wrong)
    now = gallery.manifest()
    with pytest.raises(UserError, match="-1 is no number of a version"):
        now.with_member(-1, now.members[0])  # it could not be read again


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


def test_of_two_switches_at_once_one_wins(gallery, monkeypatch):
    other = reopened(gallery)
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
    assert last.sentence() == "3 rows embedded again by version 1 in 0 s: 100.0% are of it"
    small_gallery.assert_consistent(gallery)
    assert gallery.manifest().lease is None


def test_new_pictures_go_in_with_the_version_in_force(gallery, own):
    own.switch(1)
    repaint(own, "pear/new.png")
    own.index(own.originals.root)
    assert versions(own)["pear/new.png"] == 1
    own.rollback()
    repaint(own, "pear/newer.png")
    own.index(own.originals.root)
    assert versions(own)["pear/newer.png"] == 0


def test_rows_deleted_replaced_or_inserted_meanwhile(own):
    own.switch(1)
    first = own.store.rows(limit=4).keys
    gone, replaced, taken = first[:3]

    def meanwhile():
        own.delete(gone)
        repaint(own, replaced)
        own.put(own.originals.find(replaced), version=2)  # and again, as it is now
        own.put(own.originals.find(taken), version=1)
        repaint(own, "pear/late.png")
        own.index(own.originals.find("pear/late.png"), version=0)

    done = during(own, meanwhile).backfill()
    assert gone not in versions(own)
    assert set(versions(own).values()) == {1}
    assert (done.left_alone, done.changed) == (2, ())
    small_gallery.assert_consistent(own)


def test_a_replaced_picture_keeps_its_own_feature(own):
    own.switch(1)
    [key, *_] = own.store.rows(limit=4).keys

    def meanwhile():
        repaint(own, key)
        own.put(own.originals.find(key), version=0)

    done = during(own, meanwhile).backfill(budget=COUNT - 1)
    assert list(done.changed) == [key]
    assert versions(own)[key] == 0
    small_gallery.assert_consistent(own)


def test_pictures_that_are_gone_or_changed_are_named(own):
    own.switch(1)
    os.remove(own.originals.find(SOME))
    repaint(own, "plum/001.jpg")
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

    assert during(gallery, meanwhile).backfill().updated == COUNT
    assert refused


def lend(gallery, owner, seconds):
    now = gallery.manifest()
    lease = Lease(owner, time.time() + seconds)
    assert gallery.store.swap_manifest(now.replaced(lease=lease).describe(), now.generation)


def test_a_lease_runs_out(gallery):
    gallery.switch(1)
    lend(gallery, "elsewhere/1/abc", 60)
    with pytest.raises(UserError, match="its lease runs out in 60 s"):
        gallery.backfill()
    lend(gallery, "elsewhere/1/abc", -1)
    assert gallery.backfill(budget=1).updated == 1


def test_the_lease_of_a_process_that_ended_is_taken_over(gallery):
    gallery.switch(1)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    lend(gallery, f"{os.uname().nodename}/{ended.pid}/abc", 600)
    assert gallery.backfill(budget=1).updated == 1
    lend(gallery, f"{os.uname().nodename}/{os.getpid()}/abc", 600)
    with pytest.raises(UserError, match="another backfill"):
        gallery.backfill()


def test_a_lease_is_renewed_and_lost(gallery):
    with Holder(gallery, 0, seconds=0.0) as holder:
        first = gallery.manifest().lease
        holder.renew()
        assert gallery.manifest().lease.until > first.until
        lend(gallery, "elsewhere/1/abc", 60)
        with pytest.raises(Stopped, match="was taken over by another one"):
            holder.renew()
    assert gallery.manifest().lease.owner == "elsewhere/1/abc"


def test_a_switch_ends_a_backfill(gallery):
    gallery.switch(1)
    with pytest.raises(Stopped, match="version 2 embeds queries since a switch"):
        during(gallery, lambda: gallery.switch(2)).backfill()
    assert gallery.manifest().lease is None
    assert gallery.backfill().rows == {2: COUNT}


def test_a_stopped_backfill_keeps_what_it_did(gallery):
    gallery.switch(1)
    asked = iter([False, True])
    stopping = reopened(gallery, work=small_gallery.work(should_stop=lambda: next(asked)))
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
    done = {key for key, version in versions(gallery).items() if version == 1}
    assert done == set(sorted(cosine, key=cosine.get)[first])


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
    done = {key for key, version in versions(gallery).items() if version == 1}
    assert done == set(sorted(best, key=best.get)[:3])


def test_a_field_of_the_payload_decides_the_order(chain, photos):
    store = MemoryStore(tiny.K - 1)
    gallery = Gallery.create(store, chain, version=0, root=photos, work=small_gallery.work())
    files = [picture.path for picture in list_labelled(photos)]
    views = {gallery.originals.key(path): {"views": i} for i, path in enumerate(files[:8])}
    gallery.index(photos, payload=views)
    gallery.switch(1)
    gallery.backfill(budget=2, order="-views")
    assert {k for k, v in versions(gallery).items() if v == 1} == set(list(views)[6:])
    gallery.backfill(budget=7, order="views")
    left = {k for k, v in versions(gallery).items() if v == 0}
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


# Status and verification


def test_the_status_counts_rows_and_answers_by_version(gallery, photos):
    gallery.switch(1)
    gallery.backfill(budget=3)
    status = gallery.status(photos, k=COUNT, measure=4)
    assert (status.query, status.previous, status.total, status.left) == (1, 0, COUNT, COUNT - 3)
    assert (status.share, status.answers) == (0.25, {0: 0.75, 1: 0.25})
    assert status.row_bytes == 64 and status.seconds_left > 0
    assert "version 1 embeds queries; 12 rows:" in status.sentence()
    assert "3 rows, 25.0%, 25.0% of answers" in status.sentence()
    assert status.describe()["bytes_left"] == 64 * 9


def test_a_gallery_that_is_right_passes(gallery):
    gallery.switch(1)
    gallery.backfill(budget=3)
    found = gallery.verify()
    assert found.passes and found.describe()["rows"] == found.embedded == COUNT
    assert found.sentence().endswith("every claim of the manifest holds")
    assert gallery.verify(5).embedded == 5


def damaged(store, key, **changes):
    """Write a row whose columns do not belong together."""
    rows = store.rows(Where(ids=np.array([row_id(key)])), vectors=True)
    store.put(dataclasses.replace(rows, **changes))


def test_every_false_claim_is_found(own):
    own.switch(1)
    own.backfill(budget=6)
    keys = [key for key, version in versions(own).items() if version == 0]
    store = own.store
    damaged(store, keys[0], versions=np.int32([1]))
    damaged(store, keys[1], versions=np.int32([5]))
    damaged(store, keys[2], models=["0" * 16])
    damaged(store, keys[3], vectors=2 * store.rows(limit=1, vectors=True).vectors)
    damaged(store, keys[4], contents=["0" * 32])
    os.remove(own.originals.find(keys[5]))
    forge(own, 1, canary=own.manifest().members[0].canary)
    found = reopened_unchecked(own).verify()
    assert {problem: names for problem, names in found.problems.items() if len(names) == 1} == {
        "versions that cannot be used": found.problems["versions that cannot be used"],
        "rows of versions that the manifest does not have": [keys[1]],
        "rows whose feature is not of norm 1": [keys[3]],
        "pictures that are others than their rows'": [keys[4]],
        "pictures that are gone or cannot be read": [
            f"{own.originals.find(keys[5])} is not there: put it back, or take it off the list"
        ],
        "rows whose feature is not what their version makes of their picture": [keys[3]],
    }
    torn = found.problems["rows whose fingerprint is not their version's"]
    assert sorted(torn) == sorted([keys[0], keys[2]])
    assert "1 (version 1 of" in found.sentence() and not found.passes


def reopened_unchecked(gallery):
    """A gallery that was opened before its manifest was forged."""
    gallery.rollback()
    return reopened(gallery)
