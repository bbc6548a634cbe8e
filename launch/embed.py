"""Embed pictures with a version of a chain, prepared exactly as in training.

  python -m launch.embed --chain=runs/shop/chain --pictures=photos/gallery --out=gallery.npz
  python -m launch.embed --chain=runs/shop/chain --version=0 --pictures='photos/*/*.jpg' \\
      --out=gs://bucket/gallery.parquet
  python -m launch.embed --chain=runs/shop/chain --pictures=photos --skip=gallery.npz --out=new.npz

--pictures is a folder (of any depth), a pattern, a file, or a table (.csv, .tsv, .parquet) with a column
path. A picture that is listed more than once is embedded once. The result holds float32[n, d] features
of norm 1 and the path of each row. Parts are kept while it runs: killed at any time, run the same
command to resume. Pictures that changed meanwhile are embedded again; a result that is there is left
alone, and refused if its pictures have changed since. On several hosts give each the same command with
--shard=I/N: every host embeds its share, and the one that finishes last writes the file.
Files that are no pictures refuse the work, all at once; --on_bad=skip lists them and goes on.
"""

from absl import flags

from launch import _cli as cli

flags.DEFINE_string("chain", None, "folder of the chain")
flags.DEFINE_integer("version", -1, "number of the version; negative counts from the end")
flags.DEFINE_string("pictures", None, "folder, pattern, file or table of the pictures")
flags.DEFINE_string("out", None, "file to write: .npz or .parquet, local or in a bucket")
flags.DEFINE_string("skip", None, "file of features whose pictures are left out: embed what is new")
flags.DEFINE_string("shard", "0/1", "share of this host, I/N")
flags.DEFINE_string("on_bad", "stop", "files that are no pictures: stop or skip")
flags.DEFINE_integer("batch_size", 64, "pictures per batch", lower_bound=1)
flags.DEFINE_integer("part", 4096, "pictures per part, saved as it is done", lower_bound=1)
flags.DEFINE_string("dtype", "float32", "of the network's computation: float32, bfloat16 or auto")
flags.DEFINE_string("backbone", None, "import path of your own backbone, package.module:Name")
flags.DEFINE_bool("progress", True, "show progress bars")


def main(_) -> None:
    """Parse, embed, say where the features are."""
    args = flags.FLAGS
    path, out = cli.require("chain", "runs/shop/chain"), cli.require("out", "gallery.npz")
    pictures = cli.require("pictures", "photos/gallery")
    cli.start_jax()
    from compat_jax import models
    from compat_jax.chain import Chain
    from compat_jax.data.listing import TABLES, list_pictures, list_table
    from compat_jax.embedding_job import EmbeddingJob
    from compat_jax.features_file import read_features
    from compat_jax.files import plain

    cli.check_choice("dtype", args.dtype, models.DTYPE_CHOICES)
    if pictures.lower().endswith(TABLES):
        files = [picture.path for picture in list_table(pictures)]
    else:
        files = list_pictures(pictures)
    listed, files = len(files), list(dict.fromkeys(files))
    if len(files) < listed:
        print(
            f"{listed - len(files)} of {listed} paths left out: their pictures are listed already"
        )
    if args.skip:
        with cli.given_as("skip", "features"):
            known, count = set(map(plain, read_features(args.skip).paths)), len(files)
        files = [file for file in files if file not in known]
        print(f"{count - len(files)} of {count} pictures left out by --skip")
    version = Chain(path, args.backbone).require().open(args.version)
    job = EmbeddingJob(
        version, files, out, part=args.part, on_bad=args.on_bad, shard=cli.shard(args.shard)
    )
    written = job.run(
        should_stop=cli.StopSignal(),
        batch_size=args.batch_size,
        dtype=args.dtype,
        progress=f"embedding with version {version.number}" if args.progress else None,
    )
    print(job.sentence(written))


if __name__ == "__main__":
    cli.run(main, __doc__)
