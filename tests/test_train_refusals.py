"""What training refuses before any work, one line each."""

import optax
import pytest
import tiny

from compat_jax import methods
from compat_jax.data import Tasks
from compat_jax.errors import UserError
from compat_jax.mesh import make_mesh
from compat_jax.models import Backbone

DATA = tiny.dataset()


@pytest.fixture(scope="module")
def eight():
    return make_mesh("data:8")


@pytest.fixture
def refused(tmp_path):
    """Asks for a run with changes, and for the error's message; the workdir is never made."""

    def ask(message, argument, data=DATA, mesh=None, replacements=None, **changes):
        with pytest.raises(UserError, match=message) as caught:
            tiny.train(tiny.run(**changes), tmp_path / "run", data, mesh, replacements=replacements)
        assert caught.value.argument == argument and "\n" not in str(caught.value)
        assert not (tmp_path / "run").exists()

    return ask


def test_what_cannot_work_is_refused_before_any_work(refused, eight):
    few = "num_prototypes 5 is too small for 6 classes"
    refused(few, "num_prototypes", num_prototypes=5)
    refused("epochs must be at least 1 and at most 1,000,000, got 0", "epochs", epochs=0)
    refused("batch_size must be at least 1 and .*, got -2", "batch_size", batch_size=-2)
    refused("seed must be at least 0 and .*, got -1", "seed", seed=-1)
    refused("seed must be at least 0 and .*, got 4294967296", "seed", seed=2**32)
    wrong = "unknown label_order 'descendin'. Did you mean 'descending'"
    refused(wrong, "label_order", label_order="descendin")
    refused("unknown method 'hoq'. Did you mean 'hoc'", "method", method="hoq")
    refused("unknown backbone 'resnet_smal'", "backbone", backbone=Backbone("resnet_smal"))
    refused("unknown argument .* 'widht'", None, backbone=Backbone("one_conv", {"widht": 4}))
    refused("a backbone is a registered name .*, got 3", None, backbone=3)
    refused("replacement at task 0", "tasks.replace_at", replacements={"0": tiny.version()})
    refused("unknown dtype 'float16'", "dtype", dtype="float16")
    shares = "batch_size 12 does not divide over 8 devices .*: use 8 or 16"
    refused(shares, "batch_size", mesh=eight, batch_size=12)
    refused("unknown mesh axis 'date'", "mesh", mesh="date:1")
    refused("needs 16 devices, there are 8", "mesh", mesh="data:16")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("method", 3, "method must be a name or a Method, got 3"),
        ("optimizer", "adam", r"optimizer must be Sgd, .* or an optax transformation, got 'adam'"),
        (
            "optimizer",
            optax.adam,
            r"optimizer must be Sgd, .* or an optax transformation, got <func",
        ),
        ("tasks", (2, 2, 4), r"tasks must be Tasks, got \(2, 2, 4\)"),
        ("preprocess", None, "preprocess must be Preprocess, got None"),
    ],
)
def test_parts_of_a_run_of_another_type_are_refused(refused, field, value, message):
    refused(message, field, **{field: value})


def test_tasks_that_the_data_cannot_fill_are_refused_before_any_work(refused):
    too_many = r"tasks\.initial must lie in 1\.\.6 \(the classes of the data\), got 7"
    refused(too_many, "tasks.initial", tasks=Tasks(7, 2))
    none = r"tasks\.increment must be at least 1 for 4 more classes, got 0"
    refused(none, "tasks.increment", tasks=Tasks(2, 0))
    with pytest.raises(UserError, match=r"tasks\.rehearsal must be at least 0 and .*, got -1"):
        Tasks(2, 2, rehearsal=-1)


def test_batches_that_the_devices_cannot_share_are_refused_before_any_work(refused, eight):
    few = tiny.dataset(per_class=5)  # ten images a task: a batch of 16 shrinks to them
    refused("task 0 has batches of 10 images, which 8 devices", "batch_size", few, eight)
    refused("task 1 has batches of 0 images", "batch_size", batch_size=1)


def test_replacements_that_do_not_fit_are_refused_before_any_work(refused):
    refused(
        r"replacement at task 3, but the sequence has tasks 0\.\.2",
        "tasks.replace_at",
        replacements={3: tiny.start_of("hoc")},
    )
    refused(
        "pre-trained with a learnable head, but method 'hoc' has a fixed simplex: .*method 'hoc'",
        "pretrained",
        replacements={1: tiny.start_of("er")},
    )
    refused(
        "has num_prototypes=32, the run 16",
        "num_prototypes",
        replacements={1: tiny.start_of("hoc", num_prototypes=32, feature_size=31)},
    )
    refused(
        r"takes images of \(16, 16, 3\), the tasks have \(8, 8, 3\)",
        "size",
        replacements={1: tiny.start_of("hoc", image_shape=(16, 16, 3))},
    )
    refused(
        r"trained with mean \(0\.5, .* and std \(0\.3, 0\.3, 0\.25\), the run has mean .*: give both",
        "pretrained",
        replacements={1: tiny.start_of("hoc", std=(0.3, 0.3, 0.25))},
    )


@pytest.mark.parametrize(
    ("method", "field", "value"),
    [
        ("hoc", "lam", 1.5),
        ("hoc", "mu", 0.0),
        ("hoc", "same_class", "exlude"),
        ("fd", "weight", -1.0),
    ],
)
def test_losses_refuse_numbers_out_of_range(method, field, value):
    with pytest.raises(UserError, match=f"{method}.{field}") as caught:
        methods.get(method, {field: value})
    assert caught.value.argument == f"{method}.{field}"


def test_a_method_names_the_nearest_of_its_arguments():
    with pytest.raises(UserError, match=r"unknown argument of hoc 'lamm'\. Did you mean 'lam'"):
        methods.get("hoc", {"lamm": 0.5})
    with pytest.raises(UserError, match=r"sce\.lam: there is no such argument"):
        methods.get("sce", {"lam": 0.5})
