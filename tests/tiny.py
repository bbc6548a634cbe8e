"""A data set, a network and a run so small that a whole sequence takes a second."""

import contextlib
import importlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl import flags as absl_flags
from ml_collections import ConfigDict

from compat_jax import config as configs
from compat_jax import methods, models
from compat_jax.chain import Chain, Record, Version, variables_sha256
from compat_jax.data import Dataset, Preprocess, Tasks
from compat_jax.mesh import make_mesh
from compat_jax.models.layers import BatchNorm, Conv, global_average_pool
from compat_jax.session import Session
from compat_jax.training import Run, Sgd
from compat_jax.training import train as train_run

SIZE, CLASSES, PER_CLASS, K = 8, 6, 16, 16
PREPROCESS = Preprocess((0.5,) * 3, (0.3,) * 3, crop_padding=0, flip=False)


class OneConv(nn.Module):
    """A backbone that compiles in a tenth of the time of the smallest real one."""

    width: int = 16
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x, train):
        """float[batch, h, w, 3] -> float[batch, width]."""
        x = Conv(self.width, 3, stride=2, padding=1, dtype=self.dtype, name="conv1")(x)
        return global_average_pool(nn.relu(BatchNorm(dtype=self.dtype, name="bn1")(x, train)))


def one_conv(dtype=jnp.float32, width: int = 16) -> OneConv:
    """Build it, as a registered backbone."""
    return OneConv(width, dtype)


models.register("one_conv", one_conv)


def dataset(classes=CLASSES, per_class=PER_CLASS, seed=0, size=SIZE, name="class") -> Dataset:
    """Noisy pictures of blocky random glyphs, one glyph a class, as if drawn by `seed`."""
    rng = np.random.default_rng([seed, classes])
    glyphs = np.kron(rng.integers(0, 2, (classes, 4, 4)), np.ones((size // 4, size // 4)))
    labels = np.repeat(np.arange(classes), per_class)
    noise = rng.normal(0, 30, (len(labels), size, size, 3))
    images = np.clip(60 + 140 * glyphs[labels][..., None] + noise, 0, 255)
    order = rng.permutation(len(labels))
    names = tuple(f"{name}{c}" for c in range(classes))
    return Dataset(images[order].astype(np.uint8), labels[order], names)


def run(method="hoc", **changes) -> Run:
    """Three tasks of two classes, two epochs each."""
    fields = {
        "method": method,
        "backbone": "one_conv",
        "num_prototypes": K,
        "tasks": Tasks(initial=2, increment=2, rehearsal=4),
        "epochs": 2,
        "batch_size": 16,
        "optimizer": Sgd(lr=0.05, min_lr=0.001),
        "preprocess": PREPROCESS,
    }
    return Run(**{**fields, **changes})


def one_device():
    """A mesh of one device."""
    return make_mesh("data:1", jax.devices()[:1])


def session(mesh=None, **changes) -> Session:
    """A session on one device."""
    return Session(mesh=mesh or one_device(), **changes)


def train(run, folder, data=None, mesh=None, *, replacements=None, config=None, **where) -> Chain:
    """The chain that `train` writes to a folder; `where` are fields of the session."""
    data = dataset() if data is None else data
    where = session(mesh, **where)
    return train_run(run, data, folder, replacements=replacements, session=where, config=config)


def record(**changes) -> Record:
    """Of an embedder that `variables` fills."""
    fields = {
        "method": "hoc",
        "backbone": "one_conv",
        "backbone_arguments": {},
        "image_shape": (SIZE, SIZE, 3),
        "mean": PREPROCESS.mean,
        "std": PREPROCESS.std,
        "feature_size": K - 1,
        "num_prototypes": K,
        "label_order": "descending",
        "head_classes": None,
        "task": 0,
        "classes_seen": 2,
        "parent": None,
        "replaced_by": None,
        "data_fingerprint": "0" * 64,
        "seed": 0,
        "config": {"epochs": 2},
    }
    return Record(**{**fields, **changes})


def backbone_of(record: Record) -> models.Backbone:
    """The backbone that a record names."""
    return models.Backbone(record.backbone, record.backbone_arguments)


def variables(record: Record, seed=0) -> dict:
    """Random variables of the network that a record describes, without compiling anything."""
    embedder = record.head.embedder(backbone_of(record).build(), jnp.float32)
    image = jax.ShapeDtypeStruct((1, *record.image_shape), np.float32)
    shapes = jax.eval_shape(lambda x: embedder.init(jax.random.key(0), x, train=False), image)
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        if path[-1].key in ("scale", "var"):
            return rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
        spread = 0.1 if leaf.ndim < 2 else np.sqrt(2 / np.prod(leaf.shape[:-1]))
        return (spread * rng.normal(size=leaf.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, dict(shapes))


def version(seed=0, number=0, **changes) -> Version:
    """A version that was never trained, as if opened."""
    described = record(**{"task": None, "class_names": ("other0",), **changes})
    drawn = variables(described, seed)
    return Version(number, described, drawn, variables_sha256(drawn), backbone_of(described))


# Overrides that shrink configs/glyphs.py and configs/pretrain.py, for programs and functions.
_SHARED = {
    "backbone.arguments": {"width": 4},
    "num_prototypes": 16,
    "epochs": 2,
    "batch_size": 8,
    "mesh": "data:1",
    "data.train.size": 8,
    "data.train.per_class": 8,
}
TRAIN = {
    **_SHARED,
    "tasks.initial": 2,
    "tasks.increment": 2,
    "tasks.rehearsal": 4,
    "data.train.classes": (0, 6),
    **{f"data.{role}.classes": (6, 9) for role in ("query", "gallery")},
    **{f"data.{role}.size": 8 for role in ("query", "gallery")},
    "data.query.per_class": 5,
    "data.gallery.per_class": 4,
}
PRETRAIN = {**_SHARED, "pretrain_classes": (2, 2), "data.train.classes": (10, 14)}


def with_backbone(name: str, overrides: dict) -> dict:
    """The overrides with another backbone, which takes no width."""
    kept = {field: value for field, value in overrides.items() if field != "backbone.arguments"}
    return {**kept, "backbone.name": name}


def start_of(method: str, **changes) -> Version:
    """A model to start from, so that no initialisation is compiled."""
    if methods.get(method).fixed_simplex:
        return version(method="sce", **changes)
    return version(method="er", head_classes=3, feature_size=16, **changes)


def config(file="glyphs", arguments="replace=false", overrides=None, **more) -> ConfigDict:
    """A shrunken configuration; keywords with __ for dots are further overrides."""
    made = importlib.import_module(f"configs.{file}").get_config(arguments)
    made.update_from_flattened_dict(TRAIN if overrides is None else overrides)
    made.update_from_flattened_dict({k.replace("__", "."): v for k, v in more.items()})
    return made


def session_of(config: ConfigDict, **more) -> Session:
    """The session of a configuration; keywords are those of `config.session_of`."""
    return configs.session_of(config, **more)


def flags(overrides, **more) -> list[str]:
    """The same overrides as flags of a program."""
    more = {k.replace("__", "."): v for k, v in more.items()}
    return [f"--config.{k}={v}" for k, v in {**overrides, **more}.items()]


@contextlib.contextmanager
def own_flags():
    """Put the flags of programs aside that other tests have imported, and away those of the block."""
    values = absl_flags.FLAGS
    owners = {name: values.find_module_defining_flag(name) or "" for name in values}
    aside = {n: values[n] for n, owner in owners.items() if owner.startswith("launch.")}
    for name in aside:
        delattr(values, name)
    before = set(values)
    try:
        yield
    finally:
        for name in set(values) - before:
            delattr(values, name)
        for name, flag in aside.items():
            absl_flags.DEFINE_flag(flag, values, module_name=owners[name])
