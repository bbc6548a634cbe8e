"""Speed and memory, beside the PyTorch reference where a clone of it is given.

  python -m launch.benchmark                                   # our side, on whatever JAX runs on
  python -m launch.benchmark --reference=CLONE --json=FILE     # both sides by turns
  python -m launch.benchmark --only=step,features --dtype=float32,bfloat16

Measures: step, epoch, first_step, features, evaluation, search, large_k, scaling, streaming, and on
accelerators protocol. The reference needs the packages of the extra `benchmark`.
"""

import json
import sys

from absl import flags

from launch import cli

flags.DEFINE_string("reference", None, "folder of a clone of the PyTorch reference (iamcl2r)")
flags.DEFINE_string("json", None, "file that gets the numbers")
flags.DEFINE_list("only", [], "measures to take; all by default")
flags.DEFINE_list(
    "dtype", [], "of the computation: float32, bfloat16; by default what is fast here"
)
flags.DEFINE_list(
    "variants", None, "of PyTorch: eager, compile, channels_last, bf16, best; all by default"
)
flags.DEFINE_string("sizes", "full", "full, or tiny to see that everything runs")
flags.DEFINE_string("part", None, "a part that a measure starts as a program of its own")


def main(_) -> None:
    """Measure and print."""
    args = flags.FLAGS
    cli.start_jax()
    from compat_jax import benchmarks, models
    from compat_jax.benchmarks import table, timing
    from compat_jax.benchmarks.sides import on_accelerator

    cli.check_choice("sizes", args.sizes, sorted(benchmarks.SIZES))
    for dtype in args.dtype:
        cli.check_choice("dtype", dtype, sorted(models.DTYPES))
    if args.part:
        _part(args.part, benchmarks.sizes(args.sizes))
        return
    benchmarks.chosen(args.only)
    dtypes = args.dtype or ["float32", *(["bfloat16"] if on_accelerator() else [])]
    variants = args.variants or benchmarks.VARIANTS
    lines = benchmarks.measure(args.only, args.reference, dtypes, args.sizes, variants)
    results = []
    matmul = {d: timing.matmul_flops(d) for d in sorted({"float32", *dtypes})}
    machine, command = timing.machine(), " ".join(["python -m launch.benchmark", *sys.argv[1:]])
    print(table.head(machine, command, matmul), flush=True)
    for result in lines:
        results.append(result)
        print(table.line(result, matmul), flush=True)
    if args.json:
        table.write(args.json, machine, command, matmul, results)


def _part(part, sizes):
    from compat_jax.benchmarks import growth, training

    kind, _, factor = part.partition(":")
    if kind == "first_update":
        training.first_update(sizes)
    else:
        print(json.dumps(growth.one_point(sizes, kind, int(factor))))


if __name__ == "__main__":
    cli.run(main, __doc__)
