"""Data sets, class folders, TFDS without TensorFlow, and class roles."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from compat_jax.data import sources
from compat_jax.data.dataset import Dataset
from compat_jax.errors import UserError

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
    ],
)
def test_data_sets_that_cannot_be(images, labels, message):
    with pytest.raises(UserError, match=message):
        Dataset(images, np.array(labels), ("cat", "dog"))


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
    dataset = sources.from_folder(str(folder))
    assert dataset.images.shape == (4, 6, 6, 3)
    assert dataset.class_names == ("cat", "dog") and dataset.labels.tolist() == [0, 0, 0, 1]
    assert dataset.images[:, 3, 3].tolist() == [[9, 8, 7], [5, 5, 5], [6, 6, 6], [7, 7, 7]]


def test_hidden_files_and_folders_are_no_data(folder):
    (folder / ".cache").mkdir()
    (folder / "cat" / ".DS_Store").write_bytes(b"\0")
    (folder / "list.txt").write_text("beside the classes")
    assert len(sources.from_folder(str(folder))) == 4


def test_pictures_of_several_sizes(folder):
    Image.fromarray(GREY_5.repeat(2, axis=1)).save(folder / "dog" / "wide.png")
    with pytest.raises(
        UserError, match=r"several sizes \(\[\(6, 6, 3\), \(6, 12, 3\)\].*data.*size"
    ):
        sources.from_folder(str(folder))
    assert sources.from_folder(str(folder), size=4).images.shape == (5, 4, 4, 3)


def test_resizing_averages(tmp_path):
    (tmp_path / "cat").mkdir()
    checks = np.array([[0, 100], [100, 0]], np.uint8).repeat(2, 0).repeat(2, 1)
    Image.fromarray(checks).save(tmp_path / "cat" / "a.png")
    dataset = sources.from_folder(str(tmp_path), size=2)
    np.testing.assert_array_equal(dataset.images[0, ..., 0], [[0, 100], [100, 0]])
    np.testing.assert_array_equal(sources.from_folder(str(tmp_path), size=1).images, 50)


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
            "f.tiff has more than 8 bits a channel",
        ),
        (
            lambda p: Image.fromarray(np.full((6, 6), 999, np.uint16)).save(p / "dog" / "f.png"),
            "f.png has more than 8 bits a channel",
        ),
    ],
)
def test_folders_that_cannot_be(folder, make, message):
    make(folder)
    with pytest.raises(UserError, match=message):
        sources.from_folder(str(folder))


def test_vanished_picture(folder, monkeypatch):
    monkeypatch.setattr(sources, "_pictures", lambda folder: [folder / "gone.png"])
    with pytest.raises(UserError, match=r"cat/gone.png vanished while .* was read: put it back"):
        sources.from_folder(str(folder))


def test_cut_off_picture(folder):
    content = (folder / "cat" / "more" / "c.jpg").read_bytes()
    (folder / "dog" / "cut.jpg").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"cut.jpg is not a picture: remove it or repair it"):
        sources.from_folder(str(folder))


def test_no_folder(tmp_path):
    with pytest.raises(UserError, match=r"no folder .*absent"):
        sources.from_folder(str(tmp_path / "absent"))
    with pytest.raises(UserError, match="has no sub-folder: it must hold one folder of pictures"):
        sources.from_folder(str(tmp_path))


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
    dataset = sources.from_tfds("tiny_pictures", "train", data_dir=str(tfds_folder))
    assert dataset.images.shape == (6, 6, 6, 3) and dataset.class_names == ("owl", "ant")
    assert sorted(zip(values(dataset), dataset.labels.tolist(), strict=True)) == [
        (0, 0), (20, 1), (40, 0), (60, 1), (80, 0), (100, 1)
    ]  # fmt: skip


def test_tfds_split_and_size(tfds_folder):
    dataset = sources.from_tfds("tiny_pictures", "test", size=4, data_dir=str(tfds_folder))
    assert dataset.images.shape == (2, 4, 4, 3)
    assert sorted(values(dataset)) == [120, 140]


def test_tfds_images_may_stay_in_their_files(tfds_folder):
    spec = {"source": "tfds", "name": "tiny_pictures", "size": 4, "data_dir": str(tfds_folder)}
    spec |= {"classes": (1, 2), "per_class": 2}
    read, left = (sources.load({**spec, "in_memory": there}) for there in (True, False))
    assert isinstance(read.images, np.ndarray) and not isinstance(left.images, np.ndarray)
    np.testing.assert_array_equal(left.images, read.images)
    np.testing.assert_array_equal(np.asarray(left.images[1:]), read.images[1:])
    assert left.fingerprint() == read.fingerprint() and left.class_names == read.class_names


def test_tfds_folder_by_the_environment_of_the_moment(tfds_folder, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tfds_folder))
    assert len(sources.from_tfds("tiny_pictures")) == 6


def test_tfds_not_prepared_names_the_command(tmp_path):
    with pytest.raises(UserError) as error:
        sources.from_tfds("cifar100", data_dir=str(tmp_path))
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
        sources.from_tfds(name, split, data_dir=str(tfds_folder))
    assert "\n" not in str(error.value)


def test_tfds_in_another_format(tfds_folder, tmp_path):
    """What `download_and_prepare()` without a format writes cannot be read without TensorFlow."""
    folder = tmp_path / "tiny_pictures" / "1.0.0"
    folder.mkdir(parents=True)
    for name in ("dataset_info.json", "features.json", "label.labels.txt"):
        (folder / name).write_text((tfds_folder / "tiny_pictures" / "1.0.0" / name).read_text())
    info = json.loads((folder / "dataset_info.json").read_text())
    (folder / "dataset_info.json").write_text(json.dumps({**info, "fileFormat": "tfrecord"}))
    with pytest.raises(UserError, match=r"not in array_record format: delete it and run `python"):
        sources.from_tfds("tiny_pictures", data_dir=str(tmp_path))


# By configuration


def test_load_folder(folder):
    spec = {
        "source": "folder",
        "path": str(folder),
        "size": None,
        "classes": (0, 1),
        "per_class": 2,
    }
    dataset = sources.load(spec)
    assert dataset.class_names == ("cat",) and values(dataset) == [9, 5]


def test_load_tfds(tfds_folder):
    spec = {"source": "tfds", "name": "tiny_pictures", "data_dir": str(tfds_folder)}
    assert len(sources.load(spec)) == 6
    chosen = sources.load({**spec, "classes": (1, 2), "per_class": 2})
    assert chosen.class_names == ("ant",) and len(chosen) == 2


def test_load_glyphs():
    spec = {"source": "glyphs", "classes": (3, 6), "per_class": 2, "look": "print", "seed": 0}
    dataset = sources.load({**spec, "size": 16})
    assert dataset.images.shape == (6, 16, 16, 3)
    assert dataset.labels.tolist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            {"source": "folders", "path": "x"},
            "unknown data source 'folders'. Did you mean 'folder'",
        ),
        ({"path": "x"}, "unknown data source 'None'. Valid: folder, glyphs, tfds"),
        ({"source": "folder", "pth": "x"}, "unknown field of data source 'folder' 'pth'. .*'path'"),
        ({"source": "folder", "path": ""}, r"'folder' needs path: set data\.\*\.path"),
        ({"source": "tfds", "split": "train"}, r"'tfds' needs name: set data\.\*\.name"),
        ({"source": "glyphs", "look": "print"}, "'glyphs' needs classes, per_class, seed: set"),
    ],
)
def test_load_what_is_not_there(spec, message):
    with pytest.raises(UserError, match=message):
        sources.load(spec)


@pytest.mark.parametrize("classes", [(3, 3), (4, 2), (-1, 2), (1, 2, 3), (7,), ("a", "b"), ()])
def test_classes_that_are_no_range(folder, classes):
    with pytest.raises(UserError, match=r"classes must be \(start, stop\) with 0 <= start < stop"):
        sources.load({"source": "folder", "path": str(folder), "classes": classes})


def test_bars_only_where_they_are_asked_for(folder, monkeypatch):
    spec, shown = {"source": "folder", "path": str(folder)}, []
    monkeypatch.setattr(
        sources, "tqdm", lambda items, *_, disable, **__: shown.append(disable) or items
    )
    sources.load(spec), sources.load(spec, progress=True)
    assert shown == [True, None]  # None: on a terminal


# Roles


def of_classes(*names):
    images = np.zeros((len(names), 1, 1, 3), np.uint8)
    return Dataset(images, np.arange(len(names)), names)


def check(tasks=("a", "b"), query=("c",), gallery=("c",), pretrained=("d",), may_share=False):
    retrieval = {"query": of_classes(*query), "gallery": of_classes(*gallery)}
    sources.check_roles(of_classes(*tasks), retrieval, {"model 0": pretrained}, may_share)


@pytest.mark.parametrize("may_share", [False, True])
def test_tasks_and_retrieval_never_share(may_share):
    check(may_share=may_share)
    with pytest.raises(UserError, match=r"tasks and query share 2 classes \(a, b\)"):
        check(query=("a", "c", "b"), may_share=may_share)
    with pytest.raises(UserError, match=r"tasks and gallery share 1 classes \(b\)"):
        check(gallery=("b", "c"), may_share=may_share)


def test_pretraining_and_retrieval_share_only_where_the_configuration_says_so():
    with pytest.raises(UserError, match=r"model 0 and query .*\(c\).*pretraining_may_share=True"):
        check(pretrained=("c", "d"))
    check(pretrained=("c", "d"), may_share=True)
    check(pretrained=("a", "b"))  # tasks may go on with classes of the pre-training
