"""Exact nearest neighbours by inner product, in blocks and over any number of devices."""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from compat_jax import hosts
from compat_jax.errors import UserError
from compat_jax.fields import Rule, check_fields
from compat_jax.retrieval.blocks import (
    Block,
    check_sizes,
    gallery_blocks,
    place,
    power_of_two,
    rows_of,
)

# On CPU, scores are computed TILE gallery rows at a time: few enough to stay in cache until they are
# reduced to one maximum per GROUP of neighbouring rows.
TILE = 4096
GROUP = 64
# Default sizes of one compiled call: queries, and gallery rows per device. Accelerators hold the
# scores of a whole block.
QUERY_BLOCK = 256
GALLERY_BYTES = 1 << 29
GALLERY_ROWS, GALLERY_ROWS_ON_CPU = 1 << 18, 1 << 20
# Of a gallery that is kept between searches, a device: two blocks, as many as streaming holds at once.
KEPT_BYTES = 2 * GALLERY_BYTES


@dataclasses.dataclass(frozen=True)
class SearchOptions:
    """Trade memory, speed and exactness of `search`; the defaults are exact.

    Attributes:
      approx_recall: None for the exact answer, or the recall in (0, 1) that `jax.lax.approx_max_k`
        aims at. Faster on TPU only; elsewhere JAX computes the exact answer.
      screen: screen in bfloat16 before scoring in float32. None screens on CPUs that multiply in
        bfloat16, given enough queries and rows. The answer is the same either way.
      query_block: queries of one compiled call, rounded up to a power of two.
      gallery_block: gallery rows per device of one compiled call, rounded up to a power of two; None
        for as many as take 512 MB. The largest arrays are the two blocks and, on accelerators, their
        scores [query_block, gallery_block].

    Raises:
      UserError: a recall or a block size out of range.
    """

    approx_recall: Annotated[float | None, Rule("recall to aim at", above=0, below=1)] = None
    screen: Annotated[bool | None, Rule("screen in bfloat16")] = None
    query_block: Annotated[int, Rule("queries of a compiled call", low=1)] = QUERY_BLOCK
    gallery_block: Annotated[int | None, Rule("gallery rows per device", low=1)] = None

    def __post_init__(self):
        check_fields(self)


DEFAULT_OPTIONS = SearchOptions()


class Rounded(NamedTuple):
    """Gallery rows rounded to bfloat16, and bounds on what the rounding changed.

    Attributes:
      rows: bfloat16[size, d].
      norm: float32[], upper bound on the norm of a row before rounding.
      lost: float32[], upper bound on the norm of the difference that rounding makes to a row.
    """

    rows: Any
    norm: Any
    lost: Any


def search(
    query: np.ndarray | jax.Array,
    gallery: np.ndarray | jax.Array,
    k: int,
    *,
    mesh: Mesh | None = None,
    options: SearchOptions = DEFAULT_OPTIONS,
) -> tuple[np.ndarray, np.ndarray]:
    """Find the k gallery rows of largest inner product with each query, largest first.

    The answer is exact in float32; among equal scores the lower row comes first. The full
    query x gallery matrix is never held: beyond the inputs, memory is O(q k + block). Calls whose
    sizes differ only in the number of blocks share one compiled program.

    On devices where bfloat16 is fast, products in bfloat16 select groups of rows, and only these are
    scored in float32. A bound on the rounding error proves that no other group holds a row of the
    answer; where the proof fails, the whole block is scored in float32. The answer is the same.

    Args:
      query: float[q, d].
      gallery: float[n, d], on the host (streamed in blocks) or on the device.
      k: number of neighbours, 1..n.
      mesh: a mesh with a "data" axis. The gallery is split over that axis, every device searches
        its share and the answers are merged into the answer of a single device.
      options: see `SearchOptions`.

    Returns:
      float32[q, k] scores and int32[q, k] gallery rows.

    Raises:
      UserError: there is no query, feature sizes differ, k is out of range, a row is not finite, or
        the mesh has no "data" axis.

    Source: `calculate_rank` in `src/iamcl2r/performance_metrics.py`, there faiss.IndexFlatIP.
    """
    blocks = partial(gallery_blocks, gallery, mesh=mesh)
    return _search(query, gallery, k, blocks=blocks, mesh=mesh, options=options)


class Prepared:
    """A gallery for many searches: its rows are checked, padded and placed on the devices once.

    Blocks of more than `KEPT_BYTES` a device are not kept, but streamed again by each search.

    Args:
      gallery: float[n, d], on the host or on the device; must not change afterwards.
      mesh: see `search`.
      options: see `SearchOptions`.
    """

    def __init__(
        self,
        gallery: np.ndarray | jax.Array,
        *,
        mesh: Mesh | None = None,
        options: SearchOptions = DEFAULT_OPTIONS,
    ):
        self._gallery, self._mesh, self._options = gallery, mesh, options
        self._size = 0
        self._kept: list[Block] = []

    def search(self, query: np.ndarray | jax.Array, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Return what `search` returns for this gallery, to the bit; see there."""
        gallery, options = self._gallery, self._options
        return _search(query, gallery, k, blocks=self._blocks, mesh=self._mesh, options=options)

    def _blocks(self, size: int) -> Iterable[Block]:
        num_rows, feature_size = self._gallery.shape
        shards = 1 if self._mesh is None else self._mesh.shape["data"]
        if 4 * feature_size * size * -(-num_rows // size) > KEPT_BYTES * shards:
            return gallery_blocks(self._gallery, size, self._mesh)
        if size != self._size:  # a k above a block's rows needs larger ones
            self._kept = list(gallery_blocks(self._gallery, size, self._mesh))
            self._size = size
        return self._kept


def _search(
    query, gallery, k: int, *, blocks: Callable[[int], Iterable[Block]], mesh, options
) -> tuple[np.ndarray, np.ndarray]:
    """Search the blocks of a gallery; `blocks` returns them, of so many rows each."""
    _check(query, gallery, k, mesh=mesh)
    query_size, size = _block_sizes(query.shape, len(gallery), k, mesh=mesh, options=options)
    approx_recall, screen = options.approx_recall, options.screen
    if screen is None:
        screen = len(query) >= QUERY_BLOCK and _multiplies_in_bfloat16(_platform(mesh))
        if mesh is not None and mesh.is_multi_process:  # the hosts may have different processors
            screen = hosts.broadcast(screen)
    screen = screen and approx_recall is None and _can_screen(size, k, mesh)
    queries = [place(b, mesh) for _, b in rows_of("query", query, query_size)]
    none_yet = tuple(place(part, mesh) for part in no_neighbours(query_size, k))
    best = [none_yet] * len(queries)
    step = partial(search_block, k=k, approx_recall=approx_recall, mesh=mesh)
    for block in blocks(size):
        coarse = round_rows(block.rows) if screen else None
        for i, one in enumerate(queries):
            best[i], certain = step(one, block, best[i], coarse=coarse)
            if screen and block.first == i == 0 and not certain:
                # Rows too close to each other for the bound to hold: stop screening.
                screen, coarse = False, None
    scores, found = (np.concatenate([np.asarray(b[i]) for b in best]) for i in (0, 1))
    return scores[: len(query)], found[: len(query)]


def lower(num_rows: int, feature_size: int, k: int, mesh: Mesh | None = None) -> jax.stages.Lowered:
    """Lower the step that `search` compiles for a full block of queries, without running it.

    Args:
      num_rows: rows of the gallery.
      feature_size: columns of query and gallery.
      k: number of neighbours.
      mesh: see `search`; its devices may belong to a compile-only topology.

    Returns:
      The lowered step; compile it to read its memory and cost.
    """
    query_shape = (QUERY_BLOCK, feature_size)
    queries, size = _block_sizes(query_shape, num_rows, k, mesh=mesh, options=DEFAULT_OPTIONS)

    def shape(rows, columns, dtype=jnp.float32, axis=None):
        sharding = None if mesh is None else NamedSharding(mesh, PartitionSpec(axis))
        return jax.ShapeDtypeStruct((rows, columns), dtype, sharding=sharding)

    block = Block(shape(size, feature_size, axis="data"), np.int32(0), np.int32(0))
    best = (shape(queries, k), shape(queries, k, jnp.int32))
    query = shape(queries, feature_size)
    return search_block.lower(query, block, best, coarse=None, k=k, approx_recall=None, mesh=mesh)


def _block_sizes(
    query_shape, num_rows: int, k: int, *, mesh: Mesh | None, options: SearchOptions
) -> tuple[int, int]:
    """Return queries and gallery rows of one step, the latter over all devices."""
    num_queries, feature_size = query_shape
    shards = 1 if mesh is None else mesh.shape["data"]
    gallery_block = options.gallery_block
    if gallery_block is None:
        most = GALLERY_ROWS_ON_CPU if _platform(mesh) == "cpu" else GALLERY_ROWS
        gallery_block = min(most, power_of_two(GALLERY_BYTES // (4 * feature_size) + 1) // 2)
    rows = power_of_two(max(k, min(gallery_block, -(-num_rows // shards))))
    return power_of_two(min(options.query_block, num_queries)), shards * rows


def _platform(mesh: Mesh | None) -> str:
    return jax.default_backend() if mesh is None else mesh.devices.flat[0].platform


@functools.cache
def _multiplies_in_bfloat16(platform: str) -> bool:
    """Return True if bfloat16 products are faster: XLA:CPU since jax 0.12, given the instructions."""
    cpuinfo = Path("/proc/cpuinfo")
    if platform != "cpu" or jax.__version_info__ < (0, 12) or not cpuinfo.exists():
        return False
    return any(flag in cpuinfo.read_text() for flag in ("avx512_bf16", "amx_bf16"))


def _screened(k: int) -> int:
    """Return the number of groups that screening keeps."""
    return 2 * k + 8


def _can_screen(size: int, k: int, mesh: Mesh | None) -> bool:
    return size // (1 if mesh is None else mesh.shape["data"]) >= 2 * GROUP * _screened(k)


@jax.jit
def round_rows(rows: jax.Array) -> Rounded:
    """Round gallery rows to bfloat16 for the screening of `search_block`.

    Args:
      rows: float32[size, d].

    Returns:
      The rounded rows and the bounds that screening needs.
    """
    rounded = rows.astype(jnp.bfloat16)
    return Rounded(rounded, _norms(rows).max(), _norms(_lost(rows)).max())


def _lost(rows):
    """Return rows minus their rounding to bfloat16."""
    # XLA may optimise away a conversion there and back.
    return rows - jax.lax.reduce_precision(rows, exponent_bits=8, mantissa_bits=7)


def _norms(rows):
    """Return upper bounds on the norms of rows, valid also where squares underflow."""
    return jnp.sqrt(jnp.square(rows).sum(axis=1)) + rows.shape[1] ** 0.5 * 2.0**-63


def no_neighbours(num_queries: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the scores and rows that `search_block` starts from.

    Args:
      num_queries: q, queries of a block.
      k: number of neighbours.

    Returns:
      float32[q, k] of -infinity and int32[q, k] of zeros.
    """
    # In NumPy: a weakly typed array of JAX would compile the first step once more.
    return np.full((num_queries, k), -np.inf, np.float32), np.zeros((num_queries, k), np.int32)


@partial(jax.jit, static_argnames=("k", "approx_recall", "mesh"))
def search_block(
    query: jax.Array,
    block: Block,
    best: tuple[jax.Array, jax.Array],
    coarse: Rounded | None = None,
    *,
    k: int,
    approx_recall: float | None = None,
    mesh: Mesh | None = None,
) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    """Update the best k of a block of queries with a block of gallery rows.

    Args:
      query: float32[q, d].
      block: gallery rows; with a mesh, split over its "data" axis.
      best: float32[q, k] scores and int32[q, k] rows of the blocks before, or `no_neighbours`.
      coarse: `round_rows` of the block, to screen with; None scores every row in float32.
      k: number of neighbours.
      approx_recall: see `SearchOptions`; None with `coarse`.
      mesh: see `search`.

    Returns:
      The updated scores and rows; and bool[], false if screening proved nothing and the block was
      scored again in float32 (on a mesh: on at least one device). Always true without `coarse`.
    """
    on_cpu = _platform(mesh) == "cpu"

    def local(query, block, best, coarse):
        if coarse is not None:
            return _screened_top_k(query, block, k, best=best, coarse=coarse)
        found = _local_top_k(query, block, k, approx_recall=approx_recall, on_cpu=on_cpu)
        return found, jnp.bool(True)

    if mesh is None:
        found, certain = local(query, block, best, coarse=coarse)
        return _merge(best, found, k), certain

    def on_device(query, block, best, coarse):
        start = jax.lax.axis_index("data") * jnp.int32(len(block.rows))
        own = Block(block.rows, block.first + start, block.stop)
        found, certain = local(query, own, best, coarse=coarse)
        # Gathered in the order of the shards' rows, so ties still go to the lower row.
        found = jax.lax.all_gather(found, "data", axis=1, tiled=True)
        if coarse is not None:
            certain = jax.lax.pmin(certain.astype(jnp.int32), "data")
        return _merge(best, found, k), certain

    everywhere, split = PartitionSpec(), PartitionSpec("data")
    of_block = Block(split, everywhere, everywhere)
    of_coarse = None if coarse is None else Rounded(split, everywhere, everywhere)
    return jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(everywhere, of_block, everywhere, of_coarse),
        out_specs=everywhere,
        check_vma=False,  # the merged answer is the same on every device; JAX cannot infer that
    )(query, block, best, coarse)


def _local_top_k(query, block, k, *, approx_recall, on_cpu):
    """Return the best k rows of a block."""
    grouped = on_cpu and len(block.rows) >= 4 * k * GROUP
    if grouped and approx_recall is None:
        return _grouped_top_k(query, block, k)
    scores = jnp.dot(query, block.rows.T, precision="highest")
    rows = block.first + jnp.arange(len(block.rows), dtype=jnp.int32)
    scores = jnp.where(rows[None] < block.stop, scores, -jnp.inf)
    if approx_recall is None:
        scores, found = jax.lax.top_k(scores, k)
    else:
        scores, found = jax.lax.approx_max_k(scores, k, recall_target=approx_recall)
    return scores, block.first + found.astype(jnp.int32)


def _grouped_top_k(query, block, k):
    """Return the best k rows of a block from the maxima over groups of rows.

    This is exact, and three times as fast on CPU. The k groups with the largest maxima hold the
    answer: if a row of the answer were in another group, each of these k groups would hold a row that
    ranks before it. Groups are runs of neighbouring rows, so the same argument covers ties.
    """
    maxima = _group_maxima(query, block)
    return _top_k_within(query, block, k, groups=jax.lax.top_k(maxima, k)[1])


def _screened_top_k(query, block, k, *, best, coarse):
    """Return the best k rows of a block from maxima in bfloat16, and if they are proven exact."""
    count = _screened(k)
    rounded = Block(coarse.rows, block.first, block.stop)
    maxima = _group_maxima(query.astype(jnp.bfloat16), rounded)
    # Without the barrier XLA:CPU computes the maxima twice. Every group that is left out has a maximum
    # of at most the last one kept.
    maxima, groups = jax.lax.top_k(jax.lax.optimization_barrier(maxima), count)
    found = _top_k_within(query, block, k, groups=groups)
    # q.g - q'.g' = (q - q').g + q'.(g - g'), bounded by Cauchy-Schwarz. The float32 sums of both
    # products and of the norms are rounded as well, and may underflow.
    sums = query.shape[1] * 2.0**-21
    bound = _norms(_lost(query)) * coarse.norm
    bound = bound + _norms(query) * (1.01 * coarse.lost + sums * coarse.norm) + 1e-30
    worst = _merge(best, found, k)[0][:, -1]
    all_scored = block.stop - block.first <= count * GROUP
    certain = all_scored | (maxima[:, -1] + bound < worst).all()
    again = partial(_grouped_top_k, query, block, k)
    return jax.lax.cond(certain, lambda: found, again), certain


def _group_maxima(query, block):
    """Return float32[queries, groups], the largest inner product of each group of rows.

    Padding repeats the last row, so it does not change the maximum of the group it shares.
    """
    gallery = block.rows
    tile = min(TILE, len(gallery))

    def fill(i, maxima):
        rows = jax.lax.dynamic_slice_in_dim(gallery, i * tile, tile)
        # As `rows @ query.T` this takes twice as long in bfloat16.
        scores = jax.lax.dot_general(
            rows,
            query,
            (((1,), (1,)), ((), ())),
            precision=None if rows.dtype == jnp.bfloat16 else "highest",
            preferred_element_type=jnp.float32,
        )
        return maxima.at[i].set(scores.reshape(-1, GROUP, len(query)).max(axis=1))

    maxima = jnp.full((len(gallery) // tile, tile // GROUP, len(query)), -jnp.inf)
    tiles_in_use = jnp.minimum(-((block.first - block.stop) // tile), len(maxima))
    maxima = jax.lax.fori_loop(0, tiles_in_use, fill, maxima)
    group_first = block.first + GROUP * jnp.arange(len(gallery) // GROUP, dtype=jnp.int32)
    return jnp.where(group_first[None] < block.stop, maxima.reshape(-1, len(query)).T, -jnp.inf)


def _top_k_within(query, block, k, *, groups):
    """Return the best k rows of each query within its groups, int32[queries, groups]."""
    # Sorted by row rather than by score, for the order among ties.
    groups = jnp.sort(groups, axis=1)
    members = block.rows.reshape(-1, GROUP, block.rows.shape[1])

    def inside(args):
        one, chosen = args
        rows = members[chosen].reshape(-1, block.rows.shape[1])
        return jnp.dot(rows, one, precision="highest")

    scores = jax.lax.map(inside, (query, groups))
    offsets = GROUP * groups[:, :, None] + jnp.arange(GROUP, dtype=jnp.int32)[None, None]
    rows = block.first + offsets.reshape(len(query), -1)
    return _top_k_of(jnp.where(rows < block.stop, scores, -jnp.inf), rows, k)


def _merge(best, found, k):
    """Return the best k of two lists; among equal scores `best` comes before `found`."""
    scores, rows = (jnp.concatenate(pair, axis=1) for pair in zip(best, found, strict=True))
    return _top_k_of(scores, rows, k)


def _top_k_of(scores, rows, k):
    scores, place = jax.lax.top_k(scores, k)
    return scores, jnp.take_along_axis(rows, place, axis=1)


def _check(query, gallery, k: int, *, mesh: Mesh | None) -> None:
    check_sizes(query, gallery)
    if not len(query):
        raise UserError("search needs at least one query, got none")
    if not 1 <= k <= len(gallery):
        raise UserError(
            f"k={k} neighbours of a gallery of {len(gallery)} rows: choose k in 1..{len(gallery)}",
            "k",
        )
    if mesh is not None and "data" not in mesh.shape:
        raise UserError(
            f'search needs a mesh with a "data" axis, this one has {tuple(mesh.shape)}: '
            "make it with compat_jax.mesh.make_mesh",
            "mesh",
        )
