"""Try every version of a chain against every older one: matrix, AC, AA, pictures.

  python -m launch.evaluate --chain=runs/hoc/chain
  python -m launch.evaluate --chain=runs/hoc/chain --metric=map --out=runs/hoc/map

Query and gallery are those of the run's configuration, which the chain carries; --config takes
others (`data.query`, `data.gallery`).
"""

from absl import flags

from launch import cli

cli.define_config()
flags.DEFINE_string("chain", None, "folder of the chain")
flags.DEFINE_string("metric", "identification", "identification, recall@1 or map")
flags.DEFINE_string("out", None, "folder for matrix.json and pictures; beside the chain by default")
flags.DEFINE_integer("batch_size", 256, "images a batch", lower_bound=1)
flags.DEFINE_string("dtype", "float32", "of the networks' computation: float32 or bfloat16")
flags.DEFINE_string("mesh", "data:-1", "devices")
cli.define_hosts()
flags.DEFINE_bool("progress", True, "show progress bars")


def main(_) -> None:
    """Parse, evaluate, report."""
    args = flags.FLAGS
    path = cli.require("chain", "runs/hoc/chain")
    cli.start_jax()
    from etils import epath

    from compat_jax import evaluation, hosts, models, report
    from compat_jax.chain import Chain
    from launch import runs

    cli.check_choice("metric", args.metric, sorted(evaluation.METRICS))
    cli.check_choice("dtype", args.dtype, sorted(models.DTYPES))
    chain = Chain(path).require()
    out = epath.Path(args.out) if args.out else chain.path.parent / "evaluation"
    result = runs.evaluate(
        chain,
        out,
        args.config,
        args.metric,
        args.mesh,
        args.batch_size,
        args.dtype,
        cli.StopSignal(),
        args.progress,
    )
    method = chain.record(chain.numbers()[-1]).method
    if not hosts.is_first():
        return
    print(report.table({method: result}))
    for file in report.write({method: result}, out):
        print(file)


if __name__ == "__main__":
    cli.run(main, __doc__)
