"""Pictures: one function decides what a picture is, one value how it is brought to size.

A picture becomes uint8[height, width, 3] in RGB by these rules, whatever it came from:

- turned upright as its EXIF orientation says;
- of an animation or a file of several pages, the first frame;
- grey, palette, CMYK, YCbCr and Lab are converted to RGB;
- transparent pixels are composed on white, whatever colour they hide;
- 16-bit grey is scaled to 8 bits; 32-bit and floating-point pixels are refused;
- broken, truncated and enormous files are refused, by name.
"""

import dataclasses
import io
import math
import os
import threading
import warnings
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import numpy as np
from etils import epath
from PIL import ExifTags, Image, UnidentifiedImageError

from compat_jax.errors import UserError, unknown
from compat_jax.fields import Rule, check_fields

RULES = (
    "upright by EXIF; first frame; converted to RGB; alpha on white; 16-bit grey scaled to 8 bits"
)
FILTERS = ("bicubic", "bilinear", "box", "lanczos")
RESIZES = ("crop", "squash")
_RESAMPLING = {name: Image.Resampling[name.upper()] for name in FILTERS}
_NARROW = 8  # long side by short side
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

    def __init__(self, problems: Sequence[str], hint: str = ""):
        self.problems = tuple(problems)
        shown = "; ".join(self.problems[:_LISTED])
        more = len(self.problems) - _LISTED
        super().__init__(
            (f"{len(self.problems)} pictures cannot be read: " if len(self.problems) > 1 else "")
            + shown
            + (f"; and {more} more" if more > 0 else "")
            + (f". {hint}" if hint else "")
        )


Size = Annotated[int, Rule("side of the pictures in pixels", low=1, high=8192)]
Resize = Annotated[
    str, Rule("keep the aspect and crop the centre, or squash to a square", choices=RESIZES)
]
Filter = Annotated[str, Rule("of the resize, antialiased", choices=FILTERS)]
Crop = Annotated[
    float, Rule("share of the resized short side that the centre crop keeps", above=0, high=1)
]


@dataclasses.dataclass(frozen=True)
class Preparation:
    """How a picture is brought to its size, before it is augmented and normalised.

    Attributes:
      size: side of the result in pixels.
      resize: "crop" resizes the short side and crops the centre, keeping the aspect; "squash" resizes
        both sides, whatever the aspect.
      filter: Pillow's, which average over what a pixel covers when they shrink (antialiased).
      crop: share of the resized short side that the centre crop keeps; 0.875 resizes to 256 for 224.

    Source: `Resize` and `CenterCrop` of torchvision, whose pixels "crop" gives (up to sides of 8:1).
    """

    size: Size
    resize: Resize = "crop"
    filter: Filter = "bicubic"
    crop: Crop = 1.0

    def __post_init__(self):
        check_fields(self)

    def __call__(self, picture: Any, where: str = "") -> np.ndarray:
        """Decode a picture and bring it to size x size.

        A picture that has this size already is left as it is, to the bit.

        Args:
          picture: see `decode`.
          where: what to call it in errors.

        Returns:
          uint8[size, size, 3].

        Raises:
          UserError: see `decode`.
        """
        return np.asarray(self._sized(_image(picture, where)))

    def _sized(self, image):
        if image.size == (self.size, self.size):
            return image
        method = _RESAMPLING[self.filter]
        if self.resize == "squash":
            return image.resize((self.size, self.size), method)
        short = max(self.size, math.floor(self.size / self.crop + 1e-6))
        sides = [int(short * side / min(image.size)) for side in image.size]
        left, top = (round((side - self.size) / 2) for side in sides)
        right, bottom = left + self.size, top + self.size
        if max(image.size) <= _NARROW * min(image.size):
            return image.resize(sides, method).crop((left, top, right, bottom))
        # A strip of a pixel would become enormous before it is cropped: resize no more than is kept.
        across, down = image.width / sides[0], image.height / sides[1]
        box = (left * across, top * down, right * across, bottom * down)
        box = (*box[:2], min(box[2], image.width), min(box[3], image.height))
        return image.resize((self.size, self.size), method, box=box)

    def describe(self) -> dict[str, Any]:
        """Return the fields and the rules of decoding in words, as JSON values."""
        return {**dataclasses.asdict(self), "rules": RULES}

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> "Preparation":
        """Return the preparation that `describe` described.

        Raises:
          UserError: no size, an unknown field, or a value against its rule.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        for key in mapping:
            if key not in (*names, "rules"):
                raise unknown("field of a preparation", key, names)
        if "size" not in mapping:
            raise UserError("a preparation needs a size", "size")
        return cls(**{key: value for key, value in mapping.items() if key != "rules"})


def decode(
    picture: Any,
    where: str = "",
    *,
    pixels: int | None = None,
    formats: Sequence[str] | None = None,
) -> np.ndarray:
    """Decode a picture by the rules above; the one function that decides what a picture is.

    Args:
      picture: the path of a file, its bytes, a PIL image of any mode, or an array uint8[h, w],
        [h, w, 1], [h, w, 3] or [h, w, 4] (red, green, blue, alpha).
      where: what to call the picture in errors: its path, or its record.
      pixels: that a file may have at most; as many as Pillow admits without a warning by default.
      formats: of files, by Pillow's names; all that it reads by default.

    Returns:
      uint8[height, width, 3].

    Raises:
      BadPictures: it cannot be decoded, with the reason and the remedy.
      UserError: neither a path, bytes, a PIL image nor such an array.
    """
    return np.asarray(_image(picture, where, pixels=pixels, formats=formats))


def missing(name: str) -> BadPictures:
    """Make the error for a file that is not there."""
    return BadPictures([f"{name} is not there: put it back, or take it off the list"])


def _image(picture, where, *, pixels=None, formats=None):
    """Return the picture as a PIL image in RGB."""
    if isinstance(picture, str | os.PathLike):
        name = where or os.fspath(picture)
    else:
        name = where or getattr(picture, "filename", "") or "the picture"
    if not isinstance(picture, str | os.PathLike | bytes | bytearray | memoryview | Image.Image):
        return _of_array(picture, name)
    try:
        with _QUIET:
            return _opened(picture, pixels, formats)
    except FileNotFoundError as error:
        raise missing(name) from error
    except UnidentifiedImageError as error:  # its own text has the address of an object
        raise BadPictures(
            [f"{name} is not a picture that Pillow can read: remove or repair it (no known format)"]
        ) from error
    except UserError as error:
        raise BadPictures([f"{name} {error}"]) from error
    except Image.DecompressionBombError as error:
        raise BadPictures([f"{name} has too many pixels: make it smaller ({error})"]) from error
    except Exception as error:  # Pillow raises many kinds for a broken file; all are passed on here
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise BadPictures(
            [f"{name} is not a picture that Pillow can read: remove or repair it ({reason})"]
        ) from error


def _opened(picture, pixels, formats):
    if isinstance(picture, Image.Image):
        return _rgb(picture)
    if isinstance(picture, bytes | bytearray | memoryview):
        picture = io.BytesIO(picture)
    elif "://" in os.fspath(picture):
        picture = io.BytesIO(epath.Path(picture).read_bytes())
    with Image.open(picture, formats=formats) as image:
        most = Image.MAX_IMAGE_PIXELS  # Pillow raises from twice as many on, and warns before
        most = most if pixels is None else pixels
        if most is not None and image.width * image.height > most:
            raise UserError(
                f"has too many pixels: make it smaller ({image.width} x {image.height})"
            )
        return _rgb(image)


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
    if 0 in image.size:
        raise UserError(f"is empty: {image.width} x {image.height} pixels")
    if image.has_transparency_data:
        image = _on_white(image.convert("RGBA"))
    return image if image.mode == "RGB" else image.convert("RGB")


def _on_white(image):
    return Image.alpha_composite(Image.new("RGBA", image.size, _WHITE), image).convert("RGB")


def _upright(image, source):
    """Turn an image as the EXIF data of its source say; broken data turn nothing."""
    try:
        orientation = source.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # Pillow raises many kinds; the pixels are whole
        orientation = None
    turn = _TURNS.get(orientation)
    return image if turn is None else image.transpose(turn)


def _of_array(value, name):
    """Return an array as a PIL image in RGB."""
    if not hasattr(value, "__array__"):
        raise UserError(
            f"{name} must be a path, the bytes of a file, a PIL image or a uint8 array, got "
            f"{type(value).__name__}"
        )
    pixels = np.asarray(value)
    if pixels.dtype != np.uint8:
        scale = "" if np.issubdtype(pixels.dtype, np.integer) else "multiply by 255 and "
        raise UserError(
            f"{name} must be uint8 in 0..255, got {pixels.dtype}: {scale}convert with "
            ".astype('uint8')"
        )
    if pixels.ndim == 4:
        raise UserError(f"{name} must be one picture, got {len(pixels)}: give them one by one")
    channels = pixels.shape[2] if pixels.ndim == 3 else 1
    if pixels.ndim not in (2, 3) or channels not in (1, 3, 4):
        last = pixels.ndim == 3 and pixels.shape[0] in (1, 3, 4)
        raise UserError(
            f"{name} must be [height, width] or [height, width, 1, 3 or 4 channels], got shape "
            f"{pixels.shape}" + (": bring the channels last, .transpose(1, 2, 0)" if last else "")
        )
    if 0 in pixels.shape:
        raise UserError(f"{name} is empty: {pixels.shape[1]} x {pixels.shape[0]} pixels")
    image = Image.fromarray(
        np.ascontiguousarray(pixels[..., 0] if channels == 1 and pixels.ndim == 3 else pixels)
    )
    return _on_white(image) if channels == 4 else image.convert("RGB")


class _Quiet:
    """While entered by any thread, ignore what Pillow warns of and the rules above settle.

    `warnings.catch_warnings` is not for threads: it would leave the filters of one to the others.
    """

    def __init__(self) -> None:
        self._lock, self._inside, self._filter = threading.Lock(), 0, None

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            filters: Any = warnings.filters
            if self._filter not in filters:
                warnings.filterwarnings("ignore", module=r"PIL\.")
                self._filter = filters[0]

    def __exit__(self, *_: Any) -> None:
        with self._lock:
            self._inside -= 1
            filters: Any = warnings.filters
            if not self._inside and self._filter in filters:
                filters.remove(self._filter)


_QUIET = _Quiet()
