"""Move a chain to a larger K: room for more classes, without reading a picture again.

  python -m launch.enlarge --chain=runs/shop/chain --num_prototypes=4096 --out=runs/shop-4096/chain
  python -m launch.enlarge --chain=runs/shop/chain --num_prototypes=4096 --version=0 \\
      --features=gallery.npz --out=gallery-4096.npz

The first form writes every version anew, its projection multiplied by a map with orthonormal rows:
scores between features stay what they are, classes keep their numbers. The second moves features that a
version extracted, as launch.embed writes them. What it costs: one matrix product a gallery, and rows
of K'-1 instead of K-1 numbers. The ledger of photos beside the chain is copied; train on in the new
folder with --config.num_prototypes.
"""

from absl import flags

from launch import _cli as cli

flags.DEFINE_string("chain", None, "folder of the chain to move")
flags.DEFINE_integer("num_prototypes", None, "K of the new simplex", lower_bound=3)
flags.DEFINE_string("out", None, "folder of the new chain, or file of the moved features")
flags.DEFINE_string("features", None, "file of features (.npz) to move")
flags.DEFINE_integer("version", -1, "version that extracted the features")
flags.DEFINE_bool("progress", True, "show progress bars")


def main(_) -> None:
    """Parse, move, say what comes next."""
    args = flags.FLAGS
    path, out = cli.require("chain", "runs/shop/chain"), cli.require("out", "runs/larger/chain")
    size = int(cli.require("num_prototypes", "4096"))
    cli.start_jax()
    from compat_jax.chain import Chain
    from compat_jax.data.ledger import LEDGER
    from compat_jax.enlarge import enlarge, enlarge_features
    from compat_jax.features_file import read_features, write_features
    from compat_jax.files import write_bytes

    chain = Chain(path).require_whole()
    if args.features:
        found = read_features(args.features)
        moved = enlarge_features(found.features, chain.record(args.version), size)
        written = write_features(out, found.replaced(moved))
        print(f"{len(moved)} features of {size - 1} numbers in {written}")
        return
    target = Chain(out)
    enlarge(chain, target, size, progress="versions" if args.progress else None)
    ledger = chain.path.parent / LEDGER
    if ledger.exists() and not (target.path.parent / LEDGER).exists():
        write_bytes(target.path.parent / LEDGER, ledger.read_bytes())
    print(
        f"{len(chain)} versions with num_prototypes={size} in {out}; galleries move by --features, "
        "those in stores by launch.upgrade enlarge"
    )


if __name__ == "__main__":
    cli.run(main, __doc__)
