"""Compile a configuration for chips before you pay for them; no TPU or GPU needed.

  python -m launch.plan --topology=v5e:2x4 --config=configs/glyphs.py:replace=false
  python -m launch.plan --topology=h100:8 --config=configs/iamcl2r.py --images=30000 --classes=100 \\
      --config.dtype=bfloat16
  python -m launch.plan --topology=v6e:2x4 --config=configs/iamcl2r.py --images=30000 --classes=100 \\
      --config.mesh=data:-1,model:4 --config.num_prototypes=1000000

Compiles the training step, the feature extraction and the search step of that run (step and extraction
also of the network of tasks.fresh_at, where it is another) for the chips of the topology: v2 to v6e
and tpu7x with the TPU compiler (libtpu, `pip install 'jax[tpu]'`), h100:1 to h100:8 and a100:1 to
a100:8 with JAX's CUDA plugin (`pip install jax-cuda13-plugin`, of the release of jaxlib; no CUDA
libraries). Prints the memory that each needs on every device, its collectives, whether it fits and
what to change if not; a lower bound of a step's time from FLOP, memory and links; and what the
compiled program wastes: products in float32 where bfloat16 was asked for, kernels that only reorder,
convert or copy, kernels that compute the same in every step, collectives that nothing runs beside,
transfers to the host. Reads the data for its sizes; with --images and --classes it needs none.

With --json=FILE the bounds are written as well, for the table of costs (hours of a training, of a
re-index) that `python -m launch.benchmark --numbers=FILE,... --costs` prints:

  python -m launch.plan --topology=h100:1 --config=configs/folders.py:size=224,backbone=resnet50 \\
      --images=12800 --classes=100 --config.dtype=bfloat16 --batch_size=1024 --json=h100-month.json
"""

import importlib.util
import os
import sys

from absl import flags

from launch import _cli as cli

cli.define_config("configs/iamcl2r.py")
flags.DEFINE_string("topology", None, "chips, for example v5e:4x4 or h100:8")
flags.DEFINE_integer(
    "images", None, "training images; counted in the data by default", lower_bound=1
)
flags.DEFINE_integer(
    "classes", None, "classes of those images; counted in the data by default", lower_bound=1
)
flags.DEFINE_integer("gallery", 1_000_000, "gallery rows of the search", lower_bound=1)
flags.DEFINE_integer("k", 10, "neighbours of the search", lower_bound=1)
flags.DEFINE_integer("batch_size", 256, "images per batch of the feature extraction", lower_bound=1)
flags.DEFINE_string("json", None, "file to write the bounds of a step's time to")


def prepare_environment(topology: str) -> None:
    """Make JAX run on the CPU and only compile for the topology; call before JAX is used.

    Args:
      topology: its name.

    Raises:
      UserError: libtpu, which compiles for TPUs, is not installed.
    """
    from compat_jax.errors import UserError
    from compat_jax.hlo.chips import GPUS

    is_tpu = topology.partition(":")[0] not in GPUS
    if is_tpu and importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"{topology} needs the compiler libtpu, which is not installed: pip install 'jax[tpu]'"
        )
    # Before JAX loads the CUDA plugin, which says on stderr that it finds no GPU.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import jax

    jax.config.update("jax_platforms", "cpu")
    if not is_tpu:
        return
    os.environ.update(
        TPU_SKIP_MDS_QUERY="1",  # no metadata server here
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",  # another program may be planning, or training
        # The others only silence warnings.
        TPU_LOG_DIR="disabled",
        TPU_ACCELERATOR_TYPE="v5litepod-8",
        TPU_WORKER_HOSTNAMES="localhost",
        TPU_WORKER_ID="0",
    )


def main(_) -> None:
    """Parse, compile, print; exit code 1 if something does not fit."""
    args = flags.FLAGS
    topology = cli.require("topology", "v5e:4x4")
    prepare_environment(topology)
    from launch.tpu import planning

    found = planning.plan(
        args.config,
        topology,
        images=args.images,
        classes=args.classes,
        gallery=args.gallery,
        k=args.k,
        batch_size=args.batch_size,
    )
    if args.json:
        found.write(args.json)
    sys.exit(1 if found.too_large else 0)


if __name__ == "__main__":
    cli.run(main, __doc__)
