"""Pictures: one function decodes them, one resizes them, one lists a folder of them.

A picture becomes uint8[height, width, 3] in RGB by these rules, whatever it came from:

- turned upright as its EXIF orientation says;
- of an animation or a file of several pages, the first frame;
- grey, palette, CMYK, YCbCr and Lab are converted to RGB;
- transparent pixels are composed on white, whatever colour they hide;
- 16-bit grey is scaled to 8 bits; 32-bit and floating-point pixels are refused;
- broken, truncated and enormous files are refused, by name.

In a folder, hidden files and what systems leave behind (`@eaDir`, `__MACOSX`, `Thumbs.db`, …) are no
pictures; links are followed, dangling ones refused.
"""

import io
import os
import stat
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from compat_jax.errors import UserError

_LEFT_BEHIND = {"@eadir", "__macosx", "thumbs.db", "desktop.ini", "ehthumbs.db", "lost+found"}
_LISTED = 10
_WHITE = (255, 255, 255, 255)
# EXIF orientation: what turns the picture upright.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BadPictures(UserError):
    """Files that cannot be read as pictures.

    Attributes:
      problems: one line a file, naming it.
    """

    def __init__(self, problems: Sequence[str]):
        self.problems = tuple(problems)
        shown = "; ".join(self.problems[:_LISTED])
        more = len(self.problems) - _LISTED
        super().__init__(
            (f"{len(self.problems)} pictures cannot be read: " if len(self.problems) > 1 else "")
            + shown
            + (f"; and {more} more" if more > 0 else "")
        )


def decode(content: bytes | os.PathLike | str, where: str) -> np.ndarray:
    """Decode a picture by the rules above.

    Args:
      content: the encoded bytes, or the path of a file.
      where: what to call the picture in errors: its path, or its record.

    Returns:
      uint8[height, width, 3].

    Raises:
      BadPictures: it cannot be decoded, with the reason and the remedy.
    """
    source = io.BytesIO(content) if isinstance(content, bytes) else content
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of what the rules above settle
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(source) as image:
                return _rgb(image)
    except FileNotFoundError as error:
        raise BadPictures([f"{where} vanished while it was read: put it back"]) from error
    except UnidentifiedImageError as error:  # its own text has the address of an object
        raise BadPictures(
            [
                f"{where} is not a picture that Pillow can read: remove or repair it (no known format)"
            ]
        ) from error
    except UserError as error:
        raise BadPictures([f"{where} {error}"]) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadPictures([f"{where} has too many pixels: make it smaller ({error})"]) from error
    except Exception as error:  # Pillow raises many kinds for a broken file; all are passed on here
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise BadPictures(
            [f"{where} is not a picture that Pillow can read: remove or repair it ({reason})"]
        ) from error


def _rgb(image):
    image.load()
    if image.mode.startswith("I;16") or (image.mode, image.format) == ("I", "PPM"):
        wide = np.asarray(image).astype(np.uint16)
        grey = np.rint(wide.astype(np.float32) / 257.0).astype(np.uint8)
        grey = np.where(wide == image.info.get("transparency", -1), np.uint8(255), grey)
        image = _upright(Image.fromarray(grey), image)
    elif image.mode[0] in "IF":  # Pillow would clip these to 0..255
        raise UserError("has more than 16 bits per channel: convert it to 8")
    else:
        image = _upright(image, image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, _WHITE), image)
    pixels = np.asarray(image.convert("RGB"))
    if 0 in pixels.shape:
        raise UserError(f"is empty: {pixels.shape[1]} x {pixels.shape[0]} pixels")
    return pixels


def _upright(image, source):
    """Turn an image as the EXIF data of its source say; broken data turn nothing."""
    try:
        orientation = source.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # Pillow raises many kinds; the pixels are whole
        orientation = None
    turn = _TURNS.get(orientation)
    return image if turn is None else image.transpose(turn)


def resized(image: np.ndarray, size: int | None) -> np.ndarray:
    """Bring a picture to size x size; None leaves it as it is.

    Args:
      image: uint8[height, width, channels]; one channel becomes three equal ones.
      size: side in pixels.

    Returns:
      uint8[size, size, 3], each pixel the mean of what it covers.

    Raises:
      UserError: not uint8.
    """
    if image.dtype != np.uint8:
        raise UserError(f"images must be uint8 in 0..255, got {image.dtype}")
    if image.shape[-1] == 1:
        image = np.repeat(image, 3, axis=-1)
    if size is None or image.shape[:2] == (size, size):
        return image
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BOX))


def class_folders(root: str | os.PathLike) -> list[tuple[str, list[Path]]]:
    """List a folder with one sub-folder of pictures per class.

    Args:
      root: the folder.

    Returns:
      (class name, its pictures in the order of their paths), sorted by name.

    Raises:
      UserError: no such folder, no class, an empty class, a name that is not UTF-8, a dangling link,
        or a file that is neither a file nor a folder.
    """
    folder = Path(root)
    if not folder.is_dir():
        raise UserError(
            f"no folder {root}: it must hold one sub-folder of pictures per class", "path"
        )
    classes = [p for p in _entries(folder) if p.is_dir()]
    if not classes:
        raise UserError(
            f"{root} has no sub-folder: it must hold one folder of pictures per class", "path"
        )
    return [(class_name(p), _pictures(p)) for p in classes]


def class_name(folder: Path) -> str:
    """Return the class name that a folder stands for.

    Raises:
      UserError: a name that is not UTF-8.
    """
    try:
        folder.name.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"the name of class folder {os.fsencode(folder)!r} is not UTF-8: rename it", "path"
        ) from error
    return folder.name


def _pictures(folder):
    files = list(_walk(folder, ()))
    if not files:
        raise UserError(f"class folder {folder} is empty: add pictures or remove it", "path")
    return files


def _walk(folder, above) -> Iterable[Path]:
    where = folder.resolve()
    if where in above:
        raise UserError(f"{folder} links to a folder around itself: remove the link", "path")
    for path in _entries(folder):
        if path.is_dir():
            yield from _walk(path, (*above, where))
        else:
            yield path


def _entries(folder):
    """List pictures and folders of them, in the order of names."""
    found = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name.lower() in _LEFT_BEHIND:
            continue
        try:
            mode = path.stat().st_mode
        except OSError as error:
            kind = "a link to nowhere" if path.is_symlink() else "nothing that can be read"
            raise UserError(
                f"{path} is {kind} ({error.strerror}): remove it or restore what it names", "path"
            ) from error
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise UserError(f"{path} is neither a file nor a folder: remove it", "path")
        found.append(path)
    return found
