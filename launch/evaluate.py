"""Try every version of a chain against every older one: matrix, AC, AA, pictures.

  python -m launch.evaluate --chain=runs/hoc/chain
  python -m launch.evaluate --chain=runs/hoc/chain --metric=map --out=runs/hoc/map
  python -m launch.evaluate --chain=runs/er/chain --afterwards=procrustes,ridge

With --afterwards there is a further matrix for each kind of map, whose queries are mapped into the space
of each older version; its files lie in a folder of that name. A kind that cannot be fitted on this
gallery is named and left out.

Query and gallery are those of the run's configuration, which the chain carries; --config takes
others (`data.query`, `data.gallery`).
"""

import functools

from absl import flags

from launch import _cli as cli
from launch import _evaluation as evaluation

cli.define_config(fields=("data.ROLE.", "data.photos."))
flags.DEFINE_string("chain", None, "folder of the chain")
flags.DEFINE_string("out", None, "folder for matrix.json and pictures; beside the chain by default")
flags.DEFINE_list("afterwards", [], "kinds of maps to apply to queries as well, e.g. procrustes")
evaluation.define_pairs()
evaluation.define()


def main(_) -> None:
    """Parse, evaluate, report."""
    args = flags.FLAGS
    path = cli.require("chain", "runs/hoc/chain")
    cli.start_jax()
    from compat_jax import experiment, hosts, report
    from compat_jax.chain import Chain
    from compat_jax.evaluation import Maps, evaluate, evaluate_mapped
    from compat_jax.files import absolute

    evaluation.check()
    with cli.given_as("afterwards", "kind"):
        maps = [Maps(kind=kind, pairs=args.pairs) for kind in dict.fromkeys(args.afterwards)]
    chain = Chain(path, args.backbone).require()
    config = experiment.config_of(chain) if args.config is None else args.config
    out = absolute(args.out) if args.out else chain.path.parent / "evaluation"
    report.check_writable(out)
    session = evaluation.session(out / "cache", cli.StopSignal())
    session.devices()  # refuses a mesh before any data is read
    data = experiment.load_retrieval(config, chain, session)
    options = {"metrics": args.metric, "dtype": args.dtype, "session": session}
    unfit = {one.kind: one.unfit(data[1]) for one in maps}
    fit = (one for one in maps if not unfit[one.kind])
    ways = {one.kind: functools.partial(evaluate_mapped, maps=one) for one in fit}
    for kind, way in {"": evaluate, **ways}.items():
        results = way(chain, *data, **options)
        hosts.on_first(functools.partial(_show, results, out, kind))
    hosts.on_first(functools.partial(_say_left_out, unfit))


def _show(results, out, kind) -> None:
    """Write the files of each metric and print its matrix, as soon as it is known."""
    from compat_jax import methods, report

    said = []
    for name, result in results.items():
        title = f"{methods.title(result.method)}, {kind}" if kind else result.method
        folder = out / kind if kind else out
        if len(results) > 1:
            folder = folder / name.replace("@", "_at_")
        said += [result.table(title), *report.write({title: result}, folder)]
    print(*said, sep="\n", flush=True)


def _say_left_out(reasons) -> None:
    """Print which kinds of maps were left out, those with a reason, and why."""
    for kind, reason in reasons.items():
        if reason:
            print(f"{kind} was left out: {reason}.", flush=True)


if __name__ == "__main__":
    cli.run(main, __doc__)
