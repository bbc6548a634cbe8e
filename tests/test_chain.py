"""The chain of versions: what an entry records, what is refused, who wins when two programs add."""

import hashlib
import json
import shutil
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from compat_jax import chain as chains
from compat_jax.chain import Chain, CorruptEntry, variables_sha256
from compat_jax.errors import UserError

SMALL = {
    "params": {"fc1": {"kernel": np.arange(12, dtype=np.float32).reshape(3, 4)}},
    "batch_stats": {"bn1": {"mean": np.float32([1, 2, 3])}},
}


@pytest.fixture(scope="module", autouse=True)
def backbone():
    with tiny.one_conv():
        yield


def small(seed):
    """Another version's variables, as small."""
    return jax.tree.map(lambda x: x + np.float32(seed), SMALL)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Three tiny entries."""
    made = Chain(tmp_path_factory.mktemp("written") / "chain")
    for task in range(3):
        made.add(small(task), tiny.record(task=task, parent=task - 1 if task else None))
    return made


@pytest.fixture
def chain(written, tmp_path):
    """A copy of them that a test may break."""
    shutil.copytree(written.path, tmp_path / "chain")
    return Chain(tmp_path / "chain")


def assert_same_bits(a, b):
    assert variables_sha256(a) == variables_sha256(b)


def assert_others_open(chain, but):
    for number in set(chain.numbers()) - {but}:
        assert_same_bits(chain.open(number).variables, small(number))


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


# Refused entries


def test_each_file_cut_altered_or_missing_is_named(chain):
    folder = Path(chain.path) / "0001"
    files = [p for p in folder.rglob("*") if p.is_file()]
    assert len(files) > 5
    for file in files:
        whole = file.read_bytes()
        name = r"record\.json" if file.name == "record.json" else str(file.relative_to(folder))
        broken = [None, whole + b"x", b"x" * len(whole)] + ([whole[:-1]] if whole else [])
        for content in broken:
            if content == whole:  # the empty file, "altered"
                continue
            file.unlink() if content is None else file.write_bytes(content)
            with pytest.raises(CorruptEntry, match=f"^version 1 of .* cannot be used: .*{name}"):
                chain.open(1)
            file.write_bytes(whole)
    assert chain.verify() == {0: None, 1: None, 2: None}


@pytest.fixture(scope="module")
def attacked(written, tmp_path_factory):
    """Another copy and the files of its entry 1, for examples that repair what they break."""
    path = tmp_path_factory.mktemp("attacked") / "chain"
    shutil.copytree(written.path, path)
    files = sorted(p for p in (path / "0001").rglob("*") if p.is_file())
    return Chain(path), [(p, p.read_bytes()) for p in files if p.stat().st_size]


def opens_right_or_is_refused(chain):
    try:
        version = chain.open(1)
    except CorruptEntry as error:
        assert str(error).startswith(f"version 1 of {chain.path} cannot be used: ")
        assert "\n" not in str(error)
        return
    assert_same_bits(version.variables, small(1))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_flipped_bit_never_passes_for_the_right_bits(attacked, data):
    chain, files = attacked
    path, whole = data.draw(st.sampled_from(files))
    at = data.draw(st.integers(0, 8 * len(whole) - 1))
    altered = bytearray(whole)
    altered[at // 8] ^= 1 << at % 8
    try:
        path.write_bytes(altered)
        opens_right_or_is_refused(chain)
    finally:
        path.write_bytes(whole)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_a_cut_file_never_passes_for_the_right_bits(attacked, data):
    chain, files = attacked
    path, whole = data.draw(st.sampled_from(files))
    try:
        path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
        with pytest.raises(CorruptEntry, match="version 1 of"):
            chain.open(1)
    finally:
        path.write_bytes(whole)


def forge(chain, change, number=1):
    """Change a record as someone would who also makes its checksum fit."""
    path = Path(chain.path) / f"{number:04d}" / "record.json"
    body = json.loads(path.read_text())
    del body["record_sha256"]
    change(body)
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps({**body, "record_sha256": digest}))


def kernel(**fields):
    return lambda body: body["variables"]["params/fc1/kernel"].update(fields)


def field(**fields):
    return lambda body: body["record"].update(fields)


def file(**fields):
    return lambda body: next(iter(body["files"].values())).update(fields)


def extra_file(name):
    digest = hashlib.sha256(b"secret").hexdigest()
    return lambda body: body["files"].update({name: {"bytes": 6, "sha256": digest}})


FORGERIES = {
    "unknown format": (lambda b: b.update(format=2), "its format is 2, this release reads 1"),
    "no format": (lambda b: b.pop("format"), "KeyError"),
    "record of another entry": (lambda b: b.update(number=2), "added as version 2"),
    "path traversal": (extra_file("variables/../../../secret"), "a file outside itself"),
    "absolute path": (extra_file("/etc/passwd"), "a file outside itself"),
    "file beside variables": (extra_file("../0000/record.json"), "a file outside itself"),
    "zero byte in a path": (extra_file("variables/\0"), "."),
    "endless path": (extra_file("variables/" + "x" * 10_000), "."),
    "negative shape": (kernel(shape=[3, -4]), "cannot have shape"),
    "shape of a billion": (kernel(shape=[10**9, 10**9]), "too large"),
    "shape beyond counting": (kernel(shape=[10**30]), "cannot have shape"),
    "shape of fractions": (kernel(shape=[3.0, 4.0]), "cannot have shape"),
    "shape that is true": (kernel(shape=[True, 12]), "cannot have shape"),
    "shape of text": (kernel(shape="34"), "cannot have shape"),
    "no shape": (kernel(shape=None), "TypeError"),
    "objects": (kernel(dtype="object"), "cannot have shape"),
    "unknown dtype": (kernel(dtype="float31"), "float31"),
    "another dtype": (kernel(dtype="float64"), "SHA-256"),
    "another network": (lambda b: b["variables"].clear(), "."),
    "negative file size": (file(bytes=-1), "bytes instead of -1"),
    "huge file size": (file(bytes=10**30), "bytes instead of 1000"),
    "file size of text": (file(bytes="many"), "bytes instead of many"),
    "two folders": (extra_file("variables-01234567/x"), "variables-01234567/x is missing"),
    "list for a folder": (lambda b: b.update(files=[1, 2]), "AttributeError"),
    "no size": (lambda b: b["files"].popitem()[1] and b["files"].update(x=1), "outside itself"),
    "negative K": (field(num_prototypes=-16), "num_prototypes cannot be -16"),
    "huge K": (field(num_prototypes=10**40), "num_prototypes cannot be 1000"),
    "feature size of text": (field(feature_size="15"), "feature_size cannot be '15'"),
    "negative task": (field(task=-1), "task cannot be -1"),
    "negative image": (field(image_shape=[8, -8, 3]), "image_shape cannot be"),
    "flat image": (field(image_shape=[8, 8]), "image_shape cannot be"),
    "means of text": (field(mean=["a", "b", "c"]), "mean cannot be"),
    "infinite deviation": (field(std=[0.1, 0.1, float("inf")]), "std cannot be"),
    "method of a number": (field(method=3), "method cannot be 3"),
    "field of a later release": (field(temperature=0.1), "TypeError"),
    "no method": (lambda b: b["record"].pop("method"), "TypeError"),
    "a list for a record": (lambda b: b.update(record=[]), "KeyError"),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forged_record_is_refused_by_name(chain, name, tmp_path):
    (tmp_path / "secret").write_text("secret")
    change, message = FORGERIES[name]
    forge(chain, change)
    with pytest.raises(CorruptEntry, match=f"^version 1 of .*/chain cannot be used: .*{message}"):
        chain.open(1)
    assert_others_open(chain, but=1)
    assert (tmp_path / "secret").read_text() == "secret"


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "7", "null", "\0", "[" * 100_000, '{"format": 1e999}', "1" * 10_000]
)
def test_a_record_that_is_no_record_is_refused(chain, text):
    (chain.path / "0001" / "record.json").write_text(text)
    with pytest.raises(CorruptEntry, match=r"^version 1 of .* cannot be used: "):
        chain.open(1)
    with pytest.raises(CorruptEntry, match=r"^version 1 of .* cannot be used: "):
        chain.record(1)
    assert_others_open(chain, but=1)


def test_a_record_too_large_to_read_is_refused(chain):
    with (Path(chain.path) / "0001" / "record.json").open("r+b") as file:
        file.truncate(2**31)  # sparse: takes no room
    with pytest.raises(CorruptEntry, match=r"record\.json is too large"):
        chain.open(1)


def leaves(tree, path=()):
    """The paths of everything that is neither a dict nor a list."""
    if isinstance(tree, dict | list):
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        return [leaf for key, value in items for leaf in leaves(value, (*path, key))]
    return [path]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=3,
)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_whatever_is_forged_opens_right_or_is_refused(attacked, data):
    chain, files = attacked
    path, whole = next((p, w) for p, w in files if p.name == "record.json")

    def change(body):
        *parents, last = data.draw(st.sampled_from(leaves(body)))
        for key in parents:
            body = body[key]
        body[last] = data.draw(JSON)

    try:
        forge(chain, change)
        opens_right_or_is_refused(chain)
    finally:
        path.write_bytes(whole)


def test_an_entry_of_future_packages_opens_with_the_right_bits(chain):
    forge(chain, lambda body: body["packages"].update(jax="99.0", compat_jax="99.0", orbax="9"))
    assert_same_bits(chain.open(1).variables, small(1))


def test_swapped_entries_are_refused(chain):
    first, second, aside = (chain.path / name for name in ("0000", "0001", "aside"))
    first.rename(aside), second.rename(first), aside.rename(second)
    for number in (0, 1):
        with pytest.raises(CorruptEntry, match=f"added as version {1 - number}"):
            chain.open(number)
    assert_same_bits(chain.open(2).variables, small(2))


def test_swapped_records_are_refused(chain):
    paths = [chain.path / name / "record.json" for name in ("0000", "0001")]
    texts = [p.read_text() for p in paths]
    for path, text in zip(paths, texts[::-1], strict=True):
        path.write_text(text)
    for number in (0, 1):
        with pytest.raises(CorruptEntry, match=f"version {number} of"):
            chain.open(number)


def test_an_entry_that_is_no_folder_is_refused(chain):
    shutil.rmtree(chain.path / "0001")
    (chain.path / "0001").write_text("not a folder")
    with pytest.raises(CorruptEntry, match="version 1 of"):
        chain.open(1)
    assert_others_open(chain, but=1)


# Two programs


def test_a_number_taken_while_writing_is_not_overwritten(tmp_path, monkeypatch):
    mine, theirs = Chain(tmp_path / "chain"), Chain(tmp_path / "chain")
    encode, first = chains._encode, [True]

    def while_the_other_adds(*arguments):
        if first.pop():
            first.append(False)
            theirs.add(small(5), tiny.record())
        return encode(*arguments)

    monkeypatch.setattr(chains, "_encode", while_the_other_adds)
    with pytest.raises(UserError, match=r"version 0 of .* was added by another program"):
        mine.add(small(4), tiny.record())
    assert_same_bits(mine.open(0).variables, small(5))
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
