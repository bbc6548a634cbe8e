"""See the paper's claim on a laptop: no download, no GPU, minutes.

  python -m launch.quickstart
  python -m launch.quickstart --workdir=/tmp/q --seed=1 --methods=hoc,er,sce

Renders characters, pre-trains three models on growing sets of them, fine-tunes over 7 tasks with
replacements at tasks 0, 2 and 4, and tries every version against every older one: once with the
fixed d-Simplex and the HOC loss, once with an ordinary learnable classifier (ER).
"""

import time

from absl import flags

from compat_jax.errors import UserError
from launch import cli

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
    from etils import epath

    from compat_jax import hosts, report
    from compat_jax.methods import get_method
    from launch import runs

    for method in args.methods:
        get_method(method)
    stop, results, folder = cli.StopSignal(), {}, epath.Path(args.workdir)
    for method in args.methods:
        models, config = configurations(method, args.seed)
        pretrained = runs.pretrain(models, f"{folder}/{method}-models", stop, args.progress)
        config.pretrained = str(pretrained.path)
        chain = runs.train(config, f"{folder}/{method}", stop, args.progress)
        out = folder / method / "evaluation"
        results[method] = runs.evaluate(chain, out, config, should_stop=stop, bar=args.progress)
    if not hosts.is_first():
        return
    print(report.table(results))
    print("\n" + report.sentence(results))
    for path in report.write(results, folder):
        print(path)
    print(f"{time.perf_counter() - began:.0f} s in all")


def configurations(method: str, seed: int):
    """Configurations of the pre-training and of the sequence."""
    from configs import glyphs, pretrain

    head = "er" if method == "er" else "hoc"
    models = pretrain.get_config(f"method={head},data=glyphs,seed={seed}")
    return models, glyphs.get_config(f"method={method},seed={seed}")


if __name__ == "__main__":
    cli.run(main, __doc__)
