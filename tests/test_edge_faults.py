"""The engine of Qdrant, written to as our store writes, killed again and again: no row lost or torn."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.slow
pytest.importorskip("qdrant_edge")

import edge_child  # noqa: E402

KILLS, COUNT = 20, int(os.environ.get("EDGE_ROWS", 6000))
SPAN = 1.0  # seconds after the start of its writes within which a child is killed
ACTIONS = ("ingest", "update")


def start(action, folder, seed):
    """Start an action in a process of its own, and wait until it has opened the shard."""
    tests = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": f"{tests.parent}:{tests}", "JAX_PLATFORMS": "cpu"}
    program = [sys.executable, tests / "edge_child.py", action, folder, str(seed), str(COUNT)]
    child = subprocess.Popen(program, stdout=subprocess.PIPE, text=True, env=environment)
    line = child.stdout.readline().strip()
    assert line == "ready", line
    return child


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
    assert len(found) == len(versions) == sum(store.counts().values())
    check_whole(found)
    check_search(store, len(found))
    store.shard.close()
    said = edge_child.said(folder)
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
        [made] = edge_child.requests(
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
def test_twenty_kills(action, tmp_path):
    kills, number, folder = 0, 0, None
    rng = np.random.default_rng([16, ACTIONS.index(action)])
    while kills < KILLS:
        if folder is None:
            folder = tmp_path / str(number)
            number += 1
            made(folder, filled=action == "update")
        child = start(action, folder, rng.integers(10**6))
        time.sleep(rng.uniform(0, SPAN))
        running = child.poll() is None
        child.kill()
        rest = child.communicate()[0]
        assert running or "done" in rest, "the child failed"
        kills += running and "done" not in rest
        count = check(folder)
        if "done" in rest:
            folder = None
    print(f"{action}: {kills} kills in {number} shards, {count} rows in the last")
