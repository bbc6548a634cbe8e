"""Pre-train the models that replace others in a sequence: versions 0, 1, ... of WORKDIR/chain.

  python -m launch.pretrain --config=configs/pretrain.py:method=hoc,data=glyphs --workdir=runs/models
  python -m launch.pretrain --config=configs/pretrain.py:method=hoc,data=folder \\
      --config.data.train.path=tiny-imagenet-200/train --config.pretrain_classes='(50, 100, 200)' \\
      --config.epochs=10 --workdir=runs/models

Model i learns the first pretrain_classes[i] classes of the data. Run the same command to resume a
killed run.
"""

from absl import flags

from launch import _cli as cli

cli.define_config("configs/pretrain.py")
flags.DEFINE_string("workdir", None, "folder of the run: chain, progress, log")
cli.define_hosts()
flags.DEFINE_bool("progress", True, "show progress bars")


def main(_) -> None:
    """Parse, pre-train, say what comes next."""
    args = flags.FLAGS
    workdir = cli.require("workdir", "runs/models")
    cli.start_jax()
    from compat_jax import experiment

    session = cli.session(args.config, cli.StopSignal())
    chain = experiment.pretrain(args.config, workdir, session)
    cli.say(f"{len(chain)} models in {chain.path}; next:")
    cli.say(f"  python -m launch.train --config.pretrained={chain.path} --config=... --workdir=...")


if __name__ == "__main__":
    cli.run(main, __doc__)
