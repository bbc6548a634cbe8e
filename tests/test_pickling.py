"""Versions, indexes, methods and runs in other processes: what pickles, and how."""

import copy
import multiprocessing
import pickle
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
import tiny

import compat_jax as cj
from compat_jax import methods
from compat_jax.errors import UserError

PICTURES = tiny.dataset(classes=2, per_class=3).images


def embedded(version):
    """Embed; in the other process, this module is imported and with it the backbone."""
    return version.embed(PICTURES)


def used(index, run):
    """Return the answers of an index, and the method of a run."""
    return index.search(index.version, PICTURES, k=2), run.method is methods.hoc(mu=3.0)


@pytest.fixture(scope="module")
def other_process():
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        yield lambda function, *given: pool.submit(function, *given).result(timeout=300)


@pytest.fixture(scope="module")
def version(tmp_path_factory):
    """A version of a chain that has embedded."""
    chain = cj.Chain(tmp_path_factory.mktemp("pickling") / "chain")
    record = tiny.record()
    chain.add(tiny.variables(record), record)
    opened = chain[0]
    opened.embed(PICTURES)
    return opened


def test_a_version_that_has_embedded_embeds_to_the_same_bits_elsewhere(version, other_process):
    np.testing.assert_array_equal(other_process(embedded, version), version.embed(PICTURES))


def test_an_index_and_a_run_go_along(version, other_process):
    index, run = cj.Index(version, PICTURES), tiny.run(methods.hoc(mu=3.0))
    want = index.search(version, PICTURES, k=2)
    (scores, rows), is_own = other_process(used, index, run)
    np.testing.assert_array_equal(scores, want[0])
    np.testing.assert_array_equal(rows, want[1])
    assert is_own


def test_a_copy_of_a_version_makes_ready_what_it_needs_itself(version):
    for made in (copy.copy(version), copy.deepcopy(version), pickle.loads(pickle.dumps(version))):
        assert (made.sha256, made.record) == (version.sha256, version.record)
        assert made.home == version.home and not made._ready
        np.testing.assert_array_equal(made.embed(PICTURES), version.embed(PICTURES))
    assert version._ready


@pytest.mark.parametrize("name", methods.names())
def test_a_registered_method_is_pickled_by_its_name_and_numbers(name):
    method = methods.get(name)
    assert pickle.loads(pickle.dumps(method)) is copy.deepcopy(method) is method
    assert len(pickle.dumps(method)) < 500


def loss_of_ones_own(inputs):
    """A loss that a module has, so that it pickles."""
    return inputs.cross_entropy()


def test_a_method_of_ones_own_pickles_as_its_functions_allow():
    mine = cj.Method("mine", loss_of_ones_own)
    again = pickle.loads(pickle.dumps(mine))
    assert again.loss is loss_of_ones_own and again.name == "mine"
    with pytest.raises((AttributeError, pickle.PicklingError), match="local object"):
        pickle.dumps(cj.Method("mine", lambda inputs: inputs.cross_entropy()))


def test_a_method_that_only_has_the_name_of_a_registered_one_is_not_taken_for_it():
    mine = cj.Method("hoc", loss_of_ones_own)
    assert pickle.loads(pickle.dumps(mine)).loss is loss_of_ones_own
    strange = cj.Method("hoc", loss_of_ones_own, arguments={"power": 2})
    assert pickle.loads(pickle.dumps(strange)).arguments == {"power": 2}


def test_numbers_of_a_method_may_be_given_by_place():
    assert methods.hoc(0.2, mu=3.0) is methods.hoc(lam=0.2, mu=3.0)
    with pytest.raises(TypeError, match="too many positional arguments"):
        methods.hoc(0.2, 3.0, "exclude", 4)
    with pytest.raises(TypeError, match="lam"):
        methods.hoc(0.2, lam=0.3)
    with pytest.raises(UserError, match=r"hoc\.lam must be at least 0"):
        methods.hoc(-1.0)
