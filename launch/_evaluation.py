"""Shared by the programs that evaluate chains: flags, checks, the session."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from absl import flags
from etils import epath

from launch import _cli as cli

if TYPE_CHECKING:  # imports JAX, which programs do after they have parsed their flags
    from compat_jax.session import Session


def define_metric() -> None:
    """Define --metric."""
    flags.DEFINE_list(
        "metric",
        ["identification"],
        "identification, recall@K, cmc@K, map, map@r, verification or tar@FAR; several by commas",
    )


def define() -> None:
    """Define the flags of an evaluation: metrics, and where and how it is carried out."""
    define_metric()
    define_places()


def define_places() -> None:
    """Define the flags that say where and how pictures are embedded."""
    flags.DEFINE_integer("batch_size", 256, "images per batch", lower_bound=1)
    flags.DEFINE_string(
        "dtype", "float32", "of the networks' computation: float32, bfloat16 or auto"
    )
    flags.DEFINE_string("mesh", "data:-1", "devices")
    flags.DEFINE_string("backbone", None, "import path of your own backbone, package.module:Name")
    cli.define_hosts()
    flags.DEFINE_bool("progress", True, "show progress bars")


def define_pairs() -> None:
    """Define what maps afterwards are fitted on."""
    flags.DEFINE_integer(
        "pairs",
        1000,
        "gallery images that maps are fitted on, at most half of the gallery",
        lower_bound=2,
    )


def check_metrics() -> None:
    """Refuse unknown metrics before anything is read."""
    from compat_jax import metrics

    for name in flags.FLAGS.metric:
        metrics.get(name)


def check() -> None:
    """Refuse unknown metrics and another dtype before anything is read."""
    from compat_jax import models

    check_metrics()
    cli.check_choice("dtype", flags.FLAGS.dtype, models.DTYPE_CHOICES)


def session(cache: epath.Path, stop: Callable[[], bool]) -> "Session":
    """Make the session of an evaluation.

    Args:
      cache: folder for features and scores.
      stop: asked before each version.
    """
    from compat_jax.session import Session

    args = flags.FLAGS
    return Session(
        mesh=args.mesh,
        batch_size=args.batch_size,
        cache=cache,
        should_stop=stop,
        progress=args.progress,
    )
