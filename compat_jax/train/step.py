"""One training step, and many of them as one dispatch."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from compat_jax import mesh as meshes
from compat_jax import simplex
from compat_jax.data.augment import Preprocess
from compat_jax.methods import LossInputs, LossSettings, Method, target_labels
from compat_jax.models import Embedder, init_variables
from compat_jax.train.optimizer import OptimizerSettings, learning_rate, make_optimizer
from compat_jax.train.state import TaskInfo, TrainState, create_state


class Metrics(NamedTuple):
    """Of a step or the mean over several: float32[] each."""

    loss: jax.Array
    accuracy: jax.Array


class DeviceData(NamedTuple):
    """Images that fit on the devices: uint8[n, h, w, c], and their classes, int32[n]."""

    images: jax.Array
    labels: jax.Array


@dataclasses.dataclass(frozen=True)
class Trainer:
    """The static part of training; its methods are pure functions of arrays.

    Attributes:
      embedder: the network, as the chain holds it.
      method: loss and head.
      loss: numbers of the loss.
      optim: numbers of the optimiser.
      preprocess: normalisation and augmentation.
      num_prototypes: K.
      label_order: which prototype a class is written to.
      mesh: devices.
    """

    embedder: Embedder
    method: Method
    loss: LossSettings
    optim: OptimizerSettings
    preprocess: Preprocess
    num_prototypes: int
    label_order: str
    mesh: Mesh

    def init(self, key: jax.Array, image_shape: tuple[int, int, int]) -> Any:
        """Fresh variables on the mesh, the same on every mesh; see `models.init_variables`."""
        with jax.default_device(meshes.host_device()):  # which may hold a whole projection
            variables = init_variables(self.embedder, key, image_shape)
        return self.place(variables)

    def place(self, variables: Any) -> Any:
        """Variables (or a state) on the mesh; a projection gets columns of zeros up to its size."""
        return meshes.place(variables, self.mesh, self.network.projection)

    def stored(self, variables: Any) -> Any:
        """Variables as the chain holds them: without the columns that `place` added."""
        return meshes.cut_projection(variables, self.embedder.projection)

    def create_state(self, variables: Any, task: TaskInfo) -> TrainState:
        """A state at step 0 of a task on the mesh; `variables` are copied, never donated."""
        copies = jax.tree.map(jnp.copy, self.place(variables))
        return self.place(create_state(copies, make_optimizer(self.optim), task))

    @functools.cached_property
    def network(self) -> Embedder:
        """The embedder as the mesh computes it: the model axis divides its projection."""
        return meshes.fitted(self.embedder, self.mesh)

    def train_step(
        self, state: TrainState, batch: dict[str, jax.Array], previous: Any
    ) -> tuple[TrainState, Metrics]:
        """One step of SGD: `new_state, metrics = train_step(state, batch, previous)`.

        Args:
          state: where training stands.
          batch: {"image": uint8[batch, h, w, c], "label": int32[batch] class numbers}.
          previous: variables of the frozen previous model; None for a method that needs none.

        Returns:
          The new state and the metrics of this batch. The key of the augmentation is folded from
          (seed, task, epoch, step).

        Source: `train_one_epoch` in `src/iamcl2r/train.py`.
        """
        images = self.preprocess.normalize(self.preprocess.augment(step_key(state), batch["image"]))
        return self.update(state, images, batch["label"], previous)

    def update(
        self, state: TrainState, images: jax.Array, classes: jax.Array, previous: Any
    ) -> tuple[TrainState, Metrics]:
        """`train_step` after augmentation: images float32[batch, h, w, c], normalised."""
        task = state.task
        labels = target_labels(self.method, classes, self.num_prototypes, self.label_order)
        old = None
        if self.method.needs_previous:
            outputs = self._split(self.network.apply(previous, images, train=False))
            old = lax.stop_gradient(outputs.features)

        def loss_fn(params):
            outputs, updated = self.network.apply(
                {"params": params, "batch_stats": state.batch_stats},
                images,
                train=True,
                mutable=["batch_stats"],
            )
            outputs = self._split(outputs)
            inputs = LossInputs(
                outputs,
                old,
                labels,
                (classes < task.num_old).astype(jnp.float32),
                task.num_seen,
                task.distillation_weight,
                self.num_prototypes if self.method.fixed_simplex else None,
            )
            return self.method.loss(inputs, self.loss).mean(), (outputs, updated)

        grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, (outputs, updated)), grads = grad_fn(state.params)
        updates, opt_state = make_optimizer(self.optim).update(grads, state.opt_state, state.params)
        rate = learning_rate(self.optim, state.step // task.steps_per_epoch, task.epochs)
        params = jax.tree.map(lambda p, u: p - rate * u, state.params, updates)
        new_state = state.replace(
            step=state.step + 1,
            params=params,
            batch_stats=updated.get("batch_stats", state.batch_stats),
            opt_state=opt_state,
        )
        return new_state, Metrics(loss, self._accuracy(outputs, labels, task.num_seen))

    def _split(self, outputs):
        """Outputs with the columns of the features split over the model axis."""
        if not self.method.fixed_simplex:
            return outputs
        columns = meshes.along_features(self.mesh)
        return outputs._replace(features=lax.with_sharding_constraint(outputs.features, columns))

    def _accuracy(self, outputs, labels, num_seen):
        # Among the prototypes of a simplex the nearest is found without the K logits' matrix, but
        # reading their maximum is one more pass over the features; cheap beside the network.
        if self.method.fixed_simplex:
            rows = simplex.nearest_row(outputs.features, self.num_prototypes)
        else:
            unseen = jnp.arange(outputs.logits.shape[-1]) >= num_seen
            rows = jnp.where(unseen, -jnp.inf, outputs.logits).argmax(-1)
        return (rows == labels).mean(dtype=jnp.float32)

    def run_steps(
        self,
        state: TrainState,
        previous: Any,
        data: DeviceData,
        plan: jax.Array,
        stop: int,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> tuple[TrainState, Metrics]:
        """The steps from `state.step` to `stop`, at least one; the state is donated.

        Args:
          state: where training stands, on the mesh.
          previous: see `train_step`.
          data: all images and labels, on the devices.
          plan: int32[steps, batch] positions of every batch of the task.
          stop: the step before which to stop, <= len(plan).
          should_stop: asked after each step where a step is a dispatch of its own (CPU); when it
            says True, no more follow.

        Returns:
          The new state and the mean of the metrics over the steps done.
        """
        start = int(state.step)
        program = self._program(state, previous)
        if not self._dispatch_each_step:
            stop = jax.device_put(np.int32(stop), meshes.replicated(self.mesh))
            return program(state, previous, data, plan, stop)
        total = None
        for _ in range(start, stop):
            state, metrics = program(state, previous, data, plan)
            total = metrics if total is None else jax.tree.map(jnp.add, total, metrics)
            if should_stop():
                break
        steps = jax.device_put(np.float32(int(state.step) - start), meshes.replicated(self.mesh))
        return state, jax.tree.map(lambda x: x / steps, total)

    def shapes(self, image_shape: tuple[int, int, int]) -> tuple[TrainState, Any]:
        """Shapes of a state and of the previous model's variables (None without), for `lower`."""

        def make(key):
            variables = init_variables(self.network, key, image_shape)
            task = TaskInfo.create(0, 0, 1, 1, 1)
            return create_state(variables, make_optimizer(self.optim), task), variables

        state, variables = jax.eval_shape(make, jax.random.key(0))
        return state, variables if self.method.needs_previous else None

    def lower(self, state: TrainState, previous: Any, data: DeviceData, plan: jax.Array):
        """What `run_steps` compiles, lowered: for plans.

        Args:
          state, previous, data, plan: see `run_steps`; arrays or their shapes (`shapes`).

        Returns:
          A jax.stages.Lowered.
        """
        stop = () if self._dispatch_each_step else (np.int32(plan.shape[0]),)
        return self._program(state, previous).lower(state, previous, data, plan, *stop)

    @property
    def _dispatch_each_step(self) -> bool:
        # XLA:CPU runs a convolution inside a loop body 2 to 15 times slower than outside one
        # (jax issue 12868), which costs far more than a dispatch a step.
        return self.mesh.devices.flat[0].platform == "cpu"

    def _planned_step(self, state, previous, data, plan):
        index = lax.dynamic_index_in_dim(plan, state.step, keepdims=False)
        batch = {"image": data.images[index], "label": data.labels[index]}
        # The backbone's work is shared by all devices, those of the model axis included.
        split = meshes.over_all(self.mesh, len(index))
        batch["image"] = lax.with_sharding_constraint(batch["image"], split)
        batch["label"] = lax.with_sharding_constraint(batch["label"], meshes.along_data(self.mesh))
        return self.train_step(state, batch, previous)

    def _loop(self, state, previous, data, plan, stop):
        first = state.step

        def body(_, carry):
            state, total = carry
            state, metrics = self._planned_step(state, previous, data, plan)
            return state, jax.tree.map(jnp.add, total, metrics)

        # A loop with a traced bound, not a scan: tasks with other numbers of steps, or a stop in
        # mid epoch to save, run the same executable.
        zero = Metrics(jnp.float32(0), jnp.float32(0))
        state, total = lax.fori_loop(first, stop, body, (state, zero))
        steps = jnp.maximum(stop - first, 1).astype(jnp.float32)
        return state, jax.tree.map(lambda x: x / steps, total)

    @functools.cached_property
    def _programs(self):
        return {}

    def _program(self, state, previous):
        """The jitted steps for states of this structure, one step or many a dispatch."""
        structure = jax.tree.structure((state, previous)), self._dispatch_each_step
        if structure not in self._programs:
            self._programs[structure] = self._jitted(
                *meshes.shardings(self.mesh, (state, previous))
            )
        return self._programs[structure]

    def _jitted(self, state, previous):
        everywhere = meshes.replicated(self.mesh)
        inputs = (state, previous, everywhere, meshes.along_data(self.mesh, 1))
        function = self._planned_step
        if not self._dispatch_each_step:
            function, inputs = self._loop, (*inputs, everywhere)
        return jax.jit(
            function,
            donate_argnums=0,
            in_shardings=inputs,
            out_shardings=(state, everywhere),
        )


def step_key(state: TrainState) -> jax.Array:
    """The random key of a step, folded from (seed, task, epoch, step)."""
    key = jax.random.key(state.task.seed)
    for part in (state.task.index, state.step // state.task.steps_per_epoch, state.step):
        key = jax.random.fold_in(key, part)
    return key
