"""Identification across versions: the gallery becomes a template, the mean feature, of each class.

Features are used as they are, as in `metrics`.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from compat_jax import hosts
from compat_jax.retrieval.blocks import SCORES, check_sizes
from compat_jax.retrieval.labels import in_one_form, labelled


def class_templates(gallery: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Average the features of each class and L2-normalise the result.

    Args:
      gallery: float[n, d].
      labels: int[n].

    Returns:
      float32[c, d] templates and the c class numbers, ascending.

    Raises:
      UserError: labels and features of different lengths, or none.

    Source: `image2template_feature` in `src/iamcl2r/performance_metrics.py`.
    """
    gallery, labels = labelled("gallery", gallery, labels)
    classes, codes, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    order = np.argsort(codes, kind="stable")
    starts = np.cumsum(sizes) - sizes
    sums = np.add.reduceat(gallery[order], starts, axis=0, dtype=np.float64)
    # The norm of the sum is that of the mean but for the class's size, which cancels.
    norms = np.linalg.norm(sums, axis=1, keepdims=True)
    return (sums / np.where(norms == 0, 1, norms)).astype(np.float32), classes


def identification(
    query: np.ndarray,
    query_labels: np.ndarray,
    gallery: np.ndarray,
    gallery_labels: np.ndarray,
) -> float:
    """Return the share of queries whose nearest class template, by inner product, is of their class.

    Args:
      query: float[q, d], L2-normalised (the length of a query does not matter here).
      query_labels: int[q].
      gallery: float[n, d], L2-normalised; the lengths weigh the images within a template.
      gallery_labels: int[n].

    Returns:
      A float in [0, 1]. A query whose class the gallery lacks counts as wrong.

    Raises:
      UserError: lengths that differ, or see `search`.

    Source: the protocol's 1:N search; `identification` in `src/iamcl2r/performance_metrics.py`,
      with the class that it names rather than its place among the templates, which is the same
      when classes are numbered 0, 1, ….
    """
    query_labels, gallery_labels = in_one_form(query_labels, gallery_labels)
    templates, classes = class_templates(gallery, gallery_labels)
    return float(template_scores(query, query_labels, [templates], classes=classes).mean())


def template_scores(
    query: np.ndarray,
    query_labels: np.ndarray,
    templates: Sequence[np.ndarray],
    classes: np.ndarray,
) -> np.ndarray:
    """Score the same queries in the galleries of several versions, by one matmul.

    Args:
      query: float[q, d], L2-normalised.
      query_labels: int[q].
      templates: float32[c, d] for each version, of `class_templates`.
      classes: int[c], the classes of the templates, the same in every version.

    Returns:
      float64[versions, q], 1 where the nearest template is that of the query's class, else 0. Several
      processes (`jax.distributed`) share the queries.

    Raises:
      UserError: lengths or feature sizes that differ, an empty set, values that are not finite.
    """
    query, query_labels = labelled("query", query, query_labels)
    query_labels, classes = in_one_form(query_labels, classes)
    check_sizes(query, templates[0])
    # Filled up to a power of two: a chain that grows compiles few programs.
    filled = np.zeros((1 << (len(templates) - 1).bit_length(), *templates[0].shape), np.float32)
    filled[: len(templates)] = templates
    on_device = jax.device_put(filled.reshape(-1, filled.shape[-1]))
    size = min(len(query), max(1, SCORES // len(on_device)))
    hits = np.zeros((len(templates), len(query)))
    for start in range(size * jax.process_index(), len(query), size * jax.process_count()):
        rows, labels = query[start : start + size], query_labels[start : start + size]
        missing = size - len(rows)
        rows = np.pad(rows, ((0, missing), (0, 0))) if missing else rows
        nearest = np.asarray(_nearest_templates(rows, on_device, len(filled)))
        found = classes[nearest[: len(labels), : len(templates)]]
        hits[:, start : start + size] = (found == labels[:, None]).T
    return hosts.sum_over_processes(hits.reshape(-1)).reshape(hits.shape)


def template_scores_without_self(
    query: np.ndarray,
    query_labels: np.ndarray,
    gallery: np.ndarray,
    gallery_labels: np.ndarray,
    own: np.ndarray,
) -> np.ndarray:
    """Score queries of which some are in the gallery; each leaves itself out of its class's template.

    Args:
      query: float[q, d], L2-normalised.
      query_labels: int[q].
      gallery: float[n, d], L2-normalised.
      gallery_labels: int[n].
      own: int[q], the gallery row of the same picture, -1 for none.

    Returns:
      float64[q], see `template_scores`. A query that is alone in the gallery counts as wrong, as one
      does whose class the gallery lacks.
    """
    query, query_labels = labelled("query", query, query_labels)
    gallery, gallery_labels = labelled("gallery", gallery, gallery_labels)
    query_labels, gallery_labels = in_one_form(query_labels, gallery_labels)
    check_sizes(query, gallery)
    templates, classes = class_templates(gallery, gallery_labels)
    codes = np.searchsorted(classes, gallery_labels)
    sums = np.zeros(templates.shape)
    np.add.at(sums, codes, gallery.astype(np.float64))
    block, hits = max(1, SCORES // len(classes)), np.zeros(len(query))
    for start in range(0, len(query), block):
        rows = slice(start, start + block)
        scores = query[rows].astype(np.float64) @ templates.T
        inside = np.flatnonzero(own[rows] >= 0)
        row = own[rows][inside]
        rest = sums[codes[row]] - gallery[row]
        norms = np.linalg.norm(rest, axis=1)
        alone = np.bincount(codes, minlength=len(classes))[codes[row]] == 1
        inner = np.einsum("nd,nd->n", query[rows][inside].astype(np.float64), rest)
        scores[inside, codes[row]] = np.where(
            alone, -np.inf, inner / np.where(norms == 0, 1, norms)
        )
        hits[rows] = names_right(scores, classes, query_labels[rows])
    return hits


def names_right(scores: np.ndarray, classes: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Tell whether the class of the best score is the query's; it is not where no class is left.

    Args:
      scores: float[q, c], -inf for a class without any image to compare with.
      classes: [c], its labels.
      labels: [q], of the queries.

    Returns:
      bool[q].
    """
    best = scores.argmax(axis=1)
    is_left = np.take_along_axis(scores, best[:, None], 1)[:, 0] > -np.inf
    return is_left & (classes[best] == labels)


@partial(jax.jit, static_argnames="versions")
def _nearest_templates(query, templates, versions):
    """Return the nearest of each version's templates, int32[q, versions]."""
    scores = jnp.dot(query, templates.T, precision="highest")
    return scores.reshape(len(query), versions, -1).argmax(axis=-1).astype(jnp.int32)
