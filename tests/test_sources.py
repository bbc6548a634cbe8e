"""Data sets, class folders, TFDS without TensorFlow, and class roles."""

import json
import re
from typing import Annotated

import numpy as np
import pytest
from PIL import Image

from compat_jax import data
from compat_jax.data import Dataset, Preparation, listing, reading, sources
from compat_jax.data.glyphs import LOOKS
from compat_jax.data.listing import Picture
from compat_jax.data.pictures import BadPictures
from compat_jax.data.registry import source_fields
from compat_jax.data.roles import check_roles, check_same_classes
from compat_jax.errors import UserError
from compat_jax.fields import Rule

GREY_5 = np.full((6, 6), 5, np.uint8)


def small_dataset():
    """Six one-pixel images, values 0, 10, ... 50, of three classes."""
    images = (10 * np.arange(6, dtype=np.uint8)).reshape(6, 1, 1, 1)
    return Dataset(images, np.array([2, 0, 1, 0, 2, 0]), ("cat", "dog", "owl"))


def values(dataset):
    return dataset.images[:, 0, 0, 0].tolist()


# Dataset


def test_size_and_types():
    dataset = small_dataset()
    assert len(dataset) == 6 and dataset.num_classes == 3
    assert dataset.labels.dtype == np.int32


def test_select_relabels_in_the_order_given():
    chosen = small_dataset().select([2, 0])
    assert chosen.class_names == ("owl", "cat")
    assert values(chosen) == [0, 10, 30, 40, 50]
    assert chosen.labels.tolist() == [0, 1, 1, 0, 1]


def test_first_images_of_each_class():
    first = small_dataset().per_class(1)
    assert values(first) == [10, 20, 0] and first.labels.tolist() == [0, 1, 2]
    assert values(small_dataset().per_class(2)) == [10, 30, 20, 0, 40]
    dataset = small_dataset()
    assert dataset.per_class(None) is dataset


def test_fingerprint_changes_with_images_labels_and_names():
    dataset = small_dataset()
    others = [
        Dataset(dataset.images + 1, dataset.labels, dataset.class_names),
        Dataset(dataset.images, dataset.labels[::-1], dataset.class_names),
        Dataset(dataset.images, dataset.labels, ("cat", "dog", "fox")),
        Dataset(dataset.images.reshape(6, 1, 1, 1).repeat(2, 1), dataset.labels, ("a", "b", "c")),
    ]
    prints = {d.fingerprint() for d in [dataset, small_dataset(), *others]}
    assert len(prints) == 5
    assert re.fullmatch("[0-9a-f]{64}", dataset.fingerprint())


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (
            np.zeros((2, 4, 4, 3)),
            [0, 1],
            r"images must be uint8 in 0\.\.255, got float64: multiply",
        ),
        (np.zeros((2, 4, 4, 3), np.float32), [0, 1], "got float32: multiply by 255"),
        (np.zeros((2, 4, 4), np.uint8), [0, 1], r"must be \[n, height.* got shape \(2, 4, 4\)"),
        (np.zeros((2, 4, 4, 3), np.uint8), [0, 1, 1], "2 images but 3 labels"),
        (np.zeros((2, 4, 4, 3), np.uint8), [0, 2], "from 0 to 2, but there are 2 class names"),
        (np.zeros((2, 4, 4, 3), np.uint8), [-1, 1], "from -1 to 1, but there are 2 class names"),
        (np.zeros((2, 4, 4, 3), np.uint8), [1, 1], "class 'cat' has no image: add some"),
        (np.zeros((2, 4, 4, 3), np.uint8), [0, 2**32 + 1], "from 0 to 4294967297, but there are 2"),
        (np.zeros((2, 4, 4, 3), np.uint8), np.uint64([0, 2**63]), "to 9223372036854775808, but"),
        (np.zeros((2, 4, 4, 3), np.uint8), [0.0, 1.9], "must be whole numbers .*, got float64"),
        (
            np.zeros((2, 4, 4, 3), np.uint8),
            ["0", "1"],
            "must be whole numbers .*: give class names",
        ),
    ],
)
def test_data_sets_that_cannot_be(images, labels, message):
    with pytest.raises(UserError, match=message):
        Dataset(images, np.array(labels), ("cat", "dog"))


@pytest.mark.parametrize("labels", [[0, 2_000_000_000], [0, 2**40], [0, 2], [-5, 0]])
def test_classes_are_not_named_after_numbers_with_gaps(labels):
    with pytest.raises(UserError, match=f"from {min(labels)} to {max(labels)}, but must number"):
        data.from_arrays(np.zeros((2, 4, 4, 3), np.uint8), labels)


def test_select_no_class():
    with pytest.raises(UserError, match="no classes asked for: name at least one"):
        small_dataset().select([])


@pytest.mark.parametrize("classes", [[0, 3], [-1, 0]])
def test_select_classes_that_are_not_there(classes):
    with pytest.raises(UserError, match=r"asked for, but the data set has classes 0\.\.2"):
        small_dataset().select(classes)


# Folders of classes


@pytest.fixture
def folder(tmp_path):
    """Two classes of 6x6 pictures: grey and colour, PNG and JPEG, one of them further down."""
    (tmp_path / "cat" / "more").mkdir(parents=True)
    (tmp_path / "dog").mkdir()
    Image.fromarray(GREY_5).save(tmp_path / "cat" / "b.png")
    Image.fromarray(np.full((6, 6, 3), (9, 8, 7), np.uint8)).save(tmp_path / "cat" / "a.png")
    Image.fromarray(GREY_5 + 1).save(tmp_path / "cat" / "more" / "c.jpg", quality=100)
    Image.fromarray(GREY_5 + 2).convert("P").save(tmp_path / "dog" / "a.png")
    return tmp_path


def test_folder(folder):
    dataset = data.from_folder(str(folder))
    assert dataset.images.shape == (4, 6, 6, 3)
    assert dataset.class_names == ("cat", "dog") and dataset.labels.tolist() == [0, 0, 0, 1]
    assert dataset.images[:, 3, 3].tolist() == [[9, 8, 7], [5, 5, 5], [6, 6, 6], [7, 7, 7]]


def test_hidden_files_and_folders_are_no_data(folder):
    (folder / ".cache").mkdir()
    (folder / "cat" / ".DS_Store").write_bytes(b"\0")
    (folder / "list.txt").write_text("beside the classes")
    assert len(data.from_folder(str(folder))) == 4


def test_pictures_of_several_sizes(folder):
    Image.fromarray(GREY_5.repeat(2, axis=1)).save(folder / "dog" / "wide.png")
    with pytest.raises(UserError, match=r"several sizes \(6 x 6, 12 x 6, \.\.\.\): set size$"):
        data.from_folder(str(folder))
    assert data.from_folder(str(folder), size=4).images.shape == (5, 4, 4, 3)


def test_the_way_to_resize_is_chosen(tmp_path):
    (tmp_path / "cat").mkdir()
    checks = np.array([[0, 100], [100, 0]], np.uint8).repeat(2, 0).repeat(2, 1)
    Image.fromarray(checks).save(tmp_path / "cat" / "a.png")
    for size in (1, 2, 3):
        for resize in ("crop", "squash"):
            how = {"resize": resize, "filter": "lanczos", "crop": 0.9}
            dataset = data.from_folder(str(tmp_path), size=size, **how)
            assert dataset.preparation == Preparation(size, **how)
            np.testing.assert_array_equal(dataset.images[0], Preparation(size, **how)(checks))
    boxes = data.from_folder(str(tmp_path), size=2, filter="box")
    np.testing.assert_array_equal(boxes.images[0, ..., 0], [[0, 100], [100, 0]])
    assert data.from_folder(str(tmp_path)).preparation is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda p: (p / "dog" / "notes.txt").write_text("no picture"),
            "notes.txt is not a picture",
        ),
        (lambda p: (p / "dog" / "cut.png").write_bytes(b"\x89PNG\r\n"), "cut.png is not a picture"),
        (lambda p: (p / "ant").mkdir(), "class folder .*ant is empty: add pictures or remove it"),
        (
            lambda p: Image.fromarray(np.full((6, 6), 0.5, np.float32)).save(p / "dog" / "f.tiff"),
            "f.tiff has more than 16 bits per channel: convert it to 8",
        ),
    ],
)
def test_folders_that_cannot_be(folder, make, message):
    make(folder)
    with pytest.raises(UserError, match=message):
        data.from_folder(str(folder))


def test_sixteen_bits_of_grey_are_scaled_to_eight(folder):
    Image.fromarray(np.full((6, 6), 999, np.uint16)).save(folder / "dog" / "f.png")
    np.testing.assert_array_equal(data.from_folder(str(folder)).images[-1], 4)


def test_vanished_picture(folder, monkeypatch):
    listed = [Picture(str(folder / "cat" / "gone.png"), "cat")]
    monkeypatch.setattr(listing, "list_folder", lambda root, **_: listed)
    with pytest.raises(UserError, match=r"cat/gone.png is not there: put it back, or take it off"):
        data.from_folder(str(folder))


def test_cut_off_picture(folder):
    content = (folder / "cat" / "more" / "c.jpg").read_bytes()
    (folder / "dog" / "cut.jpg").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"cut.jpg is not a picture .*: remove or repair it \("):
        data.from_folder(str(folder))


def test_no_folder(tmp_path):
    with pytest.raises(UserError, match=r"no folder .*absent"):
        data.from_folder(str(tmp_path / "absent"))
    with pytest.raises(UserError, match="has no sub-folder: it must hold one folder of pictures"):
        data.from_folder(str(tmp_path))


def test_the_home_folder_is_found(folder, monkeypatch, tmp_path_factory):
    monkeypatch.setenv("HOME", str(folder.parent))
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    assert len(data.from_folder(f"~/{folder.name}")) == 4
    assert len(data.load({"source": "folder", "path": f"~/{folder.name}"})) == 4


def test_a_relative_path_and_one_with_signs_of_patterns(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    folder.rename(folder.parent / "[a]*?{b}")
    assert len(data.from_folder("[a]*?{b}")) == 4


# Arrays


def test_arrays_become_a_data_set():
    images = np.zeros((3, 4, 4, 3), np.uint8)
    dataset = data.from_arrays(images, [1, 0, 1])
    assert dataset.class_names == ("0", "1") and dataset.labels.dtype == np.int32
    assert data.from_arrays(images, [1, 0, 1], ["cat", "dog"]).class_names == ("cat", "dog")
    for labels in ([0.0, 1.0, 1.0], ["a", "b", "c"], [[0], [1], [1]], [True, False, True]):
        with pytest.raises(
            UserError, match=r"labels must be whole numbers \[n\], got .*class_names"
        ):
            data.from_arrays(images, labels)
    with pytest.raises(UserError, match="class '0' has no image: add some or leave the class out"):
        data.from_arrays(images, [1, 2, 1])


def test_arrays_of_unequal_sizes_are_refused():
    pictures = [np.zeros((4, side, 3), np.uint8) for side in (4, 5)]
    for labels in (None, [0, 1]):
        with pytest.raises(UserError, match="the pictures are of unequal sizes: bring them to one"):
            data.from_arrays(pictures, labels)


# TensorFlow Datasets


@pytest.fixture(scope="module")
def tfds_folder(tmp_path_factory):
    """A tiny data set, prepared as TFDS does it: 8 grey 6x6 pictures of values 0, 20, ..., 140."""
    import tensorflow_datasets as tfds

    pictures = tmp_path_factory.mktemp("pictures")
    for i in range(8):
        Image.fromarray(np.full((6, 6), 20 * i, np.uint8)).save(pictures / f"{i}.png")

    class TinyPictures(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        pkg_dir_path = pictures

        def _info(self):
            features = {
                "image": tfds.features.Image(shape=(6, 6, 1)),
                "label": tfds.features.ClassLabel(names=["owl", "ant"]),
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager):
            return {
                "train": self._generate_examples(range(6)),
                "test": self._generate_examples([6, 7]),
            }

        def _generate_examples(self, numbers):
            for i in numbers:
                yield i, {"image": str(pictures / f"{i}.png"), "label": i % 2}

    folder = tmp_path_factory.mktemp("tfds")
    TinyPictures(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


def test_tfds(tfds_folder):
    dataset = data.from_tfds("tiny_pictures", "train", data_dir=str(tfds_folder))
    assert dataset.images.shape == (6, 6, 6, 3) and dataset.class_names == ("owl", "ant")
    assert sorted(zip(values(dataset), dataset.labels.tolist(), strict=True)) == [
        (0, 0), (20, 1), (40, 0), (60, 1), (80, 0), (100, 1)
    ]  # fmt: skip


def test_tfds_split_and_size(tfds_folder):
    dataset = data.from_tfds("tiny_pictures", "test", size=4, data_dir=str(tfds_folder))
    assert dataset.images.shape == (2, 4, 4, 3)
    assert sorted(values(dataset)) == [120, 140]


def test_tfds_images_may_stay_in_their_files(tfds_folder):
    spec = {"source": "tfds", "name": "tiny_pictures", "size": 4, "data_dir": str(tfds_folder)}
    spec |= {"classes": (1, 2), "per_class": 2}
    read, left = (data.load({**spec, "in_memory": there}) for there in (True, False))
    assert isinstance(read.images, np.ndarray) and not isinstance(left.images, np.ndarray)
    np.testing.assert_array_equal(left.images, read.images)
    np.testing.assert_array_equal(np.asarray(left.images[1:]), read.images[1:])
    assert left.fingerprint() == read.fingerprint() and left.class_names == read.class_names


def test_the_pictures_of_tfds_are_turned_upright(tmp_path):
    import tensorflow_datasets as tfds

    stored = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    turned = {  # by the definition of EXIF, rows of pixels as they are to be seen
        1: [[0, 1], [2, 3]],
        2: [[1, 0], [3, 2]],
        3: [[3, 2], [1, 0]],
        4: [[2, 3], [0, 1]],
        5: [[0, 2], [1, 3]],
        6: [[2, 0], [3, 1]],
        7: [[3, 1], [2, 0]],
        8: [[1, 3], [0, 2]],
    }
    for orientation in turned:
        exif = Image.Exif()
        exif[0x112] = orientation
        Image.fromarray(stored).save(tmp_path / f"{orientation}.png", exif=exif)

    class TurnedPictures(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        pkg_dir_path = tmp_path

        def _info(self):
            features = {
                "image": tfds.features.Image(shape=(None, None, 3)),
                "label": tfds.features.ClassLabel(names=[str(o) for o in turned]),
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for label, orientation in enumerate(turned):
                yield label, {"image": str(tmp_path / f"{orientation}.png"), "label": label}

    TurnedPictures(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    for in_memory in (True, False):
        dataset = data.from_tfds("turned_pictures", data_dir=str(tmp_path), in_memory=in_memory)
        assert sorted(dataset.labels.tolist()) == list(range(8))
        for image, label in zip(np.asarray(dataset.images), dataset.labels, strict=True):
            expected = stored.reshape(4, 3)[np.array(turned[int(label) + 1])]
            np.testing.assert_array_equal(image, expected)


def test_records_that_are_no_pictures_are_named_all_at_once(tfds_folder, monkeypatch):
    def broken(content, where):
        raise BadPictures([f"{where} is broken"])

    monkeypatch.setattr(sources, "decode", broken)
    with pytest.raises(
        BadPictures, match="2 pictures cannot be read: record 0 of tiny_pict"
    ) as error:
        data.from_tfds("tiny_pictures", "test", data_dir=str(tfds_folder))
    assert error.value.problems == tuple(
        f"record {i} of tiny_pictures test is broken" for i in (0, 1)
    )
    with pytest.raises(BadPictures, match="a record of tiny_pictures test is broken"):
        data.from_tfds("tiny_pictures", "test", data_dir=str(tfds_folder), in_memory=False)


def test_tfds_in_the_home_folder(tfds_folder, monkeypatch):
    monkeypatch.setenv("HOME", str(tfds_folder.parent))
    assert len(data.from_tfds("tiny_pictures", data_dir=f"~/{tfds_folder.name}")) == 6
    monkeypatch.setenv("TFDS_DATA_DIR", f"~/{tfds_folder.name}")
    assert len(data.from_tfds("tiny_pictures")) == 6


def test_tfds_folder_by_the_environment_of_the_moment(tfds_folder, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tfds_folder))
    assert len(data.from_tfds("tiny_pictures")) == 6


def test_tfds_not_prepared_names_the_command(tmp_path):
    with pytest.raises(UserError) as error:
        data.from_tfds("cifar100", data_dir=str(tmp_path))
    message = str(error.value)
    assert message.startswith(f"cifar100 is not prepared in {tmp_path}/cifar100/")
    command = (
        'python -c "import tensorflow_datasets as tfds; '
        f"tfds.builder('cifar100', data_dir='{tmp_path}')"
        ".download_and_prepare(file_format='array_record')\""
    )
    assert command in message and "TFDS_DATA_DIR" in message and "\n" not in message


@pytest.mark.parametrize(
    ("name", "split", "message"),
    [
        ("no_such_pictures", "train", "TFDS has no data set 'no_such_pictures'"),
        ("imagenet_resized/31x31", "train", "TFDS cannot open 'imagenet_resized/31x31'"),
        ("tiny_pictures", "tests", "unknown split of tiny_pictures 'tests'. Did you mean 'test'"),
        ("tiny_pictures", "train[:x]", r"split 'train\[:x\]' of tiny_pictures"),
        ("tiny_pictures", "train[:0]", r"split 'train\[:0\]' of tiny_pictures"),
    ],
)
def test_tfds_data_that_is_not_there(tfds_folder, name, split, message):
    with pytest.raises(UserError, match=message) as error:
        data.from_tfds(name, split, data_dir=str(tfds_folder))
    assert "\n" not in str(error.value)


def test_tfds_in_another_format(tfds_folder, tmp_path):
    """Refuse the format of a plain `download_and_prepare()`, which only TensorFlow reads."""
    folder = tmp_path / "tiny_pictures" / "1.0.0"
    folder.mkdir(parents=True)
    for name in ("dataset_info.json", "features.json", "label.labels.txt"):
        (folder / name).write_text((tfds_folder / "tiny_pictures" / "1.0.0" / name).read_text())
    info = json.loads((folder / "dataset_info.json").read_text())
    (folder / "dataset_info.json").write_text(json.dumps({**info, "fileFormat": "tfrecord"}))
    with pytest.raises(UserError, match=r"not in array_record format: delete it and run `python"):
        data.from_tfds("tiny_pictures", data_dir=str(tmp_path))


# By configuration


def test_load_folder(folder):
    spec = {
        "source": "folder",
        "path": str(folder),
        "size": None,
        "classes": (0, 1),
        "per_class": 2,
    }
    dataset = data.load(spec)
    assert dataset.class_names == ("cat",) and values(dataset) == [9, 5]


def test_load_tfds(tfds_folder):
    spec = {"source": "tfds", "name": "tiny_pictures", "data_dir": str(tfds_folder)}
    assert len(data.load(spec)) == 6
    chosen = data.load({**spec, "classes": (1, 2), "per_class": 2})
    assert chosen.class_names == ("ant",) and len(chosen) == 2


def test_load_glyphs():
    spec = {"source": "glyphs", "classes": (3, 6), "per_class": 2, "look": "print", "seed": 0}
    dataset = data.load({**spec, "size": 16})
    assert dataset.images.shape == (6, 16, 16, 3)
    assert dataset.labels.tolist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            {"source": "folders", "path": "x"},
            "unknown data source 'folders'. Did you mean 'folder'",
        ),
        (
            {"path": "x"},
            "unknown data source 'None'. Valid: folder, glyphs, huggingface, pictures, table, tfds",
        ),
        ({"source": "folder", "pth": "x"}, "unknown field of data source 'folder' 'pth'. .*'path'"),
        ({"source": "folder", "path": ""}, r"data source 'folder' needs path$"),
        ({"source": "tfds", "split": "train"}, r"data source 'tfds' needs name$"),
        ({"source": "glyphs", "look": "print"}, r"'glyphs' needs classes, per_class, seed$"),
    ],
)
def test_load_what_is_not_there(spec, message):
    with pytest.raises(UserError, match=message):
        data.load(spec)


@pytest.mark.parametrize(
    ("change", "argument", "message"),
    [
        ({"source": "glyph"}, "source", "unknown data source"),
        ({"looks": "print"}, "looks", r"unknown field .*'looks'\. Did you mean 'look'\?"),
        ({"seed": None}, "seed", "needs seed"),
        ({"seed": -1}, "seed", "seed must be at least 0 and at most 4,294,967,295, got -1"),
        ({"size": 0}, "size", "size must be at least 1 and at most 8,192, got 0"),
        ({"size": 2.5}, "size", r"size must be a whole number, got 2\.5"),
        ({"size": True}, "size", "size must be a whole number, got True"),
        ({"per_class": 0}, "per_class", "per_class must be at least 1"),
        ({"look": "foto"}, "look", rf"unknown look 'foto'.*{', '.join(sorted(LOOKS))}"),
        ({"photo_share": 1.5}, "photo_share", "photo_share must be at least 0 and at most 1"),
        ({"noise": float("nan")}, "noise", "noise must be a finite number, got nan"),
        ({"classes": (5, 3)}, "classes", "classes must be"),
        ({"progress": True}, "progress", "unknown field of data source 'glyphs' 'progress'"),
    ],
)
def test_an_error_names_the_field_at_fault(change, argument, message):
    spec = {"source": "glyphs", "classes": (3, 6), "per_class": 2, "look": "print", "seed": 0}
    with pytest.raises(UserError, match=message) as caught:
        data.load({**spec, **change})
    assert caught.value.argument == argument


def test_a_source_of_ones_own_is_a_function_and_a_line():
    name = "zebras"  # sorts last

    @data.register(name)
    def checks(
        count: Annotated[int, Rule("pictures", low=1, high=9)],
        size: Annotated[int, Rule("side", low=1)] = 4,
    ) -> Dataset:
        pictures = np.arange(count, dtype=np.uint8).reshape(-1, 1, 1, 1) + np.zeros(
            (1, size, size, 3), np.uint8
        )
        return Dataset(pictures, np.arange(count) % 2, ("even", "odd"))

    assert name in data.source_names()
    assert [f.name for f in source_fields(name)] == ["count", "size", "classes", "per_class"]
    loaded = data.load({"source": name, "count": 5, "classes": (1, 2), "per_class": 1})
    assert loaded.class_names == ("odd",) and values(loaded) == [1]
    with pytest.raises(UserError, match="count must be at least 1 and at most 9, got 10"):
        data.load({"source": name, "count": 10})
    with pytest.raises(UserError, match=f"there is another data source called {name!r}"):
        data.register(name)(lambda: None)


@pytest.mark.parametrize("classes", [(3, 3), (4, 2), (-1, 2), (1, 2, 3), (7,), ("a", "b"), ()])
def test_classes_that_are_no_range(folder, classes):
    message = r"classes must be \(start, stop\) with 0 <= start < stop"
    if classes == ("a", "b"):
        message = r"classes must be a list of numbers, got \('a', 'b'\)"
    with pytest.raises(UserError, match=message) as caught:
        data.load({"source": "folder", "path": str(folder), "classes": classes})
    assert caught.value.argument == "classes"


def test_a_range_beyond_the_classes_is_refused_before_any_memory(folder):
    for classes in ((1, 3), (0, 10**15), (10**15, 10**15 + 1)):
        with pytest.raises(UserError, match=r"asked for, but the data set has classes 0\.\.1"):
            data.load({"source": "folder", "path": str(folder), "classes": classes})


def test_bars_only_where_they_are_asked_for(folder, monkeypatch):
    spec, shown = {"source": "folder", "path": str(folder)}, []
    load = reading.read
    monkeypatch.setattr(
        reading, "read", lambda *a, **k: shown.append(k["progress"]) or load(*a, **k)
    )
    data.load(spec), data.load(spec, progress=True)
    assert shown == [None, f"reading {folder.name}"]


# Roles


def of_classes(*names):
    images = np.zeros((len(names), 1, 1, 3), np.uint8)
    return Dataset(images, np.arange(len(names)), names)


def check(tasks=("a", "b"), query=("c",), gallery=("c",), pretrained=("d",), may_share=False):
    retrieval = {"query": of_classes(*query), "gallery": of_classes(*gallery)}
    check_roles(of_classes(*tasks), retrieval, {} if may_share else {"model 0": pretrained})


def test_tasks_and_retrieval_may_share():
    check()
    check(query=("a", "c"), gallery=("a", "c"))


def test_pretraining_and_retrieval_share_only_where_the_configuration_says_so():
    with pytest.raises(
        UserError, match=r"model 0 and query .*\(c\).*pretraining_may_share=True"
    ) as caught:
        check(pretrained=("c", "d"))
    assert caught.value.argument == "pretraining_may_share"
    check(pretrained=("c", "d"), may_share=True)
    check(pretrained=("a", "b"))  # tasks may go on with classes of the pre-training


def test_query_and_gallery_have_the_same_classes_in_one_order():
    check_same_classes(of_classes("a", "b"), of_classes("a", "b"))
    for other in (("b", "a"), ("a",), ("a", "b", "c")):
        with pytest.raises(UserError, match="query and gallery have different classes"):
            check_same_classes(of_classes("a", "b"), of_classes(*other))
    with pytest.raises(UserError, match="query and gallery have different classes"):
        check(gallery=("e",))


def test_all_roles_have_pictures_of_one_size():
    large = Dataset(np.zeros((1, 2, 2, 3), np.uint8), np.zeros(1, int), ("c",))
    for role in ("query", "gallery"):
        retrieval = {"query": of_classes("c"), "gallery": of_classes("c"), role: large}
        with pytest.raises(
            UserError, match=rf"{role} has images of \(2, 2, 3\), training of \(1, 1"
        ):
            check_roles(of_classes("a"), retrieval, {})
