"""Maps between two spaces of features, fitted afterwards: no network is trained or embedded again.

    pairs = old_version.embed(pictures), new_version.embed(pictures)
    found = align.fit(*pairs, kind="procrustes")
    queries = found.map(new_version.embed(queries))  # compare with the old gallery

A map takes NEW query features into the OLD space, so that a gallery embedded by the old version
answers. `KINDS` names them; each takes seconds on 10^4 pairs.
"""

from compat_jax.align.fitting import KINDS, fit
from compat_jax.align.maps import Map, Pairs, load, needs_old, unfit

__all__ = ["KINDS", "Map", "Pairs", "fit", "load", "needs_old", "unfit"]
