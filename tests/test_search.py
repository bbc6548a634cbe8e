"""Exact search against a float64 brute force, on one device and on eight."""

import dataclasses
import logging

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compat_jax.errors import UserError
from compat_jax.mesh import make_mesh
from compat_jax.retrieval import SearchOptions, blocks, exact, search
from compat_jax.retrieval.block_search import no_neighbours, round_rows, search_block
from compat_jax.retrieval.blocks import Block
from compat_jax.retrieval.exact import lower


def random_features(rows, size, seed):
    return np.random.default_rng(seed).standard_normal((rows, size), dtype=np.float32)


def whole_numbers(rows, size, seed):
    """Small integers: inner products are exact in float32, and ties abound."""
    return np.random.default_rng(seed).integers(-2, 3, (rows, size)).astype(np.float32)


def brute_force(query, gallery, k):
    scores = query.astype(np.float64) @ gallery.astype(np.float64).T
    rows = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, rows, axis=1), rows


# Many blocks with little data.
SMALL = SearchOptions(query_block=64, gallery_block=2048)


def small(**changes):
    return dataclasses.replace(SMALL, **changes)


def test_by_hand():
    gallery = np.array([[1, 0], [0, 1], [0.6, 0.8], [1, 0]], np.float32)
    scores, rows = search(np.array([[1, 0], [0, 2]], np.float32), gallery, 3)
    np.testing.assert_array_equal(rows, [[0, 3, 2], [1, 2, 0]])
    np.testing.assert_allclose(scores, [[1, 1, 0.6], [2, 1.6, 0]], rtol=1e-6)
    assert scores.dtype == np.float32 and rows.dtype == np.int32


@pytest.mark.parametrize(
    ("num_queries", "num_rows", "k"),
    [
        (1, 1, 1),
        (130, 63, 63),
        (130, 2048, 8),
        (1, 2049, 8),
        (130, 5000, 8),
        (130, 5000, 9),
        (130, 3000, 2500),
        (70, 20_000, 3),
    ],
)
@pytest.mark.parametrize("screen", [False, True])
def test_equals_brute_force(num_queries, num_rows, k, screen):
    query, gallery = random_features(num_queries, 16, 0), random_features(num_rows, 16, 1)
    scores, rows = search(query, gallery, k, options=small(screen=screen))
    expected_scores, expected_rows = brute_force(query, gallery, k)
    np.testing.assert_allclose(scores, expected_scores, atol=1e-5)
    # Neighbours in the ranking may swap where their scores agree to rounding, and only there.
    swapped = rows != expected_rows
    assert swapped.mean() < 0.01
    mine = np.einsum("qd,qkd->qk", query.astype(np.float64), gallery.astype(np.float64)[rows])
    np.testing.assert_allclose(mine, expected_scores, atol=1e-5)


@pytest.mark.parametrize("num_rows", [700, 2048, 5000, 6145])
@pytest.mark.parametrize("k", [1, 5, 40])
@pytest.mark.parametrize("screen", [False, True])
def test_ties_go_to_the_lower_row(num_rows, k, screen):
    query, gallery = whole_numbers(70, 6, 0), whole_numbers(num_rows, 6, 1)
    scores, rows = search(query, gallery, k, options=small(screen=screen, gallery_block=4096))
    expected_scores, expected_rows = brute_force(query, gallery, k)
    np.testing.assert_array_equal(scores, expected_scores)
    np.testing.assert_array_equal(rows, expected_rows)


def test_padding_is_never_returned_even_where_all_scores_are_negative():
    gallery = -np.abs(whole_numbers(2100, 6, 1)) - 1
    query = np.abs(whole_numbers(3, 6, 0)) + 1
    scores, rows = search(query, gallery, 2100, options=SMALL)
    np.testing.assert_array_equal(np.sort(rows, axis=1), np.tile(np.arange(2100), (3, 1)))
    assert (scores < 0).all()


@pytest.mark.parametrize(("num_rows", "best"), [(2148, 2060), (2148, 2147), (1100, 1099)])
@pytest.mark.parametrize("k", [1, 8])
def test_padding_does_not_displace_rows(num_rows, best, k):
    """The best row lies just before the padding, which repeats it, or else in the last block."""
    query = -(whole_numbers(3, 1, 0) ** 2) - 1
    gallery = np.arange(1, num_rows + 1, dtype=np.float32)[:, None]
    gallery[best] = 0.5
    scores, rows = search(query, gallery, k, options=SMALL)
    np.testing.assert_array_equal(rows, np.tile([best, *range(k - 1)], (3, 1)))
    np.testing.assert_array_equal(scores, query * gallery[rows[0], 0])


@hypothesis.settings(max_examples=10, deadline=None)
@hypothesis.given(
    st.integers(0, 2**31), st.integers(1, 300), st.integers(1, 600), st.sampled_from([1, 3, 600])
)
def test_any_size(seed, num_queries, num_rows, k):
    k = min(k, num_rows)
    query, gallery = whole_numbers(num_queries, 4, seed), whole_numbers(num_rows, 4, seed + 1)
    scores, rows = search(query, gallery, k)
    expected_scores, expected_rows = brute_force(query, gallery, k)
    np.testing.assert_array_equal(scores, expected_scores)
    np.testing.assert_array_equal(rows, expected_rows)


def screens(query, gallery, k):
    """True if screening in bfloat16 settles the whole gallery as one block."""
    block = Block(gallery, np.int32(0), np.int32(len(gallery)))
    best = no_neighbours(len(query), k)
    return bool(search_block(query, block, best, coarse=round_rows(gallery), k=k)[1])


def test_bfloat16_decides_unless_rows_are_too_much_alike():
    """Rows that differ by less than bfloat16 tells apart are scored in float32."""
    query, gallery = random_features(64, 32, 0), random_features(8192, 32, 1)
    assert screens(query, gallery, 5)
    alike = (random_features(1, 32, 2) + 1e-4 * gallery).astype(np.float32)
    assert not screens(query, alike, 5)
    scores, rows = search(query, alike, 5, options=SearchOptions(screen=True))
    expected = search(query, alike, 5, options=SearchOptions(screen=False))
    np.testing.assert_array_equal(rows, expected[1])
    np.testing.assert_array_equal(scores, expected[0])


def test_bfloat16_decides_where_a_device_has_no_row():
    query, gallery = random_features(64, 32, 0), random_features(8 * 4096, 32, 1)
    block = Block(gallery, np.int32(0), np.int32(5 * 4096))
    best, coarse = no_neighbours(64, 5), round_rows(gallery)
    found, certain = search_block(query, block, best, coarse=coarse, k=5, mesh=make_mesh("data:8"))
    assert bool(certain)
    exact = search(query, gallery[: 5 * 4096], 5, options=SearchOptions(screen=False))
    np.testing.assert_array_equal(found[1], exact[1])


def test_squares_that_underflow_are_no_proof():
    rng = np.random.default_rng(108)
    query = np.repeat(rng.standard_normal((16, 8), np.float32)[2:3], 16, 0)
    gallery = np.float32(1e-19) * (
        1 + np.float32(2**-8) * rng.standard_normal((2048, 8), np.float32)
    )
    rows = search(query, gallery, 3, options=SearchOptions(screen=True))[1]
    np.testing.assert_array_equal(rows, brute_force(query, gallery, 3)[1])


@hypothesis.settings(max_examples=15)
@hypothesis.given(st.integers(0, 2**31), st.integers(-60, 30), st.integers(0, 12))
def test_screening_never_changes_the_answer(seed, magnitude, spread):
    """For numbers of any size, and rows of any distance from each other."""
    query, gallery = random_features(16, 8, seed), random_features(2048, 8, seed + 1)
    gallery = (np.float32(10.0**magnitude) * (1 + np.float32(2.0**-spread) * gallery)).astype(
        np.float32
    )
    hypothesis.assume(np.isfinite(gallery).all())
    plain, screened = (search(query, gallery, 3, options=small(screen=s)) for s in (False, True))
    np.testing.assert_array_equal(screened[1], plain[1])
    np.testing.assert_array_equal(screened[0], plain[0])


@pytest.mark.parametrize("num_rows", [5, 700, 5000, 40_000])
@pytest.mark.parametrize("screen", [False, True])
def test_sharded_over_eight_devices_gives_the_same_answer(num_rows, screen):
    query, gallery = whole_numbers(70, 6, 0), whole_numbers(num_rows, 6, 1)
    alone = search(query, gallery, 5, options=SMALL)
    options = small(screen=screen, gallery_block=4096)
    together = search(query, gallery, 5, mesh=make_mesh("data:8"), options=options)
    np.testing.assert_array_equal(together[0], alone[0])
    np.testing.assert_array_equal(together[1], alone[1])


def test_sharded_over_one_axis_of_two():
    query, gallery = jnp.asarray(whole_numbers(9, 6, 0)), jnp.asarray(whole_numbers(900, 6, 1))
    together = search(query, gallery, 5, mesh=make_mesh("data:4,model:2"), options=SMALL)
    np.testing.assert_array_equal(together[1], search(query, gallery, 5, options=SMALL)[1])


def test_host_and_device_arrays_of_any_float_type():
    query, gallery = whole_numbers(70, 6, 0), whole_numbers(5000, 6, 1)
    expected = search(query, gallery, 5, options=SMALL)
    for convert in (
        jnp.asarray,
        lambda x: jnp.asarray(x, jnp.bfloat16),
        lambda x: x.astype(np.float64),
        lambda x: x.astype(np.float16),
    ):
        scores, rows = search(convert(query), convert(gallery), 5, options=SMALL)
        np.testing.assert_array_equal(scores, expected[0])
        np.testing.assert_array_equal(rows, expected[1])


def test_a_prepared_gallery_answers_as_search_does():
    query, gallery = random_features(9, 6, 0), random_features(5000, 6, 1)
    for mesh in (None, make_mesh("data:8")):
        prepared = exact.Prepared(gallery, mesh=mesh, options=SMALL)
        for k in (5, 5, 3000, 5):  # 3000 are more than a block has
            expected = search(query, gallery, k, mesh=mesh, options=SMALL)
            for found, wanted in zip(prepared.search(query, k), expected, strict=True):
                np.testing.assert_array_equal(found, wanted)
    with pytest.raises(UserError, match=r"gallery features .* row 1"):
        exact.Prepared(np.array([[1], [np.nan]], np.float32)).search(query[:, :1], 1)


def test_a_prepared_gallery_is_placed_once_unless_it_is_too_large(monkeypatch):
    query, gallery = random_features(1, 6, 0), random_features(5000, 6, 1)
    placed, place = [], blocks.place
    monkeypatch.setattr(blocks, "place", lambda *args: placed.append(len(args[0])) or place(*args))
    kept = exact.Prepared(gallery, options=SMALL)
    for _ in range(2):
        kept.search(query, 5)
    assert placed == 3 * [2048]
    monkeypatch.setattr(exact, "KEPT_BYTES", 3 * 4 * 6 * 2048 - 1)
    streamed = exact.Prepared(gallery, options=SMALL)
    for _ in range(2):
        streamed.search(query, 5)
    assert placed == 9 * [2048]


@pytest.fixture
def screenings(monkeypatch):
    """Record of each compiled call whether it screened, as on a CPU that multiplies in bfloat16."""
    calls = []

    def recorded(*args, coarse, **settings):
        calls.append(coarse is not None)
        return search_block(*args, coarse=coarse, **settings)

    monkeypatch.setattr(exact, "multiplies_bfloat16", lambda _: True)
    monkeypatch.setattr(exact, "search_block", recorded)
    return calls


def test_a_prepared_gallery_rounds_its_rows_once(screenings, monkeypatch):
    query, gallery = random_features(40, 32, 0), random_features(8192, 32, 1)
    rounded = []
    monkeypatch.setattr(exact, "round_rows", lambda rows: rounded.append(rows) or round_rows(rows))
    options = small(gallery_block=4096)
    prepared = exact.Prepared(gallery, options=options)
    for count, is_screened in ((1, True), (2, False), (40, True), (1, True)):
        expected = search(query[:count], gallery, 5, options=options)
        assert screenings == [False, False]  # a search of its own would round for each of these few
        screenings.clear()
        for found, wanted in zip(prepared.search(query[:count], 5), expected, strict=True):
            np.testing.assert_array_equal(found, wanted)
        assert screenings == 2 * [is_screened]
        screenings.clear()
    assert len(rounded) == 2


def test_a_gallery_that_screening_never_settles_is_screened_no_more(screenings):
    query = random_features(20, 32, 0)
    gallery = random_features(1, 32, 2) + 1e-4 * random_features(4096, 32, 1)
    options = small(gallery_block=4096)
    prepared = exact.Prepared(gallery, options=options)
    for one in query:
        expected = search(one[None], gallery, 5, options=options)
        for found, wanted in zip(prepared.search(one[None], 5), expected, strict=True):
            np.testing.assert_array_equal(found, wanted)
    assert screenings[1::2] == 8 * [True] + 12 * [False]


def test_approximate_search_reaches_its_recall():
    query, gallery = random_features(64, 16, 0), random_features(5000, 16, 1)
    scores, rows = search(query, gallery, 10, options=small(approx_recall=0.9))
    exact = search(query, gallery, 10, options=SMALL)[1]
    found = np.mean([len(np.intersect1d(a, b)) for a, b in zip(rows, exact, strict=True)])
    assert found >= 9
    assert (np.diff(scores, axis=1) <= 0).all()


def test_the_number_of_blocks_compiles_nothing_new(caplog):
    query, gallery = whole_numbers(200, 7, 0), whole_numbers(9000, 7, 1)

    def compiled(num_queries, num_rows):
        caplog.clear()
        with jax.log_compiles(), caplog.at_level(logging.WARNING):
            search(query[:num_queries], gallery[:num_rows], 5, options=SMALL)
        messages = [record.getMessage() for record in caplog.records]
        return [m for m in messages if m.startswith("Compiling")]

    assert any("search_block" in message for message in compiled(65, 2049))
    assert compiled(200, 9000) == compiled(129, 7777) == []


def test_no_full_matrix_on_cpu():
    """256 queries against 65,536 rows need far less scratch than their 64 MB of scores."""
    memory = lower(1 << 16, 128, 10).compile().memory_analysis()
    assert memory.argument_size_in_bytes >= 4 * 128 * (256 + (1 << 16))
    assert memory.temp_size_in_bytes < 16 << 20


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_names_the_first_row_that_is_not_finite(bad):
    query, gallery = whole_numbers(5, 6, 0), whole_numbers(5000, 6, 1)
    gallery[4321, 2] = gallery[4400, 2] = bad
    for array in (gallery, jnp.asarray(gallery)):
        with pytest.raises(UserError, match=r"gallery features .* row 4321"):
            search(query, array, 5, options=SMALL)
    query[3, 0] = bad
    with pytest.raises(UserError, match=r"query features .* row 3"):
        search(query, gallery, 5, options=SMALL)


def test_refuses_bad_input():
    query, gallery = whole_numbers(5, 6, 0), whole_numbers(50, 6, 1)
    with pytest.raises(UserError, match="k=51 neighbours of a gallery of 50 rows"):
        search(query, gallery, 51)
    with pytest.raises(UserError, match=r"choose k in 1\.\.50"):
        search(query, gallery, 0)
    with pytest.raises(UserError, match="size 4 and gallery features 6: versions of unequal"):
        search(query[:, :4], gallery, 5)
    with pytest.raises(UserError, match="at least one query"):
        search(query[:0], gallery, 5)
    with pytest.raises(UserError, match=r"approx_recall must be above 0 and below 1, got 1\.5"):
        SearchOptions(approx_recall=1.5)
    with pytest.raises(UserError, match="gallery_block must be at least 1, got 0"):
        SearchOptions(gallery_block=0)
    with pytest.raises(UserError, match='"data" axis'):
        search(query, gallery, 5, mesh=jax.make_mesh((8,), ("model",)))
