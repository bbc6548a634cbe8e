"""The manifest of a gallery: written and read back; a hundred hostile ones are refused."""

import base64
import copy
import dataclasses
import json

import numpy as np
import pytest
import tiny

from compat_jax.data import Preparation
from compat_jax.errors import UserError
from compat_jax.gallery.manifest import Lease, Manifest
from compat_jax.gallery.member import Member
from compat_jax.spaces import LEARNT, Preprocessing

SIZE = tiny.K - 1
HOSTILE = 100
# What may stand in the place of a value.
NONSENSE = (
    None, True, False, -1, 0, 1.5, 2**70, -(2**70), float("nan"), float("inf"), "", "0", "-1", "\0",
    "x" * 100_000, "../../etc/passwd", "<script>", "\ud800", [], [[]], [None] * 5, {}, {"": {}},
    {"a": {"b": {"c": 1}}}, b"bytes", [float("nan")] * 3, [1, 2], "é" * 64, "0" * 63 + "g", "A" * 64,
)  # fmt: skip


def features(seed, count=6, size=SIZE):
    """Rows of norm 1."""
    rows = np.random.default_rng(seed).normal(size=(count, size)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def member(seed, fingerprint=lambda member: "0" * 16) -> Member:
    """An entry whose fingerprint fits."""
    text = base64.b64encode(features(seed).astype("<f4").tobytes()).decode()
    made = Member(f"{seed:064x}", "0" * 16, (0.5, 0.4, 0.3), (0.2, 0.2, 0.1), canary=text)
    return dataclasses.replace(made, model=fingerprint(made))


@pytest.fixture(scope="module")
def manifest() -> Manifest:
    """Of two versions, with a lease."""
    preparation = Preparation(tiny.SIZE, crop=0.875)
    preprocessing = Preprocessing.of(tiny.record(preparation=preparation.describe()))
    made = object.__new__(Manifest)  # for its fingerprints
    given = {
        "generation": 7,
        "chain": "ab" * 32,
        "num_prototypes": tiny.K,
        "order": "descending",
        "feature_size": SIZE,
        "preprocessing": preprocessing,
    }
    for name, value in given.items():
        object.__setattr__(made, name, value)
    members = {number: member(number, made.fingerprint) for number in (0, 12)}
    lease = Lease("host/1/abc", 1.75e9)
    return Manifest(**given, members=members, query=12, previous=0, lease=lease)


def test_a_manifest_is_read_back(manifest):
    content = json.loads(json.dumps(manifest.describe(), allow_nan=False))
    assert Manifest.read(content) == manifest
    assert (content["feature_size"], content["columns"]) == (15, 16)
    assert content["versions"]["12"]["variables"] == f"{12:064x}"
    np.testing.assert_array_equal(manifest.members[12].features(SIZE), features(12))
    bare = dataclasses.replace(manifest, lease=None, previous=None)
    assert Manifest.read(json.loads(json.dumps(bare.describe()))) == bare


def test_a_fingerprint_is_of_everything_that_features_depend_on(manifest):
    one = member(0)
    members = [
        one,
        member(1),
        dataclasses.replace(one, mean=(0.4, 0.4, 0.3)),
        dataclasses.replace(one, std=(0.2, 0.1, 0.1)),
    ]
    prepared = Preparation(tiny.SIZE, resize="squash")
    changed = [
        {"preprocessing": dataclasses.replace(manifest.preprocessing, preparation=prepared)},
        {"order": "ascending"},
        {"num_prototypes": 20, "feature_size": 19},
    ]
    found = {manifest.fingerprint(each) for each in members}
    for changes in changed:
        other = copy.copy(manifest)
        for name, value in changes.items():
            object.__setattr__(other, name, value)
        found.add(other.fingerprint(one))
    assert len(found) == 7 and all(len(text) == 16 for text in found)


def places(content, path=()):
    """Every key of a nested mapping, as a path."""
    for key, value in content.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from places(value, (*path, key))


def spoilt(content, rng) -> dict:
    """A manifest with one value removed, added, replaced, or moved by a little."""
    made = copy.deepcopy(content)
    paths = sorted(places(made), key=str)
    *above, last = paths[rng.integers(len(paths))]
    owner = made
    for key in above:
        owner = owner[key]
    kind = rng.integers(4)
    if kind == 0:
        del owner[last]
    elif kind == 1:
        owner[f"{last}?"] = owner[last]
    elif kind == 2 or not isinstance(owner[last], str | list):
        owner[last] = NONSENSE[rng.integers(len(NONSENSE))]
    elif isinstance(owner[last], str):
        at = rng.integers(len(owner[last]))
        owner[last] = owner[last][:at] + owner[last][at + 1 :]
    else:
        owner[last] = owner[last][1:]
    return made


def same(a, b) -> bool:
    """Return whether two contents are one but for NaN."""
    return repr(a) == repr(b)


def test_a_hundred_hostile_manifests_are_refused(manifest):
    content, rng = manifest.describe(), np.random.default_rng(16)
    refused: dict[str, int] = {}
    while len(refused) < HOSTILE:
        made = spoilt(content, rng)
        if same(made, content):
            continue
        try:
            read = Manifest.read(made)
        except UserError as error:
            text = str(error)
            assert text.startswith("the gallery's manifest cannot be used: ") and len(text) < 600
            refused[repr(made)[:50_000]] = len(text)
        else:  # what is read is a manifest: one that somebody could have written
            assert read.describe() == json.loads(json.dumps(made)), made


FORGED = {
    "no mapping": (lambda m: [m], "the manifest must be a mapping"),
    "nothing": (lambda m: {}, "the manifest lacks chain, columns"),
    "another format": (lambda m: m | {"format": 2}, "its format is 2, this release reads 1"),
    "a format that is true": (lambda m: m | {"format": True}, "must be a whole number"),
    "a key too many": (lambda m: m | {"run": "rm"}, "has 'run', which is no field of it"),
    "generation 0": (lambda m: m | {"generation": 0}, "generation must be at least 1"),
    "a huge feature": (
        lambda m: m | {"feature_size": 2**40},
        "feature_size must be at least 1 and",
    ),
    "another size": (lambda m: m | {"feature_size": 16}, "have 15 numbers, not 16"),
    "other columns": (lambda m: m | {"columns": 15}, "of size 15 take 16 columns, not 15"),
    "an unknown order": (lambda m: m | {"order": "random"}, "unknown order 'random'"),
    "another order": (lambda m: m | {"order": "ascending"}, "is not that of its variables"),
    "a learnt head": (lambda m: m | {"order": LEARNT}, "is not that of its variables"),
    "an unknown query": (lambda m: m | {"query": 3}, "version 3 is in force, but not among"),
    "no version": (lambda m: m | {"versions": {}}, "a gallery has 1 to 10000 versions, not 0"),
    "a version of two names": (
        lambda m: m | {"versions": m["versions"] | {"00": m["versions"]["0"]}},
        "'00' is no number of a version",
    ),
    "many versions": (
        lambda m: m | {"versions": {str(n): {} for n in range(10_001)}},
        "there are 10001 versions, more than 10000",
    ),
    "a lease for ever": (
        lambda m: m | {"lease": {"owner": "a", "until": 1e300}},
        "lease.until must be at least 0 and at most",
    ),
    "an owner with a line break": (
        lambda m: m | {"lease": {"owner": "a\nb", "until": 1.0}},
        "the owner of a lease is a short text",
    ),
}


@pytest.mark.parametrize("kind", FORGED)
def test_what_is_wrong_is_said(manifest, kind):
    forge, message = FORGED[kind]
    with pytest.raises(UserError, match=message):
        Manifest.read(forge(manifest.describe()))


def canary(rows):
    """A canary's text."""
    return base64.b64encode(np.asarray(rows, "<f4").tobytes()).decode()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("é", "are not base64"),
        ("AAA", "are not base64"),
        ("", "are no rows of 15 float32"),
        (canary(np.ones(14)), "are no rows of 15 float32"),
        (canary(np.full((6, 15), np.nan)), "not finite, or not of norm 1"),
        (canary(np.full((6, 15), 3e38)), "not finite, or not of norm 1"),
        (canary(np.zeros((6, 15))), "not finite, or not of norm 1"),
        (canary(features(0, count=5)), "different numbers of canaries"),
    ],
)
def test_canary_features_that_are_none_are_refused(manifest, text, message):
    content = manifest.describe()
    content["versions"]["0"]["canary"] = text
    with pytest.raises(UserError, match=message):
        Manifest.read(content)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_shape": [8, 8]}, "image_shape must be height, width and channels"),
        ({"image_shape": [8, 9, 3]}, r"brought to 8 px, the network takes \(8, 9, 3\)"),
        ({"image_shape": [10**9, 8, 3]}, "image_shape must be"),
        ({"preparation": {"size": 8}}, "preparation lacks crop, filter, resize"),
        ({"preparation": []}, "preparation must be a mapping"),
    ],
)
def test_preprocessing_that_is_none_is_refused(manifest, changes, message):
    content = manifest.describe()
    content["preprocessing"] |= changes
    with pytest.raises(UserError, match=message):
        Manifest.read(content)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mean": [0.5]}, "mean and std of version 12 need a number for each of 3 channels"),
        ({"std": [0.3, 0.3, 0.0]}, "std of a version must be numbers above 0"),
        ({"std": []}, "std of a version must be numbers above 0"),
        ({"mean": [0.1, 0.1, 0.1]}, "the fingerprint of version 12 is not that of"),
    ],
)
def test_normalisation_that_is_none_is_refused(manifest, changes, message):
    content = manifest.describe()
    content["versions"]["12"] |= changes
    with pytest.raises(UserError, match=message):
        Manifest.read(content)


def test_a_preparation_against_the_record_is_refused():
    record = tiny.record(preparation=Preparation(8).describe())
    with pytest.raises(UserError, match="the version was trained on pictures prepared by"):
        Preprocessing.of(record, Preparation(8, resize="squash"))
