"""Exact nearest neighbours by inner product, in blocks and over any number of devices."""

import dataclasses
from collections.abc import Iterable
from functools import partial
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from compat_jax import hosts
from compat_jax.errors import UserError
from compat_jax.fields import Field, Rule, check_fields, checked
from compat_jax.models.precision import multiplies_bfloat16
from compat_jax.retrieval.block_search import (
    Rounded,
    can_screen,
    no_neighbours,
    platform,
    round_rows,
    search_block,
)
from compat_jax.retrieval.blocks import (
    Block,
    as_features,
    check_sizes,
    gallery_blocks,
    place,
    power_of_two,
    rows_of,
)

# Default sizes of one compiled call: queries, and gallery rows per device. Accelerators hold the
# scores of a whole block.
QUERY_BLOCK = 256
GALLERY_BYTES = 1 << 29
GALLERY_ROWS, GALLERY_ROWS_ON_CPU = 1 << 18, 1 << 20
# Of a gallery that is kept between searches, a device: two blocks, as many as streaming holds at once.
KEPT_BYTES = 2 * GALLERY_BYTES
# Once rounded rows are kept, screening is faster for a single query, and for so many; for a few XLA:CPU
# multiplies in bfloat16 too slowly (1,000,000 rows of 128 numbers, jax 0.12).
_SCREENED_QUERIES = 32
# Searches in a row whose screening proves nothing, after which a kept gallery is screened no more.
_VAIN = 8
_K = Field("k", int, Rule("neighbours of a query"), 10)


@dataclasses.dataclass(frozen=True)
class SearchOptions:
    """Trade memory, speed and exactness of `search`; the defaults are exact.

    Attributes:
      approx_recall: None for the exact answer, or the recall in (0, 1) that `jax.lax.approx_max_k`
        aims at. Faster on TPU only; elsewhere JAX computes the exact answer.
      screen: screen in bfloat16 before scoring in float32. None screens on CPUs that multiply in
        bfloat16, given enough rows and a number of queries for which it is faster. The answer is the
        same either way.
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
    return _search(query, _Rows(as_features("gallery", gallery), mesh), k, options=options)


class _Rows:
    """A gallery as a search reads it: in blocks that each search places anew.

    Args:
      gallery: float[n, d], on the host or on the device.
      mesh: see `search`.
    """

    def __init__(self, gallery: np.ndarray | jax.Array, mesh: Mesh | None):
        self.gallery, self.mesh = gallery, mesh

    def blocks(self, size: int) -> Iterable[Block]:
        """Return the blocks, of `size` rows over all devices."""
        return gallery_blocks(self.gallery, size, self.mesh)

    def rounded(self, block: Block) -> Rounded:
        """Return the rows of a block for screening."""
        return round_rows(block.rows)

    def is_faster_screened(self, num_queries: int, size: int) -> bool:
        """Return whether screening pays for so many queries in blocks of `size` rows, on a CPU."""
        return num_queries >= QUERY_BLOCK

    def screened(self, certain: bool) -> None:
        """Hear whether the screening of a search proved something in its first block."""


class Prepared:
    """A gallery for many searches: its rows are checked, padded and placed on the devices once.

    Where a search screens, the rows rounded to bfloat16 are kept as well, half as large. Blocks of more
    than `KEPT_BYTES` a device are not kept, but streamed again by each search.

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
        self._rows = _KeptRows(as_features("gallery", gallery), mesh)
        self._options = options

    def search(self, query: np.ndarray | jax.Array, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Return what `search` returns for this gallery, to the bit; see there."""
        return _search(query, self._rows, k, options=self._options)


class _KeptRows(_Rows):
    """A gallery whose blocks stay on the devices, unless they are too large."""

    def __init__(self, gallery: np.ndarray | jax.Array, mesh: Mesh | None):
        super().__init__(gallery, mesh)
        self._size = 0
        self._kept: list[Block] = []
        self._rounded: dict[int, Rounded] = {}
        self._vain = 0

    def blocks(self, size: int) -> Iterable[Block]:
        if not self._fits(size):
            return super().blocks(size)
        if size != self._size:  # a k above a block's rows needs larger ones
            self._kept, self._rounded = list(super().blocks(size)), {}
            self._size = size
        return self._kept

    def rounded(self, block: Block) -> Rounded:
        if len(block.rows) != self._size:
            return super().rounded(block)
        first = int(block.first)
        if first not in self._rounded:
            self._rounded[first] = super().rounded(block)
        return self._rounded[first]

    def is_faster_screened(self, num_queries: int, size: int) -> bool:
        if not self._fits(size):
            return super().is_faster_screened(num_queries, size)
        return self._vain < _VAIN and (num_queries == 1 or num_queries >= _SCREENED_QUERIES)

    def screened(self, certain: bool) -> None:
        self._vain = 0 if certain else self._vain + 1

    def _fits(self, size):
        num_rows, feature_size = self.gallery.shape
        shards = 1 if self.mesh is None else self.mesh.shape["data"]
        return 4 * feature_size * size * -(-num_rows // size) <= KEPT_BYTES * shards


def _search(query, rows: _Rows, k: int, *, options) -> tuple[np.ndarray, np.ndarray]:
    """Search the blocks of a gallery."""
    gallery, mesh = rows.gallery, rows.mesh
    query, k = as_features("query", query), neighbours(k)
    _check(query, gallery, k, mesh=mesh)
    query_size, size = _block_sizes(query.shape, len(gallery), k, mesh=mesh, options=options)
    approx_recall, screen = options.approx_recall, options.screen
    if screen is None:
        # An accelerator takes its own program.
        on_cpu = platform(mesh) == "cpu"
        faster = on_cpu and rows.is_faster_screened(len(query), size)
        screen = faster and multiplies_bfloat16("cpu")
        if mesh is not None and mesh.is_multi_process:  # the hosts may have different processors
            screen = hosts.broadcast(screen)
    screen = screen and approx_recall is None and can_screen(size, k, mesh)
    queries = [place(b, mesh) for _, b in rows_of("query", query, query_size)]
    none_yet = tuple(place(part, mesh) for part in no_neighbours(query_size, k))
    best = [none_yet] * len(queries)
    step = partial(search_block, k=k, approx_recall=approx_recall, mesh=mesh)
    for block in rows.blocks(size):
        coarse = rows.rounded(block) if screen else None
        for i, one in enumerate(queries):
            best[i], certain = step(one, block, best[i], coarse=coarse)
            if screen and block.first == i == 0:
                rows.screened(bool(certain))
                if not certain:  # rows too close to each other for the bound to hold
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
        most = GALLERY_ROWS_ON_CPU if platform(mesh) == "cpu" else GALLERY_ROWS
        gallery_block = min(most, power_of_two(GALLERY_BYTES // (4 * feature_size) + 1) // 2)
    rows = power_of_two(max(k, min(gallery_block, -(-num_rows // shards))))
    return power_of_two(min(options.query_block, num_queries)), shards * rows


def neighbours(k: int) -> int:
    """Return a number of neighbours as a plain whole number.

    Raises:
      UserError: anything else.
    """
    return checked(_K, k)


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
