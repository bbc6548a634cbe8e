"""Every version of a chain tried against every older one: the compatibility matrix."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from etils import epath
from jax.sharding import Mesh
from tqdm import tqdm

from compat_jax import compatibility, hosts
from compat_jax.chain import Chain
from compat_jax.data.dataset import Dataset
from compat_jax.errors import Stopped, UserError, unknown
from compat_jax.files import write_json, write_npy
from compat_jax.retrieval import (
    class_templates,
    extract,
    mean_average_precision,
    recall_at_k,
    template_accuracies,
)


def _everything(features, labels):
    return features, labels


def _identification(features, labels, galleries, mesh):
    del mesh  # ten templates a version are too few to spread; the queries are shared by the hosts
    templates, classes = zip(*galleries, strict=True)
    return template_accuracies(features, labels, templates, classes[0])


def _recall(features, labels, galleries, mesh):
    return [recall_at_k(features, labels, *g, ks=(1,), mesh=mesh)[1] for g in galleries]


def _map(features, labels, galleries, mesh):
    del mesh
    return [mean_average_precision(features, labels, *g).value for g in galleries]


# name: (what is kept of a gallery, scores of queries against what was kept of some galleries)
METRICS = {
    "identification": (class_templates, _identification),
    "recall@1": (_everything, _recall),
    "map": (_everything, _map),
}


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What comes out of an evaluation.

    Attributes:
      metric: name of the retrieval metric.
      matrix: float64[T, T], rows = query version, columns = gallery version, 0 above the diagonal.
      tasks: label of each version, e.g. its task number.
      replaced: whether each version started from a pre-trained replacement.
      incomparable: pairs whose features have different sizes; they count as 0.
    """

    metric: str
    matrix: np.ndarray
    tasks: tuple[str, ...]
    replaced: tuple[bool, ...]
    incomparable: tuple[tuple[int, int], ...] = ()

    @property
    def average_compatibility(self) -> float:
        """AC, in 0..1."""
        return compatibility.average_compatibility(self.matrix)

    @property
    def average_accuracy(self) -> float:
        """AA, in 0..1."""
        return compatibility.average_accuracy(self.matrix)

    def summary(self) -> dict[str, Any]:
        """Everything as JSON values."""
        several = len(self.matrix) > 1
        return {
            "metric": self.metric,
            "matrix": self.matrix.tolist(),
            "tasks": list(self.tasks),
            "replaced": list(self.replaced),
            "incomparable": [list(pair) for pair in self.incomparable],
            "average_compatibility": self.average_compatibility,
            "average_accuracy": self.average_accuracy,
            "average_accuracy_per_step": [
                float(x) for x in compatibility.average_accuracy_per_step(self.matrix)
            ],
            "backward_compatibility": (
                float(compatibility.backward_compatibility(self.matrix)) if several else None
            ),
            "forward_compatibility": (
                float(compatibility.forward_compatibility(self.matrix)) if several else None
            ),
        }


def evaluate(
    chain: Chain,
    query: Dataset,
    gallery: Dataset,
    metric: str = "identification",
    numbers: Sequence[int] | None = None,
    mesh: Mesh | None = None,
    batch_size: int = 256,
    dtype: str = "float32",
    cache: epath.Path | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    progress: str | None = None,
) -> Evaluation:
    """The compatibility matrix of a chain, from two extractions a version.

    Args:
      chain: to evaluate.
      query: images that ask; embedded by the newer version of each pair.
      gallery: images that answer; embedded by the older one.
      metric: a name in METRICS.
      numbers: versions to take; all by default.
      mesh: devices.
      batch_size: images a batch.
      dtype: of the networks' computation.
      cache: folder for what has been computed; a stopped evaluation goes on from there.
      should_stop: asked before each version.
      progress: label of the progress bars; None for none.

    Returns:
      An Evaluation.

    Raises:
      Stopped: `should_stop` said so.
      UserError: unknown metric, classes of query and gallery that differ, corrupt versions.

    Source: `evaluate` in `src/iamcl2r/eval.py`, which extracts T + T(T+1)/2 times.
    """
    if metric not in METRICS:
        raise unknown("metric", metric, METRICS)
    if query.class_names != gallery.class_names:
        raise UserError("query and gallery have different classes: declare the same ones for both")
    keep, score = METRICS[metric]
    numbers = list(chain.require().numbers() if numbers is None else numbers)
    store = _Store(cache, f"{metric} {dtype} {query.fingerprint()} {gallery.fingerprint()}")
    galleries, rows, records, incomparable = [], [], [], []
    bar = tqdm(numbers, progress, disable=progress is None, unit="version")
    for t, number in enumerate(bar):
        if should_stop():
            raise Stopped
        version = chain.open(number)
        records.append(version.record)
        label = None if progress is None else f"embedding with version {number}"

        def embed(data, version=version, label=label):
            return extract(version, data.images, mesh, batch_size, dtype, label)

        galleries.append(store.gallery(version, lambda e=embed: keep(e(gallery), gallery.labels)))
        row = store.row(version)
        if row is None:
            row = _row(score, embed(query), query.labels, galleries, mesh)
            store.add_row(version, row)
        incomparable += [(t, k) for k, value in enumerate(row) if value is None]
        rows.append([0.0 if value is None else float(value) for value in row])
    matrix = np.zeros((len(rows), len(rows)))
    for t, row in enumerate(rows):
        matrix[t, : len(row)] = row
    return Evaluation(
        metric,
        matrix,
        tuple(str(n if r.task is None else r.task) for n, r in zip(numbers, records, strict=True)),
        tuple(r.replaced_by is not None and t > 0 for t, r in enumerate(records)),
        tuple(incomparable),
    )


def _row(score, features, labels, galleries, mesh):
    """The score in each gallery; None where its features have another size."""
    row = [None] * len(galleries)
    fit = [k for k, (kept, _) in enumerate(galleries) if kept.shape[1] == features.shape[1]]
    values = score(features, labels, [galleries[k] for k in fit], mesh)
    for k, value in zip(fit, values, strict=True):
        row[k] = float(value)
    return row


class _Store:
    """What an evaluation has computed, on disk, addressed by what it was computed from."""

    def __init__(self, folder, settings):
        self.folder = None if folder is None else epath.Path(folder)
        self.settings = settings
        self.versions = []  # whose galleries a row is made of

    def gallery(self, version, compute):
        self.versions.append(f"{version.sha256} {version.record}")
        if self.folder is None:
            return compute()
        paths = [self._path("gallery", version, f"{part}.npy") for part in ("features", "labels")]
        if not hosts.first_says(all(p.exists() for p in paths)):
            parts = compute()
            hosts.first_does(lambda: [write_npy(*pair) for pair in zip(paths, parts, strict=True)])
        return tuple(_read_npy(path) for path in paths)

    def row(self, version):
        if self.folder is None:
            return None
        path = self._path("row", version, "json")
        return json.loads(path.read_text()) if hosts.first_says(path.exists()) else None

    def add_row(self, version, row):
        if self.folder is not None:
            hosts.first_does(lambda: write_json(self._path("row", version, "json"), row))

    def _path(self, kind, version, end):
        made_of = self.versions if kind == "row" else self.versions[-1:]
        digest = hashlib.sha256("\n".join([self.settings, *made_of]).encode()).hexdigest()
        return self.folder / f"{kind}{version.number:04d}-{digest[:24]}.{end}"


def _read_npy(path):
    with path.open("rb") as file:
        return np.load(file, allow_pickle=False)
