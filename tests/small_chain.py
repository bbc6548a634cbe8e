"""Entries so small that a chain of them is written in no time, and what tests ask of them."""

import jax
import numpy as np
import pytest
import tiny

from compat_jax import chain as chains
from compat_jax.chain import Chain, variables_sha256
from compat_jax.errors import UserError

SMALL = {
    "params": {"fc1": {"kernel": np.arange(12, dtype=np.float32).reshape(3, 4)}},
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


def assert_same_bits(a, b):
    assert variables_sha256(a) == variables_sha256(b)


def assert_others_open(chain, but):
    for number in set(chain.numbers()) - {but}:
        assert_same_bits(chain.open(number).variables, small(number))


def assert_the_later_writer_is_refused(folder, monkeypatch):
    """Two programs add to a folder; the second finishes while the first is writing."""
    mine, theirs = Chain(folder), Chain(folder)
    encode, first = chains._encode, [True]

    def while_the_other_adds(*arguments):
        if first.pop():
            first.append(False)
            theirs.add(small(5), tiny.record())
        return encode(*arguments)

    monkeypatch.setattr(chains, "_encode", while_the_other_adds)
    with pytest.raises(UserError, match=r"version 0 of .* was added by another program"):
        mine.add(small(4), tiny.record())
    assert mine.open(0).sha256 == variables_sha256(small(5))
