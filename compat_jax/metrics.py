"""Metrics: of a pair of versions, of a chain, and of features.

metrics.get("recall@5")                     by name
metrics.register(Metric(name, unit, score)) your own
"""

from compat_jax.backfill import Gallery, backfill
from compat_jax.compatibility import (
    average_accuracy,
    average_compatibility,
    backward_compatibility,
    compatible_pairs,
    forward_compatibility,
    update_gain,
    update_gains,
    upgrade_matrices,
    upgrade_scores,
)
from compat_jax.definition_1 import definition_1, definition_1_matrix
from compat_jax.drift import drift, drift_matrix, neural_collapse, prototype_angles
from compat_jax.retrieval.metric import (
    Metric,
    Queries,
    cmc,
    everything,
    get,
    identification,
    mean_average_precision,
    mean_average_precision_at_r,
    names,
    recall,
    register,
    tar,
    verification,
)
from compat_jax.statistics import flips, flips_by_class, matrix_intervals

__all__ = [
    "Gallery",
    "Metric",
    "Queries",
    "average_accuracy",
    "average_compatibility",
    "backfill",
    "backward_compatibility",
    "cmc",
    "compatible_pairs",
    "definition_1",
    "definition_1_matrix",
    "drift",
    "drift_matrix",
    "everything",
    "flips",
    "flips_by_class",
    "forward_compatibility",
    "get",
    "identification",
    "matrix_intervals",
    "mean_average_precision",
    "mean_average_precision_at_r",
    "names",
    "neural_collapse",
    "prototype_angles",
    "recall",
    "register",
    "tar",
    "update_gain",
    "update_gains",
    "upgrade_matrices",
    "upgrade_scores",
    "verification",
]
