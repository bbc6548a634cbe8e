"""Reading in parallel: the same pixels in the same order, in memory or in files."""

import hashlib
import threading
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from compat_jax import data
from compat_jax.data import Dataset, Preparation, reading
from compat_jax.data.pictures import BadPictures
from compat_jax.data.reading import FileImages, check_pictures, in_order, read
from compat_jax.errors import UserError

PREPARE = Preparation(8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two classes of 12 and 8 pictures of several sizes; a picture's value is its number."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for number in range(20):
        path = root / ("ant" if number < 12 else "bee") / f"{number:02d}.png"
        path.parent.mkdir(exist_ok=True)
        pixels = rng.integers(0, 256, (*rng.integers(8, 20, 2), 3)).astype(np.uint8)
        Image.fromarray(pixels).save(path)
    return root


@pytest.fixture(scope="module")
def files(folder):
    return tuple(data.pictures(folder))


@pytest.fixture(scope="module")
def pixels(files):
    return np.stack([PREPARE(file) for file in files])


@pytest.fixture
def spoilt(folder, tmp_path):
    """The same files with two bad ones among them, and their places."""
    found = [str(p) for p in sorted(folder.rglob("*.png"))]
    for place in (3, 15):
        (tmp_path / f"bad{place}.png").write_bytes(b"no picture")
        found.insert(place, str(tmp_path / f"bad{place}.png"))
    return found, (3, 15)


# In parallel and in order


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("block", [1, 3])
def test_results_come_in_order_whoever_is_first(threads, block):
    def work(i):
        time.sleep(0.003 * (i % 3))
        return i * i

    found = list(in_order(20, work, block=block, threads=threads))
    assert found == [i * i for i in range(20)]
    assert list(in_order(0, work, block=block, threads=threads)) == []


def test_what_work_raises_is_raised_in_its_place():
    def work(i):
        if i == 7:
            raise OSError("disk gone")
        return i

    found = []
    with pytest.raises(OSError, match="disk gone"):
        found.extend(in_order(20, work, threads=3))
    assert found == list(range(7)) or not found


def test_threads_end_with_the_reading(files):
    before = threading.active_count()
    for _ in range(5):
        np.asarray(FileImages(files, (8, 8, 3), PREPARE))
    for _ in range(100):
        if threading.active_count() <= before:
            break
        time.sleep(0.02)
    assert threading.active_count() <= before


# Images in files


def test_images_in_files_are_those_in_memory(files, pixels):
    images = FileImages(files, (8, 8, 3), PREPARE)
    assert images.shape == pixels.shape and images.dtype == np.uint8 and len(images) == 20
    assert images.ndim == 4
    np.testing.assert_array_equal(images, pixels)
    np.testing.assert_array_equal(images[4:9], pixels[4:9])
    rows = np.array([[5, 5], [0, 19]])
    np.testing.assert_array_equal(images[rows.reshape(-1)], pixels[[5, 5, 0, 19]])
    np.testing.assert_array_equal(images[::2][np.array([3, 3, 1])], pixels[[6, 6, 2]])
    np.testing.assert_array_equal(images[np.arange(20) > 17], pixels[18:])
    np.testing.assert_array_equal(images[7], pixels[7])
    assert np.asarray(images[:0]).shape == (0, 8, 8, 3)
    assert np.asarray(images[:2], np.float32).dtype == np.float32
    assert images[3:5].files() == files[3:5]


def test_the_digest_is_of_the_bytes_of_the_file(files):
    expected = [hashlib.blake2b(Path(f).read_bytes(), digest_size=16).digest() for f in files]
    assert list(FileImages(files, (8, 8, 3), PREPARE).digests()) == expected
    assert list(read(files, PREPARE).digests) == expected == list(check_pictures(files).digests)


def test_a_file_that_changed_meanwhile_is_named(files, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    images = read([tmp_path / "a.png"] * 3, None, in_memory=False).images
    Image.new("RGB", (9, 8)).save(tmp_path / "a.png")
    with pytest.raises(
        UserError, match=r"image 0 has shape \(8, 9, 3\), the first one \(8, 8, 3\)"
    ):
        np.asarray(images)
    (tmp_path / "a.png").unlink()
    with pytest.raises(BadPictures, match=r"/a\.png is not there: put it back"):
        np.asarray(images)


# Read


def test_a_budget_decides_what_stays_in_files(files, pixels):
    for budget, kind in ((20 * 192, np.ndarray), (20 * 192 - 1, FileImages)):
        found = read(files, PREPARE, budget=budget)
        assert isinstance(found.images, kind)
        np.testing.assert_array_equal(found.images, pixels)
        assert found.kept.tolist() == list(range(20)) and not found.problems
    assert isinstance(read(files, PREPARE, in_memory=True, budget=0).images, np.ndarray)
    assert isinstance(read(files, PREPARE, in_memory=False).images, FileImages)


@pytest.mark.parametrize("in_memory", [True, False])
def test_bad_files_stop_the_reading_all_at_once_or_are_skipped(spoilt, pixels, in_memory, capsys):
    found, places = spoilt
    for attempt in (
        lambda: read(found, PREPARE, in_memory=in_memory),
        lambda: check_pictures(found),
    ):
        with pytest.raises(BadPictures, match=r"^2 pictures cannot be read: ") as caught:
            attempt()
        assert [p.partition(" ")[0] for p in caught.value.problems] == [found[i] for i in places]
    assert not capsys.readouterr().err
    kept = read(found, PREPARE, on_bad="skip", in_memory=in_memory)
    np.testing.assert_array_equal(kept.images, pixels)
    assert kept.kept.tolist() == [i for i in range(22) if i not in places]
    assert kept.bad == {found[i] for i in places} and len(kept.digests) == 20
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "skipped 2 of 22 pictures, which cannot be read:" and len(lines) == 3
    assert all(line.startswith(f"  {found[i]} ") for line, i in zip(lines[1:], places, strict=True))


def test_of_many_bad_files_ten_are_listed(tmp_path, files, capsys):
    bad = [str(tmp_path / f"{i:02d}.png") for i in range(23)]
    checked = check_pictures([*bad, files[0]], on_bad="skip")
    lines = checked.summary().splitlines()
    assert len(lines) == 12 and lines[-1] == "  and 13 more"
    with pytest.raises(BadPictures, match=r"23 pictures cannot be read: .*; and 13 more"):
        read(bad, PREPARE, on_bad="skip")
    with pytest.raises(UserError, match=r"unknown on_bad 'ignore'\. Valid: skip, stop\."):
        read(files, PREPARE, on_bad="ignore")


def test_without_a_size_all_pictures_must_have_one(files, tmp_path):
    for in_memory in (True, False):
        with pytest.raises(
            UserError, match=r"the pictures have several sizes \(.* x .*\): set size"
        ):
            read(files, None, in_memory=in_memory)
    Image.new("RGB", (5, 4)).save(tmp_path / "a.png")
    (tmp_path / "0.png").write_bytes(b"no picture")
    pair = [tmp_path / "0.png", tmp_path / "a.png", tmp_path / "a.png"]
    for in_memory in (True, False):
        found = read(pair, None, on_bad="skip", in_memory=in_memory)
        assert found.images.shape == (2, 4, 5, 3) and not np.asarray(found.images).any()
    assert read([], PREPARE).images.shape == (0, 8, 8, 3)


def test_pixels_are_in_memory_once(files, monkeypatch):
    monkeypatch.setattr(reading, "cores", lambda: 2)  # each has pictures in hand
    large, many = Preparation(128), files * 20
    tracemalloc.start()
    images = read(many, large).images
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert images.nbytes == 400 * 128 * 128 * 3
    assert peak < 1.3 * images.nbytes


def test_progress_only_where_it_is_asked_for(files, monkeypatch):
    shown = []
    meter = reading.Meter
    monkeypatch.setattr(reading, "Meter", lambda *a, **k: shown.append(a) or meter(*a, **k))
    read(files, PREPARE), read(files, PREPARE, progress="reading photos")
    assert shown == [(None, 20), ("reading photos", 20)]


def test_the_rate_of_decoding_is_a_number(files):
    assert reading.decode_rate(files, PREPARE, threads=2) > 0


# As a data set


def test_a_folder_is_the_same_data_in_memory_and_in_files(folder, monkeypatch):
    read_now, left = (data.from_folder(folder, 8, in_memory=there) for there in (True, False))
    assert isinstance(left.images, FileImages) and isinstance(read_now.images, np.ndarray)
    assert left.preparation == read_now.preparation == PREPARE
    monkeypatch.setattr(reading, "in_order", None)  # nothing is decoded for a fingerprint
    assert left.fingerprint() == read_now.fingerprint()
    assert left.digests == read_now.digests
    monkeypatch.undo()
    assert left.pixel_digests == read_now.pixel_digests
    others = [
        data.from_folder(folder, 8, resize="squash"),
        data.from_folder(folder, 9),
        left.take(range(19)),
        left.select([1, 0]),
        Dataset(
            left.images, left.labels, ("ant", "fly"), preparation=PREPARE, digests=left.digests
        ),
    ]
    assert len({d.fingerprint() for d in [left, *others]}) == 6
    assert data.from_folder(folder, 8, filter="box").fingerprint() != left.fingerprint()


def test_pictures_are_selected_before_any_is_decoded(folder, tmp_path, monkeypatch):
    seen = []
    load = reading.read
    monkeypatch.setattr(
        reading, "read", lambda files, *a, **k: seen.append(files) or load(files, *a, **k)
    )
    few = data.from_folder(folder, 8, classes=(1, 2), per_class=3)
    assert few.class_names == ("bee",) and few.labels.tolist() == [0, 0, 0]
    assert seen == [few.files] and [f[-6:-4] for f in few.files] == ["12", "13", "14"]
    loaded = data.load(
        {"source": "folder", "path": str(folder), "size": 8, "classes": (1, 2), "per_class": 3}
    )
    assert loaded.fingerprint() == few.fingerprint()


def test_rows_of_a_data_set_keep_what_belongs_to_them(folder):
    for there in (True, False):
        whole = data.from_folder(folder, 8, in_memory=there)
        some = whole.take(np.array([13, 2, 2]))
        assert some.labels.tolist() == [1, 0, 0] and some.complete
        assert some.files == tuple(whole.files[i] for i in (13, 2, 2))
        assert some.digests == tuple(whole.digests[i] for i in (13, 2, 2))
        np.testing.assert_array_equal(some.images, np.asarray(whole.images)[[13, 2, 2]])
        first = whole.take([0])
        assert first.class_names == ("ant", "bee") and not first.complete
        assert first.counts().tolist() == [1, 0]
        one = whole.per_class(2).select([1])
        assert one.files == whole.files[12:14] and one.preparation == PREPARE
    with pytest.raises(UserError, match=r"rows 0\.\.20 asked for, but there are 20"):
        whole.take(range(21))


def test_images_may_have_no_labels():
    images = np.zeros((3, 2, 2, 3), np.uint8)
    dataset = data.from_arrays(images)
    assert dataset.labels is None and dataset.class_names == () and len(dataset) == 3
    assert len(dataset.take([2, 0])) == 2 and dataset.per_class(None) is dataset
    assert dataset.fingerprint() != data.from_arrays(images[:2]).fingerprint()
    for needs in (dataset.counts, lambda: dataset.select([0]), lambda: dataset.per_class(1)):
        with pytest.raises(
            UserError, match="the images have no labels: give class folders, a table"
        ):
            needs()
    with pytest.raises(UserError, match="2 class names but no labels"):
        Dataset(images, None, ("cat", "dog"))
    with pytest.raises(UserError, match="3 images but 1 digests"):
        Dataset(images, digests=(b"",))


def test_classes_may_lack_images_where_that_is_said():
    images = np.zeros((2, 2, 2, 3), np.uint8)
    dataset = Dataset(images, np.array([2, 2]), ("a", "b", "c"), complete=False)
    assert dataset.counts().tolist() == [0, 0, 2]
    assert len(dataset.select([0])) == 0 and not dataset.select([2]).complete


def test_a_way_to_resize_needs_a_size(folder):
    for how in ({"crop": 0.875}, {"resize": "squash"}, {"filter": "box"}):
        with pytest.raises(
            UserError, match=f"{next(iter(how))} needs a size to resize to: set size"
        ):
            data.from_folder(folder, **how)
