"""See the paper's claim on a laptop: no download, no GPU, minutes.

  python -m launch.quickstart
  python -m launch.quickstart --workdir=/tmp/q --seed=1 --methods=hoc,er,sce

Renders characters, pre-trains three models on growing sets of them, fine-tunes over 7 tasks with
replacements at tasks 0, 2 and 4, and tries every version against every older one: once with the
fixed d-Simplex and the HOC loss, once with an ordinary learnable classifier (ER). Ends with a page to
open in a browser: matrices, what queries find in old galleries, drift, training curves.
"""

import shlex
import time

from absl import flags

from compat_jax.errors import UserError
from launch import _cli as cli

flags.DEFINE_string("workdir", "runs/quickstart", "folder of the run")
flags.DEFINE_integer("seed", 0, "of everything random", lower_bound=0)
flags.DEFINE_list("methods", ["hoc", "er"], "methods to compare")
cli.define_hosts()
flags.DEFINE_bool("progress", True, "show progress bars")


def main(_) -> None:
    """Pre-train, train and evaluate each method; print and draw."""
    began = time.perf_counter()
    args = flags.FLAGS
    if not args.methods:
        raise UserError("--methods is empty: for example --methods=hoc,er")
    cli.start_jax()
    import dataclasses

    from compat_jax import experiment, hosts, methods, report
    from compat_jax.files import absolute

    for method in args.methods:
        methods.factory(method)
    stop, results, folder = cli.StopSignal(), {}, absolute(args.workdir)
    found, data, chains = [], None, []
    for method in dict.fromkeys(args.methods):
        models, config = configurations(method, args.seed)
        models_session, session = cli.session(models, stop), cli.session(config, stop)
        pretrained = experiment.pretrain(models, folder / f"{models.method}-models", models_session)
        config.pretrained = str(pretrained.path)
        chain = experiment.train(config, folder / method, session)
        session = dataclasses.replace(session, cache=folder / method / "evaluation" / "cache")
        data = data or experiment.load_retrieval(config, chain, session)
        found.append(report.collect(chain, *data, session=session))
        results[method] = found[-1].main
        chains.append(chain.path)
    if not hosts.is_first():
        return
    print(report.table(results))
    print("\n" + report.sentence(results))
    for path in report.write(results, folder):
        print(path)
    page, *_ = report.write_page(found, *data, folder / "report", "Quickstart of compat_jax")
    print(f"Open in a browser: {page}")
    demo = f"python -m launch.demo --chain={shlex.quote(str(chains[0]))}"
    print(f"Ask the old gallery with pictures (pip install 'compat_jax[demo]'): {demo}")
    print(f"{time.perf_counter() - began:.0f} s in all")


def configurations(method: str, seed: int):
    """Configurations of the pre-training and of the sequence."""
    from configs import glyphs, pretrain

    models = pretrain.get_config(f"method={method},data=glyphs,seed={seed}")
    return models, glyphs.get_config(f"method={method},seed={seed}")


if __name__ == "__main__":
    cli.run(main, __doc__)
