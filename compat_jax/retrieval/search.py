"""Exact nearest neighbours by inner product, in blocks and over any number of devices."""

import functools
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from compat_jax import hosts
from compat_jax import mesh as meshes
from compat_jax.errors import UserError

# On CPU the scores are made TILE gallery rows at a time, small enough to stay in cache until they
# are reduced to one maximum for each GROUP of neighbouring rows.
TILE = 4096
GROUP = 64
# Sizes of one compiled call: queries, and gallery rows a device. Accelerators hold their scores.
QUERY_BLOCK = 256
GALLERY_BYTES = 1 << 29
GALLERY_ROWS, GALLERY_ROWS_ON_CPU = 1 << 18, 1 << 20


def search(
    query: np.ndarray | jax.Array,
    gallery: np.ndarray | jax.Array,
    k: int,
    *,
    mesh: Mesh | None = None,
    approx_recall: float | None = None,
    screen: bool | None = None,
    query_block: int = QUERY_BLOCK,
    gallery_block: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The k gallery rows of largest inner product with each query, largest first.

    Exact in float32; of equal scores the lower index comes first. The full query x gallery matrix
    is never held: beyond the inputs, memory is O(q k + block). Calls whose sizes differ only in
    the number of blocks share one compiled program.

    Where bfloat16 is fast, it screens: products in bfloat16 choose groups of rows that are scored again
    in float32, and a bound on their error proves that no other group holds a row of the answer, or else
    the block is done again in float32. The answer is the same.

    Args:
      query: float[q, d].
      gallery: float[n, d], on the host (streamed in blocks) or on the device.
      k: 1..n.
      mesh: a mesh with a "data" axis; the gallery is split over that axis, every device searches
        its share and the answers are merged. The answer is that of one device.
      approx_recall: None for the exact answer, or the recall in (0, 1) that
        `jax.lax.approx_max_k` aims at. Faster on TPU only; elsewhere JAX computes the exact answer.
      screen: whether to screen in bfloat16; None on CPUs that multiply in it, if there are enough
        queries and rows.
      query_block: queries of one compiled call, rounded up to a power of two.
      gallery_block: gallery rows of one compiled call and device, likewise; None for what takes
        512 MB. The largest arrays are the two blocks and, on accelerators, their scores
        [query_block, gallery_block].

    Returns:
      float32[q, k] scores and int32[q, k] gallery rows.

    Raises:
      UserError: no query, features of unequal size, k out of range, a row that is not finite, a
        recall out of range, a mesh without a "data" axis.

    Source: `calculate_rank` in `src/iamcl2r/performance_metrics.py`, there faiss.IndexFlatIP.
    """
    _check(query, gallery, k, mesh, approx_recall)
    num_rows = len(gallery)
    query_size, size = _block_sizes(query.shape, num_rows, k, mesh, query_block, gallery_block)
    if screen is None:
        screen = len(query) >= QUERY_BLOCK and _multiplies_in_bfloat16(_platform(mesh))
        if mesh is not None and mesh.is_multi_process:  # of other processors, perhaps
            screen = hosts.first_says(screen)
    screen = screen and approx_recall is None and _can_screen(size, k, mesh)
    queries = [_place(b, mesh) for _, b in _blocks("query", query, query_size)]
    best = [tuple(_place(part, mesh) for part in _nothing(query_size, k))] * len(queries)
    step = partial(_search_block, k=k, approx_recall=approx_recall, mesh=mesh)
    for start, block in _blocks("gallery", gallery, size):
        block = _place(block, mesh, "data")
        first, stop = np.int32(start), np.int32(num_rows)
        coarse = _coarse(block) if screen else None
        for i, one in enumerate(queries):
            best[i], certain = step(one, block, first, stop, best[i], coarse)
            if screen and start == i == 0 and not certain:  # rows too much alike: it is in vain
                screen, coarse = False, None
    scores, rows = (np.concatenate([np.asarray(b[i]) for b in best]) for i in (0, 1))
    return scores[: len(query)], rows[: len(query)]


def lower(num_rows: int, feature_size: int, k: int, mesh: Mesh) -> jax.stages.Lowered:
    """The step that `search` compiles for a full block of queries, lowered on a mesh: for plans."""
    query = (QUERY_BLOCK, feature_size)
    queries, size = _block_sizes(query, num_rows, k, mesh, QUERY_BLOCK, None)

    def shape(rows, columns, dtype=jnp.float32, axis=None):
        sharding = NamedSharding(mesh, PartitionSpec(axis))
        return jax.ShapeDtypeStruct((rows, columns), dtype, sharding=sharding)

    gallery = shape(size, feature_size, axis="data")
    best = (shape(queries, k), shape(queries, k, jnp.int32))
    first = stop = np.int32(0)
    return _search_block.lower(
        shape(queries, feature_size),
        gallery,
        first,
        stop,
        best,
        None,
        k=k,
        approx_recall=None,
        mesh=mesh,
    )


def _block_sizes(shape, num_rows, k, mesh, query_block, gallery_block) -> tuple[int, int]:
    """Queries and gallery rows of one step, the latter over all devices."""
    num_queries, feature_size = shape
    shards = 1 if mesh is None else mesh.shape["data"]
    if gallery_block is None:
        most = GALLERY_ROWS_ON_CPU if _platform(mesh) == "cpu" else GALLERY_ROWS
        gallery_block = min(most, _power_of_two(GALLERY_BYTES // (4 * feature_size) + 1) // 2)
    rows = _power_of_two(max(k, min(gallery_block, -(-num_rows // shards))))
    return _power_of_two(min(query_block, num_queries)), shards * rows


def _platform(mesh: Mesh | None) -> str:
    return jax.default_backend() if mesh is None else mesh.devices.flat[0].platform


@functools.cache
def _multiplies_in_bfloat16(platform: str) -> bool:
    """Whether it does so faster than in float32: XLA:CPU since jax 0.12, with instructions for it."""
    cpuinfo = Path("/proc/cpuinfo")
    if platform != "cpu" or jax.__version_info__ < (0, 12) or not cpuinfo.exists():
        return False
    return any(flag in cpuinfo.read_text() for flag in ("avx512_bf16", "amx_bf16"))


def _screened(k: int) -> int:
    """Groups that are scored again."""
    return 2 * k + 8


def _can_screen(size: int, k: int, mesh: Mesh | None) -> bool:
    return size // (1 if mesh is None else mesh.shape["data"]) >= 2 * GROUP * _screened(k)


@jax.jit
def _coarse(gallery):
    """The block in bfloat16, the largest norm of its rows, and that of what the rounding took."""
    rounded = gallery.astype(jnp.bfloat16)
    return rounded, _norms(gallery).max(), _norms(_lost(gallery)).max()


def _lost(rows):
    """What rounding to bfloat16 takes; XLA may leave out a conversion there and back."""
    return rows - jax.lax.reduce_precision(rows, exponent_bits=8, mantissa_bits=7)


def _norms(rows):
    """Upper bounds, also where squares underflow."""
    return jnp.sqrt(jnp.square(rows).sum(axis=1)) + rows.shape[1] ** 0.5 * 2.0**-63


@partial(jax.jit, static_argnames=("k", "approx_recall", "mesh"))
def _search_block(query, gallery, first, stop, best, coarse, *, k, approx_recall, mesh):
    """Update the best k of a block of queries with a block of gallery rows, first..stop-1.

    Returns them, and whether screening did (always without `coarse`).
    """
    on_cpu = _platform(mesh) == "cpu"

    def local(query, gallery, first, stop, best, coarse):
        if coarse is not None:
            return _screened_top_k(query, gallery, first, stop, best, coarse, k)
        return _local_top_k(query, gallery, first, stop, k, approx_recall, on_cpu), jnp.bool(True)

    if mesh is None:
        found, certain = local(query, gallery, first, stop, best, coarse)
        return _merge(best, found, k), certain

    def on_device(query, shard, first, stop, best, coarse):
        first += jax.lax.axis_index("data") * jnp.int32(len(shard))
        found, certain = local(query, shard, first, stop, best, coarse)
        # Shares are gathered in the order of their rows, so ties still go to the lower index.
        found = jax.lax.all_gather(found, "data", axis=1, tiled=True)
        if coarse is not None:
            certain = jax.lax.pmin(certain.astype(jnp.int32), "data")
        return _merge(best, found, k), certain

    everywhere, split = PartitionSpec(), PartitionSpec("data")
    shares = None if coarse is None else (split, everywhere, everywhere)
    return jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(everywhere, split, everywhere, everywhere, everywhere, shares),
        out_specs=everywhere,
        check_vma=False,  # the merged answer is the same on every device, which JAX cannot see
    )(query, gallery, first, stop, best, coarse)


def _local_top_k(query, gallery, first, stop, k, approx_recall, on_cpu):
    """Best k of the rows first, first + 1, … < stop that `gallery` holds; the rest is padding."""
    grouped = on_cpu and len(gallery) >= 4 * k * GROUP
    if grouped and approx_recall is None:
        return _grouped_top_k(query, gallery, first, stop, k)
    scores = jnp.dot(query, gallery.T, precision="highest")
    rows = first + jnp.arange(len(gallery), dtype=jnp.int32)
    scores = jnp.where(rows[None] < stop, scores, -jnp.inf)
    if approx_recall is None:
        scores, found = jax.lax.top_k(scores, k)
    else:
        scores, found = jax.lax.approx_max_k(scores, k, recall_target=approx_recall)
    return scores, first + found.astype(jnp.int32)


def _grouped_top_k(query, gallery, first, stop, k):
    """Top k by way of the maxima over groups of rows: exact, and three times as fast on CPU.

    The k groups with the largest maxima hold the answer: were a row of the answer in another group,
    k groups would each hold a row before it. Groups are runs of neighbouring rows, so that also
    holds for the order among ties.
    """
    maxima = _group_maxima(query, gallery, first, stop)
    return _top_k_within(query, gallery, first, stop, jax.lax.top_k(maxima, k)[1], k)


def _screened_top_k(query, gallery, first, stop, best, coarse, k):
    """The same by maxima in bfloat16, and whether their error cannot have changed the answer."""
    rounded, norm, lost = coarse
    count = _screened(k)
    maxima = _group_maxima(query.astype(jnp.bfloat16), rounded, first, stop)
    # Without the barrier XLA:CPU makes the maxima twice. No other group has more than the last one.
    maxima, groups = jax.lax.top_k(jax.lax.optimization_barrier(maxima), count)
    found = _top_k_within(query, gallery, first, stop, groups, k)
    # q.g - q'.g' = (q - q').g + q'.(g - g'), by Cauchy-Schwarz; the float32 sums of both products, and
    # of the norms, are rounded as well, and may underflow.
    sums = query.shape[1] * 2.0**-21
    bound = _norms(_lost(query)) * norm + _norms(query) * (1.01 * lost + sums * norm) + 1e-30
    worst = _merge(best, found, k)[0][:, -1]
    all_scored = stop - first <= count * GROUP
    certain = all_scored | (maxima[:, -1] + bound < worst).all()
    again = partial(_grouped_top_k, query, gallery, first, stop, k)
    return jax.lax.cond(certain, lambda: found, again), certain


def _group_maxima(query, gallery, first, stop):
    """float32[queries, groups]: the largest inner product of each group of rows.

    The padding repeats the last row, hence does not change the maximum of the group it shares.
    """
    tile = min(TILE, len(gallery))

    def fill(i, maxima):
        rows = jax.lax.dynamic_slice_in_dim(gallery, i * tile, tile)
        # As `rows @ query.T` it is twice as slow in bfloat16.
        scores = jax.lax.dot_general(
            rows,
            query,
            (((1,), (1,)), ((), ())),
            precision=None if rows.dtype == jnp.bfloat16 else "highest",
            preferred_element_type=jnp.float32,
        )
        return maxima.at[i].set(scores.reshape(-1, GROUP, len(query)).max(axis=1))

    maxima = jnp.full((len(gallery) // tile, tile // GROUP, len(query)), -jnp.inf)
    tiles_in_use = jnp.minimum(-((first - stop) // tile), len(maxima))
    maxima = jax.lax.fori_loop(0, tiles_in_use, fill, maxima)
    group_first = first + GROUP * jnp.arange(len(gallery) // GROUP, dtype=jnp.int32)
    return jnp.where(group_first[None] < stop, maxima.reshape(-1, len(query)).T, -jnp.inf)


def _top_k_within(query, gallery, first, stop, groups, k):
    """Best k of the rows in some groups, int32[queries, groups], of each query."""
    # In the order of rows, not of scores, for the sake of ties.
    groups = jnp.sort(groups, axis=1)
    members = gallery.reshape(-1, GROUP, gallery.shape[1])

    def inside(args):
        one, chosen = args
        return jnp.dot(members[chosen].reshape(-1, gallery.shape[1]), one, precision="highest")

    scores = jax.lax.map(inside, (query, groups))
    offsets = GROUP * groups[:, :, None] + jnp.arange(GROUP, dtype=jnp.int32)[None, None]
    rows = first + offsets.reshape(len(query), -1)
    return _top_k_of(jnp.where(rows < stop, scores, -jnp.inf), rows, k)


def _merge(best, found, k):
    """The best k of two lists; rows of `best` come before those of `found`."""
    scores, rows = (jnp.concatenate(pair, axis=1) for pair in zip(best, found, strict=True))
    return _top_k_of(scores, rows, k)


def _top_k_of(scores, rows, k):
    scores, place = jax.lax.top_k(scores, k)
    return scores, jnp.take_along_axis(rows, place, axis=1)


def _nothing(num_queries: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    # In NumPy: a weakly typed array of JAX would compile the first step once more.
    return np.full((num_queries, k), -np.inf, np.float32), np.zeros((num_queries, k), np.int32)


def _blocks(name: str, features, size: int) -> Iterator[tuple[int, np.ndarray | jax.Array]]:
    """Starts and float32 blocks of `size` rows; the last is filled up with its last row."""
    for start in range(0, len(features), size):
        if isinstance(features, jax.Array):
            block = _slice(features, np.int32(start), size)
        else:
            block = np.asarray(features[start : start + size], np.float32)
            if len(block) < size:
                block = np.pad(block, ((0, size - len(block)), (0, 0)), mode="edge")
        check_finite(name, block, start)
        yield start, block


@partial(jax.jit, static_argnames="size")
def _slice(features, start, size):
    """Rows start, start + 1, …; beyond the end the last row again."""
    rows = jnp.minimum(start + jnp.arange(size, dtype=jnp.int32), len(features) - 1)
    return features[rows].astype(jnp.float32)


def _place(block, mesh: Mesh | None, axis: str | None = None) -> jax.Array:
    # device_put takes an aligned host array as it is on CPU, where jnp.asarray copies it.
    if mesh is None:
        return jax.device_put(block)
    if axis is not None and isinstance(block, np.ndarray):
        return meshes.feed(block, mesh)
    return meshes.put(block, NamedSharding(mesh, PartitionSpec(axis)))


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def check_finite(name: str, features, start: int = 0) -> None:
    """Refuse features with a NaN or an infinity.

    Args:
      name: of the features, for the message.
      features: float[n, d].
      start: the number of the first row, for the message.

    Raises:
      UserError: naming the first bad row.
    """
    # A row's sum is finite just when its parts are; cheaper than a look at each of them.
    finite = np.isfinite(np.asarray(features.sum(axis=1)))
    if not finite.all():
        raise UserError(
            f"{name} features have a value that is not finite in row {start + np.argmin(finite)}: "
            "look for a diverged version or a broken image there"
        )


def check_sizes(query, gallery) -> None:
    """Refuse features that are not [rows, size] of one size.

    Raises:
      UserError: naming both sizes.
    """
    if query.ndim != 2 or gallery.ndim != 2:
        raise UserError(
            f"retrieval takes features [rows, size], got {query.shape} (query) and {gallery.shape} "
            "(gallery)"
        )
    if query.shape[1] != gallery.shape[1]:
        raise UserError(
            f"query features have size {query.shape[1]} and gallery features {gallery.shape[1]}: "
            "versions of unequal feature size cannot be compared"
        )


def _check(query, gallery, k: int, mesh: Mesh | None, approx_recall: float | None) -> None:
    check_sizes(query, gallery)
    if not len(query):
        raise UserError("search needs at least one query, got none")
    if not 1 <= k <= len(gallery):
        raise UserError(
            f"k={k} neighbours of a gallery of {len(gallery)} rows: choose k in 1..{len(gallery)}"
        )
    if approx_recall is not None and not 0 < approx_recall < 1:
        raise UserError(f"approx_recall must lie between 0 and 1, or be None, got {approx_recall}")
    if mesh is not None and "data" not in mesh.shape:
        raise UserError(
            f'search needs a mesh with a "data" axis, this one has {tuple(mesh.shape)}: '
            "make it with compat_jax.mesh.make_mesh"
        )
