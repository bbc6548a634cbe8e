"""CL2R's own code beside ours: the distillation of `fd`, its ResNet-32, its metrics."""

import contextlib
import functools
import io
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType, SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

from compat_jax import compatibility, losses, models
from compat_jax import mesh as meshes
from compat_jax.data.augment import Preprocess
from compat_jax.data.dataset import Dataset
from compat_jax.data.tasks import batch_plan
from compat_jax.interop.comparison import Line, line, worst
from compat_jax.interop.comparison_inputs import OurSteps
from compat_jax.interop.reference import Recorder, losses_of, replaced, torch_module
from compat_jax.interop.weights import to_torch
from compat_jax.methods import LossSettings, build_embedder, get_method
from compat_jax.retrieval import pair_distances, verification_accuracy
from compat_jax.train.optimizer import OptimizerSettings
from compat_jax.train.state import TaskInfo
from compat_jax.train.step import Trainer

K, BACKBONE, BATCH, STEPS, LR = 100, "resnet32_cifar", 64, 5, 0.001
OLD, NEW = 6, 4  # classes before the task, and of it
PREPROCESS = Preprocess((0.5,) * 3, (0.25,) * 3)

_line = functools.partial(line, "cl2r")


def lines(
    modules: Callable[[str], ModuleType], parts: Sequence[str], seed: int, progress: bool = False
) -> Iterator[Line]:
    """The pieces of CL2R, and some steps of `fd`.

    Args:
      modules: of a clone of CL2R, see `reference.open_clone`.
      parts: of the comparison; "pieces" and "steps" have something here.
      seed: of inputs, weights and batches.
      progress: whether to show a bar.

    Yields:
      Lines.
    """
    rng = np.random.default_rng([seed, 100])
    if "pieces" in parts:
        yield from _distillation(modules, rng)
        yield from _metrics(modules, rng)
    if "steps" in parts:
        yield from _steps(modules, rng, seed, progress)


def _distillation(modules, rng):
    torch, normalize = torch_module(), modules("utils").l2_norm
    values, gradients = [], []
    for batch, size in ((2, 3), (64, 99)):
        new, old = rng.normal(size=(2, batch, size)).astype(np.float32)
        mean = lambda f, o=old: losses.feature_distillation(f, jnp.asarray(o)).mean()  # noqa: E731
        ours, gradient = jax.value_and_grad(mean)(jnp.asarray(new))
        leaf = torch.tensor(new, requires_grad=True)
        theirs = modules("train").EmbeddingsSimilarity(
            normalize(leaf), normalize(torch.tensor(old))
        )
        theirs.backward()
        values.append(_line("", ours, theirs.item(), 1e-5, "rounding"))
        gradients.append(_line("", gradient, leaf.grad.numpy(), 1e-5, "rounding"))
    yield worst(values, "feature distillation")
    yield worst(gradients, "feature distillation, gradient")
    weights = []
    for new, old in ((10, 50), (15, 10), (3, 97)):
        args = SimpleNamespace(criterion_weight_base=5)
        theirs = modules("utils").update_criterion_weight(args, old, new)
        weights.append(_line("", losses.distillation_weight(new, old), theirs, 1e-9, "rounding"))
    yield worst(weights, "its weight at a task")


def _metrics(modules, rng):
    theirs = modules("metrics")
    pairs = {
        "AC": lambda m: compatibility.average_compatibility(m, tie="compatible"),
        "BC": compatibility.backward_compatibility,
        "FC": compatibility.forward_compatibility,
    }
    names = ("average_compatibility", "backward_compatibility", "forward_compatibility")
    matrices = [np.tril(np.round(rng.uniform(0.05, 0.95, (t, t)), 1)) for t in (2, 6, 11)]
    for (title, ours), name in zip(pairs.items(), names, strict=True):
        each = [_line("", ours(m), getattr(theirs, name)(m), 1e-9, "rounding") for m in matrices]
        yield worst(each, f"{title} of random matrices, T = 2, 6, 11")
    query = rng.normal(size=(600, 32)).astype(np.float32)
    same = rng.random(600) < 0.5
    other = rng.normal(size=query.shape).astype(np.float32)
    gallery = np.where(same[:, None], query + 0.9 * other, other)
    query, gallery = (f / np.linalg.norm(f, axis=1, keepdims=True) for f in (query, gallery))
    ours = verification_accuracy(pair_distances(query, gallery), same)
    expected = modules("eval").verification(query, gallery, same)
    yield _line("verification accuracy of 600 pairs", ours, expected, 1.001 / 600, "exact", True)


def _steps(modules, rng, seed, progress):
    classes = np.repeat(np.arange(OLD + NEW), 32)
    images = rng.integers(0, 256, (len(classes), 32, 32, 3), np.uint8)
    data = Dataset(images, classes, tuple(map(str, range(OLD + NEW))))
    memory, new = np.flatnonzero(classes < OLD), np.flatnonzero(classes >= OLD)
    plan = batch_plan(new, memory, BATCH, 1, seed, task=1)[:, :STEPS]
    trainer = _trainer()
    keys = jax.random.split(jax.random.key(seed), 2)
    start, previous = (trainer.init(key, (32, 32, 3)) for key in keys)
    weight = losses.distillation_weight(NEW, OLD)
    info = TaskInfo.create(seed, 1, 1, STEPS, OLD + NEW, OLD, weight)
    ours = OurSteps(trainer, start, previous, data, plan, info)
    for _ in range(STEPS):
        ours.advance()
    nets = [_net(modules, variables) for variables in (start, previous)]
    evaluate = jax.jit(lambda v, x: trainer.embedder.apply(v, x, train=False).features)
    inputs = np.asarray(PREPROCESS.normalize(images[::8]))
    title = f"features before, of {len(inputs)} images (ResNet-32)"
    yield _line(title, evaluate(start, inputs), _features(nets[0], inputs), 1e-4, "network")
    expected = _their_steps(modules, nets, data, plan[0], weight)
    each = [_line("", a, b, 1e-4, "step") for a, b in zip(ours.losses, expected, strict=True)]
    yield worst(each, f"loss of fd, steps 1 to {STEPS}")
    trained = ours.variables()
    found, theirs = to_torch(trained), nets[0].state_dict()
    before = to_torch(start)
    for kind, dims in (("kernels", (2, 4)), ("norms and their statistics", (1,))):
        names = [n for n in found if found[n].ndim in dims]
        moved = [
            np.concatenate([np.ravel(np.asarray(side[n]) - before[n]) for n in names])
            for side in (found, theirs)
        ]
        yield _line(f"{kind} after - before, {len(names)} tensors", *moved, 1e-2, "step")
    both = evaluate(trained, inputs), _features(nets[0], inputs)
    yield _line("features after (ResNet-32)", *both, 1e-3, "step")


def _trainer():
    method = get_method("fd")
    return Trainer(
        build_embedder(method, models.create_backbone(BACKBONE), K, None, np.float32),
        method,
        LossSettings(),
        OptimizerSettings(lr=LR, min_lr=0.0, schedule="constant", decay="notebook"),
        PREPROCESS,
        K,
        "ascending",  # it writes class c to prototype c
        meshes.make_mesh("data:1", jax.devices()[:1]),
    )


def _net(modules, variables):
    """Its network with our weights."""
    torch = torch_module()
    with _on_cpu(torch):
        net = modules("model").ResNet32Cifar(None, K, K - 1, "cpu")
    state = {name: torch.tensor(array) for name, array in to_torch(variables).items()}
    net.load_state_dict(state, strict=True)
    return net


def _their_steps(modules, nets, data, plan, weight):
    """Losses of its `train`, with the optimiser of its `main`."""
    torch = torch_module()
    net, previous = nets[0], nets[1].eval()
    args = SimpleNamespace(device="cpu", batch_size=BATCH, criterion_weight=weight, epochs=1)
    optimizer = torch.optim.SGD(net.parameters(), lr=LR, momentum=0.9, weight_decay=5e-4)
    batches = [
        (
            _tensor(np.asarray(PREPROCESS.normalize(data.images[own]))),
            torch.tensor(data.labels[own].astype(np.int64)),
            None,
        )
        for own in plan
    ]
    meter = Recorder.of(modules("utils").AverageMeter)
    with (
        _on_cpu(torch),
        replaced(modules("train"), AverageMeter=meter),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        criterion = torch.nn.CrossEntropyLoss()
        modules("train").train(args, net, batches, optimizer, 0, criterion, previous, 1)
    return losses_of(meter)


def _features(net, inputs):
    with torch_module().no_grad():
        return net.eval()(_tensor(inputs))[0].numpy()


def _tensor(images):
    return torch_module().from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


@contextlib.contextmanager
def _on_cpu(torch):
    """Its `.cuda(...)` calls leave everything where it is."""
    stay = lambda self, *args, **settings: self  # noqa: E731
    with replaced(torch.Tensor, cuda=stay), replaced(torch.nn.Module, cuda=stay):
        yield
