"""Linear and affine maps in closed form, in float64."""

from typing import Annotated

import numpy as np

from compat_jax.align.maps import Map, Pairs, applies
from compat_jax.fields import Rule


def procrustes(pairs: Pairs) -> Map:
    """Rotate: the orthogonal R that minimises |new R - old|, of U S V^T = new^T old, R = U V^T.

    For unequal sizes the smaller space counts as zero-padded, so that R is part of an orthogonal matrix;
    a larger new space is cut to the old columns afterwards, since the padding of an old gallery adds
    nothing to an inner product. Where the old space is as large at least, R keeps all inner products
    among new features.

    Source: Schönemann, Psychometrika 1966.
    """
    return _linear("procrustes", pairs, rotation(pairs))


def rotation(pairs: Pairs) -> np.ndarray:
    """Return R of `procrustes`: float64[e, d] with orthonormal rows (e <= d) or columns."""
    left, _, right = np.linalg.svd(pairs.new.T @ pairs.old, full_matrices=False)
    return left @ right


def ridge(
    pairs: Pairs,
    strength: Annotated[
        float, Rule("of the penalty, against the mean squared error", above=0)
    ] = 1e-4,
) -> Map:
    """Fit the affine map that minimises mean |new W + b - old|^2 + strength |W|^2.

    Args:
      pairs: features.
      strength: > 0.
    """
    matrix, bias = _ridge(pairs, strength)
    return _linear("ridge", pairs, matrix, bias, strength=strength)


def low_rank(
    pairs: Pairs,
    rank: Annotated[int, Rule("of the matrix", low=1)] = 64,
    strength: Annotated[float, Rule("of the penalty, see ridge", above=0)] = 1e-4,
) -> Map:
    """Fit `ridge` with a matrix of low rank, stored as two factors: rank (d + e) numbers, not d e.

    It is the minimum over all matrices of this rank: the ridge solution, projected on the leading
    right singular vectors of its predictions (the penalty's rows included).

    Args:
      pairs: features.
      rank: at most min(d, e) counts.
      strength: > 0.

    Source: reduced-rank regression, Izenman 1975.
    """
    matrix, bias = _ridge(pairs, strength)
    centred = pairs.new - pairs.new.mean(0)
    gram = centred.T @ centred / len(centred) + strength * np.eye(centred.shape[1])
    _, vectors = np.linalg.eigh(matrix.T @ gram @ matrix)
    leading = vectors[:, ::-1][:, : min(rank, *matrix.shape)]
    left = matrix @ leading
    # The mean is met exactly, whatever the rank.
    bias = pairs.old.mean(0) - pairs.new.mean(0) @ left @ leading.T
    arrays = {"left": left, "right": leading.T, "bias": bias}
    return _map("low_rank", pairs, arrays, rank=rank, strength=strength)


def _ridge(pairs, strength):
    """W float64[e, d] and b float64[d]."""
    new, old = pairs.new - pairs.new.mean(0), pairs.old - pairs.old.mean(0)
    gram = new.T @ new / len(new) + strength * np.eye(new.shape[1])
    matrix = np.linalg.solve(gram, new.T @ old / len(new))
    return matrix, pairs.old.mean(0) - pairs.new.mean(0) @ matrix


def _linear(kind, pairs, matrix, bias=None, **settings):
    arrays = {"matrix": matrix} if bias is None else {"matrix": matrix, "bias": bias}
    return _map(kind, pairs, arrays, **settings)


def _map(kind, pairs, arrays, **settings):
    single = {name: array.astype(np.float32) for name, array in arrays.items()}
    new_size, old_size = pairs.sizes
    return Map(kind, new_size, old_size, arrays=single, settings=settings)


def _apply(arrays, new, old):
    del old
    if "left" in arrays:
        return new @ arrays["left"] @ arrays["right"] + arrays["bias"]
    return new @ arrays["matrix"] + arrays.get("bias", np.float32(0))


for _kind in ("procrustes", "ridge", "low_rank"):
    applies(_kind, _apply)
