"""The losses against float64 formulas, the reference's numbers, and their laws."""

import itertools
from pathlib import Path

import chex
import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import loss_formulas as formulas
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from compat_jax import losses
from compat_jax.errors import UserError
from compat_jax.mesh import make_mesh

GOLDEN = np.load(Path(__file__).parent / "golden" / "losses.npz")
FORMS = [
    {"same_class": same, "positive_in_denominator": positive}
    for same, positive in itertools.product(losses.SAME_CLASS, [False, True])
]
BATCH, SIZE = 6, 7
FEATURES = hnp.arrays(np.float32, (BATCH, SIZE), elements=st.floats(-4, 4, width=32))
LABELS = hnp.arrays(np.int32, (BATCH,), elements=st.integers(0, SIZE))
quick = hypothesis.settings(max_examples=30, deadline=None)


def example(batch=BATCH, size=SIZE, seed=0):
    """(new, old, labels): features of two versions, labels with repetitions and the last row."""
    rng = np.random.default_rng(seed)
    new, old = rng.normal(size=(2, batch, size)).astype(np.float32)
    labels = rng.integers(0, 3, batch).astype(np.int32)
    labels[-1] = size
    return new, 1.5 * new + old, labels


jit_cross_entropy = jax.jit(losses.simplex_cross_entropy)


@jax.jit
def all_forms(new, old, labels):
    """[4, batch]: the contrast in each of FORMS."""
    return jnp.stack([losses.info_nce(new, old, labels, **form) for form in FORMS])


def assert_close(actual, expected, tolerance=1e-5):
    """Within `tolerance` of the largest entry."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= tolerance * np.abs(expected).max()


class AgainstFormulas(chex.TestCase):
    """Value and gradient, jitted and not."""

    def check(self, loss, formula, example):
        new, *rest = example
        value, gradient = self.variant(
            lambda x: (loss(x, *rest), jax.grad(lambda y: loss(y, *rest).sum())(x))
        )(new)
        assert value.dtype == jnp.float32
        assert_close(value, formula(new.astype(np.float64), *rest))
        assert_close(gradient, formulas.difference_quotient(lambda x: formula(x, *rest).sum(), new))

    @chex.variants(with_jit=True, without_jit=True)
    def test_simplex_cross_entropy(self):
        new, _, labels = example()
        self.check(losses.simplex_cross_entropy, formulas.cross_entropy, (new, labels))

    @chex.variants(with_jit=True, without_jit=True)
    def test_info_nce(self):
        for form in FORMS:
            self.check(
                lambda *a, form=form: losses.info_nce(*a, **form),
                lambda *a, form=form: formulas.info_nce(*a, **form),
                example(),
            )

    @chex.variants(with_jit=True)  # the sum of the two above
    def test_hoc(self):
        options = {"lam": 0.3, "mu": 4.0, "same_class": "as_coded"}
        self.check(
            lambda *a: losses.hoc(*a, **options),
            lambda *a: formulas.hoc(*a, **options),
            example(),
        )

    @chex.variants(with_jit=True, without_jit=True)
    def test_feature_distillation(self):
        new, old, _ = example()
        self.check(losses.feature_distillation, formulas.distillation, (new, old))


# The reference's numbers


def reference_inputs(i):
    """(new, old, labels) of a case; all three come from one stream, seed 0."""
    rng = np.random.default_rng(0)
    for batch, size, classes in [(8, 9, 3), (64, 99, 10), (128, 1023, 100)][: i + 1]:
        new, old = (rng.normal(size=(batch, size)).astype(np.float32) for _ in range(2))
        labels = rng.integers(0, classes, batch)
    return new, old, labels


@pytest.mark.parametrize("i", [0, 1, 2])
def test_info_nce_as_the_reference_codes_it(i):
    if i < 2:
        new, old, labels = (GOLDEN[f"hoc/{i}/{name}"] for name in ("new", "old", "labels"))
        np.testing.assert_array_equal(reference_inputs(i)[0], new)
        expected = GOLDEN[f"hoc/{i}/grad_new"]
    else:  # the reference's own size, drawn again instead of kept
        new, old, labels = reference_inputs(i)
        np.testing.assert_array_equal(new[:1], GOLDEN[f"hoc/{i}/first_new"])
        expected = GOLDEN[f"hoc/{i}/first_grads_new"]
    loss, gradient = jax.jit(
        jax.value_and_grad(lambda x: losses.info_nce(x, old, labels, same_class="as_coded").mean())
    )(new)
    assert loss == pytest.approx(GOLDEN[f"hoc/{i}/loss"], rel=1e-5)
    assert_close(gradient[: len(expected)], expected)


def test_cross_entropy_of_the_reference():
    features, classes = GOLDEN["sce/features"], GOLDEN["sce/labels"]
    loss = jit_cross_entropy(features, features.shape[1] - classes)
    assert loss.mean() == pytest.approx(GOLDEN["sce/loss"], rel=1e-5)


# By hand


def test_zero_feature_is_undecided_between_all_classes():
    loss = jit_cross_entropy(np.zeros((2, 99), np.float32), np.array([0, 99]))
    np.testing.assert_allclose(loss, np.log(100), rtol=1e-6)


# FORMS are: exclude, exclude with the positive, as_coded, as_coded with the positive.


def test_contrast_of_two_orthogonal_images_of_two_classes():
    """Similarities of 10 to itself and 0 to the other; as_coded adds exp(0) for itself."""
    features = 3 * np.eye(2, dtype=np.float32)
    expected = [0 - 10, np.log(1 + np.exp(10)) - 10, np.log(2) - 10, np.log(1 + np.exp(10)) - 10]
    loss = all_forms(features, features, np.array([4, 5], np.int32))
    np.testing.assert_allclose(loss, np.array(expected)[:, None].repeat(2, 1), atol=1e-5)


def test_row_without_a_negative_is_its_positive_part():
    features = 3 * np.eye(2, dtype=np.float32)
    expected = [-10, 0, np.log(2) - 10, np.log(1 + np.exp(10)) - 10]
    loss = all_forms(features, features, np.array([4, 4], np.int32))
    np.testing.assert_allclose(loss, np.array(expected)[:, None].repeat(2, 1), atol=1e-5)


def test_defaults_are_the_papers():
    new, old, labels = example()
    np.testing.assert_array_equal(
        losses.info_nce(new, old, labels),
        losses.info_nce(
            new, old, labels, mu=10.0, same_class="exclude", positive_in_denominator=False
        ),
    )
    np.testing.assert_array_equal(
        losses.hoc(new, old, labels),
        losses.hoc(new, old, labels, lam=0.1, mu=10.0, same_class="exclude"),
    )


def test_distillation_by_hand():
    new = np.array([[2, 0], [0, 1], [-1, 0], [0, 0]], np.float32)
    old = np.array([[1, 0], [1, 0], [1, 0], [1, 0]], np.float32)
    np.testing.assert_allclose(losses.feature_distillation(new, old), [0, 1, 2, 1], atol=1e-6)


def test_distillation_weight():
    assert losses.distillation_weight(15, 10) == pytest.approx(5 * np.sqrt(1.5))
    assert losses.distillation_weight(10, 90) == pytest.approx(5 / 3)
    assert losses.distillation_weight(30, 30, base=2.0) == 2.0
    assert losses.distillation_weight(10, 0) == 0.0


def test_unknown_form_names_the_nearest():
    new, old, labels = example()
    with pytest.raises(UserError, match=r"unknown same_class 'excluded'\. Did you mean 'exclude'"):
        losses.info_nce(new, old, labels, same_class="excluded")
    with pytest.raises(UserError, match="same_class"):
        losses.hoc(new, old, labels, same_class="as-coded")


@pytest.mark.parametrize(
    "shapes",
    [
        ((6, 7), (5, 7), (6,)),
        ((6, 7), (6, 8), (6,)),
        ((6, 7), (6, 7), (6, 1)),
        ((6, 7), (6, 7), (1,)),
    ],
)
def test_shapes_that_do_not_fit(shapes):
    new, old, labels = (np.zeros(shape, np.float32) for shape in shapes)
    with pytest.raises(AssertionError):
        losses.info_nce(new, old, labels.astype(np.int32))


# Edges: always finite


@jax.jit
def every_loss(new, old, labels):
    """[losses, batch], and the gradient of its sum (one NaN in any of them is one in it)."""

    def values(x):
        return jnp.stack(
            [losses.info_nce(x, old, labels, **form) for form in FORMS]
            + [losses.simplex_cross_entropy(x, labels), losses.feature_distillation(x, old)]
        )

    return values(new), jax.grad(lambda x: values(x).sum())(new)


def check_finite(new, old, labels):
    values, gradient = every_loss(new, old, labels)
    assert values.shape == (6, len(new)) and gradient.shape == new.shape
    chex.assert_tree_all_finite((values, gradient))


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-13, 1e-6, 1e8])
def test_finite_for_extreme_features(scale):
    new, old, labels = example()
    new[2] *= np.float32(scale)
    old[3] *= np.float32(scale)
    check_finite(new, old, labels)


def test_finite_for_all_features_zero_and_one_class():
    check_finite(*np.zeros((2, BATCH, SIZE), np.float32), np.zeros(BATCH, np.int32))


def test_finite_for_images_of_one_class():
    new, old, labels = example()
    check_finite(new, old, np.full_like(labels, 2))


def test_finite_for_a_batch_of_one():
    new, old, labels = example(batch=1)
    check_finite(new, old, labels)
    assert losses.info_nce(new, old, labels)[0] == pytest.approx(
        -10 * formulas.unit(old[0]) @ formulas.unit(new[0])
    )


def test_gradient_of_a_zero_feature_is_zero_where_it_is_normalised():
    new, old, labels = example()
    new[2] = 0
    gradient = jit_gradient(new, old, labels)
    np.testing.assert_array_equal(gradient[2], 0)
    assert np.abs(gradient).sum() > 0


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_features_are_widened_first(dtype):
    new, old, labels = example()
    new, old = jnp.asarray(new, dtype), jnp.asarray(old, dtype)
    loss = losses.hoc(new, old, labels)
    assert loss.dtype == jnp.float32
    assert_close(
        loss, formulas.hoc(np.asarray(new, np.float64), np.asarray(old, np.float64), labels)
    )
    assert jax.grad(lambda x: losses.hoc(x, old, labels).sum())(new).dtype == dtype


# Laws


jit_hoc = jax.jit(losses.hoc)
jit_gradient = jax.jit(jax.grad(lambda *a: losses.info_nce(*a).sum()))


def test_nothing_flows_into_the_old_features():
    new, old, labels = example()

    def total(o):
        contrast, mixed = losses.info_nce(new, o, labels), losses.hoc(new, o, labels)
        return jnp.sum(contrast + mixed + losses.feature_distillation(new, o))

    np.testing.assert_array_equal(jax.jit(jax.grad(total))(old), 0)


@quick
@hypothesis.given(FEATURES, FEATURES, LABELS)
def test_contrast_of_any_batch(new, old, labels):
    hypothesis.assume((np.linalg.norm(new, axis=1) > 1e-3).all())
    hypothesis.assume((np.linalg.norm(old, axis=1) > 1e-3).all())
    wide = new.astype(np.float64), old.astype(np.float64)
    expected = [formulas.info_nce(*wide, labels, **form) for form in FORMS]
    np.testing.assert_allclose(all_forms(new, old, labels), expected, atol=2e-5)


@quick
@hypothesis.given(FEATURES, FEATURES, LABELS, st.permutations(range(BATCH)))
def test_order_in_the_batch_does_not_matter(new, old, labels, order):
    order = np.array(order)
    loss = np.asarray(all_forms(new, old, labels))
    shuffled = all_forms(new[order], old[order], labels[order])
    np.testing.assert_allclose(shuffled, loss[:, order], atol=1e-5)


@quick
@hypothesis.given(hnp.arrays(np.float32, (2, BATCH, 1), elements=st.floats(0.125, 64, width=32)))
def test_length_of_a_feature_does_not_matter_to_the_contrast(scales):
    new, old, labels = example()
    scaled = all_forms(scales[0] * new, scales[1] * old, labels)
    np.testing.assert_allclose(scaled, all_forms(new, old, labels), atol=1e-5)


@quick
@hypothesis.given(st.permutations(range(SIZE + 1)))
def test_names_of_the_classes_do_not_matter_to_the_contrast(names):
    new, old, labels = example()
    renamed = np.array(names, np.int32)[labels]
    np.testing.assert_array_equal(all_forms(new, old, renamed), all_forms(new, old, labels))


@quick
@hypothesis.given(FEATURES, LABELS, st.permutations(range(SIZE)))
def test_cross_entropy_knows_no_preferred_axis(features, labels, axes):
    """Permuting the axes permutes all prototypes but the last, and so do the labels."""
    axes = np.array(axes)
    place = np.append(np.argsort(axes), SIZE).astype(np.int32)
    np.testing.assert_allclose(
        jit_cross_entropy(features[:, axes], place[labels]),
        jit_cross_entropy(features, labels),
        atol=1e-5,
    )


@quick
@hypothesis.given(FEATURES, FEATURES, LABELS, st.floats(0, 1, width=32))
def test_hoc_mixes_its_two_terms(new, old, labels, lam):
    mixed = jit_hoc(new, old, labels, lam=np.float32(lam))
    first = jit_cross_entropy(new, labels)
    second = all_forms(new, old, labels)[0]
    np.testing.assert_allclose(mixed, lam * first + (1 - lam) * second, atol=1e-5)


@quick
@hypothesis.given(FEATURES)
def test_no_features_contrast_better_than_the_prototypes(new):
    """One image a class, old features on their prototypes: the contrast's minimum is there too.

    By Jensen, log sum exp(mu s_ij) >= log(K-1) + mu mean s_ij over the K-1 other classes, and the
    prototypes sum to zero; so the mean loss is at least log(K-1) - mu K/(K-1).
    """
    old = formulas.prototypes(BATCH)[:, : BATCH - 1].astype(np.float32)
    least = np.log(BATCH - 1) - 10 * BATCH / (BATCH - 1)
    rows = np.arange(BATCH, dtype=np.int32)
    loss = all_forms(new[:, : BATCH - 1], old, rows)[0]
    assert loss.mean() >= least - 1e-5
    at_rest = all_forms(2 * old, old, rows)[0]
    np.testing.assert_allclose(at_rest, least, atol=1e-5)
    gradient = jit_gradient(2 * old, old, rows)
    np.testing.assert_allclose(gradient, 0, atol=1e-5)


# The learnable head


@jax.jit
@jax.value_and_grad
def head_loss_and_gradient(logits, labels, num_seen):
    return losses.softmax_cross_entropy(logits, labels, num_seen).sum()


@pytest.mark.parametrize("seen", [1, 3, 8])
def test_classes_not_yet_seen_do_not_exist(seen):
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(5, 8)).astype(np.float32), rng.integers(0, seen, 5)
    loss, gradient = head_loss_and_gradient(logits, labels, jnp.int32(seen))
    small = np.exp(logits[:, :seen].astype(np.float64))
    share = small / small.sum(1, keepdims=True)
    np.testing.assert_allclose(loss, -np.log(share[np.arange(5), labels]).sum(), rtol=1e-5)
    expected = np.zeros((5, 8))
    expected[:, :seen] = share - (np.arange(seen) == labels[:, None])
    np.testing.assert_allclose(gradient, expected, atol=1e-6)
    np.testing.assert_array_equal(gradient[:, seen:], 0)


def test_growing_the_head_compiles_nothing():
    chex.clear_trace_counter()
    loss = jax.jit(chex.assert_max_traces(losses.softmax_cross_entropy, n=1))
    logits, labels = jnp.zeros((4, 8)), jnp.zeros(4, jnp.int32)
    for seen in (2, 5, 8):
        np.testing.assert_allclose(loss(logits, labels, jnp.int32(seen)), np.log(seen), rtol=1e-6)


def test_head_in_bfloat16():
    loss = losses.softmax_cross_entropy(
        jnp.array([[1, 3, 100]], jnp.bfloat16), jnp.array([0]), jnp.int32(2)
    )
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, [np.log(1 + np.exp(2))], rtol=1e-6)


# Eight devices


def on_devices(text, *specs):
    mesh = make_mesh(text)
    return [NamedSharding(mesh, PartitionSpec(*spec)) for spec in specs]


def test_cross_entropy_of_features_split_over_devices():
    """K = 65 does not divide over 8 devices; the 64 columns of the features do."""
    features, _, labels = example(batch=8, size=64)
    labels[:2] = 0, 63
    both = jax.value_and_grad(lambda x, y: losses.simplex_cross_entropy(x, y).mean())
    loss, gradient = jax.jit(both)(features, labels)
    columns, everywhere = on_devices("data:1,model:8", (None, "model"), ())
    split = jax.jit(both, in_shardings=(columns, everywhere), out_shardings=(everywhere, columns))
    split_loss, split_gradient = split(features, labels)
    assert split_gradient.sharding.shard_shape((8, 64)) == (8, 8)
    np.testing.assert_allclose(split_loss, loss, rtol=1e-6)
    assert_close(split_gradient, gradient, 1e-6)
    assert "all-gather" not in split.lower(features, labels).compile().as_text()


def test_contrast_of_a_batch_split_over_devices_sees_all_of_it():
    new, old, labels = example(batch=16)
    both = jax.value_and_grad(lambda n, o, y: losses.hoc(n, o, y).mean())
    loss, gradient = jax.jit(both)(new, old, labels)
    rows, everywhere = on_devices("data:8", ("data",), ())
    split_loss, split_gradient = jax.jit(
        both, in_shardings=(rows, rows, rows), out_shardings=(everywhere, rows)
    )(new, old, labels)
    np.testing.assert_allclose(split_loss, loss, rtol=1e-6)
    assert_close(split_gradient, gradient, 1e-6)
