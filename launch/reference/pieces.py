"""Single functions on random inputs: prototypes, losses, BatchNorm, retrieval, metrics, schedule."""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from compat_jax import Sgd, compatibility, losses, methods, retrieval, simplex
from compat_jax.models import Outputs
from compat_jax.models.layers import BatchNorm
from compat_jax.training.optimizer import learning_rate
from launch.reference.lines import Line, line, worst

# Inputs of the losses: (batch size, K, λ, μ).
SIZES = ((2, 3, 0.3, 5.0), (7, 10, 0.2, 3.0), (32, 100, 0.05, 12.0), (128, 1024, 0.1, 10.0))


class Side(NamedTuple):
    """The functions of one side, arrays in and arrays out; `clone.Pieces` has the same methods.

    Tests replace single fields by wrong functions. A loss returns its mean over the batch and the
    gradient with respect to the first argument.

    Attributes:
      prototypes: (num_classes) -> float[K, K-1].
      rows: (classes, num_classes) -> int[n], the prototype row of each class.
      cross_entropy: (features, rows) -> loss of the fixed classifier, gradient.
      contrast: (new, old, labels, mu) -> contrastive loss as the reference codes it, gradient.
      batch_loss: (new, old, classes, lam, mu) -> whole loss of a batch of class numbers, gradient.
      identification: (query, query_labels, gallery, gallery_labels) -> share of queries identified.
      average_compatibility: (matrix) -> AC.
      average_accuracy: (matrix) -> AA in percent, of a matrix in 0..1.
      learning_rates: (lr, min_lr, epochs) -> float[epochs].
      batch_norm: (maps, scale, bias, mean, var) -> result of training mode, running mean, running
        variance.
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


# Each size is compiled to run once: optimising the code would take longer than running it.
_quick_jit = functools.partial(
    jax.jit,
    compiler_options={
        "xla_backend_optimization_level": 0,
        "xla_llvm_disable_expensive_passes": True,
        "xla_backend_extra_options": "",  # rounding as in programs, whatever XLA_FLAGS says
    },
)


def _with_gradient(function):
    """Return a function that computes the mean of `function` over the batch, and its gradient."""

    def mean(features, others, settings):
        return function(features, *others, **dict(settings)).mean()

    compiled = _quick_jit(jax.value_and_grad(mean), static_argnames="settings")

    def both(features, *others, **settings):
        loss, gradient = compiled(features, others, settings=tuple(settings.items()))
        return float(loss), np.asarray(gradient)

    return both


@_with_gradient
def _contrast(new, old, labels, mu):
    return losses.info_nce(new, old, labels, mu=mu, same_class="as_coded")


@_with_gradient
def _cross_entropy(features, rows):
    return losses.simplex_cross_entropy(features, rows)


@_with_gradient
def _batch_loss(new, old, classes, lam, mu):
    num_classes = new.shape[1] + 1
    method = methods.hoc(lam=lam, mu=mu, same_class="as_coded")
    head = methods.FixedSimplex(num_classes, "descending")
    inputs = methods.LossInputs(
        outputs=Outputs(new, None),
        taught=old,
        frozen={},
        classes=classes,
        targets=head.targets(classes),
        num_seen=jnp.int32(num_classes),
        head=head,
    )
    return method.losses(inputs)[0]


def _learning_rates(lr, min_lr, epochs):
    settings = Sgd(lr=lr, min_lr=min_lr)
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


_rounded = functools.partial(line, part="pieces", note="rounding", tolerance=1e-5)
_exact = functools.partial(line, part="pieces", note="exact", absolute=True)


def lines(ours: Side, theirs: Any, *, seed: int, progress: bool = False) -> Iterator[Line]:
    """Compare every function at several sizes.

    Args:
      ours: our functions, usually OURS.
      theirs: the reference's, usually `clone.Pieces`.
      seed: seed of the inputs.
      progress: show a progress bar.

    Yields:
      A Line for each quantity, of the size at which both sides differ most.
    """
    groups = (_simplex, _losses, _norm, _retrieval, _matrices, _schedule)
    for group in tqdm(groups, "pieces", disable=not progress, leave=False):
        yield from group(ours, theirs, np.random.default_rng([seed, groups.index(group)]))


def _simplex(ours, theirs, rng):
    sizes = (2, 3, 10, 100, 1024)
    yield worst(
        [_rounded("", ours.prototypes(k), theirs.prototypes(k), absolute=True) for k in sizes],
        f"prototypes, K = {_listed(sizes)}",
    )
    classes = rng.integers(0, 100, 50)
    both = [side.rows(classes, 1024) for side in (ours, theirs)]
    yield _exact("prototype row of a class", *both, tolerance=0.0)


_LOSSES = {
    "cross_entropy": "cross-entropy on the simplex",
    "contrast": "contrast (HocLoss, as coded)",
    "batch_loss": "loss of a batch of classes (train_one_epoch)",
}


def _losses(ours, theirs, rng):
    values, gradients = ({name: [] for name in _LOSSES} for _ in range(2))
    for batch, k, lam, mu in SIZES:
        # Features as long as a network makes them; old ones near the new, as after some steps.
        new = rng.normal(size=(batch, k - 1)).astype(np.float32)
        old = (0.7 * new + 0.7 * rng.normal(size=new.shape)).astype(np.float32)
        classes = rng.integers(0, max(k // 4, 2), batch)
        rows = rng.integers(0, k, batch)
        calls = {
            "cross_entropy": ((new, rows), {}),
            "contrast": ((new, old, classes), {"mu": mu}),
            "batch_loss": ((new, old, classes), {"lam": lam, "mu": mu}),
        }
        for name, (arrays, numbers) in calls.items():
            (a, slope_a), (b, slope_b) = (
                getattr(side, name)(*arrays, **numbers) for side in (ours, theirs)
            )
            values[name].append(_rounded("", a, b))
            gradients[name].append(_rounded("", slope_a, slope_b))
    for name, title in _LOSSES.items():
        yield worst(values[name], title)
        yield worst(gradients[name], f"{title}, gradient")


def _norm(ours, theirs, rng):
    names = ("BatchNorm in training", "its running mean", "its running variance")
    found = []
    for batch, side in ((8, 1), (8, 2), (16, 8)):
        maps = (1 + 2 * rng.normal(size=(batch, side, side, 64))).astype(np.float32)
        vectors = [rng.uniform(0.5, 1.5, 64).astype(np.float32) for _ in range(4)]
        both = [one.batch_norm(maps, *vectors) for one in (ours, theirs)]
        found.append([_rounded("", a, b) for a, b in zip(*both, strict=True)])
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
        # Noisy enough that some queries miss.
        features = [
            centres[own] + 2.5 * np.sqrt(size / 10) * rng.normal(size=(len(own), size))
            for own in labels
        ]
        query, gallery = (
            (f / np.linalg.norm(f, axis=1, keepdims=True)).astype(np.float32) for f in features
        )
        arrays = (query, labels[0], gallery, labels[1])
        both = [side.identification(*arrays) for side in (ours, theirs)]
        each.append(_exact("", *both, tolerance=1.001 / queries))
    yield worst(each, "identification, up to 2000 queries")


def _matrices(ours, theirs, rng):
    each = {"AC": [], "AA, %": []}
    for versions in (2, 3, 7, 31):
        # Rounded, so that some pairs tie; above 0, which the reference takes for missing.
        matrix = np.tril(np.round(rng.uniform(0.05, 0.95, (versions, versions)), 1))
        for name, function in (("AC", "average_compatibility"), ("AA, %", "average_accuracy")):
            both = [getattr(side, function)(matrix.copy()) for side in (ours, theirs)]
            each[name].append(_rounded("", *both, tolerance=1e-9))
    for name, found in each.items():
        yield worst(found, f"{name} of random matrices, T = 2, 3, 7, 31")


def _schedule(ours, theirs, rng):
    each = []
    for epochs in (1, 7, 70):
        lr = float(rng.uniform(0.001, 0.1))
        both = [side.learning_rates(lr, lr / 100, epochs) for side in (ours, theirs)]
        each.append(_rounded("", *both))
    yield worst(each, "learning rates of 1, 7, 70 epochs")


def _listed(numbers):
    return ", ".join(map(str, numbers))
