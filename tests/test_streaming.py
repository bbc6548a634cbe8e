"""Data larger than what may lie on a device: the same batches, the same bits."""

import dataclasses

import numpy as np
import pytest
import tiny
from PIL import Image

from compat_jax import memory
from compat_jax.data import reading, streaming
from compat_jax.errors import Stopped, UserError

DATA = tiny.dataset()
IMAGE_BYTES = 8 * 8 * 3


class Records:
    """Random access to records, as tfds.data_source returns it; counts the records read."""

    def __init__(self, images):
        self.images, self.read = images, 0

    def __len__(self):
        return len(self.images)

    def __getitems__(self, positions):
        self.read += len(positions)
        return [{"image": self.images[i]} for i in positions]


def bits(folder, data=DATA, **arguments):
    """Return the SHA-256 of every version of the tiny sequence."""
    chain = tiny.train(tiny.run("hoc"), folder, data, replacements={0: tiny.version()}, **arguments)
    return [chain.open(n).sha256 for n in chain.numbers()]


@pytest.fixture(scope="module")
def in_memory(tmp_path_factory):
    return bits(tmp_path_factory.mktemp("in_memory"))


# 96 images: room for a chunk of one, two and four steps of 16 images three times over.
@pytest.mark.parametrize("images", [1, 95])
def test_streamed_training_ends_with_the_same_bits(tmp_path, in_memory, images):
    assert bits(tmp_path, device_budget=images * IMAGE_BYTES) == in_memory


def test_images_may_stay_in_their_records(tmp_path, in_memory):
    records = Records(DATA.images)
    data = dataclasses.replace(DATA, images=streaming.RecordImages(records, (8, 8, 3)))
    assert data.fingerprint() == DATA.fingerprint()
    before = records.read
    assert bits(tmp_path, data, device_budget=90 * IMAGE_BYTES) == in_memory
    assert records.read > before


@pytest.mark.parametrize("free", [None, 1])
def test_images_may_stay_in_their_files(tmp_path, in_memory, monkeypatch, free):
    """Those that would fill the host's memory do so by themselves."""
    decoded = []
    monkeypatch.setattr(memory, "free_bytes", lambda: free)
    monkeypatch.setattr(memory, "check", lambda *arguments, **more: None)
    chunks = streaming.chunks
    monkeypatch.setattr(streaming, "chunks", lambda *a, **k: decoded.append(1) or chunks(*a, **k))
    files = [str(tmp_path / f"{i}.png") for i in range(len(DATA))]
    for file, image in zip(files, DATA.images, strict=True):
        Image.fromarray(image).save(file)
    images = reading.FileImages(files, (8, 8, 3))
    data = dataclasses.replace(DATA, images=images)
    assert data.fingerprint() == DATA.fingerprint()
    budget = 90 * IMAGE_BYTES if free is None else 0
    assert bits(tmp_path / "run", data, device_budget=budget) == in_memory
    assert decoded


def test_a_stopped_stream_goes_on_to_the_same_bits(tmp_path, in_memory):
    asked = iter(range(100))
    with pytest.raises(Stopped):
        bits(tmp_path, device_budget=IMAGE_BYTES, should_stop=lambda: next(asked) == 6)
    assert bits(tmp_path, device_budget=IMAGE_BYTES) == in_memory


def test_chunks_hold_the_batches_of_the_plan():
    images = np.arange(10, dtype=np.uint8).reshape(10, 1, 1, 1)
    labels = np.arange(10, dtype=np.int32) % 3
    plan = np.array([[0, 1], [9, 2], [3, 3], [4, 8], [5, 6]], np.int32)
    ring = streaming.ring_plan(5, 2, 2)
    assert ring.tolist() == [[0, 1], [2, 3], [0, 1], [2, 3], [0, 1]]
    step = 1
    for chunk in streaming.chunks(images, labels, plan, first=1, chunk=2):
        assert chunk.images.shape == (4, 1, 1, 1) and chunk.labels.shape == (4,)
        for s in range(step, chunk.stop):
            assert chunk.images[ring[s], 0, 0, 0].tolist() == plan[s].tolist()
            assert chunk.labels[ring[s]].tolist() == (plan[s] % 3).tolist()
        step = chunk.stop
    assert step == 5


@pytest.mark.parametrize(("budget", "steps"), [(0, 1), (599, 1), (600, 1), (1200, 2), (6000, 10)])
def test_the_chunk_in_use_and_those_ahead_fit_into_the_budget(budget, steps):
    assert streaming.steps_a_chunk(20, 10, budget) == steps


def test_what_reading_raises_is_raised():
    class Broken(Records):
        def __getitems__(self, positions):
            raise OSError("disk gone")

    images = streaming.RecordImages(Broken(DATA.images), (8, 8, 3))
    with pytest.raises(OSError, match="disk gone"):
        list(streaming.chunks(images, DATA.labels, np.zeros((2, 4), np.int32), first=0, chunk=1))


def test_records_of_several_sizes_are_refused_when_they_are_read():
    images = streaming.RecordImages(Records([np.zeros((8, 8, 3)), np.zeros((1, 8, 3))]), (8, 8, 3))
    assert np.asarray(images[:1]).shape == (1, 8, 8, 3)
    with pytest.raises(
        UserError, match=r"image 1 has shape \(1, 8, 3\), the first one \(8, 8, 3\)"
    ):
        np.asarray(images)
