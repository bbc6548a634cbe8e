"""A gallery: its status, its verification, and canaries that tell other weights and pictures."""

import dataclasses
import os

import jax
import numpy as np
import pytest
import small_gallery
import tiny

from compat_jax.data import Preparation
from compat_jax.errors import UserError
from compat_jax.gallery import canary
from compat_jax.gallery.gallery import Gallery
from compat_jax.gallery.store import Where, row_id

COUNT = small_gallery.COUNT
chain, photos = small_gallery.kept_chain, small_gallery.kept_photos
gallery, own = small_gallery.indexed, small_gallery.own


def test_the_status_counts_rows_and_answers_by_version(gallery, photos):
    gallery.switch(1)
    gallery.backfill(budget=3)
    status = gallery.status(photos, k=COUNT, measure=4)
    assert (status.query, status.previous, status.total, status.left) == (1, 0, COUNT, COUNT - 3)
    assert (status.share, status.answers) == (0.25, {0: 0.75, 1: 0.25})
    assert status.row_bytes == 64 and status.seconds_left > 0
    model = gallery.manifest().members[1].model
    assert status.sentence().startswith(f"version 1 ({model}) embeds queries; 12 rows:\n")
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
    keys = [key for key, version in small_gallery.versions(own).items() if version == 0]
    store = own.store
    damaged(store, keys[0], versions=np.int32([1]))
    damaged(store, keys[1], versions=np.int32([5]))
    damaged(store, keys[2], models=["0" * 16])
    damaged(store, keys[3], vectors=2 * store.rows(limit=1, vectors=True).vectors)
    damaged(store, keys[4], contents=["0" * 32])
    os.remove(own.originals.find(keys[5]))
    small_gallery.forge(own, 1, canary=own.manifest().members[0].canary)
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
    return small_gallery.reopened(gallery)


def test_a_forged_fingerprint_is_found_by_the_canaries(gallery, tmp_path):
    gallery.switch(1)
    other = small_gallery.chain(tmp_path, seeds=(0, 7))
    sha256 = other.digest(1)
    manifest = gallery.manifest()
    forged = dataclasses.replace(manifest.members[1], variables=sha256)
    small_gallery.forge(gallery, 1, variables=sha256, model=manifest.fingerprint(forged))
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
        small_gallery.reopened(gallery)


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
