"""The pictures that a gallery's rows were made from: found by key, known by digest, embedded."""

import dataclasses
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from compat_jax.chain import Version
from compat_jax.data.listing import Picture, list_pictures
from compat_jax.data.pictures import BadPictures, decode, missing
from compat_jax.data.reading import ON_BAD, block_size, content, digest, in_order
from compat_jax.errors import UserError
from compat_jax.fields import Rule, check_fields
from compat_jax.files import absolute
from compat_jax.mesh import make_mesh
from compat_jax.models import DTYPE_CHOICES, computed_in
from compat_jax.session import never
from compat_jax.spaces import Preprocessing


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """How the pictures of a gallery are read, embedded and written.

    Attributes:
      mesh: devices to spread each batch over; all of this host by default.
      batch_size: pictures per batch of the network.
      dtype: of the network's computation; see `Run`.
      part: rows per write. A store keeps each write apart until it is told to refresh: thousands.
      on_bad: "stop" refuses new files that are no pictures; "skip" leaves them out and names them.
      should_stop: asked between writes; when it returns True, `Stopped` is raised.
      progress: whether to show how far it is, on stderr.
    """

    mesh: Mesh | None = None
    batch_size: Annotated[int, Rule("pictures per batch", low=1, high=10**6)] = 64
    dtype: Annotated[str, Rule("of the computation", choices=DTYPE_CHOICES)] = "float32"
    part: Annotated[int, Rule("rows per write", low=1, high=10**7)] = 4096
    on_bad: Annotated[str, Rule("files that are no pictures", choices=ON_BAD)] = "stop"
    should_stop: Callable[[], bool] = never
    progress: Annotated[bool, Rule("whether to show how far it is")] = False

    def __post_init__(self):
        check_fields(self)
        object.__setattr__(self, "dtype", computed_in(self.dtype))

    def label(self, text: str) -> str | None:
        """Return the label of a progress line; None where none is shown."""
        return text if self.progress else None


class Listed(NamedTuple):
    """A picture to put into a gallery.

    Attributes:
      key: name of its row.
      picture: path, or pixels, see `data.pictures.decode`.
      payload: what is known of it from its list: class and part.
    """

    key: str
    picture: Any
    payload: Mapping[str, Any]


class Originals:
    """Where the pictures are.

    Args:
      root: folder that all are in, local or gs://, so that a row's key is a path within it and the
        folder can move; or a mapping {key: picture} for pictures that are no files; None for pictures
        anywhere, whose keys are absolute paths.
    """

    def __init__(self, root: str | os.PathLike | Mapping[str, Any] | None = None):
        self.given = root if isinstance(root, Mapping) else None
        folder = None if root is None or isinstance(root, Mapping) else str(absolute(root))
        self.root = None if folder is None else folder.rstrip("/") + "/"

    def listed(self, pictures: Any) -> list[Listed]:
        """List pictures with their keys, each once.

        Args:
          pictures: file, folder or pattern; a list of files and folders; a list of
            `data.listing.Picture`, whose classes become the payload's "label"; or a mapping
            {key: picture}.

        Raises:
          UserError: nothing there, a path outside the root, or a key that is no text in UTF-8.
        """
        if isinstance(pictures, Mapping):
            found = [Listed(_checked(key), picture, {}) for key, picture in pictures.items()]
        elif isinstance(pictures, list | tuple) and any(isinstance(p, Picture) for p in pictures):
            found = [Listed(self.key(p.path), p.path, _known(p)) for p in pictures]
        else:
            found = [Listed(self.key(path), path, {}) for path in list_pictures(pictures)]
        if not found:
            raise UserError("there are no pictures in what was given", "pictures")
        return list({one.key: one for one in found}.values())

    def key(self, path: str | os.PathLike) -> str:
        """Return the key of a picture: its path within the root, else its absolute path.

        A path that is not absolute is a key already where there is a root; ~/ is the home folder.

        Raises:
          UserError: no path, outside the root, or not UTF-8.
        """
        if not isinstance(path, str | os.PathLike):
            raise UserError(
                f"the key of a picture is a text or a path, got {path!r:.80}", "pictures"
            )
        text = os.fsdecode(path)
        if self.given is not None:
            return _checked(text)
        if self.root is None:
            return _checked(str(absolute(text)))
        if not (os.path.isabs(text) or "://" in text or text.startswith("~/")):
            return _checked(text)
        full = str(absolute(text))
        if not full.startswith(self.root):
            raise UserError(
                f"{full} is not in {self.root}: give a root that all pictures are in", "root"
            )
        return _checked(full[len(self.root) :])

    def spellings(self, path: str | os.PathLike) -> tuple[str, ...]:
        """Return the keys that a user may mean: `key`, and that of a relative path below the root.

        Raises:
          UserError: see `key`.
        """
        first = self.key(path)
        if self.root is None or "://" in first or os.fsdecode(path) != first:
            return (first,)
        full = os.path.abspath(first)
        return (first, full[len(self.root) :]) if full.startswith(self.root) else (first,)

    def check_beside(self, key: str) -> None:
        """Refuse to write beside a row whose key these originals do not give: it would get a second one.

        Raises:
          UserError: the key is an absolute path and there is a root, or the other way round.
        """
        is_absolute = os.path.isabs(key) or "://" in key
        if self.given is not None or is_absolute == (self.root is None):
            return
        if is_absolute:
            raise UserError(
                f"the gallery's keys are absolute paths, such as {key}: leave root out, as before, or "
                "each picture gets a second row",
                "root",
            )
        raise UserError(
            f"the gallery's keys are paths within a folder, such as {key}: give that folder as root, as "
            "before, or each picture gets a second row",
            "root",
        )

    def find(self, key: str) -> Any:
        """Return the picture of a row: its path, or what the mapping has.

        Raises:
          BadPictures: the mapping lacks it, or the key leads out of the root.
        """
        if self.given is not None:
            if key not in self.given:
                raise missing(key)
            return self.given[key]
        if self.root is None:
            return key
        if os.path.isabs(key) or "://" in key or ".." in key.split("/"):
            raise BadPictures(
                [
                    f"{key} is not in {self.root}: give a root that all pictures are in, or none if "
                    "they were indexed without"
                ]
            )
        return self.root + key


class Embedded(NamedTuple):
    """Features of those pictures of a list that are pictures, and are the ones that were meant.

    Attributes:
      kept: int64[m], their positions in the list.
      contents: digest of each, hexadecimal.
      vectors: float32[m, d].
      problems: {key: what is wrong} with others.
      changed: keys of pictures that are others now than was expected.
    """

    kept: np.ndarray
    contents: Sequence[str]
    vectors: np.ndarray
    problems: Mapping[str, str]
    changed: Sequence[str]


def content_of(picture: Any) -> str:
    """Return the digest of a picture, hexadecimal: of its file, or of its pixels and their shape.

    Raises:
      BadPictures: its file cannot be read.
    """
    return _read(picture)[0]


def contents_of(pictures: Sequence[Any]) -> list[str]:
    """Return the digest of each picture, "" for one that cannot be read; in parallel."""

    def one(i):
        try:
            return content_of(pictures[i])
        except BadPictures:
            return ""

    return list(in_order(len(pictures), one))


def embed(
    version: Version,
    keys: Sequence[str],
    find: Callable[[str], Any],
    *,
    preprocessing: Preprocessing,
    work: Work,
    expected: Sequence[str] | None = None,
    tick: Callable[[], Any] = never,
) -> Embedded:
    """Embed pictures; those that cannot be are named, not raised.

    Each file is read once: its digest and its pixels are those of the same bytes.

    Args:
      version: that embeds.
      keys: of the pictures.
      find: (key) -> picture, see `Originals.find`.
      preprocessing: of the gallery.
      work: devices and batches.
      expected: digests; pictures of another are not embedded.
      tick: called after each picture was read.
    """
    kept: list[int] = []
    contents: list[str] = []
    problems: dict[str, str] = {}
    changed: list[str] = []
    shape = tuple(preprocessing.image_shape)

    def load(i):
        try:
            mark, data = _read(find(keys[i]))
            if expected is not None and mark != expected[i]:
                return mark, None, None
            return mark, _pixels(data, keys[i], preprocessing), None
        except BadPictures as error:
            return "", None, "; ".join(error.problems)

    def stream() -> Iterator[np.ndarray]:
        block = block_size(int(np.prod(shape)))
        for i, (mark, pixels, problem) in enumerate(in_order(len(keys), load, block=block)):
            tick()
            if pixels is not None:
                kept.append(i)
                contents.append(mark)
                yield pixels
            elif problem is not None:
                problems[keys[i]] = problem
            else:
                changed.append(keys[i])

    vectors = version.embed(
        stream(),
        preparation=preprocessing.preparation,
        mesh=work.mesh or make_mesh("data:-1", jax.local_devices()),
        batch_size=work.batch_size,
        dtype=work.dtype,
    )
    return Embedded(np.array(kept, np.int64), contents, vectors, problems, changed)


def _read(picture) -> tuple[str, Any]:
    """Return the digest of a picture, and its bytes or pixels."""
    if isinstance(picture, str | os.PathLike):
        data = content(os.fspath(picture))
        return digest(data).hex(), data
    if isinstance(picture, bytes):
        return digest(picture).hex(), picture
    pixels = np.asarray(picture) if hasattr(picture, "__array__") else decode(picture)
    marked = f"{pixels.dtype} {pixels.shape}\n".encode() + np.ascontiguousarray(pixels).tobytes()
    return hashlib.blake2b(marked, digest_size=16).hexdigest(), pixels


def _pixels(data, key, preprocessing) -> np.ndarray:
    """uint8 pixels of the network's size."""
    shape = tuple(preprocessing.image_shape)
    if isinstance(data, np.ndarray) and data.dtype == np.uint8 and data.shape == shape:
        return data
    try:
        pixels = (preprocessing.preparation or decode)(data, key)
    except BadPictures:
        raise
    except UserError as error:
        raise BadPictures([str(error)]) from error
    if pixels.shape != shape:
        raise BadPictures(
            [
                f"{key} has shape {pixels.shape}, the gallery's pictures {shape}: bring it to that size"
            ]
        )
    return pixels


def _known(picture: Picture) -> dict[str, str]:
    known = {"label": picture.label, "split": picture.split}
    return {name: value for name, value in known.items() if value is not None}


def _checked(key: Any) -> str:
    if not isinstance(key, str) or not key:
        raise UserError(f"the key of a picture is a text, got {key!r:.80}", "pictures")
    try:
        key.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{os.fsencode(key)!r} is not UTF-8: rename it", "pictures") from error
    return key
