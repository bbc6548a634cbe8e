"""Train a sequence of tasks; every task ends as a version of WORKDIR/chain.

  python -m launch.train --config=configs/iamcl2r.py:method=hoc,tasks=7 --workdir=runs/hoc \\
      --config.pretrained=runs/models/chain

Any field is overridden by --config.FIELD=VALUE, e.g. --config.optim.lr=0.01. Killed at any time and
started again with the same command, the run goes on and ends with the same bits. Exit code 75 means
"stopped in good order, run me again"; 2 means that the input was refused.
"""

from absl import flags

from launch import cli

cli.define_config("configs/iamcl2r.py")
flags.DEFINE_string("workdir", None, "folder of the run: chain, progress, log")
cli.define_hosts()
flags.DEFINE_bool("progress", True, "show progress bars")


def main(_) -> None:
    """Parse, train, say what comes next."""
    args = flags.FLAGS
    workdir = cli.require("workdir", "runs/hoc")
    cli.start_jax()
    from launch import runs

    chain = runs.train(args.config, workdir, cli.StopSignal(), args.progress)
    cli.say(f"{len(chain)} versions in {chain.path}; next:")
    cli.say(f"  python -m launch.evaluate --chain={chain.path}")


if __name__ == "__main__":
    cli.run(main, __doc__)
