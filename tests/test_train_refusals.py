"""What training refuses before any work, one line each."""

import pytest
import tiny

from compat_jax.errors import UserError
from compat_jax.mesh import make_mesh
from compat_jax.methods import LossSettings
from compat_jax.train import loop

DATA = tiny.dataset()


@pytest.fixture(scope="module", autouse=True)
def backbone():
    with tiny.one_conv():
        yield


@pytest.fixture(scope="module")
def eight():
    return make_mesh("data:8")


def refused(message, data=DATA, mesh=None, replacements=None, **changes):
    run = tiny.run(**changes)
    with pytest.raises(UserError, match=message):
        loop.train(run, data, None, None, mesh or tiny.one_device(), replacements)


def test_what_cannot_work_is_refused_before_any_work(eight):
    refused("num_prototypes 5 is too small for 6 classes", num_prototypes=5)
    refused("epochs must be at least 1, got 0", epochs=0)
    refused("batch_size must be at least 1, got -2", batch_size=-2)
    refused("rehearsal must not be negative, got -1", rehearsal=-1)
    refused(r"seed must lie in 0\.\.4294967295, got -1", seed=-1)
    refused("unknown label_order 'descendin'. Did you mean 'descending'", label_order="descendin")
    refused("unknown backbone 'resnet_smal'", backbone=loop.Backbone("resnet_smal"))
    refused("unknown argument .* 'widht'", backbone=loop.Backbone("one_conv", {"widht": 4}))
    refused("unknown dtype 'float16'", dtype="float16")
    refused(
        "batch_size 12 does not divide over 8 devices .*: use 8 or 16", DATA, eight, batch_size=12
    )


def test_batches_that_the_devices_cannot_share_are_refused_before_any_work(eight):
    few = tiny.dataset(per_class=5)  # ten images a task: a batch of 16 shrinks to them
    refused("task 0 has batches of 10 images, which 8 devices", few, eight)
    refused("task 1 has batches of 0 images", batch_size=1)


def test_replacements_that_do_not_fit_are_refused_before_any_work():
    refused(
        r"replacement at task 3, but the sequence has tasks 0\.\.2",
        replacements={3: tiny.start_of("hoc")},
    )
    refused(
        "pre-trained with a learnable head, but method 'hoc' has a fixed simplex: .*method=hoc",
        replacements={1: tiny.start_of("er")},
    )
    refused(
        "has num_prototypes=32, the run 16",
        replacements={1: tiny.start_of("hoc", num_prototypes=32, feature_size=31)},
    )
    refused(
        r"takes images of \(16, 16, 3\), the tasks have \(8, 8, 3\)",
        replacements={1: tiny.start_of("hoc", image_shape=(16, 16, 3))},
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("lam", 1.5),
        ("mu", 0.0),
        ("same_class", "exlude"),
        ("distillation", -1.0),
    ],
)
def test_losses_refuse_numbers_out_of_range(field, value):
    with pytest.raises(UserError, match=f"loss.{field}"):
        LossSettings(**{field: value})
