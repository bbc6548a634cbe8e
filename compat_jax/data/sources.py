"""Data sources: TensorFlow Datasets and folders of classes."""

import os
from collections.abc import Iterable, Sequence
from typing import Annotated, Any

import numpy as np
from etils import epath

from compat_jax.data import glyphs as drawing
from compat_jax.data.dataset import Dataset
from compat_jax.data.pictures import BadPictures, class_folders, decode, resized
from compat_jax.data.registry import class_range, register
from compat_jax.data.streaming import RecordImages
from compat_jax.errors import UserError, unknown
from compat_jax.fields import Group, Rule, checked, describe
from compat_jax.files import absolute
from compat_jax.meter import track

Side = Annotated[int | None, Rule("side of the pictures in pixels", low=1, high=8192)]
Show = Annotated[bool, Rule("whether to show a progress bar")]


@register("tfds")
def from_tfds(
    name: Annotated[str, Rule("as in the TFDS catalogue")],
    split: Annotated[str, Rule("train, test, ...")] = "train",
    size: Side = None,
    data_dir: Annotated[str | None, Rule("folder of the prepared data")] = None,
    in_memory: Annotated[bool, Rule("read all images now, or leave them in their files")] = True,
    progress: Show = False,
) -> Dataset:
    """Read an image-classification data set of TensorFlow Datasets, without TensorFlow.

    Args:
      name: as in the TFDS catalogue, e.g. "cifar100", "imagenet_resized/32x32".
      split: e.g. "train", "test".
      size: pictures are resized to size x size; None requires them all of one size.
      data_dir: of the prepared data; TFDS_DATA_DIR or ~/tensorflow_datasets by default.
      in_memory: whether to read all images now; otherwise they stay in their files as a
        `streaming.RecordImages`, for data larger than the memory of the host.
      progress: whether to show a bar on a terminal.

    Returns:
      A Dataset with the class names of TFDS.

    Raises:
      UserError: not prepared (with the command that prepares it), in another format, unknown split,
        no images or labels, or records that are no pictures.
    """
    import tensorflow_datasets as tfds  # slow to import, and only this source needs it

    size = _side(size)
    builder = _builder(tfds, name, split, data_dir)
    decoders = {"image": tfds.decode.SkipDecoding()}
    try:
        source = builder.as_data_source(split, decoders=decoders)
    except NotImplementedError as error:
        raise UserError(
            f"{name} in {builder.data_dir} is not in array_record format: delete it and run "
            f"`{_preparing(name, data_dir)}` (this once needs tensorflow)"
        ) from error
    except ValueError as error:
        raise UserError(f"split {split!r} of {name}: {str(error).splitlines()[0]}") from error

    def image(record):
        return resized(decode(record["image"], f"a record of {name} {split}"), size)

    names, where = tuple(builder.info.features["label"].names), f"{name} {split}"
    labels = np.empty(len(source), np.int32)
    images: list[np.ndarray] = []
    problems: list[str] = []
    for i, record in enumerate(_bar(source, where, progress)):
        labels[i] = record["label"]
        if in_memory:
            _collect(record["image"], f"record {i} of {where}", size, images, problems)
    if problems:
        raise BadPictures(problems)
    if in_memory:
        return _stacked(images, labels, names, where)
    return Dataset(RecordImages(source, image(source[0]).shape, image), labels, names)


def _builder(tfds, name, split, data_dir):
    """The prepared builder of a data set that has images, labels and this split."""
    data_dir = data_dir or os.environ.get("TFDS_DATA_DIR")  # TFDS reads it once, when imported
    data_dir = None if data_dir is None else str(absolute(data_dir))
    try:
        builder = tfds.builder(name, data_dir=data_dir)
    except tfds.core.registered.DatasetNotFoundError as error:
        raise UserError(
            f"TFDS has no data set {name!r}: see tensorflow.org/datasets/catalog"
        ) from error
    except Exception as error:  # TFDS raises many kinds; the reason is passed on
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
    return builder


def _preparing(name, data_dir):
    where = f", data_dir={data_dir!r}" if data_dir else ""
    return (
        'python -c "import tensorflow_datasets as tfds; '
        f"tfds.builder({name!r}{where}).download_and_prepare(file_format='array_record')\""
    )


@register("folder")
def from_folder(
    path: Annotated[str, Rule("folder with one sub-folder of pictures per class")],
    size: Side = None,
    progress: Show = False,
) -> Dataset:
    """Read a folder with one sub-folder of pictures per class, by the rules of `data.pictures`.

    Args:
      path: of the folder; sub-folders sort by name into classes.
      size: pictures are resized to size x size; None requires them all of one size.
      progress: whether to show a bar on a terminal.

    Returns:
      A Dataset, pictures in the order of their paths.

    Raises:
      UserError: see `pictures.class_folders`; files that are no pictures, all of them at once.
    """
    root, size = absolute(path), _side(size)
    classes = class_folders(root)
    labels = [c for c, (_, files) in enumerate(classes) for _ in files]
    files = [file for _, files in classes for file in files]
    images: list[np.ndarray] = []
    problems: list[str] = []
    for file in _bar(files, root.name, progress):
        _collect(file, str(file), size, images, problems)
    if problems:
        raise BadPictures(problems)
    names = tuple(name for name, _ in classes)
    return _stacked(images, np.asarray(labels, np.int32), names, str(path))


def _side(size):
    """The side of pictures, checked also where no configuration has been."""
    return checked(next(f for f in describe(from_folder) if f.name == "size"), size)


def _collect(content, where, size, images, problems):
    try:
        images.append(resized(decode(content, where), size))
    except BadPictures as error:
        problems.extend(error.problems)


def _bar(items: Sequence[Any], label: str, progress: bool) -> Iterable[Any]:
    return track(items, f"reading {label}" if progress else None, "pictures")


def _stacked(images, labels, names, where):
    shapes = {image.shape for image in images}
    if len(shapes) > 1:
        some = ", ".join(f"{w} x {h}" for h, w, _ in sorted(shapes)[:3])
        raise UserError(f"{where} has pictures of several sizes ({some}, ...): set size", "size")
    return Dataset(np.stack(images), labels, names)


@register("glyphs")
def glyphs(
    classes: Annotated[tuple[int, ...], Rule("(start, stop) of the glyph classes")],
    per_class: Annotated[int, Rule("pictures of each class", low=1, high=10**7)],
    style: Annotated[drawing.Style, Group()],
    seed: Annotated[int, Rule("of all randomness", low=0, high=2**32 - 1)],
    size: Side = 24,
    progress: Show = False,
) -> Dataset:
    """Draw characters: the embedded data set; see `data.glyphs.render`."""
    wanted, side = class_range(classes), size or 24
    return drawing.render(wanted, per_class, style, seed=seed, size=side, progress=progress)
