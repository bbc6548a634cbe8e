"""Pre-train the models that replace others in a sequence: versions 0, 1, ... of WORKDIR/chain.

  python -m launch.pretrain --config=configs/pretrain.py:method=hoc,data=glyphs --workdir=runs/models
  python -m launch.pretrain --config=configs/pretrain.py:method=hoc,data=folder \\
      --config.data.train.path=tiny-imagenet-200/train --config.pretrain_classes='(50, 100, 200)' \\
      --config.epochs=10 --workdir=runs/models

Model i learns the first pretrain_classes[i] classes of the data. A killed run goes on where it was.
"""

from absl import flags

from launch import cli

cli.define_config("configs/pretrain.py")
flags.DEFINE_string("workdir", None, "folder of the run: chain, progress, log")
cli.define_hosts()
flags.DEFINE_bool("progress", True, "show progress bars")


def main(_) -> None:
    """Parse, pre-train, say what comes next."""
    args = flags.FLAGS
    workdir = cli.require("workdir", "runs/models")
    cli.start_jax()
    from launch import runs

    chain = runs.pretrain(args.config, workdir, cli.StopSignal(), args.progress)
    cli.say(f"{len(chain)} models in {chain.path}; next:")
    cli.say(f"  python -m launch.train --config.pretrained={chain.path} --config=... --workdir=...")


if __name__ == "__main__":
    cli.run(main, __doc__)
