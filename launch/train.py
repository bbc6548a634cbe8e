"""Train a sequence of tasks; every task ends as a version of WORKDIR/chain.

  python -m launch.train --config=configs/iamcl2r.py:method=hoc,tasks=7 --workdir=runs/hoc \\
      --config.pretrained=runs/models/chain

--config.FIELD=VALUE overrides any field, e.g. --config.optim.lr=0.01. Run the same command to resume a
killed run; the result is bit-identical. Exit code 75 means "stopped and saved, run me again", 2 that the
input was refused.
"""

from absl import flags

from launch import _cli as cli

cli.define_config("configs/iamcl2r.py")
flags.DEFINE_string("workdir", None, "folder of the run: chain, progress, log")
cli.define_hosts()
flags.DEFINE_bool("progress", True, "show progress bars")


def main(_) -> None:
    """Parse, train, say what comes next."""
    args = flags.FLAGS
    workdir = cli.require("workdir", "runs/hoc")
    cli.start_jax()
    from compat_jax import experiment

    session = cli.session(args.config, cli.StopSignal())
    chain = experiment.train(args.config, workdir, session)
    cli.say(f"{len(chain)} versions in {chain.path}; next:")
    cli.say(f"  python -m launch.evaluate --chain={chain.path}")


if __name__ == "__main__":
    cli.run(main, __doc__)
