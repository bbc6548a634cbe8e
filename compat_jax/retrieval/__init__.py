"""Retrieval with any pair of versions: search, metrics of a ranking, verification."""

from compat_jax.retrieval.extract import extract
from compat_jax.retrieval.metrics import (
    MeanAveragePrecision,
    class_templates,
    cumulative_matching_characteristic,
    identification,
    mean_average_precision,
    recall_at_k,
    template_accuracies,
)
from compat_jax.retrieval.search import search
from compat_jax.retrieval.verification import (
    make_pairs,
    pair_distances,
    tar_at_far,
    verification_accuracy,
)

__all__ = [
    "MeanAveragePrecision",
    "class_templates",
    "cumulative_matching_characteristic",
    "extract",
    "identification",
    "make_pairs",
    "mean_average_precision",
    "pair_distances",
    "recall_at_k",
    "search",
    "tar_at_far",
    "template_accuracies",
    "verification_accuracy",
]
