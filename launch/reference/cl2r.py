"""CL2R's own code beside ours: the loss of `fd`, ResNet-32, metrics, some training steps."""

import contextlib
import dataclasses
import functools
import io
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType, SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

from compat_jax import Dataset, Preprocess, Run, Sgd, Tasks, compatibility, losses
from compat_jax import mesh as meshes
from compat_jax.interop.weights import to_torch
from compat_jax.retrieval import pair_distances, verification_accuracy
from compat_jax.training.task import sequence_task
from launch.reference.clone import Recorder, losses_of, replaced, torch_module
from launch.reference.inputs import OurSteps
from launch.reference.lines import Line, line, worst

K, OLD, NEW, PER_CLASS = 100, 6, 4, 32  # prototypes, classes of earlier tasks and of this one
RUN = Run(
    method="fd",
    backbone="resnet32_cifar",
    tasks=Tasks(initial=OLD, increment=NEW, rehearsal=PER_CLASS),
    epochs=1,
    batch_size=64,
    optimizer=Sgd(lr=0.001, min_lr=0.0, schedule="constant", decay="notebook"),
    preprocess=Preprocess((0.5,) * 3, (0.25,) * 3, crop_padding=0, flip=False),
    num_prototypes=K,
    label_order="ascending",  # CL2R assigns prototype c to class c
)

_line = functools.partial(line, part="cl2r")
_rounded = functools.partial(_line, note="rounding", tolerance=1e-5)
_exactly = functools.partial(_line, note="rounding", tolerance=1e-9)


def lines(
    modules: Callable[[str], ModuleType], parts: Sequence[str], *, seed: int
) -> Iterator[Line]:
    """Compare single functions of CL2R, and some steps of `fd`.

    Args:
      modules: modules of a clone of CL2R, see `clone.open_clone`.
      parts: parts of the comparison; CL2R takes part in "pieces" and "steps".
      seed: seed of the inputs, the weights and the batches.

    Yields:
      Lines.
    """
    rng = np.random.default_rng([seed, 100])
    if "pieces" in parts:
        yield from _distillation(modules, rng)
        yield from _metrics(modules, rng)
    if "steps" in parts:
        yield from _steps(modules, rng, seed)


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
        values.append(_rounded("", ours, theirs.item()))
        gradients.append(_rounded("", gradient, leaf.grad.numpy()))
    yield worst(values, "feature distillation")
    yield worst(gradients, "feature distillation, gradient")
    weights = []
    for new, old in ((10, 50), (15, 10), (3, 97)):
        args = SimpleNamespace(criterion_weight_base=5)
        theirs = modules("utils").update_criterion_weight(args, old, new)
        weights.append(_exactly("", losses.distillation_weight(new, old), theirs))
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
        each = [_exactly("", ours(m), getattr(theirs, name)(m)) for m in matrices]
        yield worst(each, f"{title} of random matrices, T = 2, 6, 11")
    query = rng.normal(size=(600, 32)).astype(np.float32)
    same = rng.random(600) < 0.5
    other = rng.normal(size=query.shape).astype(np.float32)
    gallery = np.where(same[:, None], query + 0.9 * other, other)
    query, gallery = (f / np.linalg.norm(f, axis=1, keepdims=True) for f in (query, gallery))
    ours = verification_accuracy(pair_distances(query, gallery), same)
    expected = modules("eval").verification(query, gallery, same)
    yield _line(
        "verification accuracy of 600 pairs",
        ours,
        expected,
        tolerance=1.001 / 600,
        note="exact",
        absolute=True,
    )


def _steps(modules, rng, seed):
    classes = np.repeat(np.arange(OLD + NEW), PER_CLASS)
    images = rng.integers(0, 256, (len(classes), 32, 32, 3), np.uint8)
    data = Dataset(images, classes, tuple(map(str, range(OLD + NEW))))
    run, mesh = dataclasses.replace(RUN, seed=seed), meshes.make_mesh("data:1", jax.devices()[:1])
    sequence = run.tasks.sequence(data.num_classes)
    task = sequence_task(run, sequence, 1, labels=classes, start=None, replaced=False)
    trainer = task.trainer(mesh)
    keys = jax.random.split(jax.random.key(seed), 2)
    start, previous = (trainer.init(key, (32, 32, 3)) for key in keys)
    ours = OurSteps(task, data, mesh, start=start, previous=previous)
    for _ in range(task.steps):
        ours.advance()
    nets = [_net(modules, variables) for variables in (start, previous)]
    evaluate = jax.jit(lambda v, x: trainer.embedder.apply(v, x, train=False).features)
    inputs = np.asarray(run.preprocess.normalize(images[::8]))
    title = f"features before, of {len(inputs)} images (ResNet-32)"
    both = evaluate(start, inputs), _features(nets[0], inputs)
    yield _line(title, *both, tolerance=1e-4, note="network")
    expected = _their_steps(modules, nets, data, plan=task.plan)
    step = functools.partial(_line, note="step")
    pairs = zip(ours.losses, expected, strict=True)
    each = [step("", *pair, tolerance=1e-4) for pair in pairs]
    yield worst(each, f"loss of fd, steps 1 to {task.steps}")
    trained = ours.variables()
    found, theirs = to_torch(trained), nets[0].state_dict()
    before = to_torch(start)
    for kind, dims in (("kernels", (2, 4)), ("norms and their statistics", (1,))):
        names = [n for n in found if found[n].ndim in dims]
        moved = [
            np.concatenate([np.ravel(np.asarray(side[n]) - before[n]) for n in names])
            for side in (found, theirs)
        ]
        yield step(f"{kind} after - before, {len(names)} tensors", *moved, tolerance=1e-2)
    both = evaluate(trained, inputs), _features(nets[0], inputs)
    yield step("features after (ResNet-32)", *both, tolerance=1e-3)


def _net(modules, variables):
    """Make CL2R's network with our weights."""
    torch = torch_module()
    with _on_cpu(torch):
        net = modules("model").ResNet32Cifar(None, K, K - 1, "cpu")
    state = {name: torch.tensor(array) for name, array in to_torch(variables).items()}
    net.load_state_dict(state, strict=True)
    return net


def _their_steps(modules, nets, data, *, plan):
    """Return the losses of CL2R's `train`, with the optimiser of its `main`."""
    torch = torch_module()
    net, previous = nets[0], nets[1].eval()
    weight = losses.distillation_weight(NEW, OLD)
    args = SimpleNamespace(
        device="cpu", batch_size=RUN.batch_size, criterion_weight=weight, epochs=1
    )
    optimizer = torch.optim.SGD(net.parameters(), lr=0.001, momentum=0.9, weight_decay=5e-4)
    batches = [
        (
            _tensor(np.asarray(RUN.preprocess.normalize(data.images[own]))),
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
    """Make the `.cuda(...)` calls of the clone do nothing."""
    stay = lambda self, *args, **settings: self  # noqa: E731
    with replaced(torch.Tensor, cuda=stay), replaced(torch.nn.Module, cuda=stay):
        yield
