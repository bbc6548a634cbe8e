"""Indexes against brute force; galleries of one version, queries of another."""

import re

import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import compat_jax as cj
from compat_jax.chain import Chain
from compat_jax.errors import UserError
from compat_jax.retrieval import ExactIndex, Index, SearchOptions, embed
from compat_jax.retrieval.blocks import check_finite
from compat_jax.retrieval.index import check_comparable

GALLERY = tiny.dataset(classes=4, per_class=5, seed=2)
QUERY = tiny.dataset(classes=4, per_class=3, seed=1)


def whole_numbers(rows, seed=0, size=5):
    """Small integers: inner products are exact in float32, and ties abound."""
    return np.random.default_rng(seed).integers(-2, 3, (rows, size)).astype(np.float32)


class Plain:
    """A `VectorIndex` in plain Python, of rows in the order in which they were added."""

    def __init__(self):
        self.rows = []

    def __len__(self):
        return len(self.rows)

    @property
    def ids(self):
        return np.array([number for number, _ in self.rows], np.int64)

    def add(self, features, ids=None):
        first = max([number for number, _ in self.rows], default=-1) + 1
        ids = range(first, first + len(features)) if ids is None else ids
        self.rows += [(int(n), row) for n, row in zip(ids, features, strict=True)]

    def remove(self, ids):
        gone = {int(n) for n in np.atleast_1d(ids)}
        self.rows = [(n, row) for n, row in self.rows if n not in gone]

    def search(self, query, k):
        """Largest inner product first; of equal ones the row added first."""
        scores, ids = [], []
        for one in query:
            products = [float(one @ row) for _, row in self.rows]
            order = sorted(range(len(products)), key=lambda i: (-products[i], i))[:k]
            scores.append([products[i] for i in order])
            ids.append([self.rows[i][0] for i in order])
        return np.array(scores, np.float32), np.array(ids, np.int64)


def assert_same_answers(index, plain, query, k):
    scores, ids = index.search(query, k)
    expected = plain.search(query, k)
    np.testing.assert_array_equal(scores, expected[0])
    np.testing.assert_array_equal(ids, expected[1])
    assert (scores.dtype, ids.dtype) == (np.float32, np.int64)


# The exact index


@hypothesis.settings(max_examples=15, deadline=None)
@hypothesis.given(st.data())
def test_whatever_is_added_and_removed_search_finds_what_is_left(data):
    index, plain = ExactIndex(), Plain()
    for step in range(data.draw(st.integers(1, 5))):
        features = whole_numbers(data.draw(st.integers(0, 9)), seed=step)
        ids = None
        if data.draw(st.booleans()):
            new = st.integers(0, 60).filter(lambda n: n not in plain.ids)
            size = len(features)
            ids = data.draw(st.lists(new, min_size=size, max_size=size, unique=True))
        for one in (index, plain):
            one.add(features, ids)
        gone = data.draw(st.lists(st.sampled_from([*plain.ids, None]), max_size=4))
        gone = [n for n in gone if n is not None]
        for one in (index, plain):
            one.remove(gone)
        np.testing.assert_array_equal(index.ids, plain.ids)
        assert len(index) == len(plain) and index.ids.dtype == np.int64
    if len(plain):
        assert_same_answers(index, plain, whole_numbers(3, seed=99), k=len(plain))
    else:
        with pytest.raises(UserError, match="the index is empty: add features first"):
            index.search(whole_numbers(3), 1)


def test_an_index_searches_on_eight_devices_too():
    mesh = cj.Session(mesh="data:8").devices()
    index, plain = ExactIndex(mesh, SearchOptions(query_block=4, gallery_block=8)), Plain()
    for one in (index, plain):
        one.add(whole_numbers(70), np.arange(70)[::-1] + 5)
        one.remove([5, 30, 74])
    assert_same_answers(index, plain, whole_numbers(6, seed=1), k=9)


def test_ids_count_on_from_the_largest():
    index = ExactIndex()
    index.add(whole_numbers(2))
    index.add(whole_numbers(1), [40])
    index.add(whole_numbers(2))
    index.remove(40)
    index.add(whole_numbers(1), np.array([7], np.uint8))
    index.add(whole_numbers(1))
    assert index.ids.tolist() == [0, 1, 41, 42, 7, 43]
    index.ids[:] = 0  # a copy
    assert index.ids.tolist() == [0, 1, 41, 42, 7, 43]


def test_ids_may_be_as_large_as_int64():
    index = ExactIndex()
    index.add(np.eye(2, dtype=np.float32), [2**63 - 1, -(2**63)])
    assert index.search(np.eye(2, dtype=np.float32), 1)[1].tolist() == [[2**63 - 1], [-(2**63)]]
    with pytest.raises(UserError, match=r"ids must lie in -2\*\*63\.\.2\*\*63-1"):
        index.add(whole_numbers(1, size=2))  # counting on leaves the range
    with pytest.raises(UserError, match=r"ids must lie in -2\*\*63\.\.2\*\*63-1"):
        index.add(whole_numbers(1, size=2), np.array([2**63], np.uint64))
    assert len(index) == 2


@pytest.mark.parametrize(
    ("features", "ids", "message"),
    [
        (whole_numbers(2), [5], "2 features need as many ids, got 1"),
        (whole_numbers(2), [3, 1], r"ids must be new and different: \[1\] are present already"),
        (whole_numbers(2), [7, 7], "ids must be different from one another"),
        (whole_numbers(2), [7.0, 8.0], r"ids must be whole numbers \[n\], got float64"),
        (whole_numbers(2), ["7", "8"], r"ids must be whole numbers \[n\], got <U1"),
        (whole_numbers(2), [True, False], r"ids must be whole numbers \[n\], got bool"),
        (whole_numbers(2), [[7], [8]], r"ids must be whole numbers \[n\], got int64 of shape"),
        (whole_numbers(2, size=4), None, "versions of unequal feature size cannot be compared"),
        (whole_numbers(2)[0], None, r"retrieval takes features \[rows, size\]"),
        (np.float32([[1, 2, 3, np.nan, 5]]), None, "gallery features .* not finite in row 0"),
        (np.float32([[0] * 5, [0, np.inf, 0, 0, 0]]), None, "not finite in row 1"),
    ],
)
def test_what_cannot_be_added_changes_nothing(features, ids, message):
    index = ExactIndex()
    index.add(whole_numbers(3))
    with pytest.raises(UserError, match=message):
        index.add(features, ids)
    assert index.ids.tolist() == [0, 1, 2]
    assert_same_answers(index, plain_of(whole_numbers(3)), whole_numbers(2, seed=1), k=3)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("place", [np.asarray, jnp.asarray])
def test_large_values_are_finite_though_their_sum_may_not_be(place, dtype):
    large = 0.9 * float(jnp.finfo(dtype).max)
    features = np.array([[1, 2], [large, large], [3, 4], [large, -large]], dtype)
    check_finite("gallery", place(features))
    for broken in ((np.nan, 1), (np.inf, -np.inf)):
        features[2] = broken
        with pytest.raises(UserError, match=r"gallery features .* not finite in row 12"):
            check_finite("gallery", place(features), start=10)


def plain_of(features):
    plain = Plain()
    plain.add(features)
    return plain


def test_what_is_no_matrix_is_refused_by_an_empty_index_too():
    for features in (np.ones(5, np.float32), np.ones((2, 3, 4), np.float32)):
        with pytest.raises(UserError, match=r"retrieval takes features \[rows, size\]"):
            ExactIndex().add(features)


@pytest.mark.parametrize("k", [1.5, True, "3", None, 2.0])
def test_a_k_that_is_no_whole_number_is_refused_by_every_search(chain, k):
    index, rows = Index(chain[0], GALLERY.images, engine=Plain()), ExactIndex()
    rows.add(whole_numbers(3))
    for ask in (
        lambda: index.search(chain[1], QUERY.images, k=k),
        lambda: rows.search(whole_numbers(1), k),
        lambda: cj.retrieval.search(whole_numbers(1), whole_numbers(3), k),
    ):
        with pytest.raises(UserError, match=f"k must be a whole number, got {re.escape(repr(k))}"):
            ask()
    assert rows.search(whole_numbers(1), np.int8(2))[1].shape == (1, 2)


def test_features_may_be_lists_of_numbers():
    index = ExactIndex()
    index.add([[1, 0], [0, 1]])
    scores, ids = index.search([[0, 2]], 1)
    assert (scores.tolist(), ids.tolist()) == ([[2.0]], [[1]])
    assert cj.retrieval.search([[0, 2]], [[1, 0], [0, 1]], 1)[1].tolist() == [[1]]
    message = r"features must be numbers \[rows, size\], every row as long, got "
    for wrong in ([[1, 0], [1]], ["a"], {"a": 1}, object()):
        for ask in (lambda w=wrong: index.add(w), lambda w=wrong: index.search(w, 1)):
            with pytest.raises(UserError, match=message):
                ask()
    assert len(index) == 2


def test_what_is_no_version_and_options_that_do_not_exist_are_refused(chain):
    index = Index(chain[0], GALLERY.images)
    for ask in (
        lambda: Index("runs/chain"),
        lambda: Index("runs/chain", GALLERY.images),
        lambda: index.search("runs/chain", QUERY.images),
        lambda: embed("runs/chain", QUERY.images),
    ):
        with pytest.raises(UserError, match="version must be a Version, got str 'runs/chain'"):
            ask()
    for old, new in (("x", chain[0]), (chain[0], "x")):
        with pytest.raises(UserError, match=r"(old|new) must be a Version, got str 'x'"):
            cj.gallery.check(old, new, query=QUERY, gallery=GALLERY)
    message = "unknown option of embed 'batchsize'. Did you mean 'batch_size'"
    for ask in (
        lambda: Index(chain[0], batchsize=3),
        lambda: Index(chain[0], GALLERY.images, batchsize=3),
        lambda: embed(chain[0], GALLERY.images, batchsize=3),
    ):
        with pytest.raises(UserError, match=message):
            ask()


def test_what_cannot_be_removed_or_searched_is_refused():
    index = ExactIndex()
    for ask in (lambda: index.remove([0]), lambda: index.remove(0)):
        with pytest.raises(UserError, match=r"no row with id \[0\]"):
            ask()
    index.add(whole_numbers(3))
    with pytest.raises(UserError, match=r"no row with id \[3, 9\]"):
        index.remove([0, 3, 9])
    assert index.ids.tolist() == [0, 1, 2]
    for k in (0, 4):
        with pytest.raises(UserError, match=rf"k={k} neighbours of a gallery of 3 rows"):
            index.search(whole_numbers(1), k)
    with pytest.raises(UserError, match="versions of unequal feature size"):
        index.search(whole_numbers(1, size=4), 1)
    index.remove([0, 1, 2])
    with pytest.raises(UserError, match="the index is empty"):
        index.search(whole_numbers(1), 1)


# A gallery of one version, queries of another


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """Two versions of two widths in one simplex, and one with a head of its own."""
    made = Chain(tmp_path_factory.mktemp("index") / "chain")
    described = [
        tiny.record(backbone_arguments={"width": 8}),
        tiny.record(backbone_arguments={"width": 16}, task=1),
        tiny.record(method="er", head_classes=4, feature_size=16, task=2),
    ]
    for seed, record in enumerate(described):
        made.add(tiny.variables(record, seed), record)
    return made


def test_queries_of_a_later_version_search_the_gallery_of_an_older_one(chain):
    index = Index(chain[0], GALLERY.images, mesh=tiny.one_device())
    query, gallery = embed(chain[1], QUERY.images), embed(chain[0], GALLERY.images)
    products = query.astype(np.float64) @ gallery.astype(np.float64).T
    order = np.argsort(-products, axis=1, kind="stable")[:, :3]
    scores, ids = index.search(chain[1], QUERY.images, k=3)
    np.testing.assert_array_equal(ids, order)
    np.testing.assert_allclose(scores, np.take_along_axis(products, order, axis=1), atol=1e-6)
    own_scores, own_ids = index.search(chain[0], GALLERY.images, k=1)
    np.testing.assert_array_equal(own_ids[:, 0], np.arange(len(GALLERY)))
    np.testing.assert_allclose(own_scores, 1, atol=1e-6)
    assert index.search(chain[1], QUERY.images)[0].shape == (len(QUERY), 10)


def test_pictures_come_and_go(chain):
    index = Index(chain[0])
    assert len(index) == 0 and index.ids.tolist() == []
    index.add(GALLERY.images[:6], [10, 11, 12, 13, 14, 15])
    index.add(GALLERY.images[6:8])
    index.remove([11, 16])
    assert len(index) == 6 and index.ids.tolist() == [10, 12, 13, 14, 15, 17]
    found = index.search(chain[0], GALLERY.images[:8], k=1)[1][:, 0]
    assert found[[0, 2, 3, 4, 5, 7]].tolist() == [10, 12, 13, 14, 15, 17]


def test_another_engine_may_hold_the_features(chain):
    engine = Plain()
    index = Index(chain[0], GALLERY.images, engine=engine)
    assert index.engine is engine and len(engine) == len(GALLERY)
    exact = Index(chain[0], GALLERY.images)
    np.testing.assert_array_equal(
        index.search(chain[1], QUERY.images, k=4)[1], exact.search(chain[1], QUERY.images, k=4)[1]
    )


def test_versions_that_cannot_be_compared_are_refused(chain):
    index = Index(chain[0], GALLERY.images)
    message = (
        "queries of version 2 cannot be compared with the gallery of version 0: features differ: 16 of "
        "the new version, 15 of the old one; version 2 was trained with a learnable classifier"
    )
    with pytest.raises(UserError, match=message):
        index.search(chain[2], QUERY.images, k=3)
    check_comparable(chain[1], chain[0])


NAMED = {"class_names": ("a", "b"), "preparation": cj.Preparation(tiny.SIZE).describe()}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label_order": "ascending"}, "orders of the prototypes differ: ascending"),
        (
            {"class_names": ("b", "a")},
            "other prototypes: class number 0 is 'a' in the chain, but 'b'",
        ),
        (
            {"num_prototypes": 32, "feature_size": 31},
            r"prototypes \(K\) differ: 32 of the new version",
        ),
        ({"method": "er", "head_classes": 4}, "version 1 was trained with a learnable classifier"),
        (
            {"preparation": cj.Preparation(tiny.SIZE, resize="squash").describe()},
            "pictures are preprocessed in another way: .*squash",
        ),
        ({"fresh": ("projection",)}, "version 1 has layers that were never trained"),
    ],
)
def test_an_index_refuses_what_a_check_of_a_gallery_refuses(changes, message):
    old = tiny.version(0, 0, **{"task": 0, **NAMED})
    new = tiny.version(1, 1, **{"task": 1, **NAMED, **changes})
    index = Index(old, GALLERY.images)
    with pytest.raises(UserError, match=message) as caught:
        index.search(new, QUERY.images, k=3)
    verdict = cj.gallery.check(old, new, query=QUERY, gallery=GALLERY)
    assert verdict.refused and all(reason in str(caught.value) for reason in verdict.reasons)


def test_a_preparation_that_is_given_to_an_index_is_that_of_both_versions():
    given, other = cj.Preparation(tiny.SIZE), cj.Preparation(tiny.SIZE, resize="squash")
    old, new = (
        tiny.version(n, n, **{**NAMED, "task": n, "preparation": one.describe()})
        for n, one in enumerate((given, other))
    )
    found = Index(old, GALLERY.images, preparation=given).search(new, QUERY.images, k=3)
    assert found[1].shape == (len(QUERY), 3)


def test_versions_of_a_learnable_head_are_compared_as_a_check_compares_them():
    old, new = (
        tiny.version(n, n, task=n, method="er", head_classes=4, feature_size=16) for n in (0, 1)
    )
    assert Index(old, GALLERY.images).search(new, QUERY.images, k=3)[0].shape == (len(QUERY), 3)


def test_pictures_of_another_size_are_refused(chain):
    large = tiny.dataset(classes=2, size=16).images
    index = Index(chain[0], GALLERY.images)
    for ask in (lambda: index.add(large), lambda: index.search(chain[1], large, k=1)):
        with pytest.raises(UserError, match=r"embeds uint8 images of shape \[n, 8, 8, 3\]"):
            ask()
    assert len(index) == len(GALLERY)
