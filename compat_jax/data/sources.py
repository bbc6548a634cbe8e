"""Data sources: class folders, tables, Hugging Face's and TensorFlow Datasets, drawn characters."""

import dataclasses
import math
import os
from typing import Annotated, TypedDict, Unpack

import numpy as np
from etils import epath

from compat_jax.data import glyphs as drawing
from compat_jax.data import listing, reading
from compat_jax.data.dataset import Dataset
from compat_jax.data.huggingface import is_saved, open_saved
from compat_jax.data.pictures import BadPictures, Crop, Filter, Preparation, Resize, decode
from compat_jax.data.registry import class_range, register, spread
from compat_jax.data.streaming import RecordImages
from compat_jax.errors import UserError, unknown
from compat_jax.fields import Group, PathText, Rule
from compat_jax.files import absolute

Side = Annotated[int | None, Rule("side of the pictures in pixels", low=1, high=8192)]
Show = Annotated[bool, Rule("whether to show a progress bar")]
# Sources whose path is a folder that is listed.
LISTED = ("folder", "huggingface", "pictures")
Part = Annotated[str | None, Rule("part of the data, e.g. train; all of it by default")]


@dataclasses.dataclass(frozen=True)
class Reading:
    """How pictures are selected, brought to size and read.

    Attributes:
      resize, filter, crop: see `pictures.Preparation`.
      on_bad: "stop" refuses files that are no pictures, all at once; "skip" leaves them out.
      in_memory: whether to keep the pixels in memory; by default if they fit into
        `reading.BUDGET`.
      classes: (start, stop) of the classes to take.
      per_class: first pictures of each class to take, before bad ones are skipped.
    """

    resize: Resize = "crop"
    filter: Filter = "bicubic"
    crop: Crop = 1.0
    on_bad: Annotated[
        str, Rule("refuse files that cannot be read, or skip them", choices=reading.ON_BAD)
    ] = "stop"
    in_memory: Annotated[bool | None, Rule("keep the pixels in memory; if they fit by default")] = (
        None
    )
    classes: Annotated[tuple[int, ...] | None, Rule("(start, stop) of the classes to take")] = None
    per_class: Annotated[int | None, Rule("first pictures of each class to take", low=1)] = None

    def preparation(self, size: int | None) -> Preparation | None:
        """Return how pictures are brought to a size; None for no size.

        Raises:
          UserError: no size, but a way to resize.
        """
        if size is not None:
            return Preparation(size, resize=self.resize, filter=self.filter, crop=self.crop)
        for name in ("resize", "filter", "crop"):
            if getattr(self, name) != getattr(Reading, name):
                raise UserError(f"{name} needs a size to resize to: set size", "size")
        return None

    def select(self, dataset: Dataset) -> Dataset:
        """Select classes and the first pictures of each."""
        if self.classes is not None:
            dataset = dataset.select(class_range(self.classes))
        return dataset.per_class(self.per_class)


class ReadingFields(TypedDict, total=False):
    """The fields of `Reading`, given one by one to a source."""

    resize: str
    filter: str
    crop: float
    on_bad: str
    in_memory: bool | None
    classes: tuple[int, ...] | None
    per_class: int | None


@register("folder")
@spread(Reading)
def from_folder(
    path: Annotated[PathText, Rule("folder with one sub-folder of pictures per class")],
    size: Side = None,
    class_folders: Annotated[
        str,
        Rule(
            "classes: the sub-folders, or all folders that hold pictures, by path or name",
            choices=listing.CLASS_FOLDERS,
        ),
    ] = "top",
    exclude: Annotated[
        tuple[str, ...], Rule("patterns of names of files and folders to pass over, e.g. *.txt")
    ] = (),
    progress: Show = False,
    **fields: Unpack[ReadingFields],
) -> Dataset:
    """Read a folder with one sub-folder of pictures per class, by the rules of `data.pictures`.

    Args:
      path: of the folder; sub-folders sort by name into classes.
      size: pictures are resized to size x size; None requires them all of one size.
      class_folders, exclude: see `listing.list_folder`.
      progress: whether to show a bar on a terminal.
      **fields: resize, filter, crop, on_bad, in_memory, classes and per_class; see `Reading`.

    Returns:
      A Dataset, pictures in the order of their paths.

    Raises:
      UserError: see `listing.list_folder`; files that are no pictures, all of them at once.
    """
    how = Reading(**fields)
    shown = _shown(path, progress)
    pictures = listing.list_folder(path, class_folders=class_folders, exclude=exclude)
    return _from_list(pictures, how.preparation(size), how=how, shown=shown)


@register("table")
@spread(Reading)
def from_table(
    path: Annotated[PathText, Rule("table (.csv, .tsv, .parquet) of paths, labels and splits")],
    split: Part = None,
    size: Side = None,
    columns: Annotated[
        tuple[str, ...], Rule("names of the columns of paths, labels and splits, '' for none")
    ] = listing.COLUMNS,
    progress: Show = False,
    **fields: Unpack[ReadingFields],
) -> Dataset:
    """Read the pictures of a table by the rules of `data.pictures`.

    Args:
      path: of the table; paths in it are relative to it.
      split: takes the rows of this split; None takes all.
      size: pictures are resized to size x size; None requires them all of one size.
      columns: see `listing.list_table`; without labels, the Dataset has none.
      progress: whether to show a bar on a terminal.
      **fields: resize, filter, crop, on_bad, in_memory, classes and per_class; see `Reading`.

    Returns:
      A Dataset, pictures in the order of the rows; labels sort by name into classes.

    Raises:
      UserError: see `listing.list_table`; unknown split; files that are no pictures.
    """
    how = Reading(**fields)
    pictures = _of_split(listing.list_table(path, columns), split, path)
    shown = _shown(path, progress)
    return _from_list(pictures, how.preparation(size), how=how, shown=shown)


@register("huggingface")
@spread(Reading)
def from_huggingface(
    path: Annotated[
        PathText, Rule("what save_to_disk wrote, or a folder of class folders per split")
    ],
    split: Part = None,
    size: Side = None,
    progress: Show = False,
    **fields: Unpack[ReadingFields],
) -> Dataset:
    """Read a data set of Hugging Face's `datasets` on disk.

    Args:
      path: of the folder.
      split: e.g. "train"; None for one without splits.
      size: pictures are resized to size x size; None requires them all of one size.
      progress: whether to show a bar on a terminal.
      **fields: resize, filter, crop, on_bad, in_memory, classes and per_class; see `Reading`.

    Raises:
      UserError: `datasets` is not installed, unknown split, no pictures, or what is no picture.
    """
    how = Reading(**fields)
    root = absolute(path)
    if not is_saved(root):
        pictures = _of_split(listing.list_parts(root), split, path)
        shown = _shown(path, progress)
        return _from_list(pictures, how.preparation(size), how=how, shown=shown)
    records = open_saved(root, split)
    labels, names = _numbered(records.labels or [])
    where = f"{root.name} {split}" if split else root.name
    data = Dataset(
        RecordImages(records, (0, 0, 3)), labels, names, preparation=how.preparation(size)
    )
    return _from_records(records, how.select(data), how=how, where=where, progress=progress)


@register("pictures")
@spread(Reading)
def from_pictures(
    path: Annotated[PathText, Rule("folder, file or pattern of pictures without labels")],
    size: Side = None,
    progress: Show = False,
    **fields: Unpack[ReadingFields],
) -> Dataset:
    """Read pictures without labels by the rules of `data.pictures`.

    Args:
      path: of a folder, with all folders in it, of a file, or a pattern such as "photos/*.jpg".
      size: pictures are resized to size x size; None requires them all of one size.
      progress: whether to show a bar on a terminal.
      **fields: resize, filter, crop, on_bad, in_memory, classes and per_class; see `Reading`.

    Raises:
      UserError: see `listing.list_pictures`; files that are no pictures, all of them at once.
    """
    how = Reading(**fields)
    pictures = [listing.Picture(file) for file in listing.list_pictures(path)]
    shown = _shown(path, progress)
    return _from_list(pictures, how.preparation(size), how=how, shown=shown)


def _shown(path, progress):
    return f"reading {absolute(path).name}" if progress else None


def _of_split(pictures, split, path):
    if split is None:
        return pictures
    splits = {picture.split for picture in pictures} - {None}
    if not splits:
        raise UserError(f"{path} has no splits: leave split out", "split")
    if split not in splits:
        raise unknown(f"split of {path}", split, splits, "split")
    return [picture for picture in pictures if picture.split == split]


def _numbered(labels):
    """Return labels as numbers, and their names, sorted; (None, ()) without labels."""
    if not labels:
        return None, ()
    names = sorted(set(labels))
    numbers = {name: number for number, name in enumerate(names)}
    return np.array([numbers[label] for label in labels], np.int32), tuple(names)


def _from_list(pictures, preparation, *, how, shown):
    """Select pictures of a list, then read them."""
    files = tuple(p.path for p in pictures)
    labels, names = _numbered([p.label for p in pictures if p.label is not None])
    unread = reading.FileImages(files, (0, 0, 3))
    chosen = how.select(Dataset(unread, labels, names, files=files))
    found = reading.read(
        chosen.files,
        preparation,
        on_bad=how.on_bad,
        in_memory=how.in_memory,
        progress=shown,
    )
    return Dataset(
        found.images,
        None if chosen.labels is None else chosen.labels[found.kept],
        chosen.class_names,
        preparation=preparation,
        files=tuple(chosen.files[row] for row in found.kept),
        digests=found.digests,
    )


@register("tfds")
@spread(Reading)
def from_tfds(
    name: Annotated[str, Rule("as in the TFDS catalogue")],
    split: Annotated[str, Rule("train, test, ...")] = "train",
    size: Side = None,
    data_dir: Annotated[PathText | None, Rule("folder of the prepared data")] = None,
    progress: Show = False,
    **fields: Unpack[ReadingFields],
) -> Dataset:
    """Read an image-classification data set of TensorFlow Datasets, without TensorFlow.

    Args:
      name: as in the TFDS catalogue, e.g. "cifar100", "imagenet_resized/32x32".
      split: e.g. "train", "test".
      size: pictures are resized to size x size; None requires them all of one size.
      data_dir: of the prepared data; TFDS_DATA_DIR or ~/tensorflow_datasets by default.
      progress: whether to show a bar on a terminal.
      **fields: as for `from_folder`. By default, all images are read into memory; with in_memory=False
        they stay in their files as a `streaming.RecordImages`, for data larger than the memory of the
        host.

    Returns:
      A Dataset with the class names of TFDS.

    Raises:
      UserError: not prepared (with the command that prepares it), in another format, unknown split,
        no images or labels, or records that are no pictures.
    """
    import tensorflow_datasets as tfds  # slow to import, and only this source needs it

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
    names, where = tuple(builder.info.features["label"].names), f"{name} {split}"
    labels = np.fromiter((record["label"] for record in source), np.int32, len(source))
    how = Reading(**fields)
    how = dataclasses.replace(how, in_memory=how.in_memory is not False)
    data = Dataset(
        RecordImages(source, (0, 0, 3)), labels, names, preparation=how.preparation(size)
    )
    shown = {"where": where, "progress": progress}
    return _from_records(source, how.select(data), how=how, **shown, verified=True)


def _from_records(source, chosen, *, how, where, progress, verified=False):
    """Decode chosen records: into memory, or to leave them where they are.

    Args:
      source: see `streaming.Records`; a record's "image" is bytes or the path of a file.
      chosen: data set of `RecordImages` of any shape, which are chosen.
      how: `Reading`.
      where: what to call the records.
      progress: whether to show a bar.
      verified: records that stay where they are need not be decoded now, nor their digests taken.
    """
    prepare = chosen.preparation or decode

    def image(record):
        return prepare(record["image"], f"a record of {where}")

    rows = chosen.images.rows
    shape = _record_shape(source, rows, image) if chosen.preparation is None else None
    shape = shape or (chosen.preparation.size, chosen.preparation.size, 3)
    images = RecordImages(source, shape, image, positions=rows)
    keep = math.prod(images.shape) <= reading.BUDGET if how.in_memory is None else how.in_memory
    if verified and not keep:
        np.asarray(images[:1])  # the first one at least
        return dataclasses.replace(chosen, images=images)
    called = [f"record {row} of {where}" for row in rows]

    def load(i):
        content = source.__getitems__([int(rows[i])])[0]["image"]
        if isinstance(content, str):
            content = reading.content(content)
        mark = b"" if verified else reading.digest(content)
        return mark, (prepare if keep else decode)(content, called[i])

    found = reading.gather(
        called,
        load,
        on_bad=how.on_bad,
        keep=keep,
        progress=f"reading {where}" if progress else None,
        block=reading.block_size(math.prod(shape)),
    )
    found.refuse(one_size=chosen.preparation is None)
    return Dataset(
        found.images if keep else images[found.kept],
        None if chosen.labels is None else chosen.labels[found.kept],
        chosen.class_names,
        preparation=chosen.preparation,
        digests=None if verified else found.digests,
    )


def _record_shape(source, rows, image):
    """The shape of the first record that is a picture."""
    for row in rows.tolist():
        try:
            return image(source.__getitems__([row])[0]).shape
        except BadPictures:
            continue
    return (0, 0, 3)


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
