"""A process that tests of faults kill: writes to a shard of Qdrant Edge, each acknowledged in a file.

Between two writes the engine flushes or builds its index now and then, as a server does by itself.
"""

import itertools
from pathlib import Path

import numpy as np
from journal import Journal

from compat_jax.gallery.store import Rows, Where
from launch.benchmarks.edge import EdgeStore, engine

SIZE, PART, PER_MILLE = 7, 48, {"flush": 200, "index": 40}
INDEX_ABOVE = 8  # kilobytes: 256 rows


def rows(at, version) -> Rows:
    """The rows of some numbers by a version: what they hold follows from both."""
    vectors = np.stack([np.random.default_rng([i, version]).standard_normal(SIZE) for i in at])
    return Rows(
        keys=[f"photos/{i}.jpg" for i in at],
        versions=np.full(len(at), version, np.int32),
        models=[f"{version:016x}"] * len(at),
        contents=[f"{i:032x}" for i in at],
        payloads=[{"label": f"class {i % 5}", "page": int(i)} for i in at],
        vectors=vectors.astype(np.float32),
    )


class Acknowledging(Journal):
    """A shard whose writes are noted on disk: deletions before and after, the others after."""

    def __init__(self, folder):
        super().__init__(folder)
        self.store = EdgeStore(Path(folder) / "shard", SIZE, index_above=INDEX_ABOVE)

    def insert(self, at):
        assert self.store.insert(rows(at, 0)) <= len(at)
        self.say(call="insert", at=at)

    def update(self, at, version):
        self.store.update(rows(at, version), Where(version=version - 1))
        self.say(call="update", at=at, version=version)

    def delete(self, at):
        self.say(call="will delete", at=at)
        ids = rows(at, 0).ids.tolist()
        self.store.shard.update(engine.UpdateOperation.delete_points(ids))
        self.say(call="delete", at=at)


def upkeep(shard, rng):
    """Flush, build the index, or do nothing."""
    drawn = rng.integers(1000)
    if drawn < PER_MILLE["index"]:
        shard.store.refresh()
    elif drawn < sum(PER_MILLE.values()):
        shard.store.shard.flush()


def ingest(shard, before, rng, count):
    """Insert the rows up to a count, and delete one of those there now and then."""
    start = max((one["at"][-1] + 1 for one in before if one["call"] == "insert"), default=0)
    for first in range(start, count, PART):
        shard.insert([*range(first, min(first + PART, count))])
        if rng.integers(4) == 0:
            shard.delete([int(rng.integers(first + 1))])
        upkeep(shard, rng)


def update(shard, before, rng, count):
    """Give all rows the next version, again and again, with deletions among those of each part."""
    done = max((one["version"] for one in before if one["call"] == "update"), default=1)
    for version in itertools.count(done):
        order = rng.permutation(count)
        for first in range(0, count, PART):
            at = order[first : first + PART].tolist()
            if rng.integers(16) == 0:
                shard.delete(at[:1])
            shard.update(at, version)
            upkeep(shard, rng)


def main(action, folder, seed, count, ready):
    """Open the shard, say so, act."""
    shard = Acknowledging(folder)
    before = shard.read()
    ready.set()
    action(shard, before, np.random.default_rng(seed), count)
