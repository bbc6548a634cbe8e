"""Entries that were cut, altered, forged or swapped are refused by name; the others open."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import tensorstore
from hypothesis import given, settings
from hypothesis import strategies as st
from small_chain import (
    assert_others_open,
    assert_refused_at_once,
    assert_same_bits,
    seal,
    small,
    write_three,
)

from compat_jax.chain import Chain, CorruptEntry
from compat_jax.files import sha256, walk


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write_three(tmp_path_factory.mktemp("written") / "chain")


@pytest.fixture
def chain(written, tmp_path):
    """A copy of them that a test may break."""
    shutil.copytree(written.path, tmp_path / "chain")
    return Chain(tmp_path / "chain")


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
    seal(path, body)


def kernel(**fields):
    return lambda body: body["variables"]["params/projection/kernel"].update(fields)


def field(**fields):
    return lambda body: body["record"].update(fields)


def file(**fields):
    return lambda body: next(iter(body["files"].values())).update(fields)


def extra_file(name):
    digest = hashlib.sha256(b"secret").hexdigest()
    return lambda body: body["files"].update({name: {"bytes": 6, "sha256": digest}})


FORGERIES = {
    "unknown format": (
        lambda b: b.update(format=3),
        r"its format is 3, this release reads \(1, 2\): use the release that wrote it \(.*jax",
    ),
    "format of a text": (lambda b: b.update(format="2"), "its format is '2', this release reads"),
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
    "another dtype": (kernel(dtype="float64"), r"stored as float32 \(3, 4\) .* says float64"),
    "another shape": (kernel(shape=[4, 3]), r"stored as float32 \(3, 4\) .* says float32 \(4, 3\)"),
    "another network": (lambda b: b["variables"].clear(), "it holds other arrays: "),
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


# What is no regular file


def replaced_by_folder(path):
    path.mkdir()


def replaced_by_endless_device(path):
    path.symlink_to("/dev/zero")


def replaced_by_link(path):
    path.symlink_to(path.parents[1] / "elsewhere")


PUTS = {
    "pipe": os.mkfifo,
    "device": replaced_by_endless_device,
    "folder": replaced_by_folder,
    "link": replaced_by_link,
}


@pytest.mark.parametrize("kind", PUTS)
def test_what_is_no_regular_file_is_refused_at_once(chain, kind):
    folder = Path(chain.path) / "0001"
    files = [p for p in folder.rglob("*") if p.is_file()]
    for file in files:
        whole = file.read_bytes()
        (file.parents[1] / "elsewhere").write_bytes(whole)
        file.unlink()
        PUTS[kind](file)
        message = f"^version 1 of .* cannot be used: .*{file.name} is no regular file"
        assert_refused_at_once(lambda: chain.open(1), message)
        if file.name == "record.json":
            assert_refused_at_once(lambda: chain.record(1), message)
            assert_others_open(chain, but=1)
        file.rmdir() if kind == "folder" else file.unlink()
        file.write_bytes(whole)
        (file.parents[1] / "elsewhere").unlink()
    assert chain.verify() == {0: None, 1: None, 2: None}


CLAIMS = {  # of a checkpoint's own metadata about an array of 3 numbers
    "shape": lambda meta: meta.update(shape=[2**40]),
    "chunks": lambda meta: _set_chunks(meta, 2**40),
    "dtype": lambda meta: meta.update(data_type="float64"),
    "nothing": lambda meta: meta.clear(),
}


def _set_chunks(meta, size):
    meta["chunk_grid"]["configuration"]["chunk_shape"] = [size]
    for codec in meta["codecs"]:
        if "chunk_shape" in codec["configuration"]:
            codec["configuration"]["chunk_shape"] = [size]


@pytest.mark.filterwarnings("default")  # Orbax logs what it cannot read
@pytest.mark.parametrize("claim", CLAIMS)
def test_a_checkpoint_that_claims_more_than_its_record_is_refused_before_it_is_read(
    tmp_path, claim
):
    """All checksums are right: whoever forged it has made them anew."""
    chain = write_three(tmp_path / "chain")
    entry = chain.path / "0001"
    store = f"file://{entry}/variables/state/"
    database = tensorstore.KvStore.open({"driver": "ocdbt", "base": store}).result()
    key = b"batch_stats.bn1.mean/zarr.json"
    meta = json.loads(database.read(key).result().value)
    CLAIMS[claim](meta)
    database.write(key, json.dumps(meta).encode()).result()
    body = json.loads((entry / "record.json").read_text())
    del body["record_sha256"]
    body["files"] = {
        str(p.relative_to(entry)): {"bytes": p.stat().length, "sha256": sha256(p)}
        for p in walk(entry / "variables")
    }
    seal(entry / "record.json", body)
    with pytest.raises(CorruptEntry, match=r"version 1 of .* cannot be used"):
        chain.open(1)
    assert_others_open(chain, but=1)
