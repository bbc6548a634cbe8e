"""The task sequence, the rehearsal memory and the plans of batches."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from compat_jax.data.tasks import Tasks, TaskSequence, batch_plan, memory_indices, plan_shape
from compat_jax.errors import UserError

NO_MEMORY = np.zeros(0, int)


# Sequence


@pytest.mark.parametrize(
    ("sequence", "tasks"),
    [
        (TaskSequence(100, 10, 15), 7),
        (TaskSequence(100, 10, 3), 31),
        (TaskSequence(100, 100, 5), 1),
        (TaskSequence(100, 100, 0), 1),
        (TaskSequence(25, 10, 10), 3),
    ],
)
def test_number_of_tasks(sequence, tasks):
    assert len(sequence) == tasks


def test_classes_come_in_label_order():
    sequence = TaskSequence(100, 10, 15)
    assert [sequence.num_seen(t) for t in range(-1, 7)] == [0, 10, 25, 40, 55, 70, 85, 100]
    assert sequence.classes(0) == range(10) and sequence.classes(6) == range(85, 100)


def test_last_task_may_have_fewer_classes():
    assert TaskSequence(25, 10, 10).classes(2) == range(20, 25)


@hypothesis.given(st.data())
def test_every_class_comes_once(data):
    total = data.draw(st.integers(1, 200))
    initial, increment = data.draw(st.integers(1, total)), data.draw(st.integers(1, 250))
    sequence = TaskSequence(total, initial, increment)
    tasks = [sequence.classes(t) for t in range(len(sequence))]
    assert [c for task in tasks for c in task] == list(range(total))
    assert all(tasks)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((100, 0, 10), r"tasks.initial must lie in 1..100 .*, got 0"),
        ((100, 101, 10), r"tasks.initial must lie in 1..100 .*, got 101"),
        ((100, 10, 0), r"tasks.increment must be at least 1 for 90 more classes, got 0"),
    ],
)
def test_sequences_that_cannot_be(arguments, message):
    with pytest.raises(UserError, match=message):
        TaskSequence(*arguments)


def test_tasks_without_a_number_of_classes_become_a_sequence():
    tasks = Tasks(initial=10, increment=15, rehearsal=20)
    assert tasks == Tasks() and tasks.sequence(100) == TaskSequence(100, 10, 15)
    assert len(Tasks(initial=4, increment=0).sequence(4)) == 1
    with pytest.raises(UserError, match=r"tasks\.initial must lie in 1\.\.9 .*, got 10"):
        tasks.sequence(9)


# Memory


def labels_of(classes, per_class, seed=0):
    return np.random.default_rng(seed).permutation(np.repeat(np.arange(classes), per_class))


def test_memory_holds_so_many_of_each_class():
    labels = labels_of(10, 300)
    memory = memory_indices(labels, range(4), 20, seed=0)
    np.testing.assert_array_equal(labels[memory], np.repeat(np.arange(4), 20))
    assert len(np.unique(memory)) == 80


def test_memory_of_a_class_with_fewer_images_is_all_of_them():
    labels = np.array([0, 1, 0, 1, 1])
    np.testing.assert_array_equal(memory_indices(labels, [0, 1], 3, seed=0), [0, 2, 1, 3, 4])


@pytest.mark.parametrize(("classes", "per_class"), [(range(0), 20), (range(4), 0)])
def test_empty_memory(classes, per_class):
    memory = memory_indices(labels_of(4, 30), classes, per_class, seed=0)
    assert memory.shape == (0,) and memory.dtype == np.int64


def test_draw_of_a_class_depends_on_the_seed_alone():
    labels = labels_of(6, 50)
    memory = memory_indices(labels, range(6), 5, seed=3)
    np.testing.assert_array_equal(memory_indices(labels, range(2, 4), 5, seed=3), memory[10:20])
    assert (memory_indices(labels, range(6), 5, seed=4) != memory).any()


def test_classes_are_drawn_apart():
    first, second = memory_indices(np.repeat([0, 1], 50), [0, 1], 5, seed=0).reshape(2, 5)
    assert (first != second - 50).any()


def test_memory_is_drawn_at_random():
    """Over many seeds each of 10 images is kept by about half."""
    labels = np.zeros(10, int)
    kept = np.concatenate([memory_indices(labels, [0], 5, seed) for seed in range(1000)])
    counts = np.bincount(kept)
    assert np.abs(counts - 500).max() < 5 * np.sqrt(1000 * 0.25)


# Batches without memory


def test_first_task_is_shuffled_epochs_without_the_short_batch():
    new = np.arange(100, 1100)
    plan = batch_plan(new, NO_MEMORY, 128, epochs=3, seed=0, task=0)
    assert plan.shape == (3, 7, 128) and plan.dtype == np.int32
    for epoch in plan:
        assert len(np.unique(epoch)) == 7 * 128 and np.isin(epoch, new).all()
    dropped = [set(new) - set(epoch.ravel()) for epoch in plan]
    assert dropped[0] != dropped[1]  # drawn anew each epoch
    assert (np.diff(plan[0].ravel()) < 0).any()


def test_batch_larger_than_the_first_task_shrinks_to_it():
    plan = batch_plan(np.arange(10, 60), NO_MEMORY, 128, epochs=2, seed=0, task=0)
    assert plan.shape == (2, 1, 50)
    np.testing.assert_array_equal(np.sort(plan[0, 0]), np.arange(10, 60))


def test_whole_batches_lose_nothing():
    plan = batch_plan(np.arange(64), NO_MEMORY, 16, epochs=1, seed=0, task=0)
    np.testing.assert_array_equal(np.sort(plan.ravel()), np.arange(64))


# Batches with memory


def repeats(rows):
    """How many entries of each row stand in it before."""
    return np.array([len(row) - len(np.unique(row)) for row in rows])


def halves(plan):
    half = plan.shape[-1] // 2
    return plan[..., :half].reshape(-1, half), plan[..., half:].reshape(-1, half)


def test_second_task_of_the_paper():
    """15 new classes of 300 images, 10 old ones of 20: 4700 // 128 batches, half and half."""
    memory, new = np.arange(200), np.arange(3000, 7500)
    plan = batch_plan(new, memory, 128, epochs=2, seed=0, task=1)
    assert plan.shape == (2, 36, 128) and plan.dtype == np.int32
    old_half, new_half = halves(plan)
    assert np.isin(old_half, memory).all() and np.isin(new_half, new).all()
    assert not repeats(old_half).any() and not repeats(new_half).any()
    # Within a half nothing repeats; between batches it must: 36 * 64 draws from 200 images.
    assert len(np.unique(old_half)) == 200


@pytest.mark.parametrize(("images", "with_replacement"), [(7, True), (8, True), (9, False)])
@pytest.mark.parametrize("side", ["memory", "new"])
def test_pool_no_larger_than_the_half_is_drawn_with_replacement(images, with_replacement, side):
    small, large = np.arange(images), np.arange(1000, 1500)
    memory, new = (small, large) if side == "memory" else (large, small)
    plan = batch_plan(new, memory, 16, epochs=4, seed=0, task=1)
    assert plan.shape == (4, (500 + images) // 16, 16)
    half = halves(plan)[side == "new"]
    assert np.isin(half, small).all()
    assert (repeats(half) > 0).any() == with_replacement
    assert not repeats(halves(plan)[side == "memory"]).any()


@pytest.mark.parametrize(("new", "memory", "half"), [(10, 6, 8), (10, 7, 8), (5, 20, 12)])
def test_less_than_a_batch_is_one_batch_with_half_of_all_from_each_side(new, memory, half):
    plan = batch_plan(np.arange(100, 100 + new), np.arange(memory), 32, epochs=3, seed=0, task=2)
    assert plan.shape == (3, 1, 2 * half)
    old_half, new_half = halves(plan)
    assert (old_half < memory).all() and (new_half >= 100).all()


def test_odd_batch_size_rounds_both_halves_down():
    plan = batch_plan(np.arange(50, 90), np.arange(30), 5, epochs=1, seed=0, task=1)
    assert plan.shape == (1, 14, 4)


def test_draws_are_uniform():
    plan = batch_plan(np.arange(20, 50), np.arange(20), 16, epochs=500, seed=0, task=1)
    draws = 500 * 3 * 8
    for first, last in ((0, 20), (20, 50)):
        counts = np.bincount(plan.ravel(), minlength=50)[first:last]
        assert counts.sum() == draws
        expected = draws / (last - first)
        assert np.abs(counts - expected).max() < 5 * np.sqrt(expected)


@hypothesis.settings(max_examples=50, deadline=None)
@hypothesis.given(
    new=st.integers(1, 60),
    memory=st.integers(0, 60),
    batch_size=st.integers(2, 40),
    epochs=st.integers(1, 3),
    task=st.integers(0, 30),
)
def test_protocol(new, memory, batch_size, epochs, task):
    """Numbers and halves for any sizes."""
    pool, kept = np.arange(1000, 1000 + new), np.arange(memory)
    plan = batch_plan(pool, kept, batch_size, epochs, seed=1, task=task)
    batches = (new + memory) // batch_size
    size = batch_size if batches else new + memory
    if memory:
        old_half, new_half = halves(plan)
        assert plan.shape == (epochs, max(batches, 1), 2 * (size // 2))
        assert np.isin(old_half, kept).all() and np.isin(new_half, pool).all()
        assert memory <= size // 2 or not repeats(old_half).any()
        assert new <= size // 2 or not repeats(new_half).any()
    else:
        assert plan.shape == (epochs, max(batches, 1), size)
        assert np.isin(plan, pool).all() and not repeats(plan.reshape(epochs, -1)).any()
    assert plan_shape(new, memory, batch_size) == plan.shape[1:]


@pytest.mark.parametrize("rehearsal", [0, 3, 50])
def test_the_plan_of_a_task_takes_its_classes_and_a_memory_of_those_before(rehearsal):
    sequence, labels = TaskSequence(5, 2, 2), labels_of(5, 12)
    counts = np.bincount(labels)
    for task, classes in enumerate([(0, 1), (2, 3), (4,)]):
        plan = sequence.batch_plan(task, labels, rehearsal, batch_size=8, epochs=2, seed=0)
        new = np.flatnonzero(np.isin(labels, classes))
        memory = memory_indices(labels, range(classes[0]), rehearsal, seed=0)
        expected = batch_plan(new, memory, 8, epochs=2, seed=0, task=task)
        np.testing.assert_array_equal(plan, expected.reshape(-1, expected.shape[-1]))
        assert sequence.plan_shape(task, counts, rehearsal, batch_size=8) == expected.shape[1:]


# Addresses


@pytest.mark.parametrize("memory", [NO_MEMORY, np.arange(40)])
def test_plan_depends_on_seed_task_and_epoch_alone(memory):
    def plan(epochs=3, seed=0, task=1):
        return batch_plan(np.arange(100, 300), memory, 16, epochs, seed, task)

    np.testing.assert_array_equal(plan(), plan())
    np.testing.assert_array_equal(plan(epochs=5)[:3], plan())
    assert (plan(seed=1) != plan()).any() and (plan(task=2) != plan()).any()
    assert (plan()[0] != plan()[1]).any()
