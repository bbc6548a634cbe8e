"""Losses and simplex as plain float64 formulas, one image at a time."""

import numpy as np


def prototypes(num_prototypes):
    """The reference's construction: the unit axes and one more point, shifted and normalised."""
    d = num_prototypes - 1
    shift = (1 + (1 - np.sqrt(num_prototypes)) / d) / num_prototypes
    rows = np.vstack([np.eye(d), np.full(d, (1 - np.sqrt(num_prototypes)) / d)]) - shift
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def cross_entropy(features, labels):
    scores = features.astype(np.float64) @ prototypes(features.shape[1] + 1).T
    return np.array([np.log(np.exp(s).sum()) - s[c] for s, c in zip(scores, labels, strict=True)])


def unit(x):
    return x / np.linalg.norm(x)


def info_nce(new, old, labels, mu=10.0, same_class="exclude", positive_in_denominator=False):
    result = []
    for i in range(len(new)):
        positive = mu * unit(old[i]) @ unit(new[i])
        others = [j for j in range(len(new)) if labels[j] != labels[i]]
        terms = [np.exp(mu * unit(old[i]) @ unit(new[j])) for j in others]
        same = len(new) - len(others)
        if positive_in_denominator:
            terms.append(np.exp(positive))
            same -= 1
        if same_class == "as_coded":
            terms += [1.0] * same
        result.append(np.log(np.sum(terms)) - positive if terms else -positive)
    return np.array(result)


def hoc(new, old, labels, lam=0.1, **options):
    contrast = info_nce(new, old, labels, **options)
    return lam * cross_entropy(new, labels) + (1 - lam) * contrast


def distillation(new, old):
    return np.array([1 - unit(n) @ unit(o) for n, o in zip(new, old, strict=True)])


def difference_quotient(function, point, step=1e-6):
    """Central differences of a scalar function of an array, in float64."""
    point = point.astype(np.float64)
    gradient = np.zeros_like(point)
    for index in np.ndindex(point.shape):
        shift = np.zeros_like(point)
        shift[index] = step
        gradient[index] = (function(point + shift) - function(point - shift)) / (2 * step)
    return gradient
