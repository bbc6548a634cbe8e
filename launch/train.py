"""Train versions of a chain: the next one on new photos, or a sequence of tasks.

  python -m launch.train --config=configs/photos.py:path=photos --workdir=runs/shop
  python -m launch.train --config=configs/iamcl2r.py:method=hoc,tasks=7 --workdir=runs/hoc \\
      --config.pretrained=runs/models/chain

With data.photos the command makes one version of what is new; give it again after photos or classes were
added, and it makes the next. Otherwise every task of the sequence ends as a version of WORKDIR/chain.

--config.FIELD=VALUE overrides any field, e.g. --config.optim.lr=0.01. Run the same command to resume a
killed run; the result is bit-identical. Exit code 75 means "stopped and saved, run me again", 2 that the
input was refused.
"""

from absl import flags

from launch import _cli as cli

cli.define_config("configs/iamcl2r.py")
flags.DEFINE_string("workdir", None, "folder of the run: chain, progress, log")
flags.DEFINE_bool(
    "continue_with_changes",
    False,
    "go on with a changed optimiser, epochs, augmentation (at any time), batch or rehearsal (between "
    "versions); run.json keeps what changed",
)
cli.define_hosts()
flags.DEFINE_bool("progress", True, "show progress bars")


def main(_) -> None:
    """Parse, train, say what comes next."""
    args = flags.FLAGS
    workdir = cli.require("workdir", "runs/hoc")
    cli.start_jax()
    from compat_jax import experiment

    session = cli.session(args.config, cli.StopSignal())
    done = experiment.train(args.config, workdir, session)
    chain = getattr(done, "chain", done)
    cli.say(done if done is not chain else f"{len(chain)} versions in {chain.path}")
    cli.say("next:")
    cli.say(f"  python -m launch.evaluate --chain={chain.path}")


if __name__ == "__main__":
    cli.run(main, __doc__)
