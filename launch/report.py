"""Put chains side by side on one page: matrices, retrieval wall, backfill, flips, drift, training.

  python -m launch.report --chains=runs/hoc/chain --out=runs/report
  python -m launch.report --chains=runs/hoc/chain,runs/er/chain --metric=map --out=runs/report

Writes index.html, which holds everything and needs no network, and its pictures (PNG), tables (CSV) and
figures (JSON) beside it. Query and gallery are those of each chain's configuration and must be the same;
--config takes others (`data.query`, `data.gallery`). What launch.evaluate has embedded is not embedded
again.
"""

from absl import flags

from compat_jax.errors import UserError
from launch import _cli as cli

cli.define_config()
flags.DEFINE_list("chains", [], "folders of the chains, the first one's rivals behind it")
flags.DEFINE_list(
    "metric", ["identification"], "identification, recall@K or map; several by commas"
)
flags.DEFINE_string("out", None, "folder for the page and the files beside it")
flags.DEFINE_string("title", "Compatibility report", "of the page")
flags.DEFINE_integer("batch_size", 256, "images per batch", lower_bound=1)
flags.DEFINE_string("dtype", "float32", "of the networks' computation: float32 or bfloat16")
flags.DEFINE_string("mesh", "data:-1", "devices")
flags.DEFINE_string("backbone", None, "import path of your own backbone, package.module:Name")
cli.define_hosts()
flags.DEFINE_bool("progress", True, "show progress bars")


def main(_) -> None:
    """Parse, evaluate each chain, write the page."""
    args = flags.FLAGS
    cli.require("chains", "runs/hoc/chain,runs/er/chain")
    cli.require("out", "runs/report")
    cli.start_jax()
    from compat_jax import hosts, metrics, models, report
    from compat_jax.chain import Chain
    from compat_jax.files import absolute
    from compat_jax.session import Session

    for name in args.metric:
        metrics.get(name)
    cli.check_choice("dtype", args.dtype, sorted(models.DTYPES))
    chains = [Chain(path, args.backbone).require() for path in args.chains]
    out = absolute(args.out)
    report.check_writable(out)
    stop = cli.StopSignal()
    sessions = [
        Session(
            mesh=args.mesh,
            batch_size=args.batch_size,
            cache=chain.path.parent / "evaluation" / "cache",
            should_stop=stop,
            progress=args.progress,
        )
        for chain in chains
    ]
    sessions[0].devices()  # refuses a mesh before any data is read
    data = Data(args.config)
    for chain, session in zip(chains, sessions, strict=True):
        query, gallery = data.load(chain, session)
    found = [
        report.collect(
            chain,
            query,
            gallery,
            name=name,
            metrics=args.metric,
            dtype=args.dtype,
            session=session,
        )
        for chain, name, session in zip(chains, report.titles(chains), sessions, strict=True)
    ]
    if not hosts.is_first():
        return
    print(report.table({chain.name: chain.main for chain in found}))
    page, *others = report.write_page(found, query, gallery, out, args.title)
    print(f"{page} ({len(others)} pictures, tables and figures beside it)")


class Data:
    """Query and gallery, the same for all chains, read once where configurations agree.

    Args:
      config: with `data.query` and `data.gallery`; each chain's own for None.
    """

    def __init__(self, config):
        self.config, self.loaded = config, {}

    def load(self, chain, session):
        """Return query and gallery of a chain.

        Raises:
          UserError: they are not those of the chains before.
        """
        from compat_jax import experiment

        config = experiment.config_of(chain) if self.config is None else self.config
        beside = (
            chain.path.parent if "photos" in config.data else ""
        )  # its pictures are listed there
        key = f"{beside} {config.data}"
        if key not in self.loaded:
            self.loaded[key] = experiment.load_retrieval(config, chain, session)
        first, found = next(iter(self.loaded.values())), self.loaded[key]
        if any(a.fingerprint() != b.fingerprint() for a, b in zip(first, found, strict=True)):
            raise UserError(
                f"{chain.path} has other queries or another gallery than the chains before it: give a "
                "configuration for all",
                "config",
            )
        return first


if __name__ == "__main__":
    cli.run(main, __doc__)
