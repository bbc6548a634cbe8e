"""Galleries on s3:// and gs://: LanceDB's tables in stand-ins for both, see bucket_server.py."""

import functools
import importlib.util
import json
import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import drawn_photos
import flat  # noqa: F401, registers it
import numpy as np
import programs
import pytest
import small_gallery
from loopback import free_port, served
from plain_store import D, Model, at_once, check_same, contents_of, make, names, step

from compat_jax.errors import UserError
from compat_jax.gallery.places import open_store
from compat_jax.gallery.store import Where

MOTO, GCSFS = (importlib.util.find_spec(name) is not None for name in ("moto", "gcsfs"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (MOTO and GCSFS), reason="needs pip install -e '.[test,test-gcs]'"),
]


@pytest.fixture(scope="module")
def server():
    """Environment that sends LanceDB to a stand-in, in programs as well, and a bucket in it."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    key = {"gcs_base_url": url, "disable_oauth": True}
    key |= dict.fromkeys(("client_email", "private_key", "private_key_id"), "")
    settings = {
        "AWS_ENDPOINT": url,
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": "anyone",
        "AWS_SECRET_ACCESS_KEY": "anyone",
        "AWS_REGION": "us-east-1",
        "GOOGLE_SERVICE_ACCOUNT_KEY": json.dumps(key),
        "GOOGLE_ALLOW_HTTP": "true",
        "STORAGE_EMULATOR_HOST": url,  # so that nobody asks for credentials
    }
    command = [sys.executable, Path(__file__).with_name("bucket_server.py"), str(port)]
    with served(command, urllib.request.Request(f"{url}/bucket", method="PUT"), settings):
        yield


@pytest.fixture(params=["s3", "gs"])
def folder(request, server):
    """A folder in the bucket."""
    return f"{request.param}://bucket/{request.param}/folder"


def test_a_lance_table_in_a_bucket_keeps_the_same_promises(folder):
    place = f"{folder}/rows.lance"
    with pytest.raises(UserError, match="there is no gallery"):
        open_store(place)
    inside, model, rng = open_store(place, D), Model(), np.random.default_rng(0)
    for _ in range(20):
        step(inside, model, rng, names(12))
    check_same(inside, model, Where(), np.ones(D, np.float32))
    stores = [open_store(place) for _ in range(4)]
    rows = make(names(20, 12), 1)
    assert sum(at_once(*(functools.partial(one.insert, rows) for one in stores))) == 20
    assert len(contents_of(inside)) == len(model.rows) + 20
    swaps = [
        functools.partial(s.swap_manifest, {"generation": 1, "by": i}, 0)
        for i, s in enumerate(stores)
    ]
    assert sorted(at_once(*swaps)) == [False, False, False, True]


def test_hosts_fill_a_gallery_in_a_bucket_and_it_is_upgraded(folder, tmp_path):
    small_gallery.chain(tmp_path / "chain", backbone="flat")
    drawn_photos.draw(tmp_path / "photos", ["pear", "plum"], 6)
    where = [f"--chain={tmp_path}/chain", f"--store={folder}/shop", f"--root={tmp_path}/photos"]
    index = ["index", *where, f"--pictures={tmp_path}/photos", "--version=0", "--noprogress"]

    def told(*arguments):
        code, out, error = programs.call("upgrade", *arguments, flat=True)
        assert (code, error) == (0, ""), (out, error)
        return out

    hosts = [
        programs.start("upgrade", *index, f"--shard={shard}", flat=True) for shard in ("0/2", "1/2")
    ]
    ended = [host.communicate() for host in hosts]
    assert all(error == "" for _, error in ended), ended
    counts = [int(out.split()[0]) for out, _ in ended]
    assert sum(counts) == 12 and min(counts) > 0
    assert told(*index).startswith("0 rows inserted, 12 there before")
    told("switch", *where, "--to=1")
    assert json.loads(told("status", *where, "--json"))["rows"] == {"0": 12}
    told("backfill", *where, "--until=0.5", "--noprogress")
    assert json.loads(told("status", *where, "--json"))["rows"] == {"0": 6, "1": 6}
    told("verify", *where, "--sample=4")
    told("switch", *where, "--rollback")


def test_a_writer_that_is_killed_leaves_a_table_in_a_bucket_whole(folder):
    place = f"{folder}/killed.lance"
    store, code = (
        open_store(place, D),
        "import sys, plain_store as p\nfrom compat_jax.gallery.places",
    )
    code += " import open_store\nstore = open_store(sys.argv[1])\n"
    code += "for start in range(0, 4000, 20):\n    store.insert(p.make(p.names(20, start), 1))\n"
    code += "    print(start, flush=True)\n"
    rng, acknowledged = np.random.default_rng(0), 0
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    for _ in range(4):
        command = [sys.executable, "-c", code, place]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env=environment
        ) as writer:
            for _ in range(int(rng.integers(1, 6))):
                acknowledged = max(acknowledged, int(writer.stdout.readline()) + 20)
            time.sleep(rng.random() / 20)
            writer.kill()
        kept = contents_of(store)
        assert len(kept) % 20 == 0 and len(kept) >= acknowledged
        assert list(kept) and set(kept) == set(names(len(kept)))
