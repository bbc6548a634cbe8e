"""The d-Simplex: K class prototypes in R^(K-1), as far from each other as K points can be.

The prototypes are never trained. Features learned against them are stationary, and stationary
features are compatible (paper, Theorem 1). The prototype matrix is a scaled identity plus a rank-one
term, so products with it have a closed form and the matrix itself is never built.

Source: the construction of `dsimplex` in `src/iamcl2r/models/__init__.py` of miccunifi/iamcl2r.
"""

import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from compat_jax.errors import UserError, unknown

LabelOrder = Literal["descending", "ascending"]
LABEL_ORDERS = ("descending", "ascending")


def _coefficients(num_prototypes: int) -> tuple[float, float]:
    """Return the mean m and the norm r of the construction, in double precision.

    Row i < K-1 of the matrix is (e_i - m 1) / r; every entry of row K-1 is -1 / sqrt(K-1).
    """
    if num_prototypes < 2:
        raise UserError(f"a simplex needs at least 2 classes, got num_prototypes={num_prototypes}")
    d = num_prototypes - 1
    mean = (1.0 + (1.0 - math.sqrt(num_prototypes)) / d) / num_prototypes
    norm = math.sqrt((1.0 - mean) ** 2 + (d - 1) * mean**2)
    return mean, norm


def prototypes(num_prototypes: int, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
    """Return the d-Simplex prototype matrix, for inspection and export.

    Training never needs the matrix: see `logits`.

    Args:
      num_prototypes: K >= 2.
      dtype: dtype of the result.

    Returns:
      float[K, K-1] with rows of norm 1 whose inner products are all -1/(K-1).

    Raises:
      UserError: fewer than 2 classes.

    Source: paper, section on the d-Simplex fixed classifier; reference `dsimplex`.
    """
    d = num_prototypes - 1
    mean, norm = _coefficients(num_prototypes)
    body = (jnp.eye(d, dtype=jnp.float32) - mean) / norm
    last = jnp.full((1, d), -1.0 / math.sqrt(d), jnp.float32)
    return jnp.concatenate([body, last]).astype(dtype)


def logits(features: jax.Array) -> jax.Array:
    """Compute the scores of features against every prototype in O(d), without the matrix.

    Args:
      features: float[..., d] with d = K-1 >= 1.

    Returns:
      float[..., K] in the dtype of `features`, equal to `features @ prototypes(K).T`. Sums run in
      float32 (or wider) also for bfloat16 features.

    Source: closed form of the construction; see `prototypes`.
    """
    body, last = split_logits(features)
    return jnp.concatenate([body, last[..., None]], axis=-1).astype(features.dtype)


def split_logits(
    features: jax.Array, num_prototypes: int | None = None
) -> tuple[jax.Array, jax.Array]:
    """Compute `logits` as two arrays, so that a sharded feature axis stays evenly divided.

    Args:
      features: float[..., d].
      num_prototypes: K. Smaller than d + 1 if padding columns were appended to make the feature axis
        divide over devices; padding is ignored in the value and in the gradient. None means d + 1.

    Returns:
      float32[..., d], the scores of the first K-1 prototypes (-infinity in padding columns), and
      float32[...], the scores of the last prototype.

    Raises:
      UserError: K out of range.
    """
    wide, is_own, num_prototypes = _own_columns(features, num_prototypes)
    mean, norm = _coefficients(num_prototypes)
    total = wide.sum(axis=-1)
    body = (wide - mean * total[..., None]) / norm
    body = body if is_own is None else jnp.where(is_own, body, -jnp.inf)
    return body, total * (-1.0 / math.sqrt(num_prototypes - 1))


def label_logit(
    features: jax.Array, rows: jax.Array, num_prototypes: int | None = None
) -> jax.Array:
    """Compute the score of one prototype per feature, without the other scores.

    Args:
      features: float[..., d].
      rows: int[...] prototype rows in 0..K-1, one per feature.
      num_prototypes: K, see `split_logits`.

    Returns:
      float32[...], equal to `take_along_axis(logits(features), rows[..., None], -1)[..., 0]`.

    Raises:
      UserError: K out of range.
    """
    wide, _, num_prototypes = _own_columns(features, num_prototypes)
    mean, norm = _coefficients(num_prototypes)
    d = num_prototypes - 1
    total = wide.sum(axis=-1)
    index = jnp.minimum(rows, d - 1)[..., None]
    own = jnp.take_along_axis(wide, index, axis=-1)[..., 0]
    return jnp.where(rows < d, (own - mean * total) / norm, total * (-1.0 / math.sqrt(d)))


def nearest_row(features: jax.Array, num_prototypes: int | None = None) -> jax.Array:
    """Return the row of the highest-scoring prototype, without building the K-wide row of scores.

    Args:
      features: float[..., d].
      num_prototypes: K, see `split_logits`.

    Returns:
      int32[...], equal to `logits(features).argmax(-1)`.

    Raises:
      UserError: K out of range.
    """
    body, last = split_logits(features, num_prototypes)
    row = body.argmax(axis=-1).astype(jnp.int32)
    last_row = jnp.int32((num_prototypes or features.shape[-1] + 1) - 1)
    return jnp.where(last > body.max(axis=-1), last_row, row)


def _own_columns(features, num_prototypes):
    """Return features in float32 or wider, a mask of the non-padding columns (None: all), and K."""
    d = features.shape[-1]
    wide = features.astype(np.promote_types(features.dtype, np.float32))
    if num_prototypes is None or num_prototypes == d + 1:
        return wide, None, d + 1
    if not 2 <= num_prototypes <= d:
        raise UserError(
            f"features of size {d} hold a simplex of 2..{d + 1} classes, "
            f"got num_prototypes={num_prototypes}"
        )
    is_own = jnp.arange(d) < num_prototypes - 1
    return jnp.where(is_own, wide, 0.0), is_own, num_prototypes


def enlargement(num_prototypes: int, larger: int, order: LabelOrder = "descending") -> np.ndarray:
    """Return the map that moves features from a simplex of K prototypes to one of more.

    The K directions from the centre of the larger simplex's prototypes of the same classes to those
    prototypes are a simplex of K themselves. The map takes each old prototype to the direction of its
    class and keeps all inner products, so that scores between old features stay what they are; the
    cosine between an old prototype's image and the new prototype is sqrt(1 - (K'-K) / (K (K'-1))).

    Args:
      num_prototypes: K of the features.
      larger: K' of the simplex that they move to, > K.
      order: which prototype a class is written to, see `prototype_rows`.

    Returns:
      float32[K-1, K'-1] with orthonormal rows; `features @ map` moves features.

    Raises:
      UserError: K' is not larger than K.
    """
    if larger <= num_prototypes:
        raise UserError(
            f"num_prototypes can only grow: the chain has {num_prototypes:,}, got {larger:,}",
            "num_prototypes",
        )
    classes = np.arange(num_prototypes)
    old, new = (
        _rows64(np.asarray(prototype_rows(jnp.asarray(classes), k, order)), k)
        for k in (num_prototypes, larger)
    )
    new -= new.mean(axis=0)
    new /= np.linalg.norm(new, axis=1, keepdims=True)
    # The sum of outer products of a simplex's prototypes is K / (K-1) times the identity.
    return ((num_prototypes - 1) / num_prototypes * old.T @ new).astype(np.float32)


def _rows64(rows: np.ndarray, num_prototypes: int) -> np.ndarray:
    """Rows of the prototype matrix in double precision: float64[n, K-1]."""
    d = num_prototypes - 1
    mean, norm = _coefficients(num_prototypes)
    found = np.full((len(rows), d), -mean / norm)
    inner = np.flatnonzero(rows < d)
    found[inner, rows[inner]] += 1.0 / norm
    found[rows == d] = -1.0 / math.sqrt(d)
    return found


def prototype_rows(
    labels: jax.Array, num_prototypes: int, order: LabelOrder = "descending"
) -> jax.Array:
    """Map class numbers to prototype rows.

    Args:
      labels: int[...] class numbers in 0..K-1.
      num_prototypes: K.
      order: "descending" maps class c to row K-1-c, as the reference does for the classes of the task
        sequence; "ascending" maps it to row c, as the reference does for the classes of pre-training.
        The two orders fill the simplex from opposite ends.

    Returns:
      int[...] rows. In both orders the map is its own inverse.

    Raises:
      UserError: unknown order.
    """
    if order not in LABEL_ORDERS:
        raise unknown("label order", order, LABEL_ORDERS)
    return num_prototypes - 1 - labels if order == "descending" else labels
