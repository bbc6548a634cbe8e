"""Compatible representations in JAX: upgrade a retrieval model without re-embedding its gallery.

import compat_jax as cj

photos = cj.Photos(path="photos", size=224)  # one folder per class; it grows
run = cj.Run(method="hoc", backbone="resnet18", epochs=20)
month = cj.update(run, photos, "runs/shop")  # call it again when photos or classes were added
index = cj.Index(month.chain[0], photos.paths())
scores, rows = index.search(month.chain[-1], "query.jpg", k=10)
"""

from etils import epy

# Imported when first used, so that a program's --help does not wait for JAX.
with epy.lazy_api_imports(globals()):
    from compat_jax import afterwards, align, data, gallery, methods, metrics, models, retrieval
    from compat_jax.chain import Chain, Record, Version
    from compat_jax.data import Dataset, Preparation, Preprocess, Tasks
    from compat_jax.data.ledger import Splits
    from compat_jax.data.photos import Photos
    from compat_jax.errors import Diverged, Stopped, UserError
    from compat_jax.evaluation import evaluate
    from compat_jax.gallery import Gallery
    from compat_jax.matrix import Evaluation, Evaluations
    from compat_jax.methods import Method
    from compat_jax.retrieval import ExactIndex, Index, Metric, VectorIndex, embed
    from compat_jax.session import Session
    from compat_jax.training import Adamw, Lars, Run, Sgd, Update, pretrain, train, update

__version__ = "0.2.0"

__all__ = [
    "Adamw",
    "Chain",
    "Dataset",
    "Diverged",
    "Evaluation",
    "Evaluations",
    "ExactIndex",
    "Gallery",
    "Index",
    "Lars",
    "Method",
    "Metric",
    "Photos",
    "Preparation",
    "Preprocess",
    "Record",
    "Run",
    "Session",
    "Sgd",
    "Splits",
    "Stopped",
    "Tasks",
    "Update",
    "UserError",
    "VectorIndex",
    "Version",
    "afterwards",
    "align",
    "data",
    "embed",
    "evaluate",
    "gallery",
    "methods",
    "metrics",
    "models",
    "pretrain",
    "retrieval",
    "train",
    "update",
]
