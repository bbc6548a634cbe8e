"""What rematerialisation saves, and that it changes nothing but rounding."""

import functools
import re

import chex
import jax
import numpy as np
import pytest
import tiny

from compat_jax import models
from compat_jax.errors import UserError
from compat_jax.methods import TaskStart
from compat_jax.training import TaskInfo
from compat_jax.training.run import make_trainer

BATCH = 32
# XLA:CPU of jax 0.10 undoes it (docs/speed.md); a shorter network compiles in half the time there.
SAVES_MEMORY = jax.__version_info__ >= (0, 12)


@functools.cache
def compiled(remat):
    """(trainer, compiled step) of a ViT."""
    depth = 4 if SAVES_MEMORY else 2
    layout = {"width": 32, "heads": 2, "depth": depth, "patch": 2, "image_size": tiny.SIZE}
    deep = models.Backbone("compat_jax.models.vit:VisionTransformer", layout)
    run = tiny.run("hoc", backbone=deep, remat=remat)
    trainer = make_trainer(run, tiny.CLASSES, tiny.one_device())
    image = (tiny.SIZE, tiny.SIZE, 3)
    state, frozen = trainer.shapes(image)
    batch = {
        "image": jax.ShapeDtypeStruct((BATCH, *image), np.uint8),
        "label": jax.ShapeDtypeStruct((BATCH,), np.int32),
    }
    return trainer, jax.jit(trainer.train_step).lower(state, batch, frozen).compile()


def scratch(remat):
    return compiled(remat)[1].memory_analysis().temp_size_in_bytes


def after_a_step(remat):
    trainer, step = compiled(remat)
    data = tiny.dataset()
    batch = {"image": data.images[:BATCH], "label": data.labels[:BATCH].astype(np.int32)}
    info = TaskInfo.create(0, 1, epochs=2, steps_per_epoch=2, num_seen=4)
    variables = trainer.init(jax.random.key(0), data.images.shape[1:])
    means = np.zeros((tiny.CLASSES, tiny.K - 1), np.float32)
    frozen = trainer.method.freeze(TaskStart(variables, 2, 4, lambda: means))
    return step(trainer.create_state(variables, info), batch, frozen)


saves_memory = pytest.mark.skipif(not SAVES_MEMORY, reason="XLA:CPU of jax 0.10 undoes it")


@saves_memory
@pytest.mark.parametrize(
    ("remat", "share"), [pytest.param("elementwise", 0.8, marks=pytest.mark.slow), ("blocks", 0.5)]
)
def test_a_step_takes_less_memory(remat, share):
    assert scratch(remat) < share * scratch("none")


@saves_memory
@pytest.mark.slow
def test_the_more_is_computed_again_the_less_memory_a_step_takes():
    assert scratch("blocks") < scratch("elementwise") < scratch("none")


@pytest.mark.parametrize("remat", [pytest.param("elementwise", marks=pytest.mark.slow), "blocks"])
def test_a_step_is_the_same_but_for_rounding(remat):
    chex.assert_trees_all_close(after_a_step(remat), after_a_step("none"), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backbone", ["resnet_small", "resnet32_cifar", "senet18"])
def test_blocks_keep_their_variables(backbone):
    network = models.Backbone(backbone).build()
    images, found = jax.ShapeDtypeStruct((2, 16, 16, 3), np.float32), {}

    def draw(x):
        return network.init(jax.random.key(0), x, train=False)

    for remat in models.REMAT:

        def learn(variables, x):
            return network.apply(variables, x, train=True, mutable=["batch_stats"])

        with models.rematerializing(remat):
            found[remat] = jax.eval_shape(draw, images)
            traced = jax.make_jaxpr(learn)(found[remat], images)
        computes_again = bool(re.search("remat|checkpoint", str(traced)))
        assert computes_again == (remat != "none")
    assert found["elementwise"] == found["blocks"] == found["none"]


def test_the_setting_is_described_where_it_is_not_the_default():
    assert "remat" not in tiny.run("sce").describe()
    assert tiny.run("sce", remat="blocks").describe()["remat"] == "blocks"


def test_an_unknown_setting_is_refused():
    with pytest.raises(UserError, match=r"remat.*blocks, elementwise, none") as caught:
        tiny.run("sce", remat="all")
    assert caught.value.argument == "remat"
