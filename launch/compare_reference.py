"""Run your own clone of the PyTorch reference beside this package and compare the numbers.

  git clone https://github.com/miccunifi/iamcl2r ~/iamcl2r && pip install -e '.[torch]'
  python -m launch.compare_reference --reference=~/iamcl2r
  python -m launch.compare_reference --reference=~/iamcl2r --only=pieces        # seconds

With a clone of CL2R, to compare its loss and network for `fd` and its metrics as well:

  git clone https://github.com/NiccoBiondi/CompatibleLifelongRepresentation ~/cl2r
  python -m launch.compare_reference --reference=~/iamcl2r --cl2r=~/cl2r

Parts, all by default:
  pieces    prototypes, losses with gradients, BatchNorm, identification, AC, AA, learning rates, on
            random inputs of several sizes
  steps     20 optimiser steps from the same weights on the same batches, loss by loss
  protocol  three tasks with a replacement, trained and evaluated on both sides: both matrices, AC, AA
  speed     a step, feature extraction and the evaluation, timed alternately; reported, not judged

The clone is not edited: its own `main` runs, on data and batches that this program gives it, with
stand-ins for wandb and for packages that are not installed (continuum, torchvision, faiss,
scikit-learn). Both sides compute in float32 on the CPU with the same number of threads. --data=cifar
reads CIFAR through TFDS (TFDS_DATA_DIR); by default characters are drawn.

Exit code: 0 all equal within tolerance, 1 something differs, 2 the input was refused.
"""

import sys
import tempfile
import time
from pathlib import Path

from absl import flags

from launch import _cli as cli

flags.DEFINE_string("reference", None, "folder of a clone of miccunifi/iamcl2r")
flags.DEFINE_string("cl2r", None, "folder of a clone of CompatibleLifelongRepresentation")
flags.DEFINE_string("data", "glyphs", "images of the steps and of the protocol: glyphs or cifar")
flags.DEFINE_integer("seed", 0, "seed of inputs, weights and batches", lower_bound=0)
flags.DEFINE_string("json", None, "file to write the numbers to")
flags.DEFINE_list("only", [], "parts to do: pieces, steps, protocol, speed; all by default")
flags.DEFINE_bool("progress", True, "show progress bars")


def main(_) -> None:
    """Compare, print the table, exit with the verdict."""
    began = time.perf_counter()
    args = flags.FLAGS
    clone = cli.require("reference", "~/iamcl2r")
    import jax

    jax.config.update("jax_platforms", "cpu")  # where both sides compute the same float32
    cli.start_jax()
    from launch.reference import comparison, lines

    done = []
    with tempfile.TemporaryDirectory(prefix="compare-") as folder:
        for line in comparison.compare(
            clone,
            cl2r=args.cl2r,
            only=args.only,
            data=args.data,
            seed=args.seed,
            folder=Path(folder),
            progress=args.progress,
        ):
            if not done:
                print(lines.head())
            print(lines.row(line), flush=True)
            done.append(line)
    print(lines.foot(done))
    seconds = time.perf_counter() - began
    print(f"{seconds:.0f} s, seed {args.seed}")
    if args.json:
        settings = {"seed": args.seed, "data": args.data, "seconds": round(seconds, 1)}
        lines.write(args.json, done, command=sys.argv, settings=settings)
    sys.exit(0 if all(line.passed for line in done) else 1)


if __name__ == "__main__":
    cli.run(main, __doc__)
