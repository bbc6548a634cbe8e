"""A gallery: made, opened in many places, and refused to the wrong model."""

import contextlib
import dataclasses
import json
import os
import shutil

import numpy as np
import pytest
import small_gallery
import tiny

from compat_jax.data import Preparation
from compat_jax.data.listing import list_labelled
from compat_jax.errors import UserError
from compat_jax.gallery.gallery import Gallery
from compat_jax.gallery.memory import MemoryStore
from compat_jax.gallery.originals import Originals
from compat_jax.gallery.places import open_store
from compat_jax.gallery.store import Rows

COUNT = small_gallery.COUNT
SOME = small_gallery.SOME
chain, photos = small_gallery.kept_chain, small_gallery.kept_photos
gallery = small_gallery.indexed


def test_a_folder_of_pictures_may_move(gallery, photos, tmp_path):
    shutil.copytree(photos, tmp_path / "moved")
    moved = small_gallery.reopened(gallery, root=tmp_path / "moved")
    assert moved.verify(None).passes
    with pytest.raises(
        UserError, match=r"is not in .*moved/: give a root that all pictures are in"
    ):
        moved.index(photos)
    assert "is not in" in moved.verify(1).sentence() or moved.verify(1).passes


def test_a_key_is_the_same_however_root_and_picture_are_written(photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    above = os.path.relpath(photos, tmp_path)  # ../../photos
    expected = Originals(photos).listed(photos)
    for root in (photos, above, f"./{above}//"):
        for pictures in (photos, above, f"{above}/../{photos.name}"):
            assert Originals(root).listed(pictures) == expected


def test_keys_lead_nowhere_else(gallery):
    for key in ("../secret.jpg", "/etc/passwd", "gs://other/a.jpg"):
        with pytest.raises(UserError, match="give a root that all pictures are in"):
            gallery.originals.find(key)


def test_a_preparation_is_given_where_records_have_none(tmp_path, photos):
    chain = small_gallery.chain(tmp_path, seeds=(0,), preparation={})
    store = MemoryStore(tiny.K - 1)
    given = {"root": photos, "work": small_gallery.work()}
    gallery = Gallery.create(store, chain, preparation=small_gallery.PREPARATION, **given)
    assert gallery.index(photos / SOME).inserted == 1
    again = Gallery.open(store, chain, **given)
    expected = chain[0].embed(photos / SOME, preparation=small_gallery.PREPARATION)
    np.testing.assert_allclose(again.embed(photos / SOME, 0), expected, atol=1e-6)


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

        engine = qdrant_client.QdrantClient(
            path=str(tmp_path), force_disable_check_same_thread=True
        )
        with contextlib.closing(engine) as client:
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
