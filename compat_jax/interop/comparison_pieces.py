"""Pieces of the method on fresh random inputs: ours beside the reference's, function by function."""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from compat_jax import compatibility, losses, retrieval, simplex
from compat_jax.interop.comparison import Line, line, worst
from compat_jax.methods import LossInputs, LossSettings, get_method, target_labels
from compat_jax.models import Outputs
from compat_jax.models.layers import BatchNorm
from compat_jax.train.optimizer import OptimizerSettings, learning_rate

# (images a batch, K, λ, μ) of the losses.
SIZES = ((2, 3, 0.3, 5.0), (7, 10, 0.2, 3.0), (32, 100, 0.05, 12.0), (128, 1024, 0.1, 10.0))


class Side(NamedTuple):
    """The functions of one side, arrays in and arrays out; `reference.Pieces` has the same methods.

    A field can be replaced, which is how the comparison itself is tested. A loss gives the mean over
    the batch and its gradient with respect to the (first) features.

    Attributes:
      prototypes: (num_classes) -> float[K, K-1].
      rows: (classes, num_classes) -> the prototype row of each class.
      cross_entropy: (features, rows) -> loss on the fixed classifier.
      contrast: (new, old, labels, mu) -> the contrastive term as the reference codes it.
      batch_loss: (new, old, classes, lam, mu) -> the whole loss of a batch of class numbers.
      identification: (query, query_labels, gallery, gallery_labels) -> share that find their class.
      average_compatibility: (matrix) -> AC.
      average_accuracy: (matrix) -> AA in percent of a matrix in 0..1.
      learning_rates: (lr, min_lr, epochs) -> of every epoch.
      batch_norm: (maps, scale, bias, mean, var) -> result, running mean and running variance of a
        batch in training.
    """

    prototypes: Any
    rows: Any
    cross_entropy: Any
    contrast: Any
    batch_loss: Any
    identification: Any
    average_compatibility: Any
    average_accuracy: Any
    learning_rates: Any
    batch_norm: Any


# Each size is compiled to run once.
_quick_jit = functools.partial(
    jax.jit,
    compiler_options={
        "xla_backend_optimization_level": 0,
        "xla_llvm_disable_expensive_passes": True,
    },
)


def _with_gradient(function):
    """(features, *others, **settings) -> mean over the batch and its gradient."""

    def mean(features, others, settings):
        return function(features, *others, **dict(settings)).mean()

    compiled = _quick_jit(jax.value_and_grad(mean), static_argnames="settings")

    def both(features, *others, **settings):
        loss, gradient = compiled(features, others, settings=tuple(settings.items()))
        return float(loss), np.asarray(gradient)

    return both


@_with_gradient
def _contrast(new, old, labels, mu):
    return losses.info_nce(new, old, labels, mu, "as_coded")


@_with_gradient
def _cross_entropy(features, rows):
    return losses.simplex_cross_entropy(features, rows)


@_with_gradient
def _batch_loss(new, old, classes, lam, mu):
    method, num_classes = get_method("hoc"), new.shape[1] + 1
    inputs = LossInputs(
        Outputs(new, None),
        old,
        target_labels(method, classes, num_classes, "descending"),
        memory=jnp.zeros(len(new)),
        num_seen=jnp.int32(num_classes),
        distillation_weight=jnp.float32(0),
        num_prototypes=num_classes,
    )
    return method.loss(inputs, LossSettings(lam, mu, "as_coded"))


def _learning_rates(lr, min_lr, epochs):
    settings = OptimizerSettings(lr=lr, min_lr=min_lr)
    return np.array([float(learning_rate(settings, e, epochs)) for e in range(epochs)])


def _batch_norm(maps, scale, bias, mean, var):
    variables = {
        "params": {"scale": scale, "bias": bias},
        "batch_stats": {"mean": mean, "var": var},
    }
    result, updated = BatchNorm().apply(variables, maps, train=True, mutable=["batch_stats"])
    return result, updated["batch_stats"]["mean"], updated["batch_stats"]["var"]


OURS = Side(
    prototypes=simplex.prototypes,
    rows=simplex.prototype_rows,
    cross_entropy=_cross_entropy,
    contrast=_contrast,
    batch_loss=_batch_loss,
    identification=retrieval.identification,
    average_compatibility=compatibility.average_compatibility,
    average_accuracy=lambda matrix: 100 * compatibility.average_accuracy(matrix),
    learning_rates=_learning_rates,
    batch_norm=_batch_norm,
)


def lines(ours: Side, theirs: Any, seed: int, progress: bool = False) -> Iterator[Line]:
    """Every piece at several sizes; a line shows the size at which both differ most.

    Args:
      ours: usually OURS.
      theirs: usually `reference.Pieces`.
      seed: of the inputs.
      progress: whether to show a bar.

    Yields:
      Lines.
    """
    groups = (_simplex, _losses, _norm, _retrieval, _matrices, _schedule)
    for group in tqdm(groups, "pieces", disable=not progress, leave=False):
        yield from group(ours, theirs, np.random.default_rng([seed, groups.index(group)]))


def _piece(quantity, ours, theirs, tolerance, note, absolute=False):
    return line("pieces", quantity, ours, theirs, tolerance, note, absolute)


def _simplex(ours, theirs, rng):
    sizes = (2, 3, 10, 100, 1024)
    yield worst(
        [
            _piece("", ours.prototypes(k), theirs.prototypes(k), 1e-5, "rounding", absolute=True)
            for k in sizes
        ],
        f"prototypes, K = {_listed(sizes)}",
    )
    classes = rng.integers(0, 100, 50)
    both = [side.rows(classes, 1024) for side in (ours, theirs)]
    yield _piece("prototype row of a class", *both, 0.0, "exact", absolute=True)


def _losses(ours, theirs, rng):
    found = {name: [] for name in ("cross-entropy", "contrast", "loss of a batch")}
    for batch, k, lam, mu in SIZES:
        # Lengths as a network gives them; old features near the new ones, as after some steps.
        new = rng.normal(size=(batch, k - 1)).astype(np.float32)
        old = (0.7 * new + 0.7 * rng.normal(size=new.shape)).astype(np.float32)
        classes = rng.integers(0, max(k // 4, 2), batch)
        rows = rng.integers(0, k, batch)
        for name, call in (
            ("cross-entropy", lambda side, f=new, r=rows: side.cross_entropy(f, r)),
            ("contrast", lambda side, a=(new, old, classes), m=mu: side.contrast(*a, mu=m)),
            (
                "loss of a batch",
                lambda side, a=(new, old, classes), n=(lam, mu): side.batch_loss(
                    *a, lam=n[0], mu=n[1]
                ),
            ),
        ):
            found[name].append((call(ours), call(theirs)))
    text = {
        "cross-entropy": "cross-entropy on the simplex",
        "contrast": "contrast (HocLoss, as coded)",
        "loss of a batch": "loss of a batch of classes (train_one_epoch)",
    }
    for name, pairs in found.items():
        for index, what in enumerate(("", ", gradient")):
            each = [_piece("", a[index], b[index], 1e-5, "rounding") for a, b in pairs]
            yield worst(each, text[name] + what)


def _norm(ours, theirs, rng):
    names = ("BatchNorm in training", "its running mean", "its running variance")
    found = []
    for batch, side in ((8, 1), (8, 2), (16, 8)):
        maps = (1 + 2 * rng.normal(size=(batch, side, side, 64))).astype(np.float32)
        vectors = [rng.uniform(0.5, 1.5, 64).astype(np.float32) for _ in range(4)]
        both = [one.batch_norm(maps, *vectors) for one in (ours, theirs)]
        found.append([_piece("", a, b, 1e-5, "rounding") for a, b in zip(*both, strict=True)])
    for index, name in enumerate(names):
        yield worst([each[index] for each in found], name)


def _retrieval(ours, theirs, rng):
    each = []
    for queries, images, classes, size in (
        (40, 20, 5, 9),
        (600, 300, 10, 99),
        (2000, 400, 40, 1023),
    ):
        centres = rng.normal(size=(classes, size))
        labels = [np.arange(n) % classes for n in (queries, images)]
        # So noisy that some queries miss.
        features = [
            centres[own] + 2.5 * np.sqrt(size / 10) * rng.normal(size=(len(own), size))
            for own in labels
        ]
        query, gallery = (
            (f / np.linalg.norm(f, axis=1, keepdims=True)).astype(np.float32) for f in features
        )
        both = [
            side.identification(query, labels[0], gallery, labels[1]) for side in (ours, theirs)
        ]
        each.append(_piece("", *both, 1.001 / queries, "exact", absolute=True))
    yield worst(each, "identification, up to 2000 queries")


def _matrices(ours, theirs, rng):
    each = {"AC": [], "AA, %": []}
    for versions in (2, 3, 7, 31):
        # Rounded, so that some pairs tie; above 0, which the reference takes as missing.
        matrix = np.tril(np.round(rng.uniform(0.05, 0.95, (versions, versions)), 1))
        for name, function in (("AC", "average_compatibility"), ("AA, %", "average_accuracy")):
            both = [getattr(side, function)(matrix.copy()) for side in (ours, theirs)]
            each[name].append(_piece("", *both, 1e-9, "rounding"))
    for name, found in each.items():
        yield worst(found, f"{name} of random matrices, T = 2, 3, 7, 31")


def _schedule(ours, theirs, rng):
    each = []
    for epochs in (1, 7, 70):
        lr = float(rng.uniform(0.001, 0.1))
        both = [side.learning_rates(lr, lr / 100, epochs) for side in (ours, theirs)]
        each.append(_piece("", *both, 1e-5, "rounding"))
    yield worst(each, "learning rates of 1, 7, 70 epochs")


def _listed(numbers):
    return ", ".join(map(str, numbers))
