"""Retrieval with any pair of versions: embedding, indexes, metrics, verification."""

from compat_jax.retrieval.embedding import embed
from compat_jax.retrieval.exact import SearchOptions, search
from compat_jax.retrieval.index import ExactIndex, Index, VectorIndex
from compat_jax.retrieval.metric import Metric, Queries
from compat_jax.retrieval.metrics import (
    MeanAveragePrecision,
    average_precision_scores,
    cumulative_matching_characteristic,
    mean_average_precision,
    neighbour_scores,
    precision_at_r_scores,
    recall_at_k,
)
from compat_jax.retrieval.templates import class_templates, identification, template_scores
from compat_jax.retrieval.verification import (
    QueryPairs,
    make_pairs,
    pair_distances,
    pair_scores,
    query_pairs,
    right_decisions,
    tar_at_far,
    verification_accuracy,
)

__all__ = [
    "ExactIndex",
    "Index",
    "MeanAveragePrecision",
    "Metric",
    "Queries",
    "QueryPairs",
    "SearchOptions",
    "VectorIndex",
    "average_precision_scores",
    "class_templates",
    "cumulative_matching_characteristic",
    "embed",
    "identification",
    "make_pairs",
    "mean_average_precision",
    "neighbour_scores",
    "pair_distances",
    "pair_scores",
    "precision_at_r_scores",
    "query_pairs",
    "recall_at_k",
    "right_decisions",
    "search",
    "tar_at_far",
    "template_scores",
    "verification_accuracy",
]
