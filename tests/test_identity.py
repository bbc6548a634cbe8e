"""Settings that JSON cannot hold are told apart in records, working folders and caches."""

import enum
import functools
import itertools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

import compat_jax as cj
from compat_jax.chain import Chain
from compat_jax.errors import UserError
from compat_jax.identity import Nameless, as_json, fingerprint
from compat_jax.models import as_backbone

OPTIMIZERS = """[
    optax.sgd(0.1), optax.sgd(0.2), optax.sgd(0.1, momentum=0.9), optax.adam(0.1), optax.amsgrad(0.1),
    optax.sgd(optax.cosine_decay_schedule(0.1, 100)), optax.sgd(optax.cosine_decay_schedule(0.1, 200)),
    optax.sgd(lambda step: 0.1 * 0.9**step), optax.sgd(lambda step: 0.1 * 0.8**step),
    optax.chain(optax.clip(1.0), optax.adam(0.1)), optax.chain(optax.clip(2.0), optax.adam(0.1)),
    optax.MultiSteps(optax.sgd(0.1), 4), optax.masked(optax.adam(0.1), {"a": True}),
]"""
DATA = tiny.dataset(classes=2)


class Net(nn.Module):
    """One layer and a function of the user's choice."""

    width: int = 8
    act: Callable = nn.relu
    init: Callable = nn.initializers.lecun_normal()
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, images, train=False):
        """float[batch, h, w, c] -> float[batch, width]."""
        pixels = images.reshape(len(images), -1)
        return self.act(nn.Dense(self.width, dtype=self.dtype, kernel_init=self.init)(pixels))


class Colour(enum.Enum):
    """Members to choose from."""

    RED, BLUE = 1, 2


def trained(folder, **changes):
    tasks = cj.Tasks(initial=2, increment=2, rehearsal=4)
    return tiny.train(tiny.run(tasks=tasks, epochs=1, **changes), folder, DATA)


def test_optimisers_differ_where_their_numbers_or_functions_do_and_are_the_same_in_every_process():
    made = [eval(OPTIMIZERS, {"optax": optax}) for _ in range(2)]
    found, again = ([fingerprint(one) for one in some] for some in made)
    assert found == again and len(set(found)) == len(found)
    code = f"import optax\nfrom compat_jax.identity import fingerprint\nfor o in {OPTIMIZERS}:\n"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}    print(fingerprint(o))"],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[1],
    )
    assert done.stdout.split() == found


def test_values_that_json_cannot_hold_have_names_that_differ():
    values = [
        *(nn.relu, nn.tanh, np.mean, nn.Dense, jnp.float32, jnp.bfloat16, np.dtype("int8")),
        *(functools.partial(nn.gelu, approximate=a) for a in (True, False)),
        *(nn.Dense(3), nn.Dense(4), nn.Dense(3, kernel_init=nn.initializers.zeros_init())),
        *(nn.initializers.he_normal(), nn.initializers.variance_scaling(3.0, "fan_in", "normal")),
        *(np.zeros(3), np.ones(3), np.zeros((3, 1)), np.zeros(3, np.float32)),
        *(Colour.RED, Colour.BLUE, np.float32(0.1), float("inf"), [nn.relu], {"act": nn.relu}),
    ]
    found = [as_json(value) for value in values]
    for a, b in itertools.combinations(found, 2):
        assert a != b, (a, b)
    assert as_json(nn.relu) == {"object": "jax:relu"}
    assert as_json({"a": (1, "b", None)}) == {"a": [1, "b", None]}
    for nameless in (lambda x: x, object()):
        with pytest.raises(Nameless):
            as_json(nameless)


def test_a_backbone_is_recorded_with_the_functions_that_are_not_its_defaults():
    assert as_backbone(Net()).arguments == {"width": 8}
    assert as_backbone(Net(act=nn.relu, dtype=jnp.bfloat16)).arguments == {"width": 8}
    assert as_backbone(Net(act=nn.tanh)).arguments == {"width": 8, "act": {"object": "jax:tanh"}}
    assert as_backbone(Net(np.int64(5))).arguments == {"width": 5}
    with pytest.raises(UserError, match=r"cannot name act=<function .*: give a") as refused:
        as_backbone(Net(act=lambda x: x))
    assert refused.value.argument == "backbone"


def test_another_function_is_another_run_another_version_and_another_cache(tmp_path):
    chain = trained(tmp_path / "run", backbone=Net(act=nn.tanh))
    with pytest.raises(UserError, match="backbone"):
        trained(tmp_path / "run", backbone=Net())
    with pytest.raises(UserError, match="backbone"):
        trained(tmp_path / "run", backbone=Net(act=nn.relu6))
    path = chain.path
    for other in (Net(), Net(act=nn.relu6)):
        with pytest.raises(UserError, match=r"it was trained with the backbone .*jax:tanh"):
            Chain(path, backbone=other)[0].embed(DATA.images[:2])
    with pytest.raises(UserError, match=r"act of backbone .* was jax:tanh, .*hand in the object"):
        Chain(path, backbone=f"{__name__}:Net")[0].embed(DATA.images[:2])
    again = Chain(path, backbone=Net(act=nn.tanh))
    np.testing.assert_array_equal(again[0].embed(DATA.images), chain[0].embed(DATA.images))


SCALE = 2.0


def scaled(inputs):
    return SCALE * inputs.cross_entropy()


class Weighted:
    """A loss with a number of its own."""

    def __init__(self, weight):
        self.weight = weight

    def __call__(self, inputs):
        return self.weight * inputs.cross_entropy()


def mine(loss, **changes):
    return cj.Method("mine", loss, **changes)


def losses():
    """Losses of which no two are alike, made anew."""

    def closed(weight):
        return lambda inputs: weight * inputs.cross_entropy()

    def inner(inputs):
        def half(values):
            return values / 2

        return half(inputs.cross_entropy())

    return [
        *(closed(weight) for weight in (1.0, 2.0)),
        *(lambda i: i.cross_entropy() + 1, lambda i: i.cross_entropy() - 1),
        *(lambda i: i.outputs.logits[:, 0], lambda i: i.outputs.logits[:, 1]),
        *(scaled, inner, Weighted(1.0), Weighted(2.0), functools.partial(Weighted(1.0))),
    ]


def test_methods_of_ones_own_differ_where_their_functions_do(monkeypatch):
    found, again = ([mine(loss).describe() for loss in losses()] for _ in range(2))
    assert found == again and len({each["functions"] for each in found}) == len(found)
    assert mine(scaled, all_data=True).describe() != mine(scaled).describe()
    before = mine(scaled).describe()
    monkeypatch.setattr(sys.modules[__name__], "SCALE", 3.0)
    assert mine(scaled).describe() != before


def test_methods_of_the_library_are_what_their_names_and_numbers_say():
    for name in cj.methods.names():
        assert cj.methods.get(name).describe().keys() == {
            "name",
            *cj.methods.get(name).arguments,
        }


def test_another_loss_under_the_same_name_is_another_run(tmp_path):
    one, two = (mine(loss) for loss in losses()[:2])
    chain = trained(tmp_path / "run", method=one)
    assert trained(tmp_path / "run", method=mine(losses()[0]))[-1].sha256 == chain[-1].sha256
    with pytest.raises(UserError, match=r"method\.functions was [0-9a-f]{16}, now "):
        trained(tmp_path / "run", method=two)
