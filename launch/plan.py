"""What a configuration takes of a TPU slice, before you pay for one; no TPU needed.

  python -m launch.plan --topology=v5e:4x4 --config=configs/iamcl2r.py:method=hoc,tasks=7
  python -m launch.plan --topology=v6e:2x4 --config=configs/iamcl2r.py --images=30000 --classes=100 \\
      --config.mesh=data:-1,model:4 --config.num_prototypes=1000000

Compiles the training step, the feature extraction and the search step of that run with the TPU
compiler (libtpu, `pip install 'jax[tpu]'`) for the chips of the topology, and prints what each takes
of every device, its collectives, whether it fits and what to change if not. Reads the data for its
sizes; with --images and --classes it needs none.
"""

import importlib.util
import os
import sys

from absl import flags

from launch import cli

cli.define_config("configs/iamcl2r.py")
flags.DEFINE_string("topology", None, "TPU and its chips, for example v5e:4x4")
flags.DEFINE_integer("images", None, "training images; counted in the data by default", 1)
flags.DEFINE_integer("classes", None, "classes of the training images, likewise", 1)
flags.DEFINE_integer("gallery", 1_000_000, "gallery rows of the search", 1)
flags.DEFINE_integer("k", 10, "neighbours of the search", 1)
flags.DEFINE_integer("batch_size", 256, "images a batch of the feature extraction", 1)


def prepare_environment() -> None:
    """Have JAX run on the CPU and libtpu compile only; call before JAX is imported.

    Raises:
      UserError: no libtpu.
    """
    from compat_jax.errors import UserError

    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "launch.plan compiles with libtpu, which is not installed: pip install 'jax[tpu]'"
        )
    os.environ.update(
        JAX_PLATFORMS="cpu",
        TPU_SKIP_MDS_QUERY="1",  # there is no metadata server to ask
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",  # another program may be planning, or training
        # The rest only silences warnings.
        TPU_LOG_DIR="disabled",
        TPU_ACCELERATOR_TYPE="v5litepod-8",
        TPU_WORKER_HOSTNAMES="localhost",
        TPU_WORKER_ID="0",
    )


def main(_) -> None:
    """Parse, compile, print; exit code 1 if something does not fit."""
    args = flags.FLAGS
    topology = cli.require("topology", "v5e:4x4")
    prepare_environment()
    from launch import planning

    fits = planning.plan(
        args.config,
        topology,
        args.images,
        args.classes,
        args.gallery,
        args.k,
        args.batch_size,
    )
    sys.exit(0 if fits else 1)


if __name__ == "__main__":
    cli.run(main, __doc__)
