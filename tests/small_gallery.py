"""A chain of three versions, photos in a folder, and a gallery of them: small enough for every test.

Modules give the fixtures names of their own: `chain, photos = small_gallery.kept_chain,
small_gallery.kept_photos`, and `indexed` and `own` take these.
"""

import dataclasses
import functools
import shutil
import time

import drawn_photos
import numpy as np
import pytest
import tiny
from PIL import Image

from compat_jax.chain import Chain
from compat_jax.data import Preparation
from compat_jax.data.listing import list_labelled
from compat_jax.gallery.gallery import Gallery
from compat_jax.gallery.manifest import Lease
from compat_jax.gallery.memory import MemoryStore
from compat_jax.gallery.originals import Work

PREPARATION = Preparation(tiny.SIZE)
CLASSES, PER_CLASS = ("pear", "plum"), 6
COUNT = len(CLASSES) * PER_CLASS
SOME = "pear/003.jpg"


class KeptChain(Chain):
    """A chain whose versions are read once, for tests that open them dozens of times."""

    def __init__(self, path):
        super().__init__(path)
        self.open = functools.cache(super().open)


def chain(path, seeds=(0, 1, 2), **changes) -> Chain:
    """Versions that were never trained, as if each were fine-tuned from the one before."""
    made = KeptChain(path)
    for task, seed in enumerate(seeds):
        record = tiny.record(
            **{
                "task": task,
                "parent": task - 1 if task else None,
                "preparation": PREPARATION.describe(),
                **changes,
            }
        )
        made.add(tiny.variables(record, seed), record)
    return made


def photos(folder):
    """Photos of two classes, of mixed sizes and kinds."""
    drawn_photos.draw(folder, CLASSES, PER_CLASS)
    return folder


def work(**changes) -> Work:
    """One device, few rows a write."""
    return Work(**{"mesh": tiny.one_device(), "batch_size": 8, "part": 4, **changes})


def made(chain, folder, *, store=None, version=0, **changes) -> Gallery:
    """An indexed gallery in memory."""
    store = MemoryStore(tiny.K - 1) if store is None else store
    gallery = Gallery.create(store, chain, version=version, root=folder, work=work(**changes))
    gallery.index(list_labelled(folder))
    return gallery


_MADE: dict = {}


def _shared(make, factory):
    """Make what no test changes once for all modules."""
    if make not in _MADE:
        _MADE[make] = make(factory.mktemp(make.__name__))
    return _MADE[make]


@pytest.fixture
def kept_chain(tmp_path_factory):
    """Three versions."""
    return _shared(chain, tmp_path_factory)


@pytest.fixture
def kept_photos(tmp_path_factory):
    """Photos that no test changes."""
    return _shared(photos, tmp_path_factory)


@pytest.fixture
def indexed(chain, photos):
    """A gallery indexed by version 0, four rows a write."""
    return made(chain, photos)


@pytest.fixture
def own(chain, photos, tmp_path):
    """A gallery whose photos a test may change."""
    shutil.copytree(photos, tmp_path / "photos")
    return made(chain, tmp_path / "photos")


def content(store) -> dict:
    """{key: (version, model, content, payload, feature)} of all rows."""
    rows = store.rows(limit=10**6, vectors=True)
    columns = (rows.versions.tolist(), rows.models, rows.contents, rows.payloads, rows.vectors)
    return dict(zip(rows.keys, zip(*columns, strict=True), strict=True))


def assert_consistent(gallery) -> None:
    """Every row's version, fingerprint and feature belong together, and to its picture."""
    manifest = gallery.manifest()
    for key, (version, model, _, _, vector) in content(gallery.store).items():
        assert model == manifest.members[version].model, key
        feature = gallery.chain[version].embed(gallery.originals.find(key))[0]
        np.testing.assert_allclose(vector, feature, atol=1e-5, err_msg=key)


def during(gallery, act):
    """Open the gallery with a hook that acts once, after the first rows of a backfill were read."""
    acts = [act]

    def hook():
        if acts:
            acts.pop()()
        return False

    return reopened(gallery, work=work(should_stop=hook))


def reopened(gallery, **changes):
    """Open the same store again."""
    given = {"root": gallery.originals.root, "work": gallery.work, **changes}
    return Gallery.open(gallery.store, gallery.chain, **given)


def versions(gallery):
    """{key: version}."""
    return {key: row[0] for key, row in content(gallery.store).items()}


def repaint(gallery, key, colour="red"):
    """Put another picture in the place of a row's."""
    Image.new("RGB", (30, 40), colour).save(gallery.originals.find(key))


def forge(gallery, number, **changes):
    """Have the manifest mean another member, consistently but for the canaries."""
    manifest = gallery.manifest()
    member = dataclasses.replace(manifest.members[number], **changes)
    assert gallery.store.swap_manifest(
        manifest.with_member(number, member).describe(), manifest.generation
    )


def lend(gallery, owner, seconds):
    """Have the manifest say that a backfill runs, for so many seconds."""
    now = gallery.manifest()
    lease = Lease(owner, time.time() + seconds)
    assert gallery.store.swap_manifest(now.replaced(lease=lease).describe(), now.generation)
