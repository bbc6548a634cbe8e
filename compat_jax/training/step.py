"""One training step, and many of them as one dispatch."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import Mesh

from compat_jax import mesh as meshes
from compat_jax.data.augment import Preprocess
from compat_jax.methods import Head, LossInputs, Method, TaskStart
from compat_jax.methods.padding import without_padding
from compat_jax.models import Embedder, init_variables, rematerializing
from compat_jax.training.optimizer import Optimizer, make_optimizer
from compat_jax.training.state import TaskInfo, TrainState, create_state

# XLA's own 30 MiB put all gradients of a ResNet-18 into one sum after the backward pass.
_BUCKET_BYTES = 4 << 20

# `Metrics.broken` where every loss is finite.
NO_STEP = np.iinfo(np.int32).max


class Metrics(NamedTuple):
    """Of a step, or of several: their sum, or their mean.

    Attributes:
      loss: float32[], mean over the batch.
      accuracy: float32[], share of the batch whose class has the largest score.
      broken: int32[], the first step whose loss is not finite; `NO_STEP` for none.
      terms: {name: float32[]} of the loss, mean over the batch; {} for a method that names none.
    """

    loss: Any
    accuracy: Any
    broken: Any
    terms: Mapping[str, Any]

    def __add__(self, other: "Metrics") -> "Metrics":  # type: ignore[override]
        """Sum the metrics of steps; the first broken step counts."""
        return Metrics(
            self.loss + other.loss,
            self.accuracy + other.accuracy,
            jnp.minimum(self.broken, other.broken),
            {name: self.terms[name] + other.terms[name] for name in self.terms},
        )

    def over(self, steps: Any) -> "Metrics":
        """Divide a sum by its number of steps, float32[]."""
        terms = {name: total / steps for name, total in self.terms.items()}
        return Metrics(self.loss / steps, self.accuracy / steps, self.broken, terms)


class DeviceData(NamedTuple):
    """Images that fit on the devices: uint8[n, h, w, c], and their classes, int32[n]."""

    images: jax.Array
    labels: jax.Array


class Feed(NamedTuple):
    """Input of many steps.

    Attributes:
      data: images and labels on the devices.
      plan: int32[steps, batch] positions in them of every batch of the task.
    """

    data: DeviceData
    plan: jax.Array


@dataclasses.dataclass(frozen=True)
class Trainer:
    """The static part of training; its methods are pure functions of arrays.

    Attributes:
      embedder: the network, as the chain holds it.
      head: its head.
      method: loss and state.
      optimizer: `Sgd` or an optax transformation.
      preprocess: normalisation and augmentation.
      mesh: devices.
      teacher: the network of the old model, where it is of another architecture.
      remat: what the backward pass computes again, see `models.rematerializing`.
    """

    embedder: Embedder
    head: Head
    method: Method
    optimizer: Optimizer
    preprocess: Preprocess
    mesh: Mesh
    teacher: Embedder | None = None
    remat: str = "none"

    def init(self, key: jax.Array, image_shape: tuple[int, int, int]) -> Any:
        """Draw fresh variables and shard them; they are the same on every mesh."""
        with jax.default_device(meshes.host_device()):  # which may hold a whole projection
            variables = init_variables(self.embedder, key, image_shape)
        return self.shard(variables)

    def shard(self, tree: Any) -> Any:
        """Shard variables or a state over the mesh, zero-padding projections for the model axis."""
        return meshes.shard(tree, self.mesh, self.network.projection_size)

    def stored(self, variables: Any) -> Any:
        """Return variables as the chain holds them, without the columns that `shard` added."""
        return meshes.unpad_projection(variables, self.embedder.projection_size)

    def create_state(self, variables: Any, task: TaskInfo) -> TrainState:
        """Make a state at step 0 of a task on the mesh; `variables` are copied, never donated."""
        variables = self.shard(variables)
        copies = jax.tree.map(jnp.copy, variables)
        carried = jax.tree.map(jnp.copy, self.shard(self.adapted.init(variables)))
        return self.shard(create_state(copies, make_optimizer(self.optimizer), carried, task=task))

    @functools.cached_property
    def network(self) -> Embedder:
        """The embedder with the projection padded to a multiple of the model axis."""
        return meshes.pad_projection(self.embedder, self.mesh)

    @functools.cached_property
    def adapted(self) -> Method:
        """The method as it works with `network`: one that does not take padding never sees any."""
        own, padded = self.embedder.projection_size, self.network.projection_size
        if own is None or padded is None or own == padded or self.method.takes_padding:
            return self.method
        return without_padding(self.method, own, padded)

    @functools.cached_property
    def teaching_network(self) -> Embedder:
        """The network of the old model, padded alike."""
        if self.teacher is None:
            return self.network
        return meshes.pad_projection(self.teacher, self.mesh)

    def train_step(
        self, state: TrainState, batch: dict[str, jax.Array], frozen: Any
    ) -> tuple[TrainState, Metrics]:
        """Do one step: `new_state, metrics = train_step(state, batch, frozen)`.

        Args:
          state: of training.
          batch: {"image": uint8[batch, h, w, c], "label": int32[batch] class numbers}.
          frozen: the method's frozen state, see `Method.freeze`.

        Returns:
          The new state and the metrics of this batch. The key of the augmentation is folded from
          (seed, task, epoch, step).

        Source: `train_one_epoch` in `src/iamcl2r/train.py`.
        """
        images = self.preprocess.normalize(self.preprocess.augment(step_key(state), batch["image"]))
        return self.update(state, (images, batch["label"]), frozen)

    def update(
        self, state: TrainState, batch: tuple[jax.Array, jax.Array], frozen: Any
    ) -> tuple[TrainState, Metrics]:
        """Do `train_step` after augmentation.

        Args:
          state: of training.
          batch: images float32[batch, h, w, c], normalised, and int32[batch] class numbers.
          frozen: the method's frozen state.
        """
        images, classes = batch
        task, targets = state.task, self.head.targets(batch[1])

        def forward(variables):
            return self._split(self.teaching_network.apply(variables, images, train=False))

        taught = lax.stop_gradient(self.adapted.teach(forward, frozen, state.carried))

        def loss_fn(params):
            variables = {"params": params, "batch_stats": state.batch_stats}
            with rematerializing(self.remat):
                outputs, updated = self.network.apply(
                    variables, images, train=True, mutable=["batch_stats"]
                )
            outputs = self._split(outputs)
            inputs = LossInputs(
                outputs,
                taught,
                frozen,
                classes=classes,
                targets=targets,
                num_seen=task.num_seen,
                head=self.head,
                classifier=params["head"]["kernel"] if not self.head.is_fixed else None,
            )
            loss, terms = self.adapted.losses(inputs)
            # Of what the loss is made of anyway: watching changes no bit of it or of the gradient.
            means = {k: lax.stop_gradient(v).mean().astype(jnp.float32) for k, v in terms.items()}
            return loss.mean(), (inputs, updated, means)

        grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, (inputs, updated, terms)), grads = grad_fn(state.params)
        updates, opt_state = make_optimizer(self.optimizer).update(
            grads,
            state.opt_state,
            state.params,
            epoch=state.step // task.steps_per_epoch,
            epochs=task.epochs,
            step=state.step,
            steps_per_epoch=task.steps_per_epoch,
        )
        params = optax.apply_updates(state.params, updates)
        batch_stats = updated.get("batch_stats", state.batch_stats)
        variables = {"params": params, "batch_stats": batch_stats}
        new_state = state.replace(
            step=state.step + 1,
            params=params,
            batch_stats=batch_stats,
            opt_state=opt_state,
            carried=self.adapted.updated(state.carried, variables, inputs),
        )
        right = self.head.predict(inputs.outputs, task.num_seen) == targets
        accuracy = right.mean(dtype=jnp.float32)
        broken = jnp.where(jnp.isfinite(loss), jnp.int32(NO_STEP), state.step)
        return new_state, Metrics(loss, accuracy, broken, terms)

    def _split(self, outputs):
        """Split the feature columns of a projection over the model axis."""
        if self.embedder.projection_size is None:
            return outputs
        columns = meshes.along_features(self.mesh)
        return outputs._replace(features=lax.with_sharding_constraint(outputs.features, columns))

    def run_steps(
        self, state: TrainState, frozen: Any, feed: Feed, *, stop: int
    ) -> tuple[TrainState, Metrics]:
        """Do the steps from `state.step` to `stop`, at least one; the state is donated.

        Args:
          state: of training, on the mesh.
          frozen: see `train_step`.
          feed: images on the devices, and the batches in them.
          stop: the step before which to stop, <= len(feed.plan).

        Returns:
          The new state and the mean of the metrics over the steps done.
        """
        start = int(state.step)
        state, total = self.advance(state, frozen, feed, self.no_metrics(), stop=stop)
        steps = jax.device_put(np.float32(stop - start), meshes.replicated(self.mesh))
        return state, total.over(steps)

    def advance(
        self,
        state: TrainState,
        frozen: Any,
        feed: Feed,
        total: Metrics,
        *,
        stop: int,
        after: Callable[[int, Metrics], bool] = lambda step, total: False,
    ) -> tuple[TrainState, Metrics]:
        """Do steps as `run_steps` does, and add their metrics to those of the steps before.

        One sum goes on through any number of calls, so that where they part changes no bit of it.

        Args:
          state, frozen, feed, stop: see `run_steps`.
          total: sum over the steps before, see `no_metrics`; not donated.
          after: (steps done, their sum) -> whether to end the call; asked after each step where a step
            is a dispatch of its own (CPU). The sum is on its way: reading it waits for the step.

        Returns:
          The new state, and `total` with the metrics of the steps done.
        """
        program = self._program(state, frozen)
        if not self.dispatches_each_step:
            last = jax.device_put(np.int32(stop), meshes.replicated(self.mesh))
            return program(state, frozen, *feed, total, last)
        for step in range(int(state.step), stop):
            before = total
            state, total = program(state, frozen, *feed, total)
            # One step at most waits behind the one that runs: what is asked after a step is asked in
            # time, where JAX would let thirty queue up.
            jax.block_until_ready(before)
            if after(step + 1, total):
                break
        return state, total

    def no_metrics(self) -> Metrics:
        """Return the sum of the metrics of no steps, on the mesh."""
        zero = np.float32(0)
        none = Metrics(zero, zero, np.int32(NO_STEP), {name: zero for name in self.method.terms})
        return meshes.device_put(none, meshes.replicated(self.mesh))

    def shapes(self, image_shape: tuple[int, int, int]) -> tuple[TrainState, Any]:
        """Return the shapes of a state and of the frozen state, for `lower`.

        The frozen state is that of a method that keeps the previous model, or nothing.
        """

        def make(key):
            variables = init_variables(self.network, key, image_shape)
            carried, optimizer = self.adapted.init(variables), make_optimizer(self.optimizer)
            state = create_state(variables, optimizer, carried, task=TaskInfo.create(0, 0))
            size = self.embedder.projection_size or 1
            means = np.zeros((1, size), np.float32)
            frozen = self.adapted.freeze(TaskStart(variables, 0, 1, mean_features=lambda: means))
            return state, frozen

        return jax.eval_shape(make, jax.random.key(0))

    def lower(
        self, state: TrainState, frozen: Any, feed: Feed, total: Metrics | None = None
    ) -> jax.stages.Lowered:
        """Lower the program of `run_steps`, also for devices that can only be compiled for.

        Args:
          state, frozen, feed: see `run_steps`; arrays or their shapes (`shapes`).
          total: see `advance`; its shapes by default.
        """
        stop = () if self.dispatches_each_step else (np.int32(feed.plan.shape[0]),)
        zero = jax.ShapeDtypeStruct((), np.float32)
        broken = jax.ShapeDtypeStruct((), np.int32)
        if total is None:
            total = Metrics(zero, zero, broken, {name: zero for name in self.method.terms})
        return self._program(state, frozen).lower(state, frozen, *feed, total, *stop)

    @property
    def dispatches_each_step(self) -> bool:
        """Return whether `run_steps` dispatches one program a step instead of one for all steps."""
        # XLA:CPU runs a convolution inside a loop body 2 to 15 times slower than outside one
        # (jax issue 12868), which costs far more than a dispatch a step.
        return self.mesh.devices.flat[0].platform == "cpu"

    def _planned_step(self, state, frozen, data, plan, total):
        index = lax.dynamic_index_in_dim(plan, state.step, keepdims=False)
        batch = {"image": data.images[index], "label": data.labels[index]}
        # The backbone's work is shared by all devices, those of the model axis included.
        split = meshes.over_all(self.mesh, len(index))
        batch["image"] = lax.with_sharding_constraint(batch["image"], split)
        batch["label"] = lax.with_sharding_constraint(batch["label"], meshes.along_data(self.mesh))
        state, metrics = self.train_step(state, batch, frozen)
        return state, total + metrics

    def _loop(self, state, frozen, data, plan, total, stop):
        # A loop with a traced bound, not a scan: tasks with other numbers of steps, or a stop in
        # mid epoch to save, run the same executable.
        def body(_, carry):
            return self._planned_step(carry[0], frozen, data, plan, carry[1])

        return lax.fori_loop(state.step, stop, body, (state, total))

    @functools.cached_property
    def _programs(self):
        return {}

    def _program(self, state, frozen):
        """Return the jitted steps for states of this structure, one or many a dispatch."""
        structure = jax.tree.structure((state, frozen)), self.dispatches_each_step
        if structure not in self._programs:
            self._programs[structure] = self._jitted(*meshes.shardings(self.mesh, (state, frozen)))
        return self._programs[structure]

    def _jitted(self, state, frozen):
        everywhere = meshes.replicated(self.mesh)
        plan = meshes.along_data(self.mesh, 1)
        inputs: tuple[Any, ...] = (state, frozen, everywhere, plan, everywhere)
        function: Callable[..., Any] = self._planned_step
        if not self.dispatches_each_step:
            function, inputs = self._loop, (*inputs, everywhere)
        return jax.jit(
            function,
            donate_argnums=0,
            in_shardings=inputs,
            out_shardings=(state, everywhere),
            compiler_options=self._compiler_options,
        )

    @property
    def _compiler_options(self):
        """Sum gradients over several GPUs in buckets, each while the backward pass goes on."""
        devices = self.mesh.devices.flat
        if len(devices) == 1 or devices[0].platform != "gpu":
            return None
        return {"xla_gpu_all_reduce_combine_threshold_bytes": _BUCKET_BYTES}


def step_key(state: TrainState) -> jax.Array:
    """Fold the random key of a step from (seed, task, epoch, step)."""
    return batch_key(state.task, state.step)


def batch_key(task: TaskInfo, step: Any) -> jax.Array:
    """Return the `step_key` of a step of a task, int32[]."""
    key = jax.random.key(task.seed)
    for part in (task.index, step // task.steps_per_epoch, step):
        key = jax.random.fold_in(key, part)
    return key
