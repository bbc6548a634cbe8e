"""Where a task stands, on disk: a run that was killed goes on from here, to the same bits."""

import functools
import re
from typing import Any

import jax
import numpy as np
from etils import epath
from flax import serialization
from orbax.checkpoint import v1 as ocp

from compat_jax import hosts
from compat_jax import mesh as meshes
from compat_jax.errors import UserError
from compat_jax.files import absolute, first_line, in_bucket
from compat_jax.train.state import TrainState

_NAME = re.compile(r"task(\d+)-step(\d+)")


class Progress:
    """The last saved state of the present task, in a folder of its own.

    Args:
      path: of the folder.
    """

    def __init__(self, path: str | epath.Path):
        self.path = absolute(path)

    def save(self, task: int, state: TrainState) -> None:
        """Replace what is saved; the older state is removed only when this one is whole.

        Raises:
          UserError: the folder cannot be written to; what was saved before is still there.
        """
        name = f"task{task}-step{int(state.step)}"
        tree = _without_empty(serialization.to_state_dict(state))
        try:
            hosts.first_does(lambda: self.path.mkdir(parents=True, exist_ok=True))
            if not hosts.first_says(_is_whole(self.path / name)):
                # Several processes write a share each. What is there already was cut off.
                tree = tree if hosts.several() else _on_host(tree)
                ocp.save(self.path / name, tree, overwrite=in_bucket(self.path))
            hosts.first_does(lambda: self._remove_others(name))
        except Exception as error:  # Orbax and TensorStore raise many kinds
            raise UserError(
                f"cannot save to {self.path} ({first_line(error)}): make room or free it, then "
                "give the same command to go on from the save before"
            ) from error

    def restore(self, task: int, state: TrainState) -> TrainState:
        """The saved state of a task in place of `state`, which gives shapes and devices.

        It may have been saved on a mesh with another model axis, whose projection has more or fewer
        columns of zeros behind its own.

        Returns `state` itself where nothing of this task is saved.

        Raises:
          UserError: what is saved is damaged.
        """
        saved = [m for m in self._saved() if int(m[1]) == task]
        if not saved:
            return state
        latest = max(saved, key=lambda m: int(m[2]))
        tree = serialization.to_state_dict(state)
        try:
            loaded = self._load(latest[0], _without_empty(tree))
        except Exception as error:  # Orbax and TensorStore raise many kinds
            raise UserError(
                f"{self.path / latest[0]} is damaged ({first_line(error)}): "
                "remove it and the task begins again"
            ) from error
        restored = serialization.from_state_dict(state, _with_empty(loaded, tree))
        return meshes.place_like(restored, state)

    def _load(self, name, tree):
        saved = ocp.metadata(self.path / name).metadata

        def template(path, leaf):
            shape = functools.reduce(lambda t, key: t[key.key], path, saved).shape
            return np.empty(shape if meshes.is_projection(path) else leaf.shape, leaf.dtype)

        return ocp.load(self.path / name, jax.tree_util.tree_map_with_path(template, tree))

    def clear(self) -> None:
        """Forget everything: the task is in the chain now."""
        hosts.first_does(lambda: self._remove_others(None))

    def _saved(self):
        if not self.path.exists():
            return []
        names = [p.name for p in self.path.iterdir() if _is_whole(p)]
        return [m for m in map(_NAME.fullmatch, names) if m]

    def _remove_others(self, name):
        if self.path.exists():
            for path in self.path.iterdir():
                if path.name != name:
                    path.rmtree()


def _is_whole(path: epath.Path) -> bool:
    """Whether a saved state is there: in a bucket, where none is renamed, Orbax marks the end."""
    return (path / "commit_success.txt" if in_bucket(path) else path).exists()


def _on_host(tree: Any) -> Any:
    return jax.tree.map(np.asarray, tree)


def _without_empty(tree: Any) -> Any:
    """A state dict without its empty dicts, which Orbax has no leaf for."""
    if not isinstance(tree, dict):
        return tree
    cut = {k: _without_empty(v) for k, v in tree.items()}
    return {k: v for k, v in cut.items() if not (isinstance(v, dict) and not v)}


def _with_empty(tree: Any, like: Any) -> Any:
    """`tree` with the empty dicts that `like` has."""
    if not isinstance(like, dict):
        return tree
    return {k: _with_empty(tree.get(k, {}), v) for k, v in like.items()}
