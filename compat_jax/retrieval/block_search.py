"""The best rows of one block of a gallery: what exact search compiles."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from compat_jax.retrieval.blocks import Block

# On CPU, scores are computed TILE gallery rows at a time: few enough to stay in cache until they are
# reduced to one maximum per GROUP of neighbouring rows.
TILE = 4096
GROUP = 64


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


def platform(mesh: Mesh | None) -> str:
    """Return the platform of a mesh's devices, by default of JAX's own."""
    return jax.default_backend() if mesh is None else mesh.devices.flat[0].platform


def _screened(k: int) -> int:
    """Return the number of groups that screening keeps."""
    return 2 * k + 8


def can_screen(size: int, k: int, mesh: Mesh | None) -> bool:
    """Return whether a block of so many rows, over all devices, is worth screening for k neighbours."""
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
    on_cpu = platform(mesh) == "cpu"

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
