"""Ways to bring an old gallery to a new version, measured on one chain with what each of them costs.

    found = afterwards.compare(chain, query, gallery, metrics=["identification", "recall@1"])
    for way in found.ways:
        print(way.name, way.curves["recall@1"].area, way.cost)

A chain that was trained for compatibility needs only the first of them, the `naive` swap; the others
stand beside it on the same pictures.
"""

from compat_jax.afterwards.comparing import METRICS, SAMPLE, compare, sampled
from compat_jax.afterwards.measuring import Spaces, left_out, measure
from compat_jax.afterwards.plan import FORWARD, NAIVE, REINDEX, RESCORING, WAYS, Plan
from compat_jax.afterwards.results import Comparison, Cost, Way

__all__ = [
    "FORWARD",
    "METRICS",
    "NAIVE",
    "REINDEX",
    "RESCORING",
    "SAMPLE",
    "WAYS",
    "Comparison",
    "Cost",
    "Plan",
    "Spaces",
    "Way",
    "compare",
    "left_out",
    "measure",
    "sampled",
]
