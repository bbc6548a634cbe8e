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

# `names()` lists the paper's own first.
# isort: split
from compat_jax.methods.feature_alignment import align
from compat_jax.methods.feature_mixing import mixbct
from compat_jax.methods.hot_refresh_contrast import hot_refresh
from compat_jax.methods.independent_models import independent
from compat_jax.methods.learning_without_forgetting import lwf
from compat_jax.methods.less_forget import lucir
from compat_jax.methods.old_classifier import bct
from compat_jax.methods.prototype_refinement import unibct
from compat_jax.methods.stationary_simplex import cores

__all__ = [
    "FixedSimplex",
    "Forward",
    "GrowingClassifier",
    "Head",
    "LossInputs",
    "Method",
    "TaskStart",
    "align",
    "bct",
    "cores",
    "er",
    "factory",
    "fd",
    "get",
    "head_of",
    "hoc",
    "hot_refresh",
    "independent",
    "lucir",
    "lwf",
    "mixbct",
    "names",
    "register",
    "sce",
    "title",
    "unibct",
]
