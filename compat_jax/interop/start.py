"""A weight file as the version that training starts from."""

import dataclasses
from typing import Any, NamedTuple

from compat_jax.chain import Version
from compat_jax.chain.record import variables_sha256
from compat_jax.data.pictures import Preparation
from compat_jax.interop import chains, torch_files
from compat_jax.interop.chains import PathLike
from compat_jax.interop.image_settings import ImageSettings, chosen
from compat_jax.models import Backbone, GivenBackbone, as_backbone, parameters, registered
from compat_jax.training import Run

FILE, GIVEN, BACKBONE = "the file", "as given", "the backbone's image_size"


class Start(NamedTuple):
    """A version made of a weight file.

    Attributes:
      version: number 0, without a task.
      fresh: layers that the file lacks, drawn from the seed.
      notes: sentences on what was chosen, to print.
    """

    version: Version
    fresh: tuple[str, ...]
    notes: tuple[str, ...]


def starting_version(
    path: PathLike,
    run_backbone: GivenBackbone,
    *,
    num_prototypes: int,
    label_order: str,
    seed: int,
    ema: bool = False,
    settings: ImageSettings | None = None,
) -> Start:
    """Open a weight file as a version on a fixed simplex, see `starting_version_of`.

    Args:
      path: of the file, see `torch_files.load`.
      run_backbone: that its tensors are of.
      num_prototypes: K of the simplex.
      label_order: which prototype a class is written to.
      seed: of the projection, for a file that has none.
      ema: take averaged weights.
      settings: of the images, over what the file says.

    Raises:
      UserError: see `starting_version_of`.
    """
    run = Run(
        backbone=run_backbone, num_prototypes=num_prototypes, label_order=label_order, seed=seed
    )
    return starting_version_of(path, run, ema=ema, settings=settings)


def starting_version_of(
    path: PathLike, run: Run, *, ema: bool = False, settings: ImageSettings | None = None
) -> Start:
    """Open a weight file as the version that a run starts from; nothing is written.

    The weights are those of a backbone alone, such as timm's and torchvision's, whose classifier is
    left out and whose projection is drawn from the run's seed; or of a whole version, as
    `chains.export_version` writes it.

    Args:
      path: of the file, see `torch_files.load`.
      run: its method, backbone, `num_prototypes`, `label_order` and seed hold for the version; its
        normalisation does not.
      ema: take averaged weights.
      settings: of the images, over what the file says.

    Returns:
      The version, whose record has the file's SHA-256 as `data_fingerprint`.

    Raises:
      UserError: the file cannot be read or does not fit the run's network, or size, mean or std are
        neither in the file nor given.
    """
    weights = torch_files.load(path, ema)
    given = settings or ImageSettings()
    own = image_size_of(run.given_backbone)
    images, sentence = chosen((GIVEN, given), (BACKBONE, own), (FILE, weights.images))
    images.require()
    assert images.size and images.mean and images.std
    notes = [
        f"{difference}, as {weights.path} says" for difference in images.differences(weights.images)
    ]
    preprocess = dataclasses.replace(run.preprocess, mean=images.mean, std=images.std)
    backbone = sized(run.given_backbone, images)
    run = dataclasses.replace(run, backbone=backbone, preprocess=preprocess)
    shape = (images.size, images.size, len(images.mean))
    adopted = chains.adopt_file(weights, run, shape)
    record = chains.pretrained_record(
        adopted, weights, run, image_shape=shape, preparation=preparation(images)
    )
    digest = variables_sha256(adopted.variables)
    version = Version(0, record, adopted.variables, sha256=digest, backbone=backbone)
    return Start(version, adopted.fresh, (*weights.notes, *adopted.notes, *notes, sentence))


def sized(backbone: GivenBackbone, images: ImageSettings) -> Backbone:
    """Return a backbone made for the size of the images, if it needs one and none is given.

    Args:
      backbone: registered, or one of the user's own, which is left as it is.
      images: with their size.
    """
    own = as_backbone(backbone)
    if own.name not in registered() or "image_size" not in parameters(own.name):
        return own
    return Backbone(own.name, {"image_size": images.size, **own.arguments})


def image_size_of(backbone: Backbone) -> ImageSettings:
    """Return the size of the images that a backbone's arguments give, as a ViT's do."""
    size = backbone.arguments.get("image_size")
    return ImageSettings(size if isinstance(size, int) else None)


def preparation(images: ImageSettings) -> dict[str, Any]:
    """Describe how pictures become these images, for a record.

    Args:
      images: as `image_settings.chosen` returns them.

    Raises:
      UserError: a crop out of range, an unknown filter or resize.
    """
    assert images.size and images.crop and images.filter and images.resize
    return Preparation(images.size, images.resize, images.filter, images.crop).describe()
