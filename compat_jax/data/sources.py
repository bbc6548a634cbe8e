"""Data sets from where they are: embedded glyphs, TensorFlow Datasets, folders of classes."""

import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from compat_jax.data import glyphs
from compat_jax.data.dataset import Dataset
from compat_jax.data.streaming import RecordImages
from compat_jax.errors import UserError, unknown


def from_tfds(
    name: str,
    split: str = "train",
    size: int | None = None,
    data_dir: str | None = None,
    in_memory: bool = True,
    progress: bool = False,
) -> Dataset:
    """An image-classification data set of TensorFlow Datasets, read without TensorFlow.

    Args:
      name: as in the TFDS catalogue, e.g. "cifar100", "imagenet_resized/32x32".
      split: e.g. "train", "test".
      size: pictures are resized to size x size; None needs them all of one size.
      data_dir: of the prepared data; TFDS_DATA_DIR or ~/tensorflow_datasets by default.
      in_memory: whether to read all images now; otherwise they stay in their files as a
        `streaming.RecordImages`, for data that is larger than the memory of the host.
      progress: whether to show a bar on a terminal.

    Returns:
      A Dataset with the class names of TFDS.

    Raises:
      UserError: not prepared (with the command that prepares it), in another format, unknown split,
        no images or labels.
    """
    import tensorflow_datasets as tfds  # slow to import, and only this source needs it

    data_dir = data_dir or os.environ.get("TFDS_DATA_DIR")  # TFDS reads it once, when imported
    try:
        builder = tfds.builder(name, data_dir=data_dir)
    except tfds.core.registered.DatasetNotFoundError as error:
        raise UserError(
            f"TFDS has no data set {name!r}: see tensorflow.org/datasets/catalog"
        ) from (error)
    except Exception as error:
        raise UserError(f"TFDS cannot open {name!r}: {str(error).splitlines()[0]}") from error
    if not epath.Path(builder.data_dir).is_dir():
        raise UserError(
            f"{name} is not prepared in {builder.data_dir}: run `{_preparing(name, data_dir)}` "
            "(this once needs tensorflow), or set TFDS_DATA_DIR to where it is"
        )
    if split.partition("[")[0] not in builder.info.splits:
        raise unknown(f"split of {name}", split, builder.info.splits)
    features = builder.info.features
    if "image" not in features or "label" not in features:
        raise UserError(f"{name} has no image and label: its features are {sorted(features)}")
    try:
        source = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
    except NotImplementedError as error:
        raise UserError(
            f"{name} in {builder.data_dir} is not in array_record format: delete it and run "
            f"`{_preparing(name, data_dir)}` (this once needs tensorflow)"
        ) from error
    except ValueError as error:
        raise UserError(f"split {split!r} of {name}: {str(error).splitlines()[0]}") from error

    def image(record):
        return _resized(_decoded(record["image"]), size)

    names, where = tuple(features["label"].names), f"{name} {split}"
    images, labels = [], np.empty(len(source), np.int32)
    for i, record in enumerate(_bar(source, where, progress)):
        labels[i] = record["label"]
        if in_memory:
            images.append(image(record))
    if in_memory:
        return _stack(images, labels, names, where)
    return Dataset(RecordImages(source, image(source[0]).shape, image), labels, names)


def _decoded(encoded):
    # TFDS would do the same, and warn once that it does so without OpenCV.
    with Image.open(io.BytesIO(encoded)) as image:
        return np.atleast_3d(np.asarray(image))


def _bar(items, label, progress):
    return tqdm(items, f"reading {label}", leave=False, disable=None if progress else True)


def _preparing(name, data_dir):
    where = f", data_dir={data_dir!r}" if data_dir else ""
    return (
        'python -c "import tensorflow_datasets as tfds; '
        f"tfds.builder({name!r}{where}).download_and_prepare(file_format='array_record')\""
    )


def from_folder(path: str, size: int | None = None, progress: bool = False) -> Dataset:
    """A folder with one sub-folder of pictures a class.

    Args:
      path: of the folder; sub-folders sort by name into classes.
      size: pictures are resized to size x size; None needs them all of one size.
      progress: whether to show a bar on a terminal.

    Returns:
      A Dataset, pictures in the order of their names.

    Raises:
      UserError: no such folder, no class, an empty class, a file that is no picture.
    """
    root = Path(path)
    if not root.is_dir():
        raise UserError(
            f"no folder {path}: data.*.path must hold one sub-folder of pictures a class"
        )
    classes = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not classes:
        raise UserError(f"{path} has no sub-folder: it must hold one folder of pictures a class")
    files = [(f, c) for c, folder in enumerate(classes) for f in _pictures(folder)]
    images = []
    for file, _ in _bar(files, root.name, progress):
        try:
            with Image.open(file) as image:
                if image.mode[0] in "IF":  # Pillow would clip these to 0..255
                    raise UserError(f"{file} has more than 8 bits a channel: convert it to 8")
                images.append(_resized(np.asarray(image.convert("RGB")), size))
        except FileNotFoundError as error:
            raise UserError(f"{file} vanished while {path} was read: put it back") from error
        except (UnidentifiedImageError, OSError) as error:
            raise UserError(f"{file} is not a picture: remove it or repair it") from error
    labels = np.asarray([c for _, c in files], np.int32)
    return _stack(images, labels, tuple(p.name for p in classes), path)


def _pictures(folder):
    files = sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))
    if not files:
        raise UserError(f"class folder {folder} is empty: add pictures or remove it")
    return files


def _resized(image, size):
    if image.dtype != np.uint8:
        raise UserError(f"images must be uint8 in 0..255, got {image.dtype}")
    if image.shape[-1] == 1:
        image = np.repeat(image, 3, axis=-1)
    if size is None or image.shape[:2] == (size, size):
        return image
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BOX))


def _stack(images, labels, names, where):
    shapes = {image.shape for image in images}
    if len(shapes) > 1:
        some = sorted(shapes)[:3]
        raise UserError(f"{where} has pictures of several sizes ({some}...): set data.*.size")
    return Dataset(np.stack(images), labels, names)


def load(spec: Mapping[str, Any], progress: bool = False) -> Dataset:
    """The data set that a section of a configuration describes.

    Args:
      spec: `source` is "glyphs", "tfds" or "folder"; the other fields are arguments of that
        source. Everywhere, `classes` = (start, stop) selects classes and `per_class` the first images
        of each.
      progress: whether to show bars.

    Returns:
      A Dataset labelled 0.. within the selected classes.

    Raises:
      UserError: unknown source or field, missing field, no classes, and what the source raises.
    """
    arguments = {k: v for k, v in spec.items() if v not in (None, "")}
    source = arguments.pop("source", None)
    if source not in SOURCES:
        raise unknown("data source", str(source), SOURCES)
    load_one, fields, required = SOURCES[source]
    for key in arguments:
        if key not in fields:
            raise unknown(f"field of data source {source!r}", key, fields)
    missing = [key for key in required if key not in arguments]
    if missing:
        raise UserError(
            f"data source {source!r} needs {', '.join(missing)}: set data.*.{missing[0]}"
        )
    if "classes" in arguments:
        arguments["classes"] = _class_range(arguments["classes"])
    return load_one(progress=progress, **arguments)


def _class_range(classes):
    whole = all(isinstance(c, int) for c in classes)
    if not whole or len(classes) != 2 or not 0 <= classes[0] < classes[1]:
        raise UserError(
            f"data.*.classes must be (start, stop) with 0 <= start < stop, got {tuple(classes)}"
        )
    return range(*classes)


def _glyphs(classes, per_class, **arguments):
    return glyphs.render(classes, per_class, **arguments)


def _tfds(name, classes=None, per_class=None, **arguments):
    return _selected(from_tfds(name, **arguments), classes, per_class)


def _folder(path, classes=None, per_class=None, **arguments):
    return _selected(from_folder(path, **arguments), classes, per_class)


def _selected(dataset, classes, per_class):
    if classes is not None:
        dataset = dataset.select(classes)
    return dataset.per_class(per_class)


# name: (function, its fields, those that have no default)
SOURCES = {
    "glyphs": (
        _glyphs,
        ("classes", "per_class", "look", "seed", "size", "photo_share", "strength", "noise"),
        ("classes", "per_class", "look", "seed"),
    ),
    "tfds": (
        _tfds,
        ("name", "split", "size", "data_dir", "in_memory", "classes", "per_class"),
        ("name",),
    ),
    "folder": (_folder, ("path", "size", "classes", "per_class"), ("path",)),
}


def check_roles(
    tasks: Dataset,
    retrieval: Mapping[str, Dataset],
    pretrained_classes: Mapping[str, tuple[str, ...]],
    pretraining_may_share: bool,
) -> None:
    """Refuse classes in two roles: the compatibility of unseen classes is what is measured.

    Args:
      tasks: data of the task sequence.
      retrieval: query and gallery.
      pretrained_classes: class names that each pre-trained model saw.
      pretraining_may_share: whether pre-training and retrieval may share classes.

    Raises:
      UserError: naming the shared classes.
    """
    for role, dataset in retrieval.items():
        _refuse_shared("tasks", tasks.class_names, role, dataset.class_names, "")
        for name, classes in pretrained_classes.items():
            if not pretraining_may_share:
                remedy = " or set data.pretraining_may_share=True"
                _refuse_shared(name, classes, role, dataset.class_names, remedy)


def _refuse_shared(role_a, names_a, role_b, names_b, remedy):
    shared = sorted(set(names_a) & set(names_b))
    if shared:
        raise UserError(
            f"{role_a} and {role_b} share {len(shared)} classes ({', '.join(shared[:5])}): "
            f"choose other classes for one of them{remedy}"
        )
