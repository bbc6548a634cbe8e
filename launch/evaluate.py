"""Try every version of a chain against every older one: matrix, AC, AA, pictures.

  python -m launch.evaluate --chain=runs/hoc/chain
  python -m launch.evaluate --chain=runs/hoc/chain --metric=map --out=runs/hoc/map

Query and gallery are those of the run's configuration, which the chain carries; --config takes
others (`data.query`, `data.gallery`).
"""

from absl import flags

from launch import _cli as cli

cli.define_config()
flags.DEFINE_string("chain", None, "folder of the chain")
flags.DEFINE_list(
    "metric",
    ["identification"],
    "identification, recall@K, cmc@K, map, map@r, verification or tar@FAR; several by commas",
)
flags.DEFINE_string("out", None, "folder for matrix.json and pictures; beside the chain by default")
flags.DEFINE_integer("batch_size", 256, "images per batch", lower_bound=1)
flags.DEFINE_string("dtype", "float32", "of the networks' computation: float32 or bfloat16")
flags.DEFINE_string("mesh", "data:-1", "devices")
flags.DEFINE_string("backbone", None, "import path of your own backbone, package.module:Name")
cli.define_hosts()
flags.DEFINE_bool("progress", True, "show progress bars")


def main(_) -> None:
    """Parse, evaluate, report."""
    args = flags.FLAGS
    path = cli.require("chain", "runs/hoc/chain")
    cli.start_jax()
    from compat_jax import experiment, hosts, metrics, models, report
    from compat_jax.chain import Chain
    from compat_jax.files import absolute
    from compat_jax.session import Session

    for name in args.metric:
        metrics.get(name)
    cli.check_choice("dtype", args.dtype, sorted(models.DTYPES))
    chain = Chain(path, args.backbone).require()
    config = experiment.config_of(chain) if args.config is None else args.config
    out = absolute(args.out) if args.out else chain.path.parent / "evaluation"
    report.check_writable(out)
    session = Session(
        mesh=args.mesh,
        batch_size=args.batch_size,
        cache=out / "cache",
        should_stop=cli.StopSignal(),
        progress=args.progress,
    )
    results = experiment.evaluate(
        chain, config=config, metrics=args.metric, dtype=args.dtype, session=session
    )
    if not hosts.is_first():
        return
    for name, result in results.items():
        print(result.table())
        folder = out if len(results) == 1 else out / name.replace("@", "_at_")
        for file in report.write({result.method: result}, folder):
            print(file)


if __name__ == "__main__":
    cli.run(main, __doc__)
