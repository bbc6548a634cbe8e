"""Size, normalisation and crop of the images that a weight file was trained on, where it has them."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import Any

from compat_jax.data.pictures import RESIZES
from compat_jax.errors import UserError
from compat_jax.interop.torch_load import StandIn

_FILTERS = ("bicubic", "bilinear", "box", "lanczos")
_REQUIRED = ("size", "mean", "std")
# What timm calls them.
_CROP_MODES = {"crop": "center", "squash": "squash"}
_LONGEST_NAME = 40
# Where timm keeps them, newest name first.
CONFIGS = ("pretrained_cfg", "default_cfg")
_SIZES = ("input_size", "img_size", "image_size")
_CROPS = ("CenterCrop", "RandomCrop", "RandomResizedCrop", "Resize")
_MAX_OBJECTS = 10_000
MAX_SIDE = 8192
USUAL = (
    "for weights of ImageNet mostly mean 0.485,0.456,0.406, std 0.229,0.224,0.225 and size 224; for "
    "CIFAR-100 mean 0.5071,0.4867,0.4408, std 0.2675,0.2565,0.2761 and size 32"
)


@dataclasses.dataclass(frozen=True)
class ImageSettings:
    """Settings of a model's images, as far as they are known; None where not.

    Attributes:
      size: side in pixels.
      mean: of each channel.
      std: of each channel.
      crop: share of the resized short side that the centre crop keeps, in 0..1.
      filter: of the resize, "bicubic", "bilinear", "box" or "lanczos".
      resize: "crop" keeps the aspect and crops the centre, "squash" does not; another name of a file's,
        such as timm's "border", is refused by `require`.
    """

    size: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    crop: float | None = None
    filter: str | None = None
    resize: str | None = None

    @property
    def is_complete(self) -> bool:
        """Return whether size, mean and std are known."""
        return all(getattr(self, name) is not None for name in _REQUIRED)

    def over(self, other: "ImageSettings") -> "ImageSettings":
        """Return these settings, those of `other` where these say nothing."""
        mine = {k: v for k, v in dataclasses.asdict(self).items() if v is not None}
        return dataclasses.replace(other, **mine)

    def differences(self, other: "ImageSettings") -> list[str]:
        """Name what both say, and say otherwise: "mean 0.5,0.5,0.5 instead of 0.485,0.456,0.406"."""
        found = []
        for name, mine in dataclasses.asdict(self).items():
            theirs = getattr(other, name)
            if mine is not None and theirs is not None and mine != theirs:
                found.append(f"{name} {_text(mine)} instead of {_text(theirs)}")
        return found

    def require(self) -> "ImageSettings":
        """Return these settings if they are complete.

        Raises:
          UserError: naming what is missing, with the usual values; a size out of range; or a resize that
            is unknown here.
        """
        missing = [name for name in _REQUIRED if getattr(self, name) is None]
        if missing:
            *first, last = missing
            listed = f"{', '.join(first)} and {last}" if first else last
            raise UserError(
                f"the file does not say what images it was trained on: give {listed}, {USUAL}",
                missing[0],
            )
        if type(self.size) is not int or not 1 <= self.size <= MAX_SIDE:
            raise UserError(
                f"size must be a whole number from 1 to {MAX_SIDE}, got {self.size!r:.80}", "size"
            )
        if self.resize not in (None, *RESIZES):
            raise UserError(
                f"pictures are resized by {self.resize!r:.80}, which is unknown here: give resize=crop "
                "(keep the aspect and crop the centre) or resize=squash, whichever is nearer",
                "resize",
            )
        return self

    def metadata(self) -> dict[str, str]:
        """Return them as metadata of a safetensors file, as `of_metadata` reads them."""
        assert self.size and self.mean and self.std
        config: dict[str, Any] = {"input_size": [len(self.mean), self.size, self.size]}
        config |= {"mean": list(self.mean), "std": list(self.std)}
        if self.crop is not None:
            config["crop_pct"] = self.crop
        if self.resize is not None:
            config["crop_mode"] = _CROP_MODES.get(self.resize, self.resize)
        if self.resize == "squash":
            config["crop_pct"] = 1.0  # timm would crop after it squashed
        if self.filter is not None:
            config["interpolation"] = self.filter
        return {"format": "pt", CONFIGS[0]: json.dumps(config)}


_DEFAULTS = ImageSettings(crop=1.0, filter="bicubic", resize="crop")


def chosen(*sources: tuple[str, ImageSettings]) -> tuple[ImageSettings, str]:
    """Return the settings that the first source gives each of, and a sentence that says which.

    Args:
      *sources: name and settings, the most trusted first.

    Returns:
      The settings, with the usual crop, filter and resize where no source gives them, and a sentence
      such as "images: size 224 (the file), mean 0.5,0.5,0.5 (the configuration), ...". What is squashed
      is not cropped: its crop is 1, whatever the sources say.
    """
    known = [*sources, ("by default", _DEFAULTS)]
    if next(s.resize for _, s in known if s.resize is not None) == "squash":
        known.insert(0, ("nothing is cropped", ImageSettings(crop=1.0)))
    values, words = {}, []
    for field in dataclasses.fields(ImageSettings):
        given = [(who, v) for who, s in known if (v := getattr(s, field.name)) is not None]
        if given:
            who, values[field.name] = given[0]
            words.append(f"{field.name} {_text(given[0][1])} ({who})")
    return ImageSettings(**values), f"images: {', '.join(words)}"


def of_metadata(metadata: Mapping[str, Any]) -> ImageSettings:
    """Return the image settings among metadata of a safetensors file, or of timm's config.json.

    Args:
      metadata: with a `pretrained_cfg`, as a mapping or as JSON.
    """
    for key in CONFIGS:
        value = metadata.get(key)
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except (RecursionError, ValueError):
                value = None
        if isinstance(value, Mapping):
            return _of_fields(value)
    return ImageSettings()


def of_checkpoint(content: Any) -> ImageSettings:
    """Return the image settings that lie beside the weights in a checkpoint.

    They are timm's `pretrained_cfg`; the fields of its settings object (`mean`, `std`, `img_size`); or
    the arguments of torchvision's transforms, if all of them agree, as in the reference's checkpoints.

    Args:
      content: of the file, see `torch_load.load`.
    """
    mapping = content if isinstance(content, dict) else {}
    direct = of_metadata(mapping)
    means, stds, sizes = [], [], []
    for name, fields in _objects(mapping):
        if name == "Normalize":
            means.append(_numbers(fields.get("mean")))
            stds.append(_numbers(fields.get("std")))
        elif name in _CROPS:
            sizes.append(_side(fields.get("size")))
        elif name in ("Namespace", "SimpleNamespace"):
            direct = direct.over(_of_fields(fields))
    return direct.over(ImageSettings(_single(sizes), _single(means), _single(stds)))


def _of_fields(fields):
    size = next((s for s in (_side(fields.get(name)) for name in _SIZES) if s), None)
    return ImageSettings(
        size,
        _numbers(fields.get("mean")),
        _numbers(fields.get("std")),
        crop=_share(fields.get("crop_pct")),
        filter=_filter(fields.get("interpolation")),
        resize=_resize(fields.get("crop_mode")),
    )


def _objects(content: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Class name and attributes of the objects in a checkpoint, each once."""
    waiting, seen = [content], set[int]()
    while waiting and len(seen) < _MAX_OBJECTS:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, StandIn):
            yield value.kind.rpartition(".")[2], value.attributes
            waiting.append(value.state)
        elif isinstance(value, dict):
            waiting += list(value.values())
        elif isinstance(value, list | tuple):
            waiting += list(value)


def _numbers(value):
    """Three numbers, or one, as a tuple; None for anything else."""
    if not isinstance(value, list | tuple) or len(value) not in (1, 3):
        return None
    fit = all(isinstance(x, int | float) and not isinstance(x, bool) for x in value)
    return tuple(float(x) for x in value) if fit else None


def _side(value):
    """The side of square images from a number, (height, width) or (channels, height, width)."""
    if isinstance(value, list | tuple) and 1 <= len(value) <= 3:
        value = value[-1] if len(set(value[-2:])) == 1 else None
    whole = isinstance(value, int) and not isinstance(value, bool)
    return value if whole and 0 < value <= MAX_SIDE else None


def _share(value):
    """A number in 0..1, without 0; None for anything else."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and 0 < value <= 1 else None


def _filter(value):
    """The name of a resize filter; None for others, such as a random one."""
    return value if isinstance(value, str) and value in _FILTERS else None


def _resize(value):
    """The resize of timm's crop mode; the mode's own name if there is no such resize here."""
    if not isinstance(value, str) or not value:
        return None
    names = {mode: resize for resize, mode in _CROP_MODES.items()}
    return names.get(value, repr(value)[1:-1][:_LONGEST_NAME])


def _single(values):
    """The value, if all are the same."""
    return values[0] if values and all(value == values[0] for value in values) else None


def _text(value):
    values = value if isinstance(value, tuple) else (value,)
    return ",".join(f"{x:g}" if isinstance(x, float) else str(x) for x in values)
