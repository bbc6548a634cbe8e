"""Rival methods: float64 formulas, the property that tells each, and a tiny sequence of each.

Fixtures: two versions' features of eight images of five classes, an old head that learnt three.
"""

import functools
import inspect
import json
import math
from pathlib import Path

import drawn_photos
import flat  # noqa: F401, registers the backbone
import jax
import jax.numpy as jnp
import loss_formulas as formulas
import numpy as np
import pytest
import tiny

import compat_jax as cj
from compat_jax import afterwards, align, losses, methods, simplex
from compat_jax import config as configs
from compat_jax.data.photos import Photos
from compat_jax.errors import UserError
from compat_jax.fields import describe
from compat_jax.methods import FixedSimplex, GrowingClassifier, LossInputs, TaskStart
from compat_jax.methods.feature_alignment import DISTANCES, feature_distance
from compat_jax.methods.feature_mixing import chosen_rows
from compat_jax.methods.hot_refresh_contrast import contrast
from compat_jax.methods.learning_without_forgetting import distillation
from compat_jax.methods.less_forget import less_forget_weight, margin_ranking
from compat_jax.methods.old_classifier import influence, old_head
from compat_jax.methods.prototype_refinement import refine
from compat_jax.models import Outputs
from compat_jax.training.run import make_trainer
from compat_jax.training.task import sequence_task
from configs import iamcl2r

BATCH, SIZE, CLASSES, NUM_OLD = 8, 6, 5, 3
RNG = np.random.default_rng(0)
NEW = RNG.normal(size=(BATCH, SIZE)).astype(np.float32)
OLD = (NEW + RNG.normal(size=NEW.shape)).astype(np.float32)
HEAD, OWN_HEAD = RNG.normal(size=(2, SIZE, CLASSES)).astype(np.float32)
LABELS = np.array([0, 1, 2, 0, 3, 4, 3, 0], np.int32)
MEANS = RNG.normal(size=(CLASSES, SIZE)).astype(np.float32)
UNIT_OLD = OLD / np.linalg.norm(OLD, axis=1, keepdims=True)
RIVALS = (
    "align",
    "bct",
    "cores",
    "hot_refresh",
    "independent",
    "lucir",
    "lwf",
    "mixbct",
    "unibct",
)
FIXED, ANEW = ("cores",), ("cores", "independent")


def start(**changes) -> TaskStart:
    """The start of a task that adds classes 3 and 4."""
    fields = {
        "variables": {"params": {"head": {"kernel": HEAD}}},
        "num_old": NUM_OLD,
        "num_seen": CLASSES,
        "mean_features": lambda: MEANS,
        "num_known": NUM_OLD,
    }
    return TaskStart(**{**fields, **changes})


def forward(variables):
    """The previous model's outputs; here always the same."""
    del variables
    return Outputs(jnp.asarray(OLD), None)


def inputs_of(method, features, classifier=OWN_HEAD, *, frozen=None, carried=None) -> LossInputs:
    """The inputs of the method's loss for the batch."""
    frozen = jax.tree.map(jnp.asarray, method.freeze(start()) if frozen is None else frozen)
    variables = {"params": {"head": {"kernel": jnp.asarray(classifier)}}}
    taught = method.teach(forward, frozen, method.init(variables) if carried is None else carried)
    return LossInputs(
        Outputs(features, features @ classifier),
        taught,
        frozen,
        classes=jnp.asarray(LABELS),
        targets=jnp.asarray(LABELS),
        num_seen=jnp.int32(CLASSES),
        head=GrowingClassifier(CLASSES),
        classifier=classifier,
    )


def loss_of(method, begins, carried=None):
    """The loss of each image."""
    inputs = inputs_of(method, jnp.asarray(NEW), frozen=method.freeze(begins), carried=carried)
    return method.losses(inputs)[0]


# Formulas in float64, one image at a time


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def plain_ce(logits, labels=LABELS):
    return np.array([-np.log(softmax(row)[c]) for row, c in zip(logits, labels, strict=True)])


def own_ce(features):
    return plain_ce(features.astype(np.float64) @ OWN_HEAD)


def synthesised():
    """The old head with columns of the mean learnt length for the classes that it lacks."""
    head = HEAD.astype(np.float64).copy()
    length = np.mean([np.linalg.norm(HEAD[:, c].astype(np.float64)) for c in range(NUM_OLD)])
    for c in range(NUM_OLD, CLASSES):
        head[:, c] = length * formulas.unit(MEANS[c].astype(np.float64))
    return head


def bct_formula(new):
    return own_ce(new) + plain_ce(new.astype(np.float64) @ synthesised())


def align_formula(new, kind="l2", weight=10.0, threshold=0.0):
    found = []
    for n, o in zip(new.astype(np.float64), OLD.astype(np.float64), strict=True):
        n, o = formulas.unit(n), formulas.unit(o)
        away = {
            "l2": np.linalg.norm(n - o),
            "mean_square": (2 - 2 * n @ o) / SIZE,
            "cosine": 1 - n @ o,
        }[kind]
        found.append(max(away - threshold, 0.0))
    return own_ce(new) + weight * np.array(found)


def lwf_formula(new, temperature=2.0, weight=1.0):
    found = []
    for n, o in zip(new.astype(np.float64), OLD.astype(np.float64), strict=True):
        old, fresh = (softmax(x @ HEAD[:, :NUM_OLD] / temperature) for x in (o, n))
        found.append(-np.sum(old * np.log(fresh)))
    return own_ce(new) + weight * np.array(found)


def lucir_formula(new):
    found = own_ce(new) + 5.0 * math.sqrt(3 / 2) * formulas.distillation(new, OLD)
    for i, n in enumerate(new.astype(np.float64)):
        if LABELS[i] >= NUM_OLD:
            continue
        cosines = [formulas.unit(n) @ formulas.unit(OWN_HEAD[:, c]) for c in range(CLASSES)]
        nearest = sorted(cosines[NUM_OLD:], reverse=True)[:2]
        found[i] += sum(max(0.5 - cosines[LABELS[i]] + c, 0.0) for c in nearest)
    return found


def contrast_formula(new, temperature=0.01, hardest=10, ract=True):
    n, o = (np.array([formulas.unit(r) for r in x.astype(np.float64)]) for x in (new, OLD))
    found = []
    for i in range(BATCH):
        other = [j for j in range(BATCH) if LABELS[j] != LABELS[i]]
        terms = [n[i] @ o[i]]
        for x in (o, n) if ract else (o,):
            terms += sorted((n[i] @ x[j] for j in other), reverse=True)[: hardest or None]
        terms = np.array(terms) / temperature
        found.append(np.log(np.exp(terms - terms.max()).sum()) + terms.max() - terms[0])
    return np.array(found)


def unibct_formula(new):
    units = np.array([formulas.unit(m.astype(np.float64)) for m in MEANS])
    return own_ce(new) + plain_ce(new.astype(np.float64) @ units.T)


def mixed_rows(share=0.3, credible=0.9):
    """Rows whose old feature replaces the new one: evenly among those near their class mean."""
    away = formulas.distillation(OLD.astype(np.float64), MEANS[LABELS].astype(np.float64))
    kept = max(round(credible * BATCH), 1)
    rows = np.sort(np.argsort(away, kind="stable")[:kept])
    wanted = min(math.floor(share * BATCH), kept)
    return [r for p, r in enumerate(rows, 1) if p * wanted // kept > (p - 1) * wanted // kept]


def mixbct_formula(new, share=0.3):
    mixed, rows = new.astype(np.float64).copy(), mixed_rows(share)
    mixed[rows] = OLD[rows]
    return plain_ce(mixed @ OWN_HEAD)


# Method with its numbers -> the loss of each image.
VALUES = {
    "independent": (methods.independent(), own_ce),
    "bct": (methods.bct(), bct_formula),
    "align": (methods.align(), align_formula),
    "align mean square": (
        methods.align(distance="mean_square", weight=1.0),
        functools.partial(align_formula, kind="mean_square", weight=1.0),
    ),
    "align cosine": (
        methods.align(distance="cosine", threshold=0.2),
        functools.partial(align_formula, kind="cosine", threshold=0.2),
    ),
    "lwf": (methods.lwf(), lwf_formula),
    "lwf cold": (
        methods.lwf(temperature=0.5, weight=2.0),
        functools.partial(lwf_formula, temperature=0.5, weight=2.0),
    ),
    "lucir": (methods.lucir(), lucir_formula),
    "hot_refresh": (methods.hot_refresh(), lambda new: own_ce(new) + contrast_formula(new)),
    "hot_refresh plain": (
        methods.hot_refresh(form="plain", temperature=0.1, hardest=2, weight=3.0),
        lambda new: own_ce(new) + 3 * contrast_formula(new, 0.1, 2, ract=False),
    ),
    "unibct": (methods.unibct(warm_up=0), unibct_formula),
    "mixbct": (methods.mixbct(), mixbct_formula),
    "mixbct half": (methods.mixbct(share=0.5), functools.partial(mixbct_formula, share=0.5)),
}


@functools.cache
def program(case):
    """(features, classifier, frozen) -> loss and terms of each image, gradients of the mean loss."""
    method, _ = VALUES[case]

    def mean(features, classifier, frozen):
        loss, terms = method.losses(inputs_of(method, features, classifier, frozen=frozen))
        return loss.mean(), (loss, terms)

    differentiated = jax.jit(jax.grad(mean, argnums=(0, 1), has_aux=True))

    def run(features=NEW, begins=None):
        grads, (loss, terms) = differentiated(features, OWN_HEAD, method.freeze(begins or start()))
        return loss, terms, grads

    return run


@pytest.mark.parametrize("case", VALUES)
def test_a_loss_and_its_gradient_are_those_of_the_formula(case):
    method, formula = VALUES[case]
    loss, terms, (grad, _) = program(case)()
    assert set(terms) == set(method.terms) and loss.shape == (BATCH,)
    np.testing.assert_allclose(loss, formula(NEW), rtol=2e-5, atol=1e-5)
    if terms:
        np.testing.assert_allclose(terms["cross_entropy"], own_ce(NEW), rtol=1e-5)
    expected = formulas.difference_quotient(lambda new: formula(new).mean(), NEW)
    np.testing.assert_allclose(grad, expected, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("case", VALUES)
def test_losses_and_gradients_are_finite_also_for_zero_features(case):
    for features in (0 * NEW, 1e-20 * NEW, 1e4 * NEW, OLD):  # the last as when a task begins
        features = features.astype(np.float32)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(program(case)(features)))


@pytest.mark.parametrize("case", VALUES)
def test_before_there_is_an_old_model_cross_entropy_is_all(case):
    loss, _, _ = program(case)(begins=start(num_old=0, num_known=0))
    np.testing.assert_allclose(loss, own_ce(NEW), rtol=1e-5)


# What tells each method


def test_bct_on_a_fixed_simplex_is_the_simplex_cross_entropy():
    labels = np.array([0, 3, 6, 2], np.int32)
    features = np.random.default_rng(1).normal(size=(4, 6)).astype(np.float32)
    head = FixedSimplex(7)
    rows = head.targets(jnp.arange(7, dtype=np.int32))
    old = simplex.prototypes(7)[rows].T  # a head that never changes, a column for each class

    def by_old_head(x):
        return influence(x, old, jnp.asarray(labels), num_seen=jnp.int32(7)).sum()

    def by_simplex(x):
        return losses.simplex_cross_entropy(x, head.targets(jnp.asarray(labels))).sum()

    found = (jax.jit(jax.value_and_grad(f))(features) for f in (by_old_head, by_simplex))
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_bct_leaves_the_old_head_alone_and_equals_the_old_models_loss_on_old_features():
    named = {"classes": jnp.asarray(LABELS), "num_seen": jnp.int32(CLASSES)}
    judged = jax.jit(functools.partial(influence, **named))
    assert not np.any(jax.jit(jax.grad(lambda head: judged(NEW, head).sum()))(HEAD))
    found = judged(OLD, HEAD)
    np.testing.assert_allclose(found, plain_ce(OLD.astype(np.float64) @ HEAD), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("known", [0, NUM_OLD, CLASSES])
def test_an_old_head_keeps_what_was_learnt_and_makes_the_rest_of_class_means(known):
    def means():
        assert known < CLASSES  # not computed where nothing lacks
        return MEANS

    found = old_head(start(num_known=known, mean_features=means))
    np.testing.assert_array_equal(found[:, :known], HEAD[:, :known])
    made = found[:, known:]
    units = (MEANS / np.linalg.norm(MEANS, axis=1, keepdims=True))[known:].T
    length = np.linalg.norm(HEAD[:, :known], axis=0).mean() if known else 1.0
    np.testing.assert_allclose(made, length * units, atol=1e-6)
    early = old_head(start(num_seen=4, num_known=known))
    assert early.shape == HEAD.shape and (known == CLASSES or not early[:, 4:].any())


@pytest.mark.parametrize("kind", DISTANCES)
def test_alignment_sees_directions_only_and_rests_within_its_threshold(kind):
    distance = jax.jit(functools.partial(feature_distance, kind=kind))
    found = distance(NEW, OLD)
    np.testing.assert_allclose(distance(7 * NEW, 0.1 * OLD), found, rtol=1e-5)
    np.testing.assert_allclose(distance(3 * OLD, OLD), np.zeros(BATCH), atol=1e-6)
    cosines = np.sum(UNIT_OLD * NEW, axis=1) / np.linalg.norm(NEW, axis=1)
    square = (2 - 2 * cosines) / SIZE
    expected = {"l2": np.sqrt(SIZE * square), "mean_square": square, "cosine": 1 - cosines}[kind]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    threshold = float(np.median(expected))
    beyond = functools.partial(feature_distance, kind=kind, threshold=threshold)
    grad = jax.jit(jax.grad(lambda x: beyond(x, OLD).sum()))(NEW)
    moves = np.any(np.asarray(grad) != 0, axis=1)
    np.testing.assert_array_equal(moves, expected > threshold)
    with pytest.raises(UserError, match="unknown distance 'l3'"):
        feature_distance(NEW, OLD, kind="l3")


def test_lwf_rests_where_both_agree_and_adds_nothing_without_old_classes():
    new, old = NEW @ HEAD, OLD @ HEAD
    found = jax.jit(functools.partial(distillation, num_old=jnp.int32(NUM_OLD)))
    shares = np.array([softmax(row[:NUM_OLD] / 2) for row in old.astype(np.float64)])
    entropy = -np.sum(shares * np.log(shares), axis=1)
    np.testing.assert_allclose(found(old, old), entropy, rtol=1e-5)
    assert np.all(found(new, old) >= entropy - 1e-6)
    grad = jax.jit(jax.grad(lambda x: found(x, old).sum()))
    np.testing.assert_allclose(grad(old), np.zeros_like(old), atol=1e-6)
    np.testing.assert_allclose(found(new, old + 5), found(new, old), rtol=1e-4)
    assert not np.any(distillation(new, old, num_old=jnp.int32(0)))


def test_lucirs_weight_grows_with_the_share_of_old_classes():
    assert less_forget_weight(5, 20) == 10.0 and less_forget_weight(15, 0) == 0.0
    assert less_forget_weight(4, 4, base=10.0) == 10.0
    for old, new in ((10, 15), (40, 15), (70, 3)):  # d-Simplex-FD's goes the other way
        product = less_forget_weight(new, old) * losses.distillation_weight(new, old)
        assert product == pytest.approx(25.0)
    frozen = methods.lucir().freeze(start(num_old=8, num_seen=10))
    assert frozen["weight"] == pytest.approx(10.0)


def test_margin_ranking_costs_nothing_where_old_classes_are_far_from_new_ones():
    head = np.eye(SIZE, CLASSES, dtype=np.float32)
    features = head.T[LABELS]  # each on its own class's axis: cosine 1, others 0
    where = {"num_old": jnp.int32(NUM_OLD), "num_seen": jnp.int32(CLASSES)}
    assert not np.any(margin_ranking(features, head, LABELS, **where))
    moved = head.T[(LABELS + 3) % CLASSES]  # classes 0 and 1 on the new axes 3 and 4
    found = margin_ranking(moved, head, LABELS, **where)
    expected = np.select([LABELS < 2, LABELS == 2], [2.0, 1.0], 0.0)  # .5+1 and .5; .5 and .5
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_hot_refreshs_contrast_with_all_negatives_is_info_nce_with_the_positive():
    plain = functools.partial(contrast, hardest=0, new_negatives=False)
    # Its anchors are the new features; those of info_nce are the old ones.
    expected = losses.info_nce(OLD, NEW, LABELS, mu=100.0, positive_in_denominator=True)
    np.testing.assert_allclose(plain(NEW, OLD, LABELS), expected, rtol=1e-6, atol=1e-5)
    exchanged = losses.info_nce(NEW, OLD, LABELS, mu=100.0, positive_in_denominator=True)
    np.testing.assert_allclose(plain(OLD, NEW, LABELS), exchanged, rtol=1e-6, atol=1e-5)


def test_more_negatives_never_lower_the_contrast():
    values = [
        contrast(NEW, OLD, LABELS, hardest=hardest, new_negatives=both, temperature=0.2)
        for hardest, both in ((1, False), (3, False), (0, False), (0, True))
    ]
    for fewer, more in zip(values, values[1:]):  # noqa: B905, RUF007
        assert np.all(more >= fewer - 1e-6)
    assert not np.any(contrast(NEW, OLD, np.zeros(BATCH, int)))  # one class: no negative


def refine_formula(new, old, smoothing=0.9, temperature=0.05):
    result = np.array(old, np.float64)
    for c in set(LABELS.tolist()):
        rows = np.flatnonzero(c == LABELS)
        if len(rows) < 2:
            continue
        n = np.array([formulas.unit(x) for x in new[rows].astype(np.float64)])
        scores = np.exp((n @ n.T - 1) / temperature)
        np.fill_diagonal(scores, 0)
        edges = scores / scores.sum(1, keepdims=True)
        inverse = np.linalg.inv(np.eye(len(rows)) - smoothing * edges)
        result[rows] = (1 - smoothing) * inverse @ old[rows]
    return result


def test_refinement_is_the_closed_form_and_moves_old_features_within_their_class():
    found = refine(NEW, OLD, LABELS)
    np.testing.assert_allclose(found, refine_formula(NEW, OLD), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(refine(NEW, OLD, LABELS, smoothing=0.0), OLD, atol=1e-6)
    alone = [1, 2, 5]  # images of classes 1, 2 and 4
    np.testing.assert_allclose(found[jnp.asarray(alone)], OLD[alone], rtol=1e-5, atol=1e-5)
    same = np.repeat(OLD[:1], BATCH, 0)  # equal features are a fixed point
    np.testing.assert_allclose(refine(NEW, same, LABELS), same, rtol=1e-4, atol=1e-5)


def test_unibct_waits_for_its_warm_up_and_without_refinement_is_bct_with_a_head_of_means():
    method = methods.unibct(smoothing=0.0, warm_up=2)
    begins = start(steps_per_epoch=3)
    for step, begun in ((0, False), (5, False), (6, True)):
        carried = {"prototypes": jnp.asarray(MEANS), "step": jnp.int32(step)}
        loss, plain = loss_of(method, begins, carried), loss_of(methods.bct(), start(num_known=0))
        np.testing.assert_allclose(loss, plain if begun else own_ce(NEW), rtol=1e-5)
    inputs = inputs_of(method, jnp.asarray(NEW), frozen=method.freeze(begins))
    carried = method.update(method.init({"params": {"head": {"kernel": HEAD}}}), {}, inputs)
    np.testing.assert_array_equal(carried["prototypes"], MEANS)


def test_unibcts_prototypes_move_to_the_refined_means_of_classes_in_the_batch():
    method = methods.unibct(momentum=0.75)
    inputs = inputs_of(method, jnp.asarray(NEW))._replace(classes=jnp.asarray(LABELS % 4))
    carried = method.init({"params": {"head": {"kernel": jnp.asarray(HEAD)}}})
    found = method.update(carried, {}, inputs)
    assert int(found["step"]) == 1
    refined = np.asarray(refine(NEW, OLD, LABELS % 4))
    for c in range(4):
        expected = 0.75 * MEANS[c] + 0.25 * refined[c == LABELS % 4].mean(0)
        np.testing.assert_allclose(found["prototypes"][c], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(found["prototypes"][4], MEANS[4])


def test_mixbcts_replaced_rows_teach_the_head_and_not_the_backbone():
    _, _, (of_features, of_head) = program("mixbct half")()
    rows = mixed_rows(0.5)
    assert len(rows) == 4
    np.testing.assert_array_equal(
        np.any(np.asarray(of_features) != 0, axis=1), ~np.isin(range(8), rows)
    )
    mixed = NEW.copy()
    mixed[rows] = OLD[rows]
    expected = jax.grad(lambda w: losses.softmax_cross_entropy(mixed @ w, LABELS, CLASSES).mean())
    np.testing.assert_allclose(of_head, expected(jnp.asarray(OWN_HEAD)), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("share", [0.0, 0.25, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("credible", [0.5, 0.9, 1.0])
def test_as_many_rows_are_mixed_as_the_share_says_all_of_them_credible(share, credible):
    means = MEANS[LABELS]
    found = np.asarray(chosen_rows(OLD, means, share=jnp.float32(share), credible=credible))
    np.testing.assert_array_equal(np.flatnonzero(found), mixed_rows(share, credible))
    far = np.argsort(formulas.distillation(OLD, means))[round(credible * BATCH) :]
    assert not found[far].any()


# Sequences

DATA = tiny.dataset(classes=4)


def tiny_run(name, **changes):
    numbers = {"unibct": {"warm_up": 1}, "hot_refresh": {"temperature": 0.5}}
    made = methods.get(name, numbers.get(name, {}))
    return tiny.run(made, backbone="flat", **changes)


# One of each kind of start; the others with -m slow.
SEQUENCES = [
    pytest.param(name, marks=() if name in ("bct", "cores") else pytest.mark.slow)
    for name in RIVALS
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """name -> chain and log of two tasks; from one model, but where each task starts anew."""

    @functools.cache
    def made(name):
        folder = tmp_path_factory.mktemp(name)
        replacements = {} if name in ANEW else {0: tiny.start_of(name, backbone="flat")}
        chain = tiny.train(tiny_run(name), folder, DATA, replacements=replacements, log_every=10**6)
        return chain, [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]

    return made


@pytest.mark.parametrize("name", SEQUENCES)
def test_a_rival_trains_a_sequence(trained, name):
    chain, log = trained(name)
    method = methods.get(name)
    records = [chain.record(number) for number in chain.numbers()]
    assert [r.method for r in records] == [name] * 2
    assert [r.classes_seen for r in records] == [2, 4]
    assert [r.head_classes for r in records] == ([None] * 2 if name in FIXED else [2, 4])
    assert method.fixed_simplex == (name in FIXED) and method.title and method.source
    for line in log:
        assert np.isfinite(line["loss"]) and set(line["terms"]) == set(method.terms)
    leaves = jax.tree.leaves(chain.open(1).variables)
    assert all(np.isfinite(leaf).all() for leaf in leaves)
    # Those that start anew learn all images of the classes seen: 64 in place of 32 + 8.
    assert [(line["task"], line["step"]) for line in log][-1] == (1, 8 if name in ANEW else 4)
    assert [r.parent for r in records] == [None, None if name in ANEW else 0]
    assert [r.replaced_by is None for r in records] == [name in ANEW, True]


@pytest.mark.parametrize("name", [p for p in SEQUENCES if p.values[0] not in (*ANEW, "mixbct")])
def test_a_term_for_the_old_model_counts_from_the_second_task_on(trained, name):
    _, log = trained(name)
    for line in log:
        extra = line["loss"] - line["terms"]["cross_entropy"]
        waits = name == "unibct" and line["epoch"] == 0
        if line["task"] == 0 or waits:
            assert extra == pytest.approx(0.0, abs=1e-5)
        else:
            assert extra > 1e-3


@pytest.mark.parametrize("name", ANEW)
def test_a_method_that_starts_anew_draws_other_weights_and_learns_every_image(trained, name):
    versions = list(trained(name)[0])
    kernels = [v.variables["params"]["backbone"]["Dense_0"]["kernel"].ravel() for v in versions]
    assert abs(np.corrcoef(*kernels)[0, 1]) < 0.3
    run = tiny_run(name)
    sequence = run.tasks.sequence(4)
    task = sequence_task(run, sequence, 1, DATA.labels, start=None, replaced=False)
    for epoch in np.split(task.plan, 2):
        assert sorted(epoch.ravel().tolist()) == list(range(64))


def test_independent_models_start_from_the_model_of_their_generation(tmp_path, monkeypatch):
    model, seen = tiny.start_of("er", seed=1, backbone="flat"), []
    module = inspect.getmodule(tiny.train_run)
    original = module.sequence_task

    def watched(run, sequence, index, labels, **more):
        seen.append((more["start"], more["replaced"]))
        return original(run, sequence, index, labels, **more)

    monkeypatch.setattr(module, "sequence_task", watched)
    run = tiny_run("independent", epochs=1)
    chain = tiny.train(run, tmp_path, DATA, replacements={0: model})
    assert seen == [(model, True), (model, True)]
    assert [chain.record(n).parent for n in range(2)] == [None] * 2
    assert [chain.record(n).replaced_by for n in range(2)] == ["pre-trained version 0"] * 2


@pytest.mark.slow
def test_an_update_that_starts_anew_learns_all_photos(tmp_path):
    photos = Photos(path=str(tmp_path / "photos"), size=8)
    for classes in (["melon", "pear"], ["apple"]):
        drawn_photos.draw(tmp_path / "photos", classes, 20)
        run = tiny_run("cores", epochs=1, batch_size=8)
        done = cj.update(run, photos, tmp_path / "work", session=tiny.session(progress=False))
    first, second = (version.record for version in done.chain)
    assert [r.method for r in (first, second)] == ["cores"] * 2
    assert [r.parent for r in (first, second)] == [None, None]
    assert second.learnt["rehearsed"] == 0 and second.learnt["classes"] == ["apple"]
    assert second.learnt["pictures"].keys() == {"melon", "pear", "apple"}
    assert "cross" in second.learnt["validation"]  # against the version before


def test_independent_models_may_learn_their_task_only():
    method = methods.independent(data="task")
    assert method.fresh_start and not method.all_data
    assert tiny.run(method).rehearsal == 4 and tiny.run("independent").rehearsal is None


@pytest.mark.parametrize("name", RIVALS)
def test_a_rival_is_chosen_by_name_in_a_configuration_and_its_step_can_be_planned(name):
    run = configs.run_of(iamcl2r.get_config(f"method={name}"))
    assert run.given_method is methods.get(name)
    state, frozen = make_trainer(tiny_run(name), 4, tiny.one_device()).shapes((8, 8, 3))
    assert jax.tree.leaves(state.params) and isinstance(frozen, dict)


@pytest.mark.parametrize("name", RIVALS)
def test_every_number_of_a_rival_has_a_rule_and_a_place_in_its_docstring(name):
    factory = inspect.unwrap(methods.factory(name))
    fields = describe(factory)
    assert [f.name for f in fields] == list(inspect.signature(factory).parameters)
    for field in fields:
        assert field.rule.help and field.name in inspect.getdoc(factory)
        wrong = {"low": -1.0, "above": 0.0}
        for bound, value in wrong.items():
            if getattr(field.rule, bound) is not None:
                kind = int if field.kind is int else float
                with pytest.raises(UserError, match=f"{field.name} must be"):
                    methods.get(name, {field.name: kind(value)})
    assert dict(methods.get(name).arguments) == {f.name: f.default for f in fields}


def test_the_page_of_methods_lists_every_method_and_map_with_its_defaults():
    page = (Path(__file__).parents[1] / "docs" / "methods.md").read_text(encoding="utf-8")
    lines = [line for line in page.splitlines() if line.startswith("| `")]
    rows = {line.split("`")[1]: line for line in reversed(lines)}  # the first of each name
    own = {
        name: inspect.unwrap(methods.factory(name))
        for name in methods.names()
        if methods.factory(name).__module__.startswith("compat_jax.")
    }
    assert set(rows) == {*own, *afterwards.WAYS}  # the maps are among the ways to upgrade
    for name, factory in {**own, **align.KINDS}.items():
        for field in describe(factory):
            default = (
                f"{field.default:.10f}".rstrip("0") if field.default == 1e-4 else field.default
            )
            assert f"`{field.name}={default}`" in rows[name], (name, field.name)
