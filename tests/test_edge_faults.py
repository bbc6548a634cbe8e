"""The engine of Qdrant, written to as our store writes, killed again and again: no row lost or torn."""

import multiprocessing
import os
import signal
import sys
import time
from collections import Counter

import numpy as np
import pytest

pytestmark = pytest.mark.slow
pytest.importorskip("qdrant_edge")

import edge_child  # noqa: E402
from journal import Journal  # noqa: E402

from launch.benchmarks import edge  # noqa: E402

KILLS, COUNT = 20, 2000
SPAN = 0.8  # seconds after the start of its writes within which a child is killed
ACTIONS = {"ingest": edge_child.ingest, "update": edge_child.update}


@pytest.fixture(scope="module")
def context():
    """Starts processes, forked from one that has imported everything: each starts at once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
        found = multiprocessing.get_context("forkserver")
        found.set_forkserver_preload(["edge_child"])
        yield found


def killed(context, action, folder, rng) -> bool:
    """Start an action and kill it somewhere in its writes; return False if it was done before."""
    ready = context.Event()
    given = (ACTIONS[action], folder, int(rng.integers(10**6)), COUNT, ready)
    child = context.Process(target=edge_child.main, args=given)
    child.start()
    assert ready.wait(120)
    time.sleep(rng.uniform(0, SPAN))
    child.kill()
    child.join()
    assert child.exitcode in (0, -signal.SIGKILL)
    return child.exitcode != 0


def made(folder, filled):
    """A new shard, with all rows of version 0 where it is to be filled."""
    folder.mkdir()
    shard = edge_child.Acknowledging(folder)
    if filled:
        shard.insert([*range(COUNT)])
    shard.store.shard.close()


def points(shard):
    """All points, page by page."""
    found, following = [], 0
    while following is not None:
        request = edge_child.engine.ScrollRequest(
            offset=following, limit=4096, with_payload=True, with_vector=True
        )
        page, following = shard.scroll(request)
        found += page
    return found


def check(folder) -> int:
    """Reopen, compare all rows with what was acknowledged, and return their number."""
    store = edge_child.Acknowledging(folder).store
    found = points(store.shard)
    versions = {one.payload["payload"]["page"]: one.payload["version"] for one in found}
    assert len(found) == len(versions)
    assert store.counts() == Counter(versions.values())  # of the index of that field
    check_whole(found)
    check_search(store, len(found))
    store.shard.close()
    said = Journal(folder).read()
    gone, dying = (
        {i for one in said if one["call"] == call for i in one["at"]}
        for call in ("delete", "will delete")
    )
    assert not gone & set(versions)
    least = {}
    for one in said:
        if one["call"] in ("insert", "update"):
            least.update(dict.fromkeys(one["at"], one.get("version", 0)))
    lost = set(least) - dying - set(versions)
    assert not lost, sorted(lost)
    for i, version in versions.items():
        assert least.get(i, 0) <= version <= least.get(i, -1) + 1, i
    return len(found)


def check_whole(found):
    """Every row holds what its number and its version say, in all its fields."""
    for one in found:
        payload = dict(one.payload)
        payload.pop("write")
        [made] = edge.requests(
            edge_child.rows([payload["payload"]["page"]], payload["version"]), edge_child.SIZE
        )
        [wanted] = made
        assert (one.id, one.vector) == (wanted.id, wanted.vector)
        assert payload == {k: v for k, v in wanted.payload.items() if k != "write"}


def check_search(store, count):
    """A search that asks for more rows than there are has each once."""
    ids = store.search(np.ones((1, edge_child.SIZE), np.float32), min(count + 5, 10_000)).ids[0]
    there = ids[ids >= 0]
    assert len(np.unique(there)) == len(there) == min(count, len(ids))


@pytest.mark.parametrize("action", ACTIONS)
def test_twenty_kills(action, context, tmp_path):
    kills, number, folder = 0, 0, None
    rng = np.random.default_rng([16, list(ACTIONS).index(action)])
    while kills < KILLS:
        if folder is None:
            folder = tmp_path / str(number)
            number += 1
            made(folder, filled=action == "update")
        in_writes = killed(context, action, folder, rng)
        kills += in_writes
        count = check(folder)
        if not in_writes:
            folder = None
    print(f"{action}: {kills} kills in {number} shards, {count} rows in the last")
