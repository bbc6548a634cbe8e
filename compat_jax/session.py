"""A session: where and how a run is carried out. None of it changes what comes out."""

import dataclasses
import os
from collections.abc import Callable
from typing import Annotated

import jax
from jax.sharding import Mesh

from compat_jax import hosts
from compat_jax import mesh as meshes
from compat_jax.errors import UserError
from compat_jax.fields import Rule, check_fields


def never() -> bool:
    """Return False: the default of `Session.should_stop`."""
    return False


@dataclasses.dataclass(frozen=True)
class _AnyHost:
    """Asks all hosts at the same time whether `own` says so on any of them."""

    own: Callable[[], bool]

    def __call__(self) -> bool:
        return hosts.any_process(bool(self.own()))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Session:
    """Where and how a run is carried out.

    Attributes:
      mesh: devices, a Mesh or sizes such as "data:-1,model:1".
      save_every: steps between saves within a task; 0 saves after each epoch, at most every 30 s.
      device_budget: bytes of images that may lie on a device; larger data stay on the host and
        batches are put on the devices ahead of their use, which changes no bit. 0 for no limit.
      should_stop: asked between dispatches; when it returns True, the state is saved and `Stopped`
        is raised. Each of several hosts gives a function of its own, or none does: as soon as one
        returns True, all stop at the same step.
      validate_every: steps between validations; 0 validates after each epoch. Without validation
        data there are none.
      log_every: steps between lines of the log within an epoch; 0 for a line every ten seconds.
      tensorboard: folder for TensorBoard's files, local or gs://; None for none.
      progress: whether to show progress bars; without them, a line at the end of each task. On the
        first host only.
      batch_size: images per batch when features are extracted.
      cache: folder for features and scores that an evaluation has computed; an interrupted evaluation
        resumes from there. None for none.
      accept_changes: whether a run goes on with changed settings where they may change: those of the
        optimiser, epochs, augmentation and what is kept at any time, batch, rehearsal, dtype and method
        between two versions. What changed is kept in `run.json`.
    """

    mesh: Mesh | str = "data:-1"
    save_every: Annotated[
        int, Rule("steps between saves; 0 saves after epochs", low=0, high=10**9)
    ] = 0
    device_budget: Annotated[
        int, Rule("bytes of images on a device; 0 for no limit", low=0, high=2**60)
    ] = 0
    should_stop: Callable[[], bool] = never
    validate_every: Annotated[
        int, Rule("steps between validations; 0 validates after epochs", low=0, high=10**9)
    ] = 0
    log_every: Annotated[
        int, Rule("steps between lines of the log; 0 for ten seconds", low=0, high=10**9)
    ] = 0
    tensorboard: str | os.PathLike | None = None
    progress: Annotated[bool, Rule("whether to show progress bars")] = True
    batch_size: Annotated[int, Rule("images per batch of extraction", low=1, high=10**6)] = 256
    cache: str | os.PathLike | None = None
    accept_changes: Annotated[
        bool, Rule("whether to go on with changed settings, where they may change")
    ] = False

    def __post_init__(self):
        check_fields(self)
        if not isinstance(self.mesh, Mesh | str):
            raise UserError(f"mesh must be a Mesh or sizes, got {self.mesh!r:.80}", "mesh")
        if not callable(self.should_stop):
            raise UserError(
                f"should_stop must be a function, got {self.should_stop!r:.80}", "should_stop"
            )
        # Hosts that stopped at different steps would wait for each other for ever.
        if self.should_stop is not never and not isinstance(self.should_stop, _AnyHost):
            object.__setattr__(self, "should_stop", _AnyHost(self.should_stop))

    def devices(self) -> Mesh:
        """Return the mesh of devices.

        Raises:
          UserError: see `mesh.make_mesh`.
        """
        if isinstance(self.mesh, Mesh):
            return self.mesh
        return meshes.make_mesh(self.mesh, jax.devices())

    def bar(self, label: str) -> str | None:
        """Return the label of a progress bar; None where none is shown."""
        return label if self.progress and hosts.is_first() else None
