"""Validation within a task: weights in training judged by pictures that were held out."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from compat_jax.chain import Chain, Version
from compat_jax.data.dataset import Dataset
from compat_jax.errors import UserError
from compat_jax.features import Extractor
from compat_jax.mesh import round_up
from compat_jax.methods import Head
from compat_jax.models import Outputs, feature_size
from compat_jax.retrieval import embed, recall_at_k
from compat_jax.session import Session
from compat_jax.training.run import Run
from compat_jax.training.step import Trainer
from compat_jax.training.task import Task

ACCURACY, RECALL, CROSS = "accuracy", "recall@1", "cross"
_BLOCK = 8  # batches between two questions whether to stop, on accelerators
_ROWS = 256  # features scored at a time


class Interrupted(Exception):
    """The session asked to stop within a validation."""


@dataclasses.dataclass
class Validation:
    """Judges the weights of one task by the held-out pictures of the classes that it has seen.

    Measures, shares in [0, 1]:
      accuracy: the head's prediction is the picture's class (fixed simplex: its prototype is nearest).
      recall@1: the nearest other picture is of the picture's class.
      cross: the same among the features that the version before gave the other pictures: what users
        find in a gallery that was not embedded again. Missing for a first version.

    Attributes:
      data: all held-out pictures; their labels are class numbers of the task.
      task: the task.
      trainer: of the task.
      session: devices, batch size, when to stop.
      previous: the version before; None for none. One of other features, or whose layers were never
        trained, has no gallery to search.
    """

    data: Dataset
    task: Task
    trainer: Trainer
    session: Session
    previous: Version | None = None

    def __post_init__(self):
        if self.previous is not None and not self._is_comparable(self.previous.record):
            self.previous = None
        self.rows = np.flatnonzero(self.data.need_labels() < self.task.num_seen)
        self.labels: Any = self.data.need_labels()[self.rows]

    def _is_comparable(self, record):
        """Return whether queries of the task can search a gallery of a version."""
        shape: Any = tuple(self.data.images.shape[1:])
        size = feature_size(self.trainer.embedder, shape)
        same = (record.feature_size, record.image_shape) == (size, shape)
        return same and not record.fresh and record.head.is_fixed == self.trainer.head.is_fixed

    @functools.cached_property
    def measures(self) -> tuple[str, ...]:
        """Return the names of what can be measured: of a class with one picture, no recall."""
        if not len(self.rows):
            return ()
        if np.bincount(self.labels).max() < 2:
            return (ACCURACY,)
        return (ACCURACY, RECALL) if self.previous is None else (ACCURACY, RECALL, CROSS)

    def judge(self, keep: str) -> str:
        """Return the measure by which the best weights are chosen.

        Args:
          keep: see `Run`; for "cross", a first version is judged by recall@1.

        Raises:
          UserError: the pictures cannot measure it.
        """
        wanted = RECALL if keep == CROSS and self.previous is None else keep
        if wanted not in self.measures:
            raise UserError(
                f"keep={keep!r} cannot choose weights of {self.task.label}: validation has "
                f"{len(self.rows)} pictures of its classes; hold out some, at least two of a class for "
                "recall@1 and cross",
                "keep",
            )
        return wanted

    def due(self, step: int) -> bool:
        """Return whether to validate after a step; always after the last one."""
        every = self.session.validate_every or self.task.steps_per_epoch
        return bool(self.measures) and step > 0 and (step % every == 0 or step == self.task.steps)

    def __call__(self, variables: Any) -> dict[str, float]:
        """Measure weights.

        Args:
          variables: on the mesh; they are read only.

        Returns:
          {measure: share}.

        Raises:
          Interrupted: the session asked to stop.
        """
        features = self._features(variables)
        found = {ACCURACY: self._accuracy(variables, features)}
        galleries = {RECALL: lambda: features, CROSS: lambda: self._old_features}
        for name in self.measures[1:]:
            found[name] = self._recall(features, galleries[name])
        return found

    def _features(self, variables):
        """Embed the pictures, asking now and then whether to stop."""
        trainer = self.trainer
        extractor = Extractor(trainer.network, trainer.preprocess, trainer.mesh)
        parts: list[np.ndarray] = []
        for rows, batch in self._blocks():
            if parts and self.session.should_stop():
                raise Interrupted
            parts.append(extractor(variables, self.data.images[rows], batch))
        return np.concatenate(parts)[: len(self.rows), : trainer.embedder.projection_size]

    def _blocks(self) -> Iterator[tuple[np.ndarray, int]]:
        """Yield positions of pictures, whole batches of one size, the last ones repeated to fill it."""
        batch = round_up(self.session.devices(), min(self.session.batch_size, len(self.data)))
        filled = np.resize(self.rows, -(-len(self.rows) // batch) * batch)
        block = batch if self.trainer.dispatches_each_step else _BLOCK * batch
        for start in range(0, len(filled), block):
            yield filled[start : start + block], batch

    @functools.cached_property
    def _old_features(self):
        assert self.previous is not None
        mesh = self.session.devices()
        parts: list[np.ndarray] = []
        for rows, batch in self._blocks():
            if parts and self.session.should_stop():
                raise Interrupted
            images = self.data.images[rows]
            parts.append(embed(self.previous, images, mesh=mesh, batch_size=batch))
        return np.concatenate(parts)[: len(self.rows)]

    def _accuracy(self, variables, features):
        # The length of a feature scales the scores of all classes alike.
        head, targets = self.trainer.head, self.trainer.head.targets(self.labels)
        scores = features
        if not head.is_fixed:
            scores = features @ np.asarray(variables["params"]["head"]["kernel"])
        predict: Any = _predict(head)  # type: ignore[arg-type]
        found = []
        for start in range(0, len(scores), _ROWS):
            rows = scores[start : start + _ROWS]
            rows = np.pad(rows, ((0, _ROWS - len(rows)), (0, 0)))
            found.append(np.asarray(predict(rows, np.int32(self.task.num_seen))))
        return float((np.concatenate(found)[: len(self.labels)] == np.asarray(targets)).mean())

    def _recall(self, features, gallery: Callable[[], np.ndarray]):
        labels = self.labels
        return recall_at_k(features, labels, gallery(), labels, ks=(1,), same_set=True)[1]


@functools.lru_cache(maxsize=16)
def _predict(head: Head):
    """The jitted prediction of a head, from features or logits."""

    def predict(scores, num_seen):
        return head.predict(Outputs(scores, None if head.is_fixed else scores), num_seen)

    return jax.jit(predict)


def check_validation(data: Dataset, validation: Dataset | None, run: Run) -> None:
    """Refuse validation pictures that do not fit the data, before any work.

    Args:
      data: that is trained on.
      validation: held-out pictures.
      run: whose `keep` may need them.

    Raises:
      UserError: no labels, another size, other classes, or no pictures where `keep` chooses by them.
    """
    if validation is None:
        if run.keep != "last":
            raise UserError(
                f"keep={run.keep!r} chooses weights by validation, and there is no validation data: "
                "hold out some, or keep the last",
                "keep",
            )
        return
    if validation.labels is None:
        raise UserError("validation needs labels: give pictures of known classes", "validation")
    if validation.images.shape[1:] != data.images.shape[1:]:
        raise UserError(
            f"validation has images of {list(validation.images.shape[1:])}, the data of "
            f"{list(data.images.shape[1:])}: give both the same size",
            "validation",
        )
    names = validation.class_names
    if names != data.class_names[: len(names)]:
        raise UserError(
            "validation numbers its classes differently from the data: give both the same list of "
            "classes, in one order",
            "validation",
        )


def validation_identity(
    run: Run, validation: Dataset | None, session: Session
) -> Mapping[str, Any]:
    """Return the JSON values by which a run knows again what its weights were chosen by.

    Args:
      run: whose `keep` chooses.
      validation: held-out pictures.
      session: whose `validate_every` says when.

    Returns:
      {} where the last weights are kept: then validation changes nothing.
    """
    if run.keep == "last" or validation is None:
        return {}
    found = {"images": len(validation), "sha256": validation.fingerprint()}
    return {"validation": {**found, "validate_every": session.validate_every}}


def previous_version(task: Task, chain: Chain) -> Version | None:
    """Return the version whose gallery the task's version will be searched in; None for a first one.

    A model that replaces another, or starts anew, is compared with the version before, not with what
    it starts from.

    Args:
      task: the task.
      chain: of the run.
    """
    previous = task.start
    if task.kind == "pretraining":
        return None
    if task.kind == "replacement" or task.start is None:
        before = [number for number in chain.numbers() if number < task.index]
        previous = chain.open(before[-1]) if before else None
    return previous
