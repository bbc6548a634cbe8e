"""Metrics: of a pair of versions, and of a whole matrix.

metrics.get("recall@5")                     by name
metrics.register(Metric(name, unit, score)) your own
"""

from compat_jax.compatibility import (
    average_accuracy,
    average_compatibility,
    backward_compatibility,
    compatible_pairs,
    definition_1,
    forward_compatibility,
)
from compat_jax.retrieval.metric import (
    Metric,
    Queries,
    everything,
    get,
    identification,
    mean_average_precision,
    names,
    recall,
    register,
)

__all__ = [
    "Metric",
    "Queries",
    "average_accuracy",
    "average_compatibility",
    "backward_compatibility",
    "compatible_pairs",
    "definition_1",
    "everything",
    "forward_compatibility",
    "get",
    "identification",
    "mean_average_precision",
    "names",
    "recall",
    "register",
]
