"""The embedded data set: characters of the DejaVu fonts that come with matplotlib, drawn with Pillow.

There are two looks: clean print, and distorted, noisy "photographs" of it. Every picture has its own
random stream, addressed by seed, character, picture number and look, so a picture does not depend on
the others that are drawn with it.
"""

import dataclasses
import functools
import hashlib
import importlib.util
import os
import pathlib
import secrets
import time
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from io import BufferedIOBase
from typing import Annotated

import numpy as np
from absl import logging
from PIL import Image, ImageDraw, ImageFilter, ImageFont, features

from compat_jax.data.dataset import Dataset
from compat_jax.errors import UserError
from compat_jax.fields import Rule, check_fields
from compat_jax.files import absolute, check_memory, in_bucket
from compat_jax.meter import Meter

LOOKS = ("photo", "print")
# Pictures drawn at a time, and the number of pictures above which a progress bar is shown.
CHUNK = 128

# Part of the key of every cache file: raise it whenever a change alters a picture or the class list.
_VERSION = 2
_DIGEST_BYTES = 32
_ABANDONED_SECONDS = 3600
_MIN_FACES = 4
_SAME_COSINE = 0.93
_PLAIN_SIZE = 20
# Glyphs are drawn once, this many times larger than the pictures, then sampled.
_OVERSAMPLING = 2

# Half-ranges and means at strength 0 (print) and strength 1; lengths in fractions of the picture.
_LIMITS = {
    "rotation": (0.05, 0.30),  # radians
    "shear": (0.02, 0.22),
    "scale": (0.05, 0.15),
    "aspect": (0.0, 0.12),
    "shift": (0.02, 0.07),
    "perspective": (0.0, 0.16),
    "paper": (240.0, 175.0),
    "paper_spread": (10.0, 50.0),
    "tint": (0.0, 32.0),
    "light": (0.0, 0.20),
    "blur": (0.0, 0.035),
    "occlusion": (0.0, 0.25),  # share of the pictures with a patch over an edge
}
_CONTRAST = (210.0, 95.0)  # between paper and ink; falls geometrically, so never to 0
_NOISE = (1.0, 15.0)  # standard deviation of the sensor noise, in grey levels

# Uniform random numbers of a picture, in the order of its stream.
_DRAWS = (
    *("face", "rotation", "shear", "scale", "aspect", "shift_x", "shift_y"),
    *("perspective_x", "perspective_y", "paper", "contrast"),
    *("paper_red", "paper_green", "paper_blue", "ink_red", "ink_green", "ink_blue"),
    *("light_x", "light_y", "blur_x", "blur_y", "noise"),
    *("occluded", "patch_side", "patch_depth", "patch_shade"),
)
_FIRST_NOISE_DRAW = 64


@dataclasses.dataclass(frozen=True)
class Style:
    """Look of the pictures.

    Attributes:
      look: "print" (clean, dark on light) or "photo" (distorted, tinted, blurred, noisy).
      photo_share: share in 0..1 of each class's pictures, spread evenly, that have the photo look
        although `look` is "print".
      strength: strength of the photo look's distortions; 0 looks like print, 1 is readable, higher
        values are harder.
      noise: factor of the photo look's sensor noise, on top of `strength`.

    Raises:
      UserError: unknown look, or a value out of range.
    """

    look: Annotated[str, Rule("clean print, or distorted photographs", choices=LOOKS)]
    photo_share: Annotated[float, Rule("share of photographs in print", low=0, high=1)] = 0.0
    strength: Annotated[float, Rule("strength of the photographs' distortions", low=0)] = 1.0
    noise: Annotated[float, Rule("factor of the photographs' sensor noise", low=0)] = 1.0

    def __post_init__(self):
        check_fields(self)
        if self.photo_share and self.look == "photo":
            raise UserError(
                f"photo_share is {self.photo_share}, but every picture is a photo: leave it out",
                "photo_share",
            )


def class_names(cache_dir: str | os.PathLike | None = None) -> tuple[str, ...]:
    """Return the characters, one per class, in a fixed shuffled order.

    Left out are characters drawn in fewer than four faces, blanks, controls, marks, characters with
    a Unicode decomposition, and characters that look like one with a smaller code point: the cosine
    between their plain pictures, as drawn or scaled to one size, is above 0.93. Any slice of the list
    is a random sample of the alphabets.

    Args:
      cache_dir: cache folder, default $COMPAT_JAX_CACHE or ~/.cache/compat_jax.

    Returns:
      About 2,500 strings of one character.

    Raises:
      UserError: matplotlib, which has the fonts, is not installed.
    """
    codes = _cached("classes", (), cache_dir, make=_choose_classes)
    return tuple(map(chr, codes.tolist()))


def render(
    classes: Sequence[int],
    images_per_class: int,
    style: Style,
    *,
    seed: int,
    size: int = 24,
    cache_dir: str | os.PathLike | None = None,
    progress: bool = False,
) -> Dataset:
    """Draw pictures of some classes, or read them from the cache.

    Args:
      classes: indices into `class_names()`; class i of the result is classes[i].
      images_per_class: number of pictures of each class.
      style: look of the pictures.
      seed: seed of all randomness; together with the other arguments it fixes every byte.
      size: side of the pictures in pixels.
      cache_dir: cache folder, default $COMPAT_JAX_CACHE or ~/.cache/compat_jax.
      progress: show a bar if there are many pictures to draw.

    Returns:
      Images uint8[n, size, size, 3] in class order, labels 0..len(classes)-1, and the characters as
      class names.

    Raises:
      UserError: an argument is out of range, or matplotlib, which has the fonts, is not installed.
    """
    names = class_names(cache_dir)
    _check(classes, images_per_class, available=len(names), size=size)
    numbers = [int(c) for c in classes]
    characters = tuple(names[c] for c in numbers)
    photo = _which_are_photos(images_per_class, style)
    settings = {
        "seed": int(seed),
        "size": int(size),
        # Print depends on neither: changing them must not draw it again.
        "strength": float(style.strength) if photo.any() else 0.0,
        "noise": float(style.noise) if photo.any() else 0.0,
    }
    draw = functools.partial(_draw_all, characters, photo, **settings, progress=progress)
    key = (characters, photo.tolist(), *settings.values())
    images = _cached("images", key, cache_dir, make=draw)
    labels = np.repeat(np.arange(len(numbers), dtype=np.int32), images_per_class)
    return Dataset(images, labels, characters)


def _check(classes: Sequence[int], images_per_class: int, *, available: int, size: int) -> None:
    bad = next((c for c in classes if not 0 <= c < available), None)
    if bad is not None:
        raise UserError(
            f"class {bad} asked for, but there are {available} glyph classes: "
            f"use 0..{available - 1}",
            "classes",
        )
    if images_per_class < 1:
        raise UserError(
            f"images_per_class is {images_per_class}: use 1 or more", "images_per_class"
        )
    if size < 8:
        raise UserError(f"size is {size} pixels: use 8 or more", "size")
    check_memory(3 * size * size * images_per_class * len(classes), "the pictures")


def _which_are_photos(images_per_class: int, style: Style) -> np.ndarray:
    """Return bool[images_per_class], true for the pictures of a class in the photo look."""
    share = 1.0 if style.look == "photo" else style.photo_share
    count = round(share * images_per_class)
    steps = np.arange(images_per_class + 1) * count // images_per_class
    return np.diff(steps) > 0


def _cached(
    kind: str,
    arguments: tuple,
    cache_dir: str | os.PathLike | None,
    *,
    make: Callable[[], np.ndarray],
) -> np.ndarray:
    """Return what `make` returns for these arguments, from the cache if it has it.

    A cache file is the SHA-256 of its key and its content, then the content, an array in NumPy's .npy
    format. It is verified before it is read; one that fails, or belongs to another key, is made again.
    """
    folder = _cache_folder(cache_dir)
    if folder is None:
        if kind == "images":  # one line per call, although it needs the class list too
            logging.warning("glyphs: no home folder to keep a cache in: set COMPAT_JAX_CACHE")
        return make()
    versions = (_VERSION, Image.__version__, features.version("freetype2"), _fonts_digest())
    key = hashlib.sha256(repr((kind, versions, arguments)).encode()).hexdigest()[:32]
    path = folder / f"{kind}-{key}.cache"
    if path.is_file():  # a pipe or a device in its place would block
        try:
            return _read_verified(path, key)
        except (OSError, ValueError, EOFError) as error:
            logging.warning("glyphs: %s cannot be used (%s): making it again", path, error)
    value = make()
    try:
        _write_whole(path, key, value)
    except OSError as error:
        if kind == "images":
            logging.warning("glyphs: no cache in %s (%s): set COMPAT_JAX_CACHE", folder, error)
    return value


def _cache_folder(cache_dir: str | os.PathLike | None) -> pathlib.Path | None:
    """Return the folder of cache files; None if none was chosen and there is no home folder."""
    chosen = cache_dir or os.environ.get("COMPAT_JAX_CACHE")
    try:
        root = absolute(chosen or "~/.cache/compat_jax")
    except UserError:
        if chosen:
            raise
        return None
    if in_bucket(root):
        raise UserError(
            f"the cache of glyphs must be a local folder, got {root}: set COMPAT_JAX_CACHE to one",
            "cache_dir",
        )
    return pathlib.Path(root) / "glyphs"


def _read_verified(path: pathlib.Path, key: str) -> np.ndarray:
    """Read a cache file after comparing its digest.

    Raises:
      ValueError: the digest differs.
    """
    with open(path, "rb") as file:
        expected = file.read(_DIGEST_BYTES)
        if _digest(file, key) != expected:
            raise ValueError("its SHA-256 differs")
        file.seek(_DIGEST_BYTES)
        return np.lib.format.read_array(file, allow_pickle=False)


def _write_whole(path: pathlib.Path, key: str, value: np.ndarray) -> None:
    """Write a cache file that appears complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(path.parent.glob("*.tmp"))
    unfinished = path.with_name(f"{secrets.token_hex(8)}.tmp")
    try:
        with open(unfinished, "w+b") as file:
            file.write(bytes(_DIGEST_BYTES))
            np.lib.format.write_array(file, value, allow_pickle=False)
            file.seek(_DIGEST_BYTES)
            digest = _digest(file, key)
            file.seek(0)
            file.write(digest)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _digest(file: BufferedIOBase, key: str) -> bytes:
    """Return the SHA-256 of the key and the rest of a file."""
    return hashlib.file_digest(file, lambda: hashlib.sha256(key.encode())).digest()


def _remove_abandoned(files: Iterable[pathlib.Path]) -> None:
    """Remove unfinished files of processes that were killed while they wrote."""
    for file in files:
        try:
            if time.time() - file.stat().st_mtime > _ABANDONED_SECONDS:
                file.unlink()
        except FileNotFoundError:  # finished, or removed by another process
            continue


@functools.cache
def _faces() -> tuple[pathlib.Path, ...]:
    """Return the font files except the almost empty Display faces; plain pictures use the first."""
    # Not imported: it reads MPLBACKEND, which in a notebook names a module that is not installed here.
    spec = importlib.util.find_spec("matplotlib")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("glyphs are drawn with matplotlib's fonts: pip install matplotlib")
    root = pathlib.Path(spec.submodule_search_locations[0], "mpl-data", "fonts", "ttf")
    files = [path for path in root.glob("DejaVu*.ttf") if "Display" not in path.name]
    if not files:
        raise UserError(f"there are no DejaVu fonts in {root}: pip install matplotlib again")
    return tuple(sorted(files, key=lambda path: (path.stem != "DejaVuSans", path.name)))


@functools.cache
def _fonts_digest() -> str:
    return hashlib.sha256(b"".join(face.read_bytes() for face in _faces())).hexdigest()


@functools.cache
def _faces_of_code() -> dict[int, tuple[int, ...]]:
    """Return the faces, as indices into `_faces()`, that draw each code point."""
    from fontTools.ttLib import TTFont  # only drawing needs it

    faces: dict[int, list[int]] = {}
    for index, path in enumerate(_faces()):
        with TTFont(path, lazy=True) as font:
            for code in font.getBestCmap():
                faces.setdefault(code, []).append(index)
    return {code: tuple(having) for code, having in faces.items()}


@functools.cache
def _choose_classes() -> np.ndarray:
    """Return uint32[classes], the code points of the classes."""
    codes = [
        code
        for code, faces in sorted(_faces_of_code().items())
        if len(faces) >= _MIN_FACES
        # Controls, formats, private use, unassigned (C), marks (M), separators (Z) have no picture.
        and unicodedata.category(chr(code))[0] not in "CMZ"
        and not unicodedata.decomposition(chr(code))
    ]
    masks = [_mask(chr(c), _faces_of_code()[c][0], 4 * _PLAIN_SIZE) for c in codes]
    drawn = [(code, mask) for code, mask in zip(codes, masks, strict=True) if mask.getbbox()]
    as_drawn = [mask.reduce(4) for _, mask in drawn]
    one_size = [_scaled(mask) for _, mask in drawn]
    views = [np.array(pictures, np.float64) for pictures in (as_drawn, one_size)]
    kept = _first_of_each_look([view.reshape(len(drawn), -1) for view in views])
    chosen = np.array([code for code, _ in drawn], np.uint32)[kept]
    # Ordered by a hash of the code point: random, but independent of the other characters.
    return chosen[np.argsort(_mix(chosen.astype(np.uint64)), kind="stable")]


def _scaled(mask: Image.Image) -> Image.Image:
    """Scale a glyph's longer side to 0.9 of the square, so that z and Z look the same."""
    glyph = mask.crop(mask.getbbox())
    side = round(0.9 * _PLAIN_SIZE)
    width, height = (max(round(length * side / max(glyph.size)), 1) for length in glyph.size)
    canvas = Image.new("L", (_PLAIN_SIZE, _PLAIN_SIZE))
    corner = ((_PLAIN_SIZE - width) // 2, (_PLAIN_SIZE - height) // 2)
    canvas.paste(glyph.resize((width, height), Image.Resampling.BOX), corner)
    return canvas


def _first_of_each_look(views: Sequence[np.ndarray]) -> np.ndarray:
    """Select rows that are not near an earlier selected row in any view.

    Args:
      views: float64[n, pixels] of whole numbers, each.

    Returns:
      int64[selected], ascending.
    """
    count = len(views[0])
    kept = np.ones(count, bool)
    for start in range(0, count, 512):
        near = np.zeros((min(512, count - start), count), bool)
        for rows in views:
            # Products of whole numbers in float64 are exact in any order of summation, so every
            # machine selects the same characters.
            squares = np.square(rows).sum(axis=1)
            block = slice(start, start + 512)
            products = rows[block] @ rows.T
            near |= np.square(products) > _SAME_COSINE**2 * np.outer(squares[block], squares)
        for index, row in enumerate(near, start):
            kept[index] = not (row[:index] & kept[:index]).any()
    return np.flatnonzero(kept)


@functools.lru_cache(maxsize=1024)
def _font(face: int, size: int) -> ImageFont.FreeTypeFont:
    # The basic layout, since the other one needs a library that may be missing.
    return ImageFont.truetype(str(_faces()[face]), size, layout_engine=ImageFont.Layout.BASIC)


@functools.lru_cache(maxsize=8192)
def _mask(character: str, face: int, side: int) -> Image.Image:
    """Draw a glyph, 255 for ink, in the middle of a square, at most 0.82 of it wide and high."""
    left, top, right, bottom = _font(face, 100).getbbox(character, anchor="ls")
    extent = max(right - left, bottom - top, 1) / 100
    # The square root brings tiny and huge glyphs closer in size but keeps their order.
    em = side * min(0.9 * np.sqrt(0.75 / extent), 3.6, 0.82 / extent)
    font = _font(face, max(int(em), 4))
    left, top, right, bottom = font.getbbox(character, anchor="ls")
    canvas = Image.new("L", (side, side))
    corner = ((side - left - right) / 2, (side - top - bottom) / 2)
    ImageDraw.Draw(canvas).text(corner, character, fill=255, font=font, anchor="ls")
    # A box of two pixels prevents aliasing when every second pixel is sampled.
    return canvas.filter(ImageFilter.BoxBlur(0.5))


def _mix(values: np.ndarray) -> np.ndarray:
    """Apply SplitMix64's output function to uint64 counters: a well-mixed number for each."""
    z = values + np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z ^= z >> np.uint64(shift)
        z *= np.uint64(factor)
    z ^= z >> np.uint64(31)
    return z


def _stream_keys(seed: int, *parts: np.ndarray) -> np.ndarray:
    """Return uint64[n], the start of the stream of each picture, addressed by parts [n]."""
    key = _mix(np.full(len(parts[0]), seed % 2**64, np.uint64))
    for part in parts:
        key = _mix(key ^ _mix(part.astype(np.uint64)))
    return key


def _hashes(keys: np.ndarray, first: int, count: int) -> np.ndarray:
    """Return uint64[n, count], numbers `first`, first + 1, … of each picture's stream."""
    step = np.arange(first, first + count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return _mix(keys[:, None] + step)


def _uniforms(keys: np.ndarray) -> dict[str, np.ndarray]:
    """Return float64[n] in [-1, 1) for each name in `_DRAWS`."""
    values = (_hashes(keys, 0, len(_DRAWS)) >> np.uint64(11)) * 2.0**-52 - 1
    return dict(zip(_DRAWS, values.T, strict=True))


def _bell_noise(keys: np.ndarray, count: int) -> np.ndarray:
    """Return float32[n, count] of mean 0 and variance 1, nearly normal: sums of four bytes."""
    low_bytes = np.uint64(0x00FF00FF00FF00FF)
    words = -(-count // 4)
    bits = _hashes(keys, _FIRST_NOISE_DRAW, 2 * words)
    # Each word now holds four 16-bit sums side by side.
    pairs = (bits & low_bytes) + (bits >> np.uint64(8) & low_bytes)
    sums = pairs[:, :words] + pairs[:, words:]
    noise = sums.view(np.uint16)[:, :count].astype(np.float32)
    noise -= np.float32(4 * 127.5)
    noise *= np.float32(1 / np.sqrt(4 * (256**2 - 1) / 12))
    return noise


def _draw_all(characters, photo, *, seed, size, strength, noise, progress) -> np.ndarray:
    """Draw `len(photo)` pictures of each character: uint8[n, size, size, 3]."""
    per_class = len(photo)
    total = len(characters) * per_class
    images = np.empty((total, size, size, 3), np.uint8)
    codes = np.array([ord(c) for c in characters], np.uint64)
    label = "drawing glyphs" if progress else None
    with Meter(label, total, units="pictures", keep=False) as meter:
        for start in range(0, total, CHUNK):
            flat = np.arange(start, min(start + CHUNK, total))
            owner, picture = flat // per_class, flat % per_class
            address = (codes[owner], picture, photo[picture])
            keys = _stream_keys(seed, *address)
            amount = np.where(photo[picture], float(strength), 0.0)
            some = [characters[i] for i in owner]
            images[flat] = _draw(some, keys, amount, size=size, noise=noise)
            meter.update(len(flat))
    return images


def _draw(characters, keys, amount, *, size, noise) -> np.ndarray:
    """Draw one picture per character: uint8[n, size, size, 3].

    Args:
      characters: n characters.
      keys: uint64[n], start of each picture's random stream.
      amount: float64[n], strength of each picture; 0 for print.
      size: side in pixels.
      noise: factor of the sensor noise.
    """
    draws = _uniforms(keys)
    limits = {
        name: np.maximum(plain + amount * (full - plain), 0.0)
        for name, (plain, full) in _LIMITS.items()
    }
    ink = _ink(characters, draws, limits, size=size)
    paper, ink_colour = _colours(draws, limits, amount)
    images = ink[..., None] * (ink_colour - paper)[:, None, None, :]
    images += paper[:, None, None, :]
    grid = ((np.arange(size) + 0.5) * (2 / size) - 1).astype(np.float32)
    _cover(images, draws, limits, grid=grid)
    slopes = (limits["light"] * draws[f"light_{axis}"] for axis in "xy")
    along_x, along_y = (slope.astype(np.float32)[:, None, None] for slope in slopes)
    images *= (1 + along_x * grid + along_y * grid[:, None])[..., None]
    level = (_NOISE[0] + noise * amount * (_NOISE[1] - _NOISE[0])) * (1 + 0.5 * draws["noise"])
    grain = _bell_noise(keys, size * size * 3)
    grain *= level.astype(np.float32)[:, None]
    images += grain.reshape(images.shape)
    np.clip(images, 0, 255, out=images)
    images += np.float32(0.5)
    return images.astype(np.uint8)


def _ink(characters, draws, limits, *, size) -> np.ndarray:
    """Draw the amount of ink in 0..1 at every pixel: float32[n, size, size]."""
    widths = (0.65 + 0.35 * draws[f"blur_{axis}"] for axis in "xy")
    blurs = np.stack([limits["blur"] * size * width for width in widths], axis=1)
    columns = ((draws["face"] + 1) / 2, _warps(draws, limits, size), blurs)
    pieces = []
    # Converted to Python floats at once: Pillow would convert NumPy scalars one by one.
    for character, face, warp, blur in zip(characters, *(c.tolist() for c in columns), strict=True):
        faces = _faces_of_code()[ord(character)]
        mask = _mask(character, faces[int(face * len(faces))], _OVERSAMPLING * size)
        sampling = (Image.Transform.PERSPECTIVE, warp, Image.Resampling.BILINEAR)
        picture = mask.transform((size, size), *sampling)
        if any(blur):
            picture = picture.filter(ImageFilter.GaussianBlur(tuple(blur)))
        pieces.append(picture.tobytes())
    ink = np.frombuffer(b"".join(pieces), np.uint8).reshape(-1, size, size)
    return ink * np.float32(1 / 255)


def _warps(draws, limits, size) -> np.ndarray:
    """Return float64[n, 8], Pillow's perspective coefficients from picture to mask pixels."""
    angle = limits["rotation"] * draws["rotation"]
    shear = limits["shear"] * draws["shear"]
    zoom = _OVERSAMPLING * np.exp(limits["scale"] * draws["scale"])
    aspect = np.exp(limits["aspect"] * draws["aspect"])
    cos, sin = np.cos(angle), np.sin(angle)
    xx, xy = zoom * aspect * (cos + shear * sin), zoom * aspect * (shear * cos - sin)
    yx, yy = zoom / aspect * sin, zoom / aspect * cos
    # Within these bounds the denominator is positive over the whole picture.
    tilt, shift = np.minimum(limits["perspective"], 0.3), np.minimum(limits["shift"], 0.3)
    tilt_x, tilt_y = (tilt * draws[f"perspective_{axis}"] * 2 / size for axis in "xy")
    middle_x, middle_y = (size * (0.5 + shift * draws[f"shift_{axis}"]) for axis in "xy")
    # The mask's centre maps to (middle_x, middle_y), which is also the centre of the tilt.
    bottom = 1 - tilt_x * middle_x - tilt_y * middle_y
    centre = _OVERSAMPLING * size / 2
    rows = [
        *(xx + centre * tilt_x, xy + centre * tilt_y),
        centre * bottom - xx * middle_x - xy * middle_y,
        *(yx + centre * tilt_x, yy + centre * tilt_y),
        centre * bottom - yx * middle_x - yy * middle_y,
        *(tilt_x, tilt_y),
    ]
    return (np.stack(rows) / bottom).T


def _colours(draws, limits, amount) -> tuple[np.ndarray, np.ndarray]:
    """Return the colours of the paper and of the darker ink, float32[n, 3] each."""
    plain, full = _CONTRAST
    contrast = plain * (full / plain) ** amount * (1 + 0.25 * draws["contrast"])
    paper = limits["paper"] + limits["paper_spread"] * draws["paper"]
    paper = np.clip(paper, np.minimum(contrast + 5, 250), 250)
    colours = []
    for level, name in ((paper, "paper"), (np.maximum(paper - contrast, 5), "ink")):
        tints = np.stack([draws[f"{name}_{part}"] for part in ("red", "green", "blue")], axis=1)
        tints -= tints.mean(axis=1, keepdims=True)
        colours.append((level[:, None] + limits["tint"][:, None] * tints).astype(np.float32))
    return colours[0], colours[1]


def _cover(images, draws, limits, *, grid) -> None:
    """Lay a plain patch over one edge of some pictures, in place."""
    for index in np.flatnonzero((draws["occluded"] + 1) / 2 < limits["occlusion"]).tolist():
        side = int(2 * (draws["patch_side"][index] + 1))
        depth = 0.22 + 0.13 * draws["patch_depth"][index]
        patch = (grid if side % 2 else -grid) > 1 - 2 * depth
        lines = images[index] if side < 2 else images[index].swapaxes(0, 1)
        lines[patch] = 135 + 75 * draws["patch_shade"][index]
