"""A gallery in LanceDB: processes killed, in a race, on a full disk; nothing is lost or torn."""

import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import drawn_photos
import numpy as np
import pytest
import small_gallery
import tiny
from journal import Journal

from compat_jax.errors import UserError
from compat_jax.gallery.gallery import Gallery

pytestmark = pytest.mark.slow
lance = pytest.importorskip("compat_jax.gallery.lance")

SEEDS, PER_CLASS = 20, 30
# Seconds after the start within which a child is killed: about as long as it works.
SPAN = {"index": 1.5, "backfill": 2.5, "switch": 2.0, "rollback": 2.0}


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """Three versions."""
    return small_gallery.chain(tmp_path_factory.mktemp("chain"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Sixty photos."""
    folder = tmp_path_factory.mktemp("photos")
    drawn_photos.draw(folder, small_gallery.CLASSES, PER_CLASS)
    return folder


@pytest.fixture(scope="module")
def features(chain, photos):
    """{key: features of the three versions}."""
    files = sorted(str(path) for path in photos.rglob("*.*"))
    made = [version.embed(files) for version in chain]
    keys = [str(Path(file).relative_to(photos)) for file in files]
    return dict(zip(keys, np.stack(made, axis=1), strict=True))


@pytest.fixture(scope="module")
def start(chain, photos, cache_folder):
    """Start an action on the gallery in a folder, in a process of its own."""
    tests = Path(__file__).parent
    settings = {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": f"{cache_folder}/children",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": f"{tests.parent}:{tests}",
    }

    def run(action, folder, *more):
        program = [sys.executable, tests / "gallery_child.py", action, folder, chain.path, photos]
        environment = {**os.environ, **settings}
        return subprocess.Popen(
            [*program, *more], stdout=subprocess.PIPE, text=True, env=environment
        )

    return run


def wait(child):
    """Wait until a child is about to act."""
    line = child.stdout.readline().strip()
    assert line == "ready", line
    return child


def made(chain, photos, folder, rows=True) -> Gallery:
    """A new gallery in LanceDB, of version 0."""
    store = lance.LanceStore(folder, size=tiny.K - 1)
    gallery = Gallery.create(
        store, chain, version=0, root=photos, work=small_gallery.work(part=100)
    )
    if rows:
        gallery.index(photos)
    return gallery


def opened(chain, photos, folder) -> Gallery:
    """The gallery, by a process that did not see what happened."""
    return Gallery.open(lance.LanceStore(folder), chain, root=photos, work=small_gallery.work())


def check(gallery, folder, features) -> None:
    """No acknowledged row lost, none doubled, none torn, no deleted one back."""
    rows = gallery.store.rows(limit=10_000, vectors=True)
    assert max(Counter(rows.keys).values(), default=1) == 1
    members = gallery.manifest().members
    for i, key in enumerate(rows.keys):
        version = int(rows.versions[i])
        assert rows.models[i] == members[version].model, key
        np.testing.assert_allclose(rows.vectors[i], features[key][version], atol=1e-5, err_msg=key)
    versions = dict(zip(rows.keys, rows.versions.tolist(), strict=True))
    said = Journal(folder).read()
    gone = {one["key"] for one in said if one["call"] == "delete"}
    assert not gone & set(versions)
    for one in said:
        if one["call"] == "insert":
            assert set(one["keys"]) - gone <= set(versions)
        if one["call"] == "update":
            left = [key for key in one["keys"] if key not in gone]
            assert sum(versions[key] == one["version"] for key in left) >= one["count"] - (
                len(one["keys"]) - len(left)
            )


def check_manifest(gallery, folder) -> None:
    """The manifest is the last acknowledged one, or the next: put there, and not yet acknowledged."""
    swaps = [one for one in Journal(folder).read() if one["call"] == "swap"]
    if swaps:
        manifest, last = gallery.manifest(), swaps[-1]
        assert last["generation"] <= manifest.generation <= last["generation"] + 1
        if manifest.generation == last["generation"]:
            assert manifest.query == last["query"]


@pytest.mark.parametrize("action", SPAN)
def test_twenty_kills(action, chain, photos, features, start, tmp_path):
    kills, folder, number = 0, None, 0
    rng = np.random.default_rng([16, list(SPAN).index(action)])
    while kills < SEEDS:
        if folder is None:
            folder = tmp_path / str(number)
            number += 1
            gallery = made(chain, photos, folder, rows=action != "index")
            if action == "backfill":
                gallery.switch(1)
        child = wait(start(action, folder))
        time.sleep(rng.uniform(0, SPAN[action]))
        running = child.poll() is None
        child.kill()
        rest = child.communicate()[0]
        kills += running and "done" not in rest
        gallery = opened(chain, photos, folder)
        check(gallery, folder, features)
        check_manifest(gallery, folder)
        if "done" in rest:
            folder = None
    print(f"{action}: {kills} kills in {number} galleries, {len(gallery)} rows in the last")
    finish(action, gallery, folder)
    if folder is not None:
        check(gallery, folder, features)


def finish(action, gallery, folder):
    """Run what was killed to its end."""
    if action == "index":
        gallery.index(gallery.originals.root)
        assert len(gallery) == 2 * PER_CLASS
    if action == "backfill" and folder is not None:
        before = len(gallery)
        gallery.backfill()
        assert gallery.store.counts() == ({1: before} if before else {})
    assert gallery.verify(None).passes


def test_of_two_backfills_one_is_refused(chain, photos, start, tmp_path):
    gallery = made(chain, photos, tmp_path)
    gallery.switch(1)
    child = wait(start("backfill", tmp_path))
    while gallery.manifest().lease is None and child.poll() is None:
        time.sleep(0.01)
    with pytest.raises(UserError, match="another backfill of this gallery is running"):
        gallery.backfill()
    assert child.communicate()[0].strip() == "done"
    assert set(gallery.store.counts()) <= {1}


def test_of_two_switches_one_wins(chain, photos, start, tmp_path):
    for seed in range(3):
        folder = tmp_path / str(seed)
        gallery = made(chain, photos, folder, rows=False)
        children = [start("compete", folder, number) for number in "12"]
        for child in children:
            wait(child)
        (folder / "start").touch()
        said = [child.communicate()[0] for child in children]
        lost = ["another program switched to version" in text for text in said]
        assert sum(lost) == 1, said
        assert gallery.manifest().query == (1 if lost[1] else 2)


def test_a_full_disk_is_reported_and_nothing_is_torn(chain, photos, features, start, tmp_path):
    gallery = made(chain, photos, tmp_path, rows=False)
    gallery.index(photos / "pear")
    child = wait(start("full", tmp_path))
    said = child.communicate()[0]
    assert said.startswith("LanceDB, ") and "done" in said
    again = opened(chain, photos, tmp_path)
    check(again, tmp_path, features)
    assert len(again) == PER_CLASS
    again.index(photos)
    assert len(again) == 2 * PER_CLASS and again.verify(None).passes


def test_a_store_of_another_chain_is_refused(chain, photos, tmp_path):
    made(chain, photos, tmp_path / "store", rows=False)
    other = small_gallery.chain(tmp_path / "other", seeds=(4, 1, 2))
    with pytest.raises(UserError, match="the gallery is of another chain"):
        opened(other, photos, tmp_path / "store")
