"""Where the reference departs from its paper or fails, shown on its own code.

IAMCL2R_CLONE (and CL2R_CLONE) name clones; without them only the tests of this package run.
"""

import os
import sys
import types

import jax
import numpy as np
import pytest
from reference_weights import zero_variables

from compat_jax import compatibility, losses, methods, models
from compat_jax.errors import UserError
from compat_jax.interop import from_torch, to_torch, torch_files
from launch.reference import clone

CLONE, CL2R = os.environ.get("IAMCL2R_CLONE"), os.environ.get("CL2R_CLONE")


@pytest.fixture(scope="module")
def modules():
    """The modules of a clone of iamcl2r."""
    if CLONE is None:
        pytest.skip("IAMCL2R_CLONE names no clone of miccunifi/iamcl2r")
    pytest.importorskip("torch", reason="PyTorch is not installed")
    return clone.open_clone(CLONE, "iamcl2r")


@pytest.fixture
def pieces(modules):
    return clone.Pieces(modules)


@pytest.fixture
def features():
    return np.random.default_rng(0).normal(size=(2, 8, 16)).astype(np.float32)


@pytest.mark.torch
def test_each_pair_of_one_class_adds_one_to_the_denominator(pieces, features):
    new, old = features
    labels = np.arange(8) // 2  # two images a class, so exp(0) twice a row
    theirs, _ = pieces.contrast(new, old, labels, mu=10.0)
    as_coded = losses.info_nce(new, old, labels, mu=10.0, same_class="as_coded").mean()
    np.testing.assert_allclose(theirs, as_coded, rtol=1e-6)

    paper = np.asarray(losses.info_nce(new, old, labels, mu=10.0))
    unit_new, unit_old = (f / np.linalg.norm(f, axis=1, keepdims=True) for f in (new, old))
    positive = 10.0 * (unit_new * unit_old).sum(1)
    with_two_more = np.log(np.exp(paper + positive) + 2) - positive
    np.testing.assert_allclose(theirs, with_two_more.mean(), rtol=1e-5)
    assert theirs > paper.mean() + 0.05


@pytest.mark.torch
def test_a_feature_of_norm_zero_ends_its_training_and_counts_as_zero_here(pieces, features):
    """A picture that no unit of the backbone answers to: one is enough."""
    new, old = features
    new[0] = 0
    labels = np.arange(8)
    theirs, gradient = pieces.contrast(new, old, labels, mu=10.0)
    assert np.isnan(theirs) and np.isnan(gradient).any()

    def loss(new):
        return losses.info_nce(new, old, labels, mu=10.0).mean()

    ours, gradient = jax.value_and_grad(loss)(new)
    assert np.isfinite(ours) and np.isfinite(gradient).all() and not gradient[0].any()


@pytest.mark.torch
def test_the_contrast_of_two_processes_is_not_that_of_their_batch(pieces, features):
    """DDP gives each process a share of the batch and averages the gradients."""
    new, old = features
    labels = np.arange(8)
    shares = [pieces.contrast(new[s], old[s], labels[s], mu=10.0)[0] for s in np.split(labels, 2)]
    whole, _ = pieces.contrast(new, old, labels, mu=10.0)
    assert whole - np.mean(shares) > 0.1
    ours = losses.info_nce(new, old, labels, mu=10.0, same_class="as_coded").mean()
    np.testing.assert_allclose(ours, whole, rtol=1e-6)


@pytest.mark.torch
def test_an_accuracy_of_zero_is_dropped_there_and_counts_here(pieces):
    matrix = np.array([[0.5, 0], [0, 0.7]])
    assert pieces.average_accuracy(matrix.copy()) == pytest.approx(60)
    assert 100 * compatibility.average_accuracy(matrix) == pytest.approx(40)


@pytest.mark.torch
def test_a_tie_is_incompatible_in_iamcl2r_and_compatible_in_cl2r(pieces):
    matrix = np.array([[0.5, 0], [0.5, 0.7]])
    assert pieces.average_compatibility(matrix) == 0
    assert compatibility.average_compatibility(matrix) == 0
    assert compatibility.average_compatibility(matrix, tie="compatible") == 1
    if CL2R is not None:
        metrics = clone.open_clone(CL2R, "cl2r")("metrics")
        assert metrics.average_compatibility(matrix) == 1


@pytest.mark.torch
@pytest.mark.parametrize("versions", [2, 7])
def test_its_evaluation_extracts_t_squared_times(modules, tmp_path, versions):
    evaluation, calls = modules("eval"), []

    def extract(args, device, net, loader):
        calls.append(loader)
        return np.eye(2, dtype=np.float32)

    loader = types.SimpleNamespace(dataset=types.SimpleNamespace(targets=[0, 1]))
    args = types.SimpleNamespace(
        checkpoint_path=str(tmp_path),
        fixed=True,
        preallocated_classes=2,
        replace_model_architecture=False,
        backbone="resnet18",
        is_main_process=False,
    )
    for task in range(versions):
        (tmp_path / f"ckpt_{task}.pt").touch()
    clone.with_in1d(modules("performance_metrics"))
    nothing = clone.Nothing()
    with clone.replaced(evaluation, extract_features=extract, create_model=nothing):
        evaluation.evaluate(args, "cpu", loader, loader, versions)
    assert len(calls) == versions + versions * (versions + 1) // 2


@pytest.mark.torch
def test_another_architecture_is_refused_by_its_evaluation(modules, tmp_path):
    loader = types.SimpleNamespace(dataset=types.SimpleNamespace(targets=[0]))
    args = types.SimpleNamespace(
        checkpoint_path=str(tmp_path),
        fixed=True,
        preallocated_classes=2,
        replace_model_architecture=True,
    )
    (tmp_path / "ckpt_0.pt").touch()
    with pytest.raises(NotImplementedError):
        modules("eval").evaluate(args, "cpu", loader, loader, 1)


@pytest.mark.torch
def test_its_check_asks_for_fields_that_no_configuration_has(modules):
    args = modules("params").ExperimentParams()
    with pytest.raises(AttributeError, match="learning_rate"):
        modules("utils").check_params(args)


@pytest.mark.torch
def test_its_own_checkpoint_is_refused_by_current_torch(modules, tmp_path):
    torch = clone.torch_module()
    if tuple(int(x) for x in torch.__version__.split(".")[:2]) < (2, 6):
        pytest.skip("torch < 2.6 loads every pickle")
    args = modules("params").ExperimentParams()
    args.fixed, args.preallocated_classes, args.current_task_id = True, 4, 0
    args.classes_at_task, args.distributed = [4], False
    file = str(tmp_path / "ckpt_0.pt")
    torch.save({"net": {}, "args": args}, file)
    with pytest.raises(Exception, match="Weights only load failed"):
        modules("models").create_model(args, "cpu", resume_path=file)


@pytest.mark.torch
def test_a_checkpoint_with_its_transforms_is_read_without_torchvision(modules, tmp_path):
    """The settings in it hold the training transforms, objects of torchvision."""
    torch, args = clone.torch_module(), modules("params").ExperimentParams()
    name = "torchvision.transforms.transforms"
    stand_in = types.ModuleType(name)
    for kind in ("Resize", "RandomCrop", "RandomHorizontalFlip", "ToTensor", "Normalize"):
        setattr(stand_in, kind, type(kind, (torch.nn.Module,), {"__module__": name}))
    args.train_transform = [stand_in.RandomCrop(), stand_in.Normalize()]
    args.new_data_ids_at_task = [np.arange(3)]
    with pytest.MonkeyPatch.context() as patch:
        for part in ("torchvision", "torchvision.transforms"):
            patch.setitem(sys.modules, part, types.ModuleType(part))
        patch.setitem(sys.modules, name, stand_in)
        torch.save({"net": {"a": torch.arange(3.0)}, "args": args}, tmp_path / "ckpt_0.pt")
    found = torch_files.read(tmp_path / "ckpt_0.pt")
    np.testing.assert_array_equal(found["a"], [0, 1, 2])


@pytest.mark.torch
@pytest.mark.parametrize("backbone", ["senet18", "regnet400"])
def test_two_of_its_backbones_fail_in_its_network(modules, backbone):
    torch = clone.torch_module()
    with pytest.raises(Exception, match=r"tuple|out_dim"):
        net = modules("models").Incremental_ResNet(10, 9, backbone)
        net(torch.zeros(2, 3, 32, 32))


# --- with K - 1 equal to the width, the reference has no projection


def embedder(num_classes):
    """ResNet-18, 512 wide."""
    return methods.FixedSimplex(num_classes).embedder(
        models.Backbone("resnet18").build(), np.float32
    )


def test_a_projection_is_always_there():
    assert to_torch(zero_variables(embedder(513)))["fc1.weight"].shape == (512, 512)


def test_weights_without_a_projection_name_what_is_missing():
    variables = zero_variables(embedder(513))
    state = to_torch(variables)
    del state["fc1.weight"]
    with pytest.raises(UserError, match=r"missing: fc1\.weight"):
        from_torch(state, variables)


@pytest.mark.torch
@pytest.mark.parametrize(("num_classes", "has_one"), [(513, False), (514, True)])
def test_the_reference_leaves_the_projection_out_where_sizes_agree(modules, num_classes, has_one):
    net = modules("models").Incremental_ResNet(num_classes, num_classes - 1, "resnet18")
    assert ("fc1.weight" in net.state_dict()) == has_one
