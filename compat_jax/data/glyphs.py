"""The embedded data set: characters of the DejaVu fonts that matplotlib ships, drawn with Pillow.

Two looks: clean print, and distorted, noisy "photographs" of it. Every picture has a random stream
of its own, addressed by seed, character, picture number and look, so a picture does not depend on
which others are drawn with it.
"""

import functools
import hashlib
import os
import pathlib
import secrets
import unicodedata
from collections.abc import Callable, Sequence

import matplotlib
import numpy as np
import tqdm
from absl import logging
from matplotlib import ft2font
from PIL import Image, ImageDraw, ImageFilter, ImageFont, features

from compat_jax.data.dataset import Dataset
from compat_jax.errors import UserError, unknown

LOOKS = ("photo", "print")

# Part of every cache file's name: raise it whenever a change alters a picture or the class list.
_VERSION = 1
_MIN_FACES = 4
_SAME_COSINE = 0.93
_PLAIN_SIZE = 20
# Glyphs are drawn once, this many times larger than the pictures, then sampled.
_OVERSAMPLING = 2
_CHUNK = 128
_BAR_FROM = 2000

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
_CONTRAST = (210.0, 95.0)  # between paper and ink; goes down geometrically, never to 0
_NOISE = (1.0, 15.0)  # standard deviation of the sensor noise, in grey levels

# The uniform random numbers of a picture, in the order of its stream.
_DRAWS = (
    *("face", "rotation", "shear", "scale", "aspect", "shift_x", "shift_y"),
    *("perspective_x", "perspective_y", "paper", "contrast"),
    *("paper_red", "paper_green", "paper_blue", "ink_red", "ink_green", "ink_blue"),
    *("light_x", "light_y", "blur_x", "blur_y", "noise"),
    *("occluded", "patch_side", "patch_depth", "patch_shade"),
)
_FIRST_NOISE_DRAW = 64


def class_names(cache_dir: str | os.PathLike | None = None) -> tuple[str, ...]:
    """The characters, one a class, in a fixed shuffled order.

    Dropped are characters drawn in fewer than four faces, blanks, controls, marks, characters with
    a Unicode decomposition, and those that look like one with a smaller code point: the cosine of
    their plain pictures, as drawn or brought to one size, is above 0.93. Any slice is a random
    sample of the alphabets.

    Args:
      cache_dir: folder of the cache, default $COMPAT_JAX_CACHE or ~/.cache/compat_jax.

    Returns:
      About 2,500 strings of one character.
    """
    return tuple(map(chr, _cached("classes", (), cache_dir, _choose_classes).tolist()))


def render(
    classes: Sequence[int],
    images_per_class: int,
    *,
    look: str,
    seed: int,
    size: int = 24,
    photo_share: float = 0.0,
    strength: float = 1.0,
    noise: float = 1.0,
    cache_dir: str | os.PathLike | None = None,
    progress: bool = False,
) -> Dataset:
    """Pictures of some classes, drawn now or read from the cache.

    Args:
      classes: indices into `class_names()`; class i of the result is classes[i].
      images_per_class: pictures of each class.
      look: "print" (clean, dark on light) or "photo" (distorted, tinted, blurred, noisy).
      seed: of all randomness; with the other arguments it fixes every byte.
      size: side of the pictures in pixels.
      photo_share: with look="print", the share of each class's pictures, spread evenly, that are
        in the photo look all the same, 0..1.
      strength: of the photo look's distortions; 0 makes it print, 1 is readable, higher is harder.
      noise: multiplies the photo look's sensor noise on top of `strength`.
      cache_dir: folder of the cache, default $COMPAT_JAX_CACHE or ~/.cache/compat_jax.
      progress: whether to show a bar when there are many pictures to draw.

    Returns:
      Images uint8[n, size, size, 3] in class order, labels 0..len(classes)-1, names = characters.

    Raises:
      UserError: an argument out of its range, or an unknown look.
    """
    names = class_names(cache_dir)
    classes = [int(c) for c in classes]
    _check(classes, len(names), images_per_class, look, size, photo_share, strength, noise)
    characters = tuple(names[c] for c in classes)
    photo = _which_are_photos(images_per_class, look, photo_share)
    # Print has neither: tuning them must not draw it again.
    of_photos = (float(strength), float(noise)) if photo.any() else (0.0, 0.0)
    settings = (int(seed), int(size), *of_photos)
    draw = functools.partial(_draw_all, characters, photo, *settings, progress)
    images = _cached("images", (characters, photo.tolist(), *settings), cache_dir, draw)
    labels = np.repeat(np.arange(len(classes), dtype=np.int32), images_per_class)
    return Dataset(images, labels, characters)


def _check(classes, available, images_per_class, look, size, photo_share, strength, noise):
    bad = [c for c in classes if not 0 <= c < available]
    if bad:
        raise UserError(
            f"class {bad[0]} asked for, but there are {available} glyph classes: "
            f"use 0..{available - 1}"
        )
    if look not in LOOKS:
        raise unknown("look", look, LOOKS)
    if images_per_class < 1:
        raise UserError(f"images_per_class is {images_per_class}: use 1 or more")
    if size < 8:
        raise UserError(f"size is {size} pixels: use 8 or more")
    if not 0 <= photo_share <= 1:
        raise UserError(f"photo_share is {photo_share}: use a share from 0 to 1")
    if photo_share and look == "photo":
        raise UserError(f"photo_share is {photo_share}, but every picture is a photo: leave it out")
    for name, value in (("strength", strength), ("noise", noise)):
        if not (np.isfinite(value) and value >= 0):
            raise UserError(f"{name} is {value}: use 0 or more")


def _which_are_photos(images_per_class: int, look: str, photo_share: float) -> np.ndarray:
    """bool[images_per_class]: the pictures of a class in the photo look, evenly spread."""
    share = 1.0 if look == "photo" else photo_share
    count = round(share * images_per_class)
    steps = np.arange(images_per_class + 1) * count // images_per_class
    return np.diff(steps) > 0


def _cached(kind: str, arguments: tuple, cache_dir, make: Callable[[], np.ndarray]) -> np.ndarray:
    """The array that `make` returns for these arguments, from the cache if it is there."""
    root = cache_dir or os.environ.get("COMPAT_JAX_CACHE") or "~/.cache/compat_jax"
    versions = (_VERSION, Image.__version__, features.version("freetype2"), _fonts_digest())
    digest = hashlib.sha256(repr((versions, arguments)).encode()).hexdigest()[:32]
    path = pathlib.Path(root).expanduser() / "glyphs" / f"{kind}-{digest}.npz"
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            return archive["value"]
    except (FileNotFoundError, NotADirectoryError):
        pass
    # A damaged archive raises nearly anything; its checksum finds a changed byte.
    except Exception as error:
        logging.warning("glyphs: cannot read %s (%s): making it again", path, error)
    value = make()
    try:
        _write_whole(path, value)
    except OSError as error:
        if kind == "images":  # One line for a call, although it needs the class list too.
            logging.warning("glyphs: no cache in %s (%s): set COMPAT_JAX_CACHE", root, error)
    return value


def _write_whole(path: pathlib.Path, value: np.ndarray) -> None:
    """Writes a file that appears complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{secrets.token_hex(8)}.tmp")
    try:
        with open(unfinished, "wb") as file:
            np.savez(file, value=value)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


@functools.cache
def _faces() -> tuple[pathlib.Path, ...]:
    """The font files but for the almost empty Display faces; plain pictures use the first."""
    files = pathlib.Path(matplotlib.get_data_path(), "fonts", "ttf").glob("DejaVu*.ttf")
    files = [path for path in files if "Display" not in path.name]
    return tuple(sorted(files, key=lambda path: (path.stem != "DejaVuSans", path.name)))


@functools.cache
def _fonts_digest() -> str:
    return hashlib.sha256(b"".join(face.read_bytes() for face in _faces())).hexdigest()


@functools.cache
def _faces_of_code() -> dict[int, tuple[int, ...]]:
    """The faces, as indices into `_faces()`, that draw each code point."""
    faces: dict[int, list[int]] = {}
    for index, path in enumerate(_faces()):
        for code in ft2font.FT2Font(str(path)).get_charmap():
            faces.setdefault(code, []).append(index)
    return {code: tuple(sorted(having)) for code, having in faces.items()}


@functools.cache
def _choose_classes() -> np.ndarray:
    """uint32[classes]: code points."""
    codes = [
        code
        for code, faces in sorted(_faces_of_code().items())
        if len(faces) >= _MIN_FACES
        # Controls, formats, private use, unassigned (C), marks (M), separators (Z): no picture.
        and unicodedata.category(chr(code))[0] not in "CMZ"
        and not unicodedata.decomposition(chr(code))
    ]
    masks = [_mask(chr(c), _faces_of_code()[c][0], 4 * _PLAIN_SIZE) for c in codes]
    drawn = [(code, mask) for code, mask in zip(codes, masks, strict=True) if mask.getbbox()]
    as_drawn = [mask.reduce(4) for _, mask in drawn]
    one_size = [_brought_to_one_size(mask) for _, mask in drawn]
    views = [np.array(pictures, np.float64) for pictures in (as_drawn, one_size)]
    kept = _first_of_each_look([view.reshape(len(drawn), -1) for view in views])
    codes = np.array([code for code, _ in drawn], np.uint32)[kept]
    # Ordered by a hash of the code point: random, yet not moved by what else is in the list.
    return codes[np.argsort(_mix(codes.astype(np.uint64)), kind="stable")]


def _brought_to_one_size(mask: Image.Image) -> Image.Image:
    """The glyph, its longer side 0.9 of the square, so that z and Z are alike."""
    glyph = mask.crop(mask.getbbox())
    side = round(0.9 * _PLAIN_SIZE)
    shape = [max(round(length * side / max(glyph.size)), 1) for length in glyph.size]
    canvas = Image.new("L", (_PLAIN_SIZE, _PLAIN_SIZE))
    corner = tuple((_PLAIN_SIZE - length) // 2 for length in shape)
    canvas.paste(glyph.resize(shape, Image.Resampling.BOX), corner)
    return canvas


def _first_of_each_look(views: Sequence[np.ndarray]) -> np.ndarray:
    """Indices of the rows float64[n, pixels] with no earlier kept row near, in any of the views."""
    count = len(views[0])
    kept = np.ones(count, bool)
    for start in range(0, count, 512):
        near = np.zeros((min(512, count - start), count), bool)
        for rows in views:
            # Whole numbers in float64: products are exact in whatever order they are added up, so
            # every machine keeps the same characters.
            squares = np.square(rows).sum(axis=1)
            block = slice(start, start + 512)
            products = rows[block] @ rows.T
            near |= np.square(products) > _SAME_COSINE**2 * np.outer(squares[block], squares)
        for index, row in enumerate(near, start):
            kept[index] = not (row[:index] & kept[:index]).any()
    return np.flatnonzero(kept)


@functools.lru_cache(maxsize=1024)
def _font(face: int, size: int) -> ImageFont.FreeTypeFont:
    # The basic layout: the other one depends on a library that may be missing.
    return ImageFont.truetype(str(_faces()[face]), size, layout_engine=ImageFont.Layout.BASIC)


@functools.lru_cache(maxsize=8192)
def _mask(character: str, face: int, side: int) -> Image.Image:
    """The glyph, 255 for ink, in the middle of a square, at most 0.82 of it wide and high."""
    left, top, right, bottom = _font(face, 100).getbbox(character, anchor="ls")
    extent = max(right - left, bottom - top, 1) / 100
    # The square root brings tiny and huge glyphs nearer to each other, yet keeps their order.
    em = side * min(0.9 * np.sqrt(0.75 / extent), 3.6, 0.82 / extent)
    font = _font(face, max(int(em), 4))
    left, top, right, bottom = font.getbbox(character, anchor="ls")
    canvas = Image.new("L", (side, side))
    corner = ((side - left - right) / 2, (side - top - bottom) / 2)
    ImageDraw.Draw(canvas).text(corner, character, fill=255, font=font, anchor="ls")
    # A box of two pixels: what sampling at every second pixel needs to be free of jags.
    return canvas.filter(ImageFilter.BoxBlur(0.5))


def _mix(values: np.ndarray) -> np.ndarray:
    """SplitMix64's output function on uint64: a well-mixed number for each counter value."""
    z = values + np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z ^= z >> np.uint64(shift)
        z *= np.uint64(factor)
    z ^= z >> np.uint64(31)
    return z


def _stream_keys(seed: int, codes: np.ndarray, pictures: np.ndarray, photo: np.ndarray):
    """uint64[n]: where the stream of each picture starts."""
    key = _mix(np.full(len(codes), seed % 2**64, np.uint64))
    for part in (codes, pictures, photo):
        key = _mix(key ^ _mix(part.astype(np.uint64)))
    return key


def _hashes(keys: np.ndarray, first: int, count: int) -> np.ndarray:
    """uint64[n, count]: numbers `first` … of each picture's stream."""
    step = np.arange(first, first + count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return _mix(keys[:, None] + step)


def _uniforms(keys: np.ndarray) -> dict[str, np.ndarray]:
    """float64[n] in [-1, 1) for each name in `_DRAWS`."""
    values = (_hashes(keys, 0, len(_DRAWS)) >> np.uint64(11)) * 2.0**-52 - 1
    return dict(zip(_DRAWS, values.T, strict=True))


def _bell_noise(keys: np.ndarray, count: int) -> np.ndarray:
    """float32[n, count]: mean 0, variance 1, nearly normal (sums of four random bytes)."""
    low_bytes = np.uint64(0x00FF00FF00FF00FF)
    words = -(-count // 4)
    bits = _hashes(keys, _FIRST_NOISE_DRAW, 2 * words)
    # Each word then holds four sums of 16 bits, side by side.
    pairs = (bits & low_bytes) + (bits >> np.uint64(8) & low_bytes)
    sums = pairs[:, :words] + pairs[:, words:]
    noise = sums.view(np.uint16)[:, :count].astype(np.float32)
    noise -= np.float32(4 * 127.5)
    noise *= np.float32(1 / np.sqrt(4 * (256**2 - 1) / 12))
    return noise


def _draw_all(characters, photo, seed, size, strength, noise, progress) -> np.ndarray:
    per_class = len(photo)
    total = len(characters) * per_class
    images = np.empty((total, size, size, 3), np.uint8)
    codes = np.array([ord(c) for c in characters], np.uint64)
    hidden = not progress or total <= _BAR_FROM
    with tqdm.tqdm(total=total, desc="rendering glyphs", unit="img", disable=hidden) as bar:
        for start in range(0, total, _CHUNK):
            flat = np.arange(start, min(start + _CHUNK, total))
            owner, picture = flat // per_class, flat % per_class
            keys = _stream_keys(seed, codes[owner], picture, photo[picture])
            amount = np.where(photo[picture], float(strength), 0.0)
            images[flat] = _draw([characters[i] for i in owner], keys, amount, size, noise)
            bar.update(len(flat))
    return images


def _draw(characters, keys, amount, size, noise) -> np.ndarray:
    """uint8[n, size, size, 3]; `amount` float64[n] is each picture's strength."""
    draws = _uniforms(keys)
    limits = {
        name: np.maximum(plain + amount * (full - plain), 0.0)
        for name, (plain, full) in _LIMITS.items()
    }
    ink = _ink(characters, draws, limits, size)
    paper, ink_colour = _colours(draws, limits, amount)
    images = ink[..., None] * (ink_colour - paper)[:, None, None, :]
    images += paper[:, None, None, :]
    grid = ((np.arange(size) + 0.5) * (2 / size) - 1).astype(np.float32)
    _cover(images, draws, limits, grid)
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


def _ink(characters, draws, limits, size) -> np.ndarray:
    """float32[n, size, size] in 0..1: how much ink is where."""
    widths = (0.65 + 0.35 * draws[f"blur_{axis}"] for axis in "xy")
    blurs = np.stack([limits["blur"] * size * width for width in widths], axis=1)
    columns = ((draws["face"] + 1) / 2, _warps(draws, limits, size), blurs)
    pieces = []
    # Plain Python floats in one go: Pillow would convert NumPy scalars one by one.
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
    """float64[n, 8]: Pillow's perspective coefficients, from a picture's pixel to the mask's."""
    angle = limits["rotation"] * draws["rotation"]
    shear = limits["shear"] * draws["shear"]
    zoom = _OVERSAMPLING * np.exp(limits["scale"] * draws["scale"])
    aspect = np.exp(limits["aspect"] * draws["aspect"])
    cos, sin = np.cos(angle), np.sin(angle)
    xx, xy = zoom * aspect * (cos + shear * sin), zoom * aspect * (shear * cos - sin)
    yx, yy = zoom / aspect * sin, zoom / aspect * cos
    # At these bounds the denominator stays positive over the whole picture.
    tilt, shift = np.minimum(limits["perspective"], 0.3), np.minimum(limits["shift"], 0.3)
    tilt_x, tilt_y = (tilt * draws[f"perspective_{axis}"] * 2 / size for axis in "xy")
    middle_x, middle_y = (size * (0.5 + shift * draws[f"shift_{axis}"]) for axis in "xy")
    # The mask's centre comes to lie on (middle_x, middle_y); the tilt turns about that point too.
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
    """float32[n, 3] each: the paper's colour and the ink's, which is darker."""
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


def _cover(images, draws, limits, grid) -> None:
    """Lays a plain patch over one edge of some pictures, in place."""
    for index in np.flatnonzero((draws["occluded"] + 1) / 2 < limits["occlusion"]).tolist():
        side = int(2 * (draws["patch_side"][index] + 1))
        depth = 0.22 + 0.13 * draws["patch_depth"][index]
        patch = (grid if side % 2 else -grid) > 1 - 2 * depth
        lines = images[index] if side < 2 else images[index].swapaxes(0, 1)
        lines[patch] = 135 + 75 * draws["patch_shade"][index]
