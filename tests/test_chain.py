"""The chain of versions: what an entry records, how it opens, who wins when two programs add."""

import hashlib
import json
import shutil
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from small_chain import (
    SMALL,
    assert_same_bits,
    assert_the_later_writer_is_refused,
    small,
    write_three,
)

from compat_jax import chain as chains
from compat_jax.chain import Chain, variables_sha256
from compat_jax.errors import UserError


@pytest.fixture(scope="module", autouse=True)
def backbone():
    with tiny.one_conv():
        yield


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write_three(tmp_path_factory.mktemp("written") / "chain")


@pytest.fixture
def chain(written, tmp_path):
    """A copy of them that a test may break."""
    shutil.copytree(written.path, tmp_path / "chain")
    return Chain(tmp_path / "chain")


# Add, list, open, verify


def test_an_entry_says_everything_about_its_version(tmp_path):
    chain = Chain(tmp_path / "chain")
    record = tiny.record(
        method="fd",
        backbone_arguments={"width": 16},
        task=3,
        classes_seen=40,
        parent=2,
        data_fingerprint="ab" * 32,
        seed=7,
        config={"epochs": 70, "optim": {"lr": 0.1}, "tasks": {"replace_at": [0, 2]}},
    )
    number = chain.add(SMALL, record)
    content = json.loads((tmp_path / "chain" / "0000" / "record.json").read_text())
    assert number == 0 and content["number"] == 0
    assert content["format"] == 1
    assert content["record"] == {
        "method": "fd",
        "backbone": "one_conv",
        "backbone_arguments": {"width": 16},
        "image_shape": [8, 8, 3],
        "mean": [0.5, 0.5, 0.5],
        "std": [0.3, 0.3, 0.3],
        "feature_size": 15,
        "num_prototypes": 16,
        "label_order": "descending",
        "head_classes": None,
        "task": 3,
        "classes_seen": 40,
        "parent": 2,
        "replaced_by": None,
        "data_fingerprint": "ab" * 32,
        "seed": 7,
        "config": {"epochs": 70, "optim": {"lr": 0.1}, "tasks": {"replace_at": [0, 2]}},
        "class_names": [],
    }
    assert {"jax", "flax", "optax", "orbax-checkpoint", "numpy"} <= set(content["packages"])
    assert content["packages"]["jax"] == jax.__version__
    assert content["variables"] == {
        "batch_stats/bn1/mean": {"shape": [3], "dtype": "float32"},
        "params/fc1/kernel": {"shape": [3, 4], "dtype": "float32"},
    }
    # The SHA-256 of the variables, spelled out: name, dtype and shape on a line, then the bytes.
    digest = hashlib.sha256()
    digest.update(b"batch_stats/bn1/mean float32 (3,)\n" + np.float32([1, 2, 3]).tobytes())
    digest.update(b"params/fc1/kernel float32 (3, 4)\n" + np.arange(12.0, dtype="f4").tobytes())
    assert content["variables_sha256"] == digest.hexdigest()
    assert chain.record(0) == record


def test_versions_are_numbered_as_they_come(chain):
    assert len(chain) == 3 and chain.numbers() == [0, 1, 2]
    assert chain.add(small(3), tiny.record(task=3)) == 3
    assert [chain.record(n).task for n in chain.numbers()] == [0, 1, 2, 3]
    assert [chain.record(n).parent for n in (0, 1)] == [None, 0]


def test_opening_gives_the_bits_that_were_added(tmp_path):
    variables = {
        "params": {
            "a": np.float32([[1.5, -0.0], [np.inf, 1e-45]]),
            "half": np.asarray([1, 2.5], jnp.bfloat16),
            "scalar": np.int32(7),
        },
        "batch_stats": {},
    }
    chain = Chain(tmp_path / "chain")
    chain.add(jax.tree.map(jnp.asarray, variables), tiny.record())
    opened = chain.open(0)
    assert_same_bits(opened.variables, variables)
    assert opened.variables["batch_stats"] == {}
    assert opened.variables["params"]["half"].dtype == jnp.bfloat16
    assert opened.sha256 == variables_sha256(variables)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(opened.variables))


def test_the_path_is_enough_also_when_architectures_differ(tmp_path):
    described = [
        tiny.record(backbone="resnet_small", backbone_arguments={"width": 4}),
        tiny.record(backbone="resnet_small", backbone_arguments={"width": 8}),
        tiny.record(method="er", head_classes=5, feature_size=16),
        tiny.record(backbone="resnet32_cifar", backbone_arguments={}),
    ]
    for seed, record in enumerate(described):
        Chain(tmp_path / "chain").add(tiny.variables(record, seed), record)
    images = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
    for number, record in enumerate(described):
        version = Chain(tmp_path / "chain").open(number)
        outputs = jax.eval_shape(version.embedder().apply, version.variables, images)
        assert outputs.features.shape == (2, record.feature_size)
        assert outputs.features.dtype == jnp.float32
    assert version.embedder("bfloat16").dtype == jnp.bfloat16


def test_a_moved_chain_opens_beside_another(chain, tmp_path):
    other = Chain(tmp_path / "other")
    other.add(small(9), tiny.record())
    shutil.move(chain.path, tmp_path / "moved")
    assert_same_bits(Chain(tmp_path / "moved").open(2).variables, small(2))
    assert_same_bits(other.open(0).variables, small(9))


def test_a_path_may_be_relative_to_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Chain("runs/a/chain").add(SMALL, tiny.record())
    monkeypatch.chdir(tmp_path / "runs")
    assert_same_bits(Chain("a/chain").open(0).variables, SMALL)


def test_negative_numbers_count_from_the_end(chain):
    assert chain.open(-1).number == 2 and chain.open(-3).number == 0


@pytest.mark.parametrize("number", [3, -4, 100])
def test_a_version_that_is_not_there_is_told_with_those_that_are(chain, number):
    with pytest.raises(UserError, match=rf"no version {number} in .*chain: it has 0\.\.2"):
        chain.open(number)


def test_no_chain_says_which_program_writes_one(tmp_path):
    assert len(Chain(tmp_path / "none")) == 0
    for ask in (Chain(tmp_path / "none").require, Chain(tmp_path / "none").verify):
        with pytest.raises(UserError, match=r"no chain at .*none: launch\.train writes one"):
            ask()
    assert not (tmp_path / "none").exists()


def test_verify_names_the_entries_that_cannot_be_used(chain):
    assert chain.verify() == {0: None, 1: None, 2: None}
    (chain.path / "0001" / "record.json").unlink()
    report = chain.verify()
    assert report[0] is None and report[2] is None
    assert report[1].startswith(f"version 1 of {chain.path} cannot be used: record.json is missing")


def test_another_number_of_prototypes_is_refused(chain):
    with pytest.raises(UserError, match=r"num_prototypes 32 differs from the chain's 16 .*=16"):
        chain.add(small(3), tiny.record(num_prototypes=32, feature_size=31))
    assert chain.numbers() == [0, 1, 2] and not list(chain.path.glob(".*"))


def test_leftovers_of_a_killed_writer_are_passed_over(chain):
    left = chain.path / ".adding-0003-deadbeef"
    shutil.copytree(chain.path / "0002", left)
    (left / "record.json").unlink()
    assert chain.numbers() == [0, 1, 2]
    assert chain.add(small(3), tiny.record()) == 3
    assert_same_bits(chain.open(3).variables, small(3))


# Two programs


def test_a_number_taken_while_writing_is_not_overwritten(tmp_path, monkeypatch):
    assert_the_later_writer_is_refused(tmp_path / "chain", monkeypatch)
    assert not list((tmp_path / "chain").glob(".*"))


def test_of_programs_that_add_at_once_one_wins(tmp_path, monkeypatch):
    save, encode = chains.ocp.save, chains._encode
    one_at_a_time, all_written, outcomes = threading.Lock(), threading.Barrier(4), {}

    def save_in_turn(*arguments):  # within one process Orbax cannot save twice at once
        with one_at_a_time:
            return save(*arguments)

    def encode_and_wait(*arguments):
        text = encode(*arguments)
        all_written.wait()
        return text

    def add(seed):
        try:
            outcomes[seed] = Chain(tmp_path / "chain").add(small(seed), tiny.record(), number=0)
        except UserError as error:
            outcomes[seed] = str(error)

    monkeypatch.setattr(chains.ocp, "save", save_in_turn)
    monkeypatch.setattr(chains, "_encode", encode_and_wait)
    threads = [threading.Thread(target=add, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    winners = [seed for seed, outcome in outcomes.items() if outcome == 0]
    losers = [outcome for outcome in outcomes.values() if outcome != 0]
    assert len(winners) == 1 and len(losers) == 3
    assert all("version 0 of" in text and "was added by another" in text for text in losers)
    assert_same_bits(Chain(tmp_path / "chain").open(0).variables, small(winners[0]))
    assert [p.name for p in (tmp_path / "chain").iterdir()] == ["0000"]


def test_a_reader_never_sees_half_an_entry(tmp_path):
    writer, reader = Chain(tmp_path / "chain"), Chain(tmp_path / "chain")
    done, seen = threading.Event(), []

    def write():
        for number in range(6):
            writer.add(small(number), tiny.record())
        done.set()

    thread = threading.Thread(target=write)
    thread.start()
    while not done.is_set():
        for number in reader.numbers()[-1:]:
            assert_same_bits(reader.open(number).variables, small(number))
            seen.append(number)
    thread.join()
    assert seen == sorted(seen) and reader.verify() == dict.fromkeys(range(6))


def test_a_folder_that_cannot_be_written_to_leaves_the_chain_as_it_was(chain, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(chains, "_encode", full)
    with pytest.raises(UserError, match=r"cannot write version 3 to .*No space left on device"):
        chain.add(small(3), tiny.record())
    assert chain.verify() == {0: None, 1: None, 2: None}
    assert not list(chain.path.glob(".*"))


def test_a_file_where_the_chain_should_be_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write version 0 to .*file/chain"):
        Chain(tmp_path / "file" / "chain").add(SMALL, tiny.record())
    assert Chain(tmp_path / "file").numbers() == []
