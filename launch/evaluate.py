"""Try every version of a chain against every older one: matrix, AC, AA, pictures.

  python -m launch.evaluate --chain=runs/hoc/chain
  python -m launch.evaluate --chain=runs/hoc/chain --metric=map --out=runs/hoc/map

Query and gallery are those of the run's configuration, which the chain carries; --config takes
others (`data.query`, `data.gallery`).
"""

from absl import flags

from launch import _cli as cli
from launch import _evaluation as evaluation

cli.define_config(fields=("data.ROLE.", "data.photos."))
flags.DEFINE_string("chain", None, "folder of the chain")
flags.DEFINE_string("out", None, "folder for matrix.json and pictures; beside the chain by default")
evaluation.define()


def main(_) -> None:
    """Parse, evaluate, report."""
    args = flags.FLAGS
    path = cli.require("chain", "runs/hoc/chain")
    cli.start_jax()
    from compat_jax import experiment, hosts, report
    from compat_jax.chain import Chain
    from compat_jax.files import absolute

    evaluation.check()
    chain = Chain(path, args.backbone).require()
    config = experiment.config_of(chain) if args.config is None else args.config
    out = absolute(args.out) if args.out else chain.path.parent / "evaluation"
    report.check_writable(out)
    session = evaluation.session(out / "cache", cli.StopSignal())
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
