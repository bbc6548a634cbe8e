"""A process that tests of faults kill: it acts on a gallery in LanceDB and acknowledges each write."""

import itertools
import resource
import sys
import time
from pathlib import Path

import small_gallery
from journal import Journal

from compat_jax.chain import Chain
from compat_jax.errors import UserError
from compat_jax.gallery.gallery import Gallery
from compat_jax.gallery.lance import LanceStore

PART = 2
FILE_LIMIT = 60_000  # bytes


class Acknowledging(Journal):
    """A store that says on disk what it has done, as its caller would believe it."""

    def __init__(self, store, folder):
        super().__init__(folder)
        self.store = store

    def __getattr__(self, name):
        return getattr(self.store, name)

    def insert(self, rows):
        count = self.store.insert(rows)
        self.say(call="insert", keys=rows.keys, count=count)
        return count

    def update(self, rows, replaces):
        count = self.store.update(rows, replaces)
        self.say(call="update", keys=rows.keys, count=count, version=int(rows.versions[0]))
        return count

    def swap_manifest(self, new, expected):
        won = self.store.swap_manifest(new, expected)
        if won:
            self.say(call="swap", generation=new["generation"], query=new["query"])
        return won


def index(gallery, store, folder):
    gallery.index(folder)


def backfill(gallery, store, folder):
    """With a row deleted between the reading and the writing of each second part."""
    calls = itertools.count()

    def delete():
        if next(calls) % 2:
            [key] = gallery.store.rows(limit=1).keys
            gallery.store.delete(gallery.store.rows(limit=1).ids)
            store.say(call="delete", key=key)
        return False

    gallery.work = small_gallery.work(part=PART, should_stop=delete)
    gallery.backfill()


def switch(gallery, store, folder):
    now = gallery.manifest().query
    for number in itertools.count(now + 1):
        gallery.switch(number % 3)


def rollback(gallery, store, folder):
    while True:
        if gallery.manifest().query:
            gallery.rollback()
        gallery.switch(2)


def compete(gallery, store, folder, number):
    """Switch at the same time as another process: both have read what is in force."""
    admit, start = gallery.admit, Path(store.place).parent / "start"

    def wait(version):
        found = admit(version)
        print("ready", flush=True)
        while not start.exists():
            time.sleep(0.001)
        return found

    gallery.admit = wait
    try:
        gallery.switch(int(number))
    except UserError as error:
        print(error, flush=True)


def full(gallery, store, folder):
    """The disk is full: no file may grow beyond a limit."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_LIMIT, FILE_LIMIT))
    try:
        gallery.index(folder, payload=lambda key: {"note": key[:4] + "x" * FILE_LIMIT})
    except UserError as error:
        print(error, flush=True)


def main(action, folder, chain, photos, *more):
    """Open, embed once so that nothing is left to compile, say so, act."""
    store = Acknowledging(LanceStore(folder), folder)
    gallery = Gallery.open(store, Chain(chain), root=photos, work=small_gallery.work(part=PART))
    for version in (0, 1, 2):
        gallery.version(version)
    gallery.chain[0].embed([next(Path(photos).rglob("*.jpg"))] * PART, mesh=gallery.work.mesh)
    if action is not compete:
        print("ready", flush=True)
    action(gallery, store, photos, *more)
    print("done", flush=True)


if __name__ == "__main__":
    main(globals()[sys.argv[1]], *sys.argv[2:])
