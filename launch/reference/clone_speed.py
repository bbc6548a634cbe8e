"""Time the PyTorch reference and FAISS in a separate process, for the benchmark.

It is separate because two thread pools in one process spin against each other. It stays alive and
does one repetition per request, so that the sides can alternate. Both ends are here: `Worker` sends
requests, `python -m launch.reference.clone_speed` answers, one line of JSON each.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from compat_jax.errors import UserError

# "best" is compiled, channels last, in bfloat16.
VARIANTS = ("eager", "compile", "channels_last", "bf16", "best")


class Worker:
    """A process that runs PyTorch or FAISS.

    Args:
      clone: folder of the reference's repository; None if only FAISS is needed.
      program: module to run, which calls `serve`.
      cores: processors that it may use; all of this process's by default.
      environment: further environment variables.

    Raises:
      UserError: the folder is no clone of the reference.
    """

    def __init__(
        self,
        clone: str | None = None,
        program: str = "launch.reference.clone_speed",
        *,
        cores: Iterable[int] | None = None,
        environment: Mapping[str, str] = MappingProxyType({}),
    ):
        folder = [] if clone is None else [Path(clone).expanduser()]
        if folder and not (folder[0] / "src" / "iamcl2r" / "models").is_dir():
            raise UserError(
                f"{clone} is no clone of the reference: it has no src/iamcl2r/models. Run git clone "
                "https://github.com/miccunifi/iamcl2r and give its folder"
            )
        self._process = subprocess.Popen(
            [sys.executable, "-m", program, *map(str, folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
                **environment,
            },
        )
        if cores is not None:  # long before it starts threads, which take it over
            os.sched_setaffinity(self._process.pid, cores)

    def ask(self, **request: Any) -> Any:
        """Send a request, see `serve`, and return its result.

        Raises:
          Unavailable: the request failed; the message is the library's own.
        """
        self.send(**request)
        return self.receive()

    def send(self, **request: Any) -> None:
        """Send a request, whose result `receive` will return."""
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()

    def receive(self) -> Any:
        """Wait for the result of the request that was sent.

        Raises:
          Unavailable: see `ask`.
        """
        line = self._process.stdout.readline()
        if not line:
            raise Unavailable("the process that runs PyTorch and FAISS ended")
        answer = json.loads(line)
        if "error" in answer:
            raise Unavailable(answer["error"])
        return answer["result"]

    def prepare(self, name: str, work: str, **settings: Any) -> Callable[[], float]:
        """Set up a piece of work and warm it up.

        Args:
          name: name of this piece.
          work: one that the program knows; here "step", "features" or "search".
          **settings: arguments of that work.

        Returns:
          A function that does one repetition and returns its seconds.

        Raises:
          Unavailable: a library is missing, or refuses the settings.
        """
        self.ask(prepare=name, work=work, **settings)
        return lambda: self.ask(repeat=name)

    @property
    def pid(self) -> int:
        """Number of the process."""
        return self._process.pid

    def forget(self, name: str) -> None:
        """Free the memory of a piece of work."""
        self.ask(forget=name)

    def close(self) -> None:
        """End the process."""
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


class Unavailable(Exception):
    """A library is missing, or refuses the settings."""


def serve(prepare: Callable[..., Callable[[], Any]]) -> None:
    """Answer the requests of a `Worker`, one line of JSON each, until it closes.

    A request is {"prepare": name, "work": …}, {"repeat": name}, {"forget": name} or
    {"describe": library}.

    Args:
      prepare: (work, **settings) -> function that does one repetition, warmed up.
    """
    answers, sys.stdout = sys.stdout, sys.stderr  # keep what libraries print out of the answers
    prepared = {}
    for line in sys.stdin:
        try:
            result = {"result": _answer(json.loads(line), prepare, prepared)}
        except Exception as error:  # any failure: the caller reports it and goes on
            text = str(error).strip().splitlines() or [""]
            result = {"error": f"{type(error).__name__}: {text[0][:200]}"}
        answers.write(json.dumps(result) + "\n")
        answers.flush()


def _answer(request, prepare, prepared):
    if "describe" in request:
        return _describe(request["describe"])
    if "forget" in request:
        prepared.pop(request["forget"], None)
        return None
    if "repeat" in request:
        began = time.perf_counter()
        prepared[request["repeat"]]()
        return time.perf_counter() - began
    name = request.pop("prepare")
    prepared[name] = prepare(**request)
    return None


def _prepare(work, **settings):
    """Set up the work of the reference, or FAISS."""
    if work == "search":
        return _search(**settings)
    _open(sys.argv[1] if len(sys.argv) > 1 else None)
    repeat = {"step": _step, "features": _features}[work](**settings)
    repeat()
    return repeat


def _describe(library):
    if library == "faiss":
        import faiss

        return f"faiss {faiss.__version__}, {faiss.omp_get_max_threads()} threads"
    import torch

    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return f"torch {torch.__version__}, {torch.get_num_threads()} threads, {where}"


def _open(clone):
    """Make the clone importable and let PyTorch use as many threads as JAX does."""
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    source = str(Path(clone) / "src")
    if source not in sys.path:
        sys.path.insert(0, source)


def _network(num_classes, feature_size, device):
    from iamcl2r.models import Incremental_ResNet, dsimplex

    net = Incremental_ResNet(num_classes, feature_size, "resnet18")
    net.fc2.weight.requires_grad = False
    net.fc2.weight.copy_(dsimplex(num_classes, "cpu"))
    return net.to(device)


def as_variant(variant: str, net: Any) -> tuple[Any, Callable[[Any], Any], Callable[[], Any]]:
    """Return the network in a variant, a function that places images, and the context of a call.

    Args:
      variant: of VARIANTS, or "channels_last_bf16".
      net: a module on its device.
    """
    import contextlib

    import torch

    device = next(net.parameters()).device
    last = "channels_last" in variant or variant == "best"
    layout = torch.channels_last if last else torch.preserve_format
    net = net.to(memory_format=layout)
    if variant in ("compile", "best"):
        net = torch.compile(net)

    def context():
        if "bf16" in variant or variant == "best":
            return torch.autocast(device.type, torch.bfloat16)
        return contextlib.nullcontext()

    return net, lambda x: x.to(device).contiguous(memory_format=layout), context


def _step(variant, batch, num_classes, seed, steps):
    """Prepare `steps` steps of HOC on random images, in the order of `train_one_epoch`."""
    import torch
    from iamcl2r.methods import HocLoss
    from iamcl2r.utils import l2_norm
    from torch import nn

    torch.manual_seed(seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    nets = [_network(num_classes, num_classes - 1, device) for _ in range(2)]
    (net, place, context), (previous, *_) = (as_variant(variant, n) for n in nets)
    previous.eval()
    decayed = [p for p in nets[0].parameters() if p.requires_grad and p.ndim >= 2]
    others = [p for p in nets[0].parameters() if p.requires_grad and p.ndim < 2]
    groups = [{"params": others, "weight_decay": 0.0}, {"params": decayed, "weight_decay": 5e-4}]
    optimizer = torch.optim.SGD(groups, lr=0.001, momentum=0.9)
    criterion, contrast = nn.CrossEntropyLoss(), HocLoss(mu_=10)
    images = place(torch.randn(batch, 3, 32, 32))
    labels = torch.randint(0, min(25, num_classes), (batch,)).to(device)

    def repeat():
        net.train()
        for _ in range(steps):
            optimizer.zero_grad()
            with context():
                out = net(images)
                loss = criterion(out["logits"], labels)
                with torch.no_grad():
                    old = previous(images)["features"]
                both = l2_norm(out["features"]), l2_norm(old)
                loss = 0.1 * loss + 0.9 * contrast(*both, labels)
            loss.backward()
            optimizer.step()
            loss.item()

    return repeat


def _features(variant, batch, num_classes, seed, count):
    """Prepare the extraction of normalised features of `count` images in batches."""
    import torch
    from iamcl2r.utils import l2_norm

    torch.manual_seed(seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    net, place, context = as_variant(variant, _network(num_classes, num_classes - 1, device).eval())
    images = torch.randn(batch, 3, 32, 32)

    def repeat():
        with torch.no_grad():
            for _ in range(count // batch):
                with context():
                    features = net(place(images))["features"]
                l2_norm(features).cpu()

    return repeat


def _search(queries, rows, size, k, seed):
    """Prepare an exact search for the top k of random vectors by FAISS."""
    import faiss

    faiss.omp_set_num_threads(len(os.sched_getaffinity(0)))
    rng = np.random.default_rng(seed)
    gallery = rng.standard_normal((rows, size), np.float32)
    query = rng.standard_normal((queries, size), np.float32)
    index = faiss.IndexFlatIP(size)
    index.add(gallery)
    return lambda: index.search(query, k)


if __name__ == "__main__":
    serve(_prepare)
