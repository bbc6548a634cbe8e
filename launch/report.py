"""Put chains side by side on one page: matrices, retrieval wall, backfill, maps, flips, drift, training.

  python -m launch.report --chains=runs/hoc/chain --out=runs/report
  python -m launch.report --chains=runs/hoc/chain,runs/er/chain --metric=map --out=runs/report

Writes index.html, which holds everything and needs no network, and its pictures (PNG), tables (CSV) and
figures (JSON) beside it. Beside the naive swap, the queries of the newest version in the oldest gallery,
stand other ways to upgrade and their costs: maps fitted afterwards, rescoring, a re-index
(--noafterwards leaves them out). One that cannot be fitted on this gallery is named and left out.

Query and gallery are those of each chain's configuration and must be the same; --config takes others
(`data.query`, `data.gallery`). What launch.evaluate has embedded is not embedded again.
"""

from absl import flags

from compat_jax.errors import UserError
from launch import _cli as cli
from launch import _evaluation as evaluation

cli.define_config(fields=("data.ROLE.", "data.photos."))
flags.DEFINE_list("chains", [], "folders of the chains, the first one's rivals behind it")
flags.DEFINE_string("out", None, "folder for the page and the files beside it")
flags.DEFINE_string("title", "Compatibility report", "of the page")
flags.DEFINE_bool("afterwards", True, "measure maps afterwards and other ways to upgrade")
evaluation.define_pairs()
evaluation.define()


def main(_) -> None:
    """Parse, evaluate each chain, write the page."""
    args = flags.FLAGS
    cli.require("chains", "runs/hoc/chain,runs/er/chain")
    cli.require("out", "runs/report")
    cli.start_jax()
    from compat_jax import hosts, report
    from compat_jax.chain import Chain
    from compat_jax.files import absolute

    evaluation.check()
    chains = [Chain(path, args.backbone).require() for path in args.chains]
    out = absolute(args.out)
    report.check_writable(out)
    stop = cli.StopSignal()
    sessions = [
        evaluation.session(chain.path.parent / "evaluation" / "cache", stop) for chain in chains
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
    if args.afterwards:
        trios = zip(found, chains, sessions, strict=True)
        found = [_with_ways(one, chain, (query, gallery), session) for one, chain, session in trios]
    if not hosts.is_first():
        return
    print(report.table({chain.name: chain.main for chain in found}))
    print(*(f"{says}\n" for chain in found for says in report.left_out(chain)), sep="", end="")
    page, *others = report.write_page(found, query, gallery, out, args.title)
    print(f"{page} ({len(others)} pictures, tables and figures beside it)")


def _with_ways(found, chain, data, session):
    """Add the ways to upgrade to what was found on a chain; one version has none."""
    import dataclasses

    from compat_jax import afterwards

    if len(found.numbers) < 2:
        return found
    metrics = dict.fromkeys([found.main.metric, *afterwards.METRICS])
    plan = afterwards.Plan(pairs=flags.FLAGS.pairs)
    options = {"dtype": flags.FLAGS.dtype, "session": session}
    ways = afterwards.compare(chain, *data, metrics=list(metrics), plan=plan, **options)
    return dataclasses.replace(found, ways=ways)


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
        # The pictures of photos are listed beside the chain.
        beside = chain.path.parent if "photos" in config.data else ""
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
