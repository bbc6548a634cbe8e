"""A chain of three versions, photos in a folder, and a gallery of them: small enough for every test."""

import functools

import drawn_photos
import numpy as np
import tiny

from compat_jax.chain import Chain
from compat_jax.data import Preparation
from compat_jax.data.listing import list_labelled
from compat_jax.gallery.gallery import Gallery
from compat_jax.gallery.memory import MemoryStore
from compat_jax.gallery.originals import Work

PREPARATION = Preparation(tiny.SIZE)
CLASSES, PER_CLASS = ("pear", "plum"), 6
COUNT = len(CLASSES) * PER_CLASS


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
