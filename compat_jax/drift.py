"""How features move between versions, how far they are from their prototypes, how much they collapse."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from compat_jax.errors import UserError
from compat_jax.retrieval.blocks import check_finite, check_sizes
from compat_jax.retrieval.labels import check_rows


class ClassMeans(NamedTuple):
    """Means of the features of each class.

    Attributes:
      means: float64[c, d], not normalised.
      classes: int[c], ascending.
      codes: int[n], row of `means` for each image.
    """

    means: np.ndarray
    classes: np.ndarray
    codes: np.ndarray


class Collapse(NamedTuple):
    """Measures of neural collapse; all but `angle` are 0 for a collapsed network.

    Attributes:
      within_class: NC1, Tr(Σ_W Σ_B†) / C, the scatter within classes relative to that between them.
      equal_norms: NC2, standard deviation of the norms of the centred class means, over their mean.
      equal_angles: NC2, standard deviation of the cosines between centred class means.
      maximal_angles: NC2, mean of |cosine + 1/(C-1)|, the distance from a simplex.
      self_duality: NC3, ‖W/‖W‖ - M/‖M‖‖² with the classifier W and the centred class means M, in the
        Frobenius norm; NaN without a classifier.
      nearest_mean: NC4, share of images for which the classifier and the nearest class mean name
        different classes; NaN without a classifier.
      angle: mean angle between centred class means, in degrees; arccos(-1/(C-1)) for a simplex.
    """

    within_class: float
    equal_norms: float
    equal_angles: float
    maximal_angles: float
    self_duality: float
    nearest_mean: float
    angle: float


def angles(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Compute the angle between each pair of rows, in degrees, precise also near 0 and 180.

    It is 2 atan2(‖u - v‖, ‖u + v‖) of the unit vectors u, v.

    Args:
      a: float[..., d].
      b: float[..., d].

    Returns:
      float64[...] in [0, 180]; NaN for a row of zeros.

    Source: Kahan 2006, "How futile are mindless assessments of roundoff", §12.
    """
    u, v = (_unit(np.asarray(x, np.float64)) for x in (a, b))
    between = np.arctan2(np.linalg.norm(u - v, axis=-1), np.linalg.norm(u + v, axis=-1))
    return np.degrees(2 * between)


def class_means(features: np.ndarray, labels: np.ndarray) -> ClassMeans:
    """Average the features of each class.

    Args:
      features: float[n, d].
      labels: int[n].

    Returns:
      `ClassMeans`.

    Raises:
      UserError: labels of another length, none, or values that are not finite.
    """
    features, labels = np.asarray(features), np.asarray(labels)
    if features.ndim != 2 or not len(features) or labels.shape != features.shape[:1]:
        raise UserError(
            f"features [n, d] need n labels (at least one), got shapes {features.shape} and "
            f"{labels.shape}"
        )
    check_finite("class", features)
    classes, codes, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    order = np.argsort(codes, kind="stable")
    sums = np.add.reduceat(features[order], np.cumsum(sizes) - sizes, axis=0, dtype=np.float64)
    return ClassMeans(sums / sizes[:, None], classes, codes)


def drift(new: np.ndarray, old: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Measure how far the mean feature of each class turns between two versions.

    Args:
      new: float[n, d], features of the new version.
      old: float[n, d], of the old version on the same images.
      labels: int[n].

    Returns:
      float64[c], the angle between both means in degrees, for each class in ascending order.

    Raises:
      UserError: shapes that differ, see `class_means`.
    """
    if np.shape(new) != np.shape(old):
        raise UserError(
            f"drift compares features of the same images, got shapes {np.shape(new)} and "
            f"{np.shape(old)}"
        )
    return angles(class_means(new, labels).means, class_means(old, labels).means)


def drift_matrix(features: Sequence[np.ndarray], labels: np.ndarray) -> np.ndarray:
    """Measure the mean drift of the classes between every pair of versions.

    Args:
      features: float[n, d] of each version, on the same images.
      labels: int[n].

    Returns:
      float64[T, T], degrees, at [t, k] with k <= t; 0 on the diagonal; NaN above it and between versions
      of unequal feature size.

    Raises:
      UserError: see `class_means`.
    """
    means = [class_means(part, labels).means for part in features]
    result = np.full((len(means),) * 2, np.nan)
    for t, new in enumerate(means):
        for k, old in enumerate(means[: t + 1]):
            if new.shape == old.shape:
                result[t, k] = angles(new, old).mean()
    return result


def prototype_angles(
    features: np.ndarray, labels: np.ndarray, prototypes: np.ndarray
) -> np.ndarray:
    """Measure the angle between the mean feature of each class and its prototype.

    Args:
      features: float[n, d].
      labels: int[n], row of each image's prototype.
      prototypes: float[K, d], e.g. of `simplex.prototypes`.

    Returns:
      float64[c], degrees, for each class that has an image, in ascending order.

    Raises:
      UserError: feature sizes that differ, a label without a prototype, see `class_means`.
    """
    found = class_means(features, labels)
    check_sizes(found.means, np.asarray(prototypes))
    check_rows(found.classes, len(prototypes), f"there are {len(prototypes)} prototypes")
    return angles(found.means, np.asarray(prototypes)[found.classes])


def neural_collapse(
    features: np.ndarray, labels: np.ndarray, classifier: np.ndarray | None = None
) -> Collapse:
    """Measure how far features have collapsed to a simplex of class means.

    Each class counts the same, whatever its number of images. With μ_c the class means and μ their mean,
    the centred class means are μ_c - μ, Σ_B their second moment and Σ_W that of the images about μ_c.

    Args:
      features: float[n, d], as the network gives them (the measures were made for features that are
        not normalised; normalised ones make NC2's norms more equal).
      labels: int[n], at least two classes.
      classifier: float[K, d], a row of weights for each class number, without biases; prototypes of a
        fixed classifier. None if there is none.

    Returns:
      `Collapse`.

    Raises:
      UserError: fewer than two classes, a label without weights, see `class_means`.

    Source: Papyan, Han, Donoho 2020, "Prevalence of neural collapse during the terminal phase of deep
      learning training".
    """
    found = class_means(features, labels)
    count = len(found.classes)
    if count < 2:
        raise UserError("neural collapse is about two classes or more, got one", "labels")
    centred = found.means - found.means.mean(axis=0)
    norms = np.linalg.norm(centred, axis=1)
    upper = np.triu_indices(count, 1)
    unit = _unit(centred)
    cosines = (unit @ unit.T)[upper]
    dual, differ = float("nan"), float("nan")
    if classifier is not None:
        dual, differ = _classifier_collapse(features, found, centred, classifier=classifier)
    return Collapse(
        within_class=_within_class(features, found, centred),
        equal_norms=float(norms.std() / norms.mean()),
        equal_angles=float(cosines.std()),
        maximal_angles=float(np.abs(cosines + 1 / (count - 1)).mean()),
        self_duality=dual,
        nearest_mean=differ,
        angle=float(angles(unit[upper[0]], unit[upper[1]]).mean()),
    )


def _within_class(features, found: ClassMeans, centred: np.ndarray) -> float:
    """NC1. Σ_B = MᵀM/C of the centred means M, so its pseudo-inverse is had from the SVD of M."""
    _, scales, directions = np.linalg.svd(centred, full_matrices=False)
    kept = scales > scales[0] * max(centred.shape) * np.finfo(np.float64).eps
    inverse = directions[kept].T / scales[kept]
    # Projected before centring: [n, c] in memory rather than [n, d] in float64.
    projected = np.asarray(features) @ inverse - (found.means @ inverse)[found.codes]
    squares = np.einsum("nc,nc->n", projected, projected)
    sizes = np.bincount(found.codes)
    return float(np.mean(np.bincount(found.codes, squares) / sizes))


def _classifier_collapse(features, found: ClassMeans, centred, *, classifier):
    """NC3 and NC4."""
    weights = np.asarray(classifier, np.float64)
    check_sizes(centred, weights)
    rows = f"the classifier has {len(weights)} rows"
    check_rows(found.classes, len(weights), rows, "classifier")
    rows = weights[found.classes]
    gap = rows / np.linalg.norm(rows) - centred / np.linalg.norm(centred)
    features = np.asarray(features)
    nearest = features @ found.means.T - 0.5 * np.square(found.means).sum(axis=1)
    differ = (features @ rows.T).argmax(axis=1) != nearest.argmax(axis=1)
    sizes = np.bincount(found.codes)
    return float(np.square(gap).sum()), float(np.mean(np.bincount(found.codes, differ) / sizes))


def _unit(rows: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(rows, axis=-1, keepdims=True)
    return rows / np.where(norms == 0, np.nan, norms)
