"""Measure speed and memory, beside the PyTorch reference if a clone of it is given.

  python -m launch.benchmark                       # our side, on the devices that JAX finds
  python -m launch.benchmark --only=step,features --dtype=float32,bfloat16

With a clone of the reference, both sides are timed alternately:

  git clone https://github.com/miccunifi/iamcl2r ~/iamcl2r && pip install -e '.[benchmark]'
  python -m launch.benchmark --reference=~/iamcl2r --json=numbers.json

Measures: step, epoch, first_step, features, evaluation, search, large_k, scaling, streaming; on
accelerators also protocol.
"""

import json
import sys

from absl import flags

from launch import _cli as cli

flags.DEFINE_string("reference", None, "folder of a clone of miccunifi/iamcl2r")
flags.DEFINE_string("json", None, "file to write the numbers to")
flags.DEFINE_list("only", [], "measures to take; all by default")
flags.DEFINE_list(
    "dtype", [], "dtypes to compute in: float32, bfloat16; by default those that are fast here"
)
flags.DEFINE_list(
    "variants",
    None,
    "variants of PyTorch: eager, compile, channels_last, bf16, best; all by default",
)
flags.DEFINE_string("sizes", "full", "full, or tiny to try that everything runs")
flags.DEFINE_string("part", None, "internal: the part of a measure that runs in a separate process")


def main(_) -> None:
    """Measure and print."""
    args = flags.FLAGS
    cli.start_jax()
    from compat_jax import models
    from launch import benchmarks
    from launch.benchmarks import table, timing
    from launch.benchmarks.sides import on_accelerator

    cli.check_choice("sizes", args.sizes, sorted(benchmarks.SIZES))
    for dtype in args.dtype:
        cli.check_choice("dtype", dtype, sorted(models.DTYPES))
    if args.part:
        _part(args.part, benchmarks.sizes(args.sizes))
        return
    benchmarks.chosen(args.only)
    dtypes = args.dtype or ["float32", *(["bfloat16"] if on_accelerator() else [])]
    variants = args.variants or benchmarks.VARIANTS
    lines = benchmarks.measure(
        args.only,
        clone=args.reference,
        dtypes=dtypes,
        sizes_name=args.sizes,
        variants=variants,
    )
    results = []
    matmul = {d: timing.matmul_flops(d) for d in sorted({"float32", *dtypes})}
    machine, command = timing.machine(), " ".join(["python -m launch.benchmark", *sys.argv[1:]])
    print(table.head(machine, command, matmul), flush=True)
    for result in lines:
        results.append(result)
        print(table.line(result, matmul), flush=True)
    if args.json:
        table.write(args.json, results, machine=machine, command=command, matmul=matmul)


def _part(part, sizes):
    from launch.benchmarks import growth, training

    kind, _, factor = part.partition(":")
    if kind == "first_update":
        training.first_update(sizes)
    else:
        print(json.dumps(growth.one_point(sizes, kind, int(factor))))


if __name__ == "__main__":
    cli.run(main, __doc__)
