"""Open a user's clones of the PyTorch reference (iamcl2r) and of CL2R without editing them.

Packages that their modules import and the machine lacks (continuum, torchvision, faiss,
scikit-learn) are replaced by stand-ins during the import; wandb always is, because a comparison must
not report anywhere. `np.in1d`, which NumPy 2.4 removed, is given back only to the module that calls
it.
"""

import contextlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

from compat_jax.errors import UserError

_PACKAGES = {
    "iamcl2r": ("reference", "https://github.com/miccunifi/iamcl2r"),
    "cl2r": ("cl2r", "https://github.com/NiccoBiondi/CompatibleLifelongRepresentation"),
}


class Nothing:
    """Return itself from every call and attribute: a logger that drops its lines, an empty data set."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *args, **kwargs):
        """Return itself."""
        return self

    def __getitem__(self, key):
        return self

    def __mul__(self, other):
        return self


class _StandIn(ModuleType):
    """A module whose attributes all exist."""

    __path__: Sequence[str] = ()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Nothing()


class FlatIndex:
    """Stand in for faiss.IndexFlatIP: exact search by the largest inner product."""

    def __init__(self, size: int):
        self.rows = np.zeros((0, size), np.float32)

    def add(self, rows: np.ndarray) -> None:
        """Append rows, float32[n, size]."""
        self.rows = np.concatenate([self.rows, rows])

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the scores and the numbers of the k best rows of each query, best first."""
        scores = queries @ self.rows.T
        order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        return np.take_along_axis(scores, order, axis=1), order


class _KFold:
    """Stand in for sklearn.model_selection.KFold without shuffling: contiguous folds."""

    def __init__(self, n_splits, shuffle=False):
        del shuffle
        self.n_splits = n_splits

    def split(self, indices):
        for fold in np.array_split(np.arange(len(indices)), self.n_splits):
            yield np.setdiff1d(np.arange(len(indices)), fold), fold


class _OldNumpy(ModuleType):
    """numpy with in1d, which NumPy 2.4 removed."""

    def __getattr__(self, name):
        return np.isin if name == "in1d" and not hasattr(np, name) else getattr(np, name)


# Attributes of a stand-in that must work, by module.
_STAND_INS = {
    "continuum": {},
    "continuum.datasets": {},
    "continuum.rehearsal": {},
    "faiss": {"IndexFlatIP": FlatIndex},
    "sklearn": {},
    "sklearn.metrics": {},
    "sklearn.model_selection": {"KFold": _KFold},
    "torchvision": {},
    "torchvision.datasets": {},
    "torchvision.transforms": {"Lambda": lambda function: function},
    "wandb": {},
}


def torch_module() -> ModuleType:
    """Import PyTorch and let it use as many threads as JAX does.

    Raises:
      UserError: PyTorch is not installed.
    """
    try:
        import torch
    except ModuleNotFoundError as error:
        raise UserError(
            "the comparison needs PyTorch, which is not installed: pip install -e '.[torch]' (its "
            "CPU build is enough: --index-url https://download.pytorch.org/whl/cpu)"
        ) from error
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    return torch


def open_clone(clone: str | Path, package: str) -> Callable[[str], ModuleType]:
    """Open a clone.

    Args:
      clone: folder of the repository.
      package: the package in it, "iamcl2r" or "cl2r".

    Returns:
      A function that imports a module by its name within the package ("" is the package itself).

    Raises:
      UserError: the folder is no clone, another clone is already open, or its modules do not import.
    """
    flag, address = _PACKAGES[package]
    source = Path(clone).expanduser().absolute() / "src"
    if not (source / package / "main.py").is_file():
        raise UserError(
            f"{clone} is no clone of {address}: it has no src/{package}/main.py. Run git clone "
            f"{address} and give its folder: --{flag}=FOLDER"
        )
    torch_module()
    known = sys.modules.get(package)
    paths = [] if known is None else list(known.__path__)
    if known is not None and str(source / package) not in paths:
        raise UserError(f"{paths[0]} is already open: compare with {clone} in a separate program")

    def module(name: str) -> ModuleType:
        try:
            with stand_ins(source):
                return importlib.import_module(f"{package}.{name}" if name else package)
        except (ImportError, SyntaxError) as error:
            raise UserError(f"{clone}: {package}.{name} does not import: {error}") from error

    module("")
    return module


@contextlib.contextmanager
def stand_ins(source: Path) -> Iterator[None]:
    """Put a folder on the import path and stand-ins in place of missing packages.

    Args:
      source: folder that holds the clone's package.
    """
    added = []
    for name, attributes in _STAND_INS.items():
        top = name.partition(".")[0]
        if name in sys.modules or (top != "wandb" and top not in added and is_installed(top)):
            continue
        module = _StandIn(name)
        vars(module).update(attributes)
        sys.modules[name] = module
        added.append(name)
        if name != top:
            setattr(sys.modules[top], name.partition(".")[2], module)
    # The clone imports `transforms` both as a module and from that module.
    if "torchvision.transforms" in added:
        sys.modules["torchvision.transforms"].transforms = sys.modules["torchvision.transforms"]
    sys.path.insert(0, str(source))
    try:
        yield
    finally:
        sys.path.remove(str(source))
        for name in added:
            del sys.modules[name]


def is_installed(name: str) -> bool:
    """Return whether a package can be imported, without importing it."""
    return importlib.util.find_spec(name) is not None


@contextlib.contextmanager
def replaced(target: Any, **attributes: Any) -> Iterator[None]:
    """Set attributes of a module or class within a `with` block, then restore them."""
    before = {name: getattr(target, name) for name in attributes}
    for name, value in attributes.items():
        setattr(target, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(target, name, value)


def with_in1d(module: ModuleType) -> None:
    """Give a clone's module `np.in1d`, which NumPy 2.4 removed."""
    module.np = _OldNumpy("numpy")


class Recorder:
    """Make subclasses of a clone's AverageMeter that keep every value."""

    @staticmethod
    def of(meter: type) -> type:
        """Return a subclass of an AverageMeter.

        Its class attribute `made` lists its instances; `values` of an instance lists its updates.
        """

        class Recording(meter):
            made: list[Any]

            def __init__(self):
                super().__init__()
                self.values = []
                type(self).made.append(self)

            def update(self, val, n=1):
                super().update(val, n)
                self.values.append(val)

        Recording.made = []
        return Recording


class Pieces:
    """The reference's functions, arrays in and arrays out; see `pieces.Side`.

    Args:
      modules: modules of a clone of iamcl2r, see `open_clone`.
    """

    def __init__(self, modules: Callable[[str], ModuleType]):
        self._torch = torch_module()
        self._modules = modules
        with_in1d(modules("performance_metrics"))

    def prototypes(self, num_classes: int) -> np.ndarray:
        """Return `dsimplex(num_classes)`."""
        return self._modules("models").dsimplex(num_classes, "cpu").numpy()

    def rows(self, classes: np.ndarray, num_classes: int) -> np.ndarray:
        """Return the rows that `create_data_and_transforms` assigns to class numbers."""
        return target_transform(self._modules, num_classes)(self._torch.from_numpy(classes)).numpy()

    def cross_entropy(self, features: np.ndarray, rows: np.ndarray) -> tuple[float, np.ndarray]:
        """Return `CrossEntropyLoss` on the fixed classifier, and its gradient."""
        torch = self._torch
        leaf = torch.tensor(features, requires_grad=True)
        scores = leaf @ self._modules("models").dsimplex(features.shape[1] + 1, "cpu").T
        return self._with_gradient(torch.nn.CrossEntropyLoss()(scores, torch.tensor(rows)), leaf)

    def contrast(
        self, new: np.ndarray, old: np.ndarray, labels: np.ndarray, mu: float
    ) -> tuple[float, np.ndarray]:
        """Return `HocLoss` on normalised features, and the gradient with respect to `new`."""
        torch, normalize = self._torch, self._modules("utils").l2_norm
        leaf = torch.tensor(new, requires_grad=True)
        loss = self._modules("methods").HocLoss(mu_=mu)(
            normalize(leaf), normalize(torch.tensor(old)), torch.tensor(labels)
        )
        return self._with_gradient(loss, leaf)

    def batch_loss(
        self, new: np.ndarray, old: np.ndarray, classes: np.ndarray, lam: float, mu: float
    ) -> tuple[float, np.ndarray]:
        """Return the loss of a batch in `train_one_epoch`, and the gradient that it leaves."""
        torch, train = self._torch, self._modules("train")
        num_classes = new.shape[1] + 1
        net = _given_features(torch, new, self._modules("models").dsimplex(num_classes, "cpu"))
        meter = Recorder.of(self._modules("utils").AverageMeter)
        args = SimpleNamespace(
            fixed=True, amp=False, method="hoc", lambda_=lam, is_main_process=False, epochs=1
        )
        previous = torch.tensor(old)
        with replaced(train, AverageMeter=meter):
            train.train_one_epoch(
                args,
                "cpu",
                net,
                lambda images: {"features": previous},
                [(torch.zeros(len(new)), torch.tensor(classes))],
                torch.amp.GradScaler("cpu", enabled=False),
                torch.optim.SGD([net.features], lr=0.0),
                0,
                torch.nn.CrossEntropyLoss(),
                0,
                self._modules("methods").HocLoss(mu_=mu),
                target_transform(self._modules, num_classes),
            )
        return losses_of(meter)[0], net.features.grad.numpy()

    def identification(
        self,
        query: np.ndarray,
        query_labels: np.ndarray,
        gallery: np.ndarray,
        gallery_labels: np.ndarray,
    ) -> float:
        """Return `identification`."""
        metrics = self._modules("performance_metrics")
        return float(metrics.identification(gallery, gallery_labels, query, query_labels))

    def average_compatibility(self, matrix: np.ndarray) -> float:
        """Return `average_compatibility`."""
        return float(self._modules("compatibility_metrics").average_compatibility(matrix))

    def average_accuracy(self, matrix: np.ndarray) -> float:
        """Return `average_accuracy`, in percent, of a matrix in 0..1."""
        return float(self._modules("compatibility_metrics").average_accuracy(matrix))

    def learning_rates(self, lr: float, min_lr: float, epochs: int) -> np.ndarray:
        """Return the rate of every epoch, from the scheduler that `main` makes."""
        optim = self._torch.optim
        optimizer = optim.SGD([self._torch.zeros(1, requires_grad=True)], lr=lr)
        schedule = optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs, eta_min=min_lr)
        rates = []
        for _ in range(epochs):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        return np.array(rates)

    def batch_norm(
        self,
        maps: np.ndarray,
        scale: np.ndarray,
        bias: np.ndarray,
        mean: np.ndarray,
        var: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Run the first BatchNorm of ResNet-18 in training mode.

        Returns:
          The result, the running mean and the running variance.
        """
        torch = self._torch
        norm = self._modules("models.resnet").resnet18().bn1.train()
        values = (scale, bias, mean, var)
        for tensor, value in zip(
            (norm.weight.data, norm.bias.data, norm.running_mean, norm.running_var),
            values,
            strict=True,
        ):
            tensor.copy_(torch.tensor(value))
        with torch.no_grad():
            result = norm(torch.tensor(maps.transpose(0, 3, 1, 2))).numpy().transpose(0, 2, 3, 1)
        return result, norm.running_mean.numpy(), norm.running_var.numpy()

    @staticmethod
    def _with_gradient(loss, leaf):
        loss.backward()
        return loss.item(), leaf.grad.numpy()


def _given_features(torch, features, prototypes):
    """Make a network whose features are its only parameters and ignore the images."""
    net = torch.nn.Module()
    net.features = torch.nn.Parameter(torch.tensor(features))
    net.forward = lambda images: {"features": net.features, "logits": net.features @ prototypes.T}
    return net


def losses_of(meter: type) -> list[float]:
    """Return the losses of all steps: an epoch makes two meters, and the second records losses.

    Args:
      meter: a class made by `Recorder.of`.
    """
    return [value for made in meter.made[1::2] for value in made.values]


def target_transform(modules: Callable[[str], ModuleType], num_classes: int) -> Callable:
    """Return the function that `create_data_and_transforms` applies to class numbers.

    No data are read.

    Args:
      modules: modules of a clone of iamcl2r.
      num_classes: number of prototypes.
    """
    dataset, cifar = modules("dataset"), modules("dataset.cifar")
    nothing = Nothing()
    args = SimpleNamespace(
        train_dataset_name="cifar",
        data_path=os.curdir,
        fixed=True,
        preallocated_classes=num_classes,
        use_subsampled_dataset=False,
        img_per_class=1,
        initial_increment=1,
        increment=1,
        rehearsal=1,
    )
    with (
        replaced(dataset, ClassIncremental=nothing, RehearsalMemory=nothing),
        replaced(cifar, load_cifar=nothing),
    ):
        return dataset.create_data_and_transforms(args)["target_transform"]
