"""Fit a map by the name of its kind."""

from collections.abc import Callable, Mapping
from typing import Any

from compat_jax.align.linear import low_rank, procrustes, ridge
from compat_jax.align.maps import Map, as_pairs
from compat_jax.align.residual import adapter
from compat_jax.align.spherical import slerp
from compat_jax.errors import unknown
from compat_jax.fields import check_arguments

KINDS: Mapping[str, Callable[..., Map]] = {
    function.__name__: function for function in (procrustes, ridge, low_rank, slerp, adapter)
}


def fit(old: Any, new: Any, kind: str = "procrustes", labels: Any = None, **numbers: Any) -> Map:
    """Fit a map that takes new features into the old space.

    Args:
      old: float[n, d], features of pictures by the old version.
      new: float[n, e], features of the same pictures by the new version. Both are L2-normalised.
      kind: a name of `KINDS`.
      labels: int[n], classes of the pictures; only `slerp` looks at them.
      **numbers: of the kind, see its function.

    Returns:
      The map.

    Raises:
      UserError: unknown kind or number, a number out of range, or features that do not fit.
    """
    if kind not in KINDS:
        raise unknown("kind of map", str(kind), KINDS, "kind")
    checked = check_arguments(KINDS[kind], numbers, f"{kind}.")
    return KINDS[kind](as_pairs(old, new, labels), **checked)
