"""Entries so small that a chain of them is written in no time, and what tests ask of them."""

import dataclasses
import hashlib
import json
import threading
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from flax import traverse_util
from orbax.checkpoint import v1 as ocp

from compat_jax.chain import Chain, store, variables_sha256
from compat_jax.errors import UserError

SMALL = {
    "params": {"projection": {"kernel": np.arange(12, dtype=np.float32).reshape(3, 4)}},
    "batch_stats": {"bn1": {"mean": np.float32([1, 2, 3])}},
}


def small(seed):
    """Another version's variables, as small."""
    return jax.tree.map(lambda x: x + np.float32(seed), SMALL)


def write_three(path):
    """A chain of three."""
    made = Chain(path)
    for task in range(3):
        made.add(small(task), tiny.record(task=task, parent=task - 1 if task else None))
    return made


def write_format_1(path, number, record, variables):
    """An entry as the first release wrote it: other layer names, no numbers of the method."""
    names = {"projection": "fc1", "head": "fc2"}
    params = {names.get(name, name): layer for name, layer in variables["params"].items()}
    old = {"params": params, "batch_stats": variables["batch_stats"]}
    folder = Path(path) / f"{number:04d}"
    folder.mkdir(parents=True)
    ocp.save(folder / "variables", {k: v for k, v in old.items() if v})
    described = dataclasses.asdict(record)
    del described["method_arguments"]
    files = sorted(p for p in (folder / "variables").rglob("*") if p.is_file())
    body = {
        "format": 1,
        "number": number,
        "record": described,
        "packages": {"jax": "0.10.0"},
        "variables": {
            name: {"shape": list(a.shape), "dtype": a.dtype.name}
            for name, a in traverse_util.flatten_dict(old, sep="/").items()
        },
        "variables_sha256": variables_sha256(old),
        "files": {
            str(p.relative_to(folder)): {
                "bytes": p.stat().st_size,
                "sha256": hashlib.sha256(p.read_bytes()).hexdigest(),
            }
            for p in files
        },
    }
    seal(folder / "record.json", json.loads(json.dumps(body)))
    return Chain(path)


def seal(path, body):
    """Write a record with the checksum that fits it."""
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps({**body, "record_sha256": digest}))


def assert_same_bits(a, b):
    assert variables_sha256(a) == variables_sha256(b)


def assert_others_open(chain, but):
    for number in set(chain.numbers()) - {but}:
        assert_same_bits(chain.open(number).variables, small(number))


def assert_refused_at_once(work, message):
    """Work raises a UserError instead of waiting for ever; it takes milliseconds."""
    caught = []

    def run():
        with pytest.raises(UserError, match=message) as error:
            work()
        caught.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(timeout=5)  # the machine may be busy
    assert caught, "it hangs, or was not refused"


def assert_the_later_writer_is_refused(folder, monkeypatch):
    """Two programs add to a folder; the second finishes while the first is writing."""
    mine, theirs = Chain(folder), Chain(folder)
    encode, first = store.encode, [True]

    def while_the_other_adds(*arguments, **options):
        if first.pop():
            first.append(False)
            theirs.add(small(5), tiny.record())
        return encode(*arguments, **options)

    monkeypatch.setattr(store, "encode", while_the_other_adds)
    with pytest.raises(UserError, match=r"version 0 of .* was added by another program"):
        mine.add(small(4), tiny.record())
    assert mine.open(0).sha256 == variables_sha256(small(5))
