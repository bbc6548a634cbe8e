"""Training methods, a file each.

    methods.hoc(lam=0.1, mu=10.0)      the paper's
    methods.get("hoc", {"mu": 5.0})    by name

To add one, write a function that returns a `Method` and decorate it with `register`.
"""

from compat_jax.methods.base import Forward, LossInputs, Method, TaskStart
from compat_jax.methods.experience_replay import er
from compat_jax.methods.heads import FixedSimplex, GrowingClassifier, Head, head_of
from compat_jax.methods.registry import factory, get, names, register, title
from compat_jax.methods.simplex_fd import fd
from compat_jax.methods.simplex_hoc import hoc
from compat_jax.methods.simplex_sce import sce

__all__ = [
    "FixedSimplex",
    "Forward",
    "GrowingClassifier",
    "Head",
    "LossInputs",
    "Method",
    "TaskStart",
    "er",
    "factory",
    "fd",
    "get",
    "head_of",
    "hoc",
    "names",
    "register",
    "sce",
    "title",
]
