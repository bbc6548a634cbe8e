"""Compatible representations in JAX: upgrade a retrieval model without re-embedding its gallery.

import compat_jax as cj

data = cj.data.from_folder("photos/train", size=64)
run = cj.Run(method="hoc", backbone="resnet18", tasks=cj.Tasks(initial=10, increment=15), epochs=10)
chain = cj.train(run, data, "runs/hoc")
result = cj.evaluate(chain, query, gallery, metrics=["identification", "recall@1"])
index = cj.Index(chain[0], gallery.images)
scores, rows = index.search(chain[-1], query.images, k=10)
"""

from etils import epy

# Imported when first used, so that a program's --help does not wait for JAX.
with epy.lazy_api_imports(globals()):
    from compat_jax import data, methods, metrics, models, retrieval
    from compat_jax.chain import Chain, Record, Version
    from compat_jax.data import Dataset, Preprocess, Tasks
    from compat_jax.errors import Diverged, Stopped, UserError
    from compat_jax.evaluation import Evaluation, Evaluations, evaluate
    from compat_jax.methods import Method
    from compat_jax.retrieval import ExactIndex, Index, Metric, VectorIndex, embed
    from compat_jax.session import Session
    from compat_jax.training import Run, Sgd, pretrain, train

__version__ = "0.2.0"

__all__ = [
    "Chain",
    "Dataset",
    "Diverged",
    "Evaluation",
    "Evaluations",
    "ExactIndex",
    "Index",
    "Method",
    "Metric",
    "Preprocess",
    "Record",
    "Run",
    "Session",
    "Sgd",
    "Stopped",
    "Tasks",
    "UserError",
    "VectorIndex",
    "Version",
    "data",
    "embed",
    "evaluate",
    "methods",
    "metrics",
    "models",
    "pretrain",
    "retrieval",
    "train",
]
