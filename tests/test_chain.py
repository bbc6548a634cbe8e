"""The chain of versions: what an entry records, how it opens, who wins when two programs add."""

import hashlib
import json
import os
import shutil
import subprocess
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from orbax.checkpoint import v1 as ocp
from small_chain import (
    SMALL,
    assert_same_bits,
    assert_the_later_writer_is_refused,
    small,
    write_format_1,
    write_three,
)

from compat_jax.chain import Chain, NoSuchVersion, store, variables_sha256
from compat_jax.errors import UserError
from compat_jax.retrieval import embed


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
        class_names=("cat", "dog"),
        method_arguments={"weight": 5.0},
        preparation={"resize": "crop"},
        aliases={"hound": "dog"},
        learnt={"classes": ["dog"]},
        fresh=("projection",),
    )
    number = chain.add(SMALL, record)
    content = json.loads((tmp_path / "chain" / "0000" / "record.json").read_text())
    assert number == 0 and content["number"] == 0
    assert content["format"] == 2
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
        "class_names": ["cat", "dog"],
        "method_arguments": {"weight": 5.0},
        "preparation": {"resize": "crop"},
        "aliases": {"hound": "dog"},
        "learnt": {"classes": ["dog"]},
        "fresh": ["projection"],
    }
    assert {"jax", "flax", "optax", "orbax-checkpoint", "numpy"} <= set(content["packages"])
    assert content["packages"]["jax"] == jax.__version__
    assert content["variables"] == {
        "batch_stats/bn1/mean": {"shape": [3], "dtype": "float32"},
        "params/projection/kernel": {"shape": [3, 4], "dtype": "float32"},
    }
    # The SHA-256 of the variables, spelled out: name, dtype and shape on a line, then the bytes.
    digest = hashlib.sha256()
    digest.update(b"batch_stats/bn1/mean float32 (3,)\n" + np.float32([1, 2, 3]).tobytes())
    digest.update(
        b"params/projection/kernel float32 (3, 4)\n" + np.arange(12.0, dtype="f4").tobytes()
    )
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
            "a": np.float32([[1.5, -0.0], [np.finfo(np.float32).max, 1e-45]]),
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
    assert chain.record(-1).task == 2


def test_a_chain_is_indexed_and_iterated_like_a_list(chain):
    assert [version.number for version in chain] == [0, 1, 2]
    assert [chain[n].number for n in (0, 2, -1)] == [0, 2, 2]
    assert repr(chain) == f"Chain({str(chain.path)!r}, versions=[0, 1, 2])"


@pytest.mark.parametrize("number", [3, -4, 100])
def test_a_version_that_is_not_there_is_refused_with_those_that_are(chain, number):
    message = rf"no version {number} in .*chain: it has 0\.\.2"
    for ask in (chain.open, chain.record):
        with pytest.raises(NoSuchVersion, match=message):
            ask(number)
    with pytest.raises(IndexError, match=message):
        chain[number]


def test_no_chain_says_what_writes_one(tmp_path):
    assert len(Chain(tmp_path / "none")) == 0
    for ask in (Chain(tmp_path / "none").require, Chain(tmp_path / "none").verify):
        with pytest.raises(
            UserError, match=r"no chain at .*none: training writes one to the folder chain"
        ):
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


def copied_while_writing(chain, to, monkeypatch):
    """The folder that a writer fills, as it is when the writer is killed."""
    save = ocp.save

    def copying_save(folder, tree):
        save(folder, tree)
        shutil.copytree(folder.parent, to)

    with monkeypatch.context() as patch:
        patch.setattr(ocp, "save", copying_save)
        chain.add(small(3), tiny.record())
    return to


def test_what_a_writer_left_is_swept_when_its_process_has_ended(chain, monkeypatch, tmp_path):
    made = copied_while_writing(chain, tmp_path / "aside", monkeypatch)
    writer = json.loads((made / "writer.json").read_text())
    ended = subprocess.Popen(["true"])
    ended.wait()
    writers = {
        "alive": writer,
        "ended": {**writer, "pid": ended.pid},
        "elsewhere": {**writer, "host": "another-host", "pid": ended.pid},
        "unknown": None,
        "forged": {**writer, "pid": "many"},
        "of no kind": [1, 2],
    }
    kept = set()
    for number, (name, content) in enumerate(writers.items()):
        left = Path(chain.path) / f".adding-0003-{number:08x}"
        shutil.copytree(made, left)
        (left / "writer.json").unlink()
        if content is not None:
            (left / "writer.json").write_text(json.dumps(content))
        kept |= {left.name} if name != "ended" else set()
    (Path(chain.path) / ".adding-mine").mkdir()
    chain.sweep()
    assert {p.name for p in chain.path.glob(".*")} == {*kept, ".adding-mine"}
    for name in kept:  # a day and a minute old: numbers of processes are used again
        os.utime(Path(chain.path) / name, times=(time.time() - 24 * 3600 - 60,) * 2)
    chain.sweep()
    assert {p.name for p in chain.path.glob(".*")} == {".adding-mine"}
    assert chain.verify() == dict.fromkeys(range(4))


def test_a_chain_that_does_not_exist_is_swept_in_vain(tmp_path):
    Chain(tmp_path / "none").sweep()
    assert not (tmp_path / "none").exists()


def test_a_number_has_one_name(chain):
    for name in ("00002", "000000002", "\u0660\u0660\u0660\u0662", "2", "02", "0002 ", "0002.bak"):
        shutil.copytree(chain.path / "0002", chain.path / name)
    assert chain.numbers() == [0, 1, 2] and len(chain) == 3
    assert chain.verify() == {0: None, 1: None, 2: None}
    assert chain.add(small(3), tiny.record()) == 3


def test_a_gap_is_named(chain):
    assert chain.require_whole() is chain
    chain.add(small(3), tiny.record())
    for gone, named in (
        (1, "lacks 1 of its versions 0..3"),
        (2, "lacks 1..2 of its versions 0..3"),
    ):
        shutil.rmtree(chain.path / f"{gone:04d}")
        with pytest.raises(UserError, match=named):
            chain.require_whole()
    with pytest.raises(UserError, match="no chain at"):
        Chain(chain.path / "none").require_whole()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["projection/kernel", "bn1/mean"])
def test_values_that_are_not_finite_make_no_version(chain, bad, name):
    part, leaf = name.split("/")
    kind = "params" if part == "projection" else "batch_stats"
    for dtype in (np.float32, jnp.bfloat16):
        variables = jax.tree.map(np.array, small(3))
        variables[kind][part][leaf] = variables[kind][part][leaf].astype(dtype)
        variables[kind][part][leaf].flat[-1] = bad
        with pytest.raises(UserError, match=f"{kind}/{name} holds values that are not finite"):
            chain.add(jax.tree.map(jnp.asarray, variables), tiny.record())
    assert chain.numbers() == [0, 1, 2] and not list(chain.path.glob(".*"))


def test_a_record_that_no_version_can_have_is_not_added(chain):
    with pytest.raises(UserError, match="a version's mean cannot be"):
        chain.add(small(3), tiny.record(mean=(float("nan"),) * 3))
    with pytest.raises(UserError, match="cannot write version 3"):
        chain.add(small(3), tiny.record(config={"lr": float("nan")}))
    assert chain.numbers() == [0, 1, 2] and not list(chain.path.glob(".*"))


# Chains of the first release


def test_a_chain_of_format_1_opens_with_the_names_of_now(tmp_path):
    images = tiny.dataset().images[:4]
    described = [tiny.record(), tiny.record(method="er", head_classes=5, feature_size=16)]
    for number, record in enumerate(described):
        variables = tiny.variables(record, seed=number)
        old = write_format_1(tmp_path / "old", number, record, variables)
        Chain(tmp_path / "new").add(variables, record)
        text = (old.path / f"{number:04d}" / "record.json").read_text()
        layer = "fc2" if record.head_classes else "fc1"
        assert f'"params/{layer}/kernel"' in text and "projection" not in text
        opened = old.open(number)
        assert_same_bits(opened.variables, variables)
        assert opened.sha256 == json.loads(text)["variables_sha256"] != variables_sha256(variables)
        assert old.record(number) == record and record.method_arguments == {}
        np.testing.assert_array_equal(
            embed(opened, images), embed(Chain(tmp_path / "new")[number], images)
        )


def test_a_chain_of_format_1_goes_on_in_the_format_of_now(tmp_path):
    chain = write_format_1(tmp_path / "chain", 0, tiny.record(), SMALL)
    assert chain.add(small(1), tiny.record()) == 1
    assert chain.verify() == {0: None, 1: None}
    assert_same_bits(chain[0].variables, SMALL)
    assert_same_bits(chain[1].variables, small(1))
    with pytest.raises(UserError, match=r"num_prototypes 32 differs from the chain's 16"):
        chain.add(small(2), tiny.record(num_prototypes=32, feature_size=31))


def test_a_record_of_format_1_is_checked_as_well(tmp_path):
    chain = write_format_1(tmp_path / "chain", 0, tiny.record(), SMALL)
    path = chain.path / "0000" / "record.json"
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 1'))
    with pytest.raises(UserError, match=r"cannot be used: record\.json was altered"):
        chain.open(0)


# Two programs


def test_a_number_taken_while_writing_is_not_overwritten(tmp_path, monkeypatch):
    assert_the_later_writer_is_refused(tmp_path / "chain", monkeypatch)
    assert not list((tmp_path / "chain").glob(".*"))


def test_of_programs_that_add_at_once_one_wins(tmp_path, monkeypatch):
    encode, all_written, outcomes = store.encode, threading.Barrier(4), {}

    def encode_and_wait(*arguments, **options):
        text = encode(*arguments, **options)
        all_written.wait()
        return text

    def add(seed):
        try:
            outcomes[seed] = Chain(tmp_path / "chain").add(small(seed), tiny.record(), number=0)
        except UserError as error:
            outcomes[seed] = str(error)

    monkeypatch.setattr(store, "encode", encode_and_wait)
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
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    for owner, name in ((store, "encode"), (ocp, "save")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, full)
            with pytest.raises(UserError, match=r"cannot write version 3 to .*No space left on"):
                chain.add(small(3), tiny.record())
        assert chain.verify() == {0: None, 1: None, 2: None}
        assert not list(chain.path.glob(".*"))


def test_a_file_where_the_chain_should_be_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write version 0 to .*file/chain"):
        Chain(tmp_path / "file" / "chain").add(SMALL, tiny.record())
    assert Chain(tmp_path / "file").numbers() == []
