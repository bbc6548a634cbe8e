"""Measure speed and memory, beside the PyTorch reference if a clone of it is given.

  python -m launch.benchmark                       # our side, on the devices that JAX finds
  python -m launch.benchmark --only=step,features --dtype=float32,bfloat16

With a clone of the reference, both sides are timed alternately:

  git clone https://github.com/miccunifi/iamcl2r ~/iamcl2r && pip install -e '.[benchmark]'
  python -m launch.benchmark --reference=~/iamcl2r --json=numbers.json

Measures: step, epoch, first_step, features, evaluation, search, large_k, scaling, streaming; on
accelerators also protocol. At real picture sizes, without a clone, beside the networks of torchvision
where it is installed (about ten minutes on two cores):

  python -m launch.benchmark --only=photos,pictures --json=photos.json
  python -m launch.benchmark --only=photo_step --backbone=resnet18 --size=128 --batch=32

photos: photo_step (a training step), photo_features (images per second).
pictures: latency (from one file to its feature), decoding (JPEGs by Grain beside Pillow), from_disk
(training from files beside training from memory), photo_memory (peak of a program that reads 5,000).

cores: processes (features and a step by one process, two, or two devices), step_memory (peak memory and
time of a training step by what its backward pass computes again), both only where they are asked for.

A gallery in a vector store, in LanceDB, in Qdrant Edge (the engine of a Qdrant server in one process)
and, where you give its address, in a Qdrant server, beside exact search in memory (4 GB of disk, 4 GB of
memory; most of an hour on two cores, of which the index of Qdrant Edge takes the most):

  python -m launch.benchmark --only=gallery --json=gallery.json
  python -m launch.benchmark --only=gallery --gallery_rows=100000 \\
      --gallery_url=qdrant:http://localhost:6333

gallery: ingest, index, disk, memory, single queries and their recall, with a filter, before and after
a backfill of a tenth of the rows.

How time and memory grow, over two decades of images, classes, versions, prototypes and gallery rows
(under ten minutes on two quiet cores), with charts; the second command draws them from the file, without
measuring:

  python -m launch.benchmark --only=scaling --json=growth.json --charts=charts
  python -m launch.benchmark --numbers=growth.json --charts=charts

What it costs: hours of the paper's seven tasks and of a month's upgrade of 1,000,000 pictures, for every
machine that the files are of; those of launch.plan hold lower bounds for chips that you do not have:

  python -m launch.benchmark --only=step,features,photos --json=cpu.json
  python -m launch.plan --topology=h100:1 --config=configs/iamcl2r.py:replace=false --images=30000 \\
      --classes=100 --config.dtype=bfloat16 --batch_size=1024 --json=h100-paper.json
  python -m launch.plan --topology=h100:1 --config=configs/folders.py:size=224,backbone=resnet50 \\
      --images=12800 --classes=100 --config.dtype=bfloat16 --batch_size=1024 --json=h100-month.json
  python -m launch.benchmark --numbers=cpu.json,h100-paper.json,h100-month.json --costs

On a CPU, convolutions in bfloat16 take in each pass the form that was fastest on an EPYC. On another
processor (two minutes, quiet):

  python -m launch.benchmark --only=forms --rates=rates.json
  COMPAT_JAX_RATES=rates.json python -m launch.benchmark --only=photos
"""

import json
import sys

from absl import flags

from compat_jax.errors import UserError
from launch import _cli as cli

flags.DEFINE_string("reference", None, "folder of a clone of miccunifi/iamcl2r")
flags.DEFINE_string("json", None, "file to write the numbers to")
flags.DEFINE_list(
    "only", [], "measures to take, or photos, pictures for groups of them; all by default"
)
flags.DEFINE_list(
    "dtype", [], "dtypes to compute in: float32, bfloat16; by default those that are fast here"
)
flags.DEFINE_list(
    "variants",
    None,
    "variants of PyTorch: eager, compile, channels_last, bf16, channels_last_bf16, best (compiled, "
    "channels last, bf16); by default those that each measure is judged by",
)
flags.DEFINE_string(
    "backbone", None, "of photo_step and photo_features; by default resnet50 and vit_s16"
)
flags.DEFINE_integer(
    "size",
    None,
    "pixels of the pictures of photos and pictures; by default 224",
    lower_bound=1,
    upper_bound=8192,
)
flags.DEFINE_integer(
    "batch", None, "pictures in a batch of photos and pictures; by default 8", lower_bound=1
)
flags.DEFINE_integer("gallery_rows", None, "rows of gallery; by default 1,000,000", lower_bound=100)
flags.DEFINE_string(
    "gallery_url",
    None,
    "server of Qdrant to measure gallery in as well, e.g. qdrant:http://localhost:6333; a collection is "
    "made there, and deleted at the end",
)
flags.DEFINE_string("rates", None, "file to write the rates of convolutions to, measured by forms")
flags.DEFINE_string("charts", None, "folder to draw the growth of time and memory to: of scaling")
flags.DEFINE_list(
    "numbers",
    [],
    "files that --json wrote, here or in launch.plan: draw --charts or print --costs of them, and "
    "measure nothing",
)
flags.DEFINE_bool("costs", False, "print the hours of two works, from the rates of --numbers")
flags.DEFINE_string("sizes", "full", "full, or tiny to try that everything runs")
flags.DEFINE_string("part", None, "internal: the part of a measure that runs in a separate process")


def main(_) -> None:
    """Measure and print."""
    args = flags.FLAGS
    if args.numbers:
        _show(args)
        return
    if args.costs:
        raise UserError("costs are of rates in files: give them, --numbers=FILE,...", "costs")
    cli.start_jax()
    from compat_jax import models
    from launch import benchmarks

    cli.check_choice("sizes", args.sizes, sorted(benchmarks.SIZES))
    for dtype in args.dtype:
        cli.check_choice("dtype", dtype, sorted(models.DTYPES))
    if args.backbone is not None and ":" not in args.backbone:
        cli.check_choice("backbone", args.backbone, models.registered())
    photo = {"image": args.size, "batch": args.batch}
    if args.backbone is not None:
        photo["backbones"] = (args.backbone,)
    photo["rows"] = args.gallery_rows
    if args.part:
        _part(args.part, benchmarks.sizes(args.sizes, **photo))
    else:
        _measure(args, photo)


def _measure(args, photo):
    from launch import benchmarks
    from launch.benchmarks import charts, table, timing

    names, folder = benchmarks.chosen(args.only), None
    if args.charts:
        if "scaling" not in names:
            raise UserError("charts are of scaling, which --only leaves out", "charts")
        folder = charts.folder(args.charts)
    lines = benchmarks.measure(
        args.only,
        dtypes=args.dtype,
        sizes_name=args.sizes,
        variants=args.variants,
        photo=photo,
        places=benchmarks.Places(args.reference, args.gallery_url, args.rates),
    )
    results, dtypes = [], benchmarks.chosen_dtypes(args.dtype, names)
    matmul = {d: timing.matmul_flops(d) for d in sorted({"float32", *dtypes})}
    machine, command = timing.machine(), " ".join(["python -m launch.benchmark", *sys.argv[1:]])
    print(table.head(machine, command, matmul), flush=True)
    for result in lines:
        results.append(result)
        print(table.line(result, matmul), flush=True)
    sizes = benchmarks.sizes(args.sizes, **photo)
    content = table.content(results, machine=machine, command=command, matmul=matmul, sizes=sizes)
    if args.json:
        table.write(args.json, content)
    if folder is not None:
        _draw(folder, [content])


def _show(args):
    """Draw or print what follows from files of numbers, without JAX's devices."""
    from launch.benchmarks import charts, costs, table

    if not args.costs and not args.charts:
        raise UserError("of these numbers, draw --charts=FOLDER or print --costs", "numbers")
    contents = {path: table.read(path) for path in args.numbers}
    if args.costs:
        print(costs.table(costs.machines(contents)))
    if args.charts:
        _draw(charts.folder(args.charts), contents.values())


def _draw(folder, contents):
    from launch.benchmarks import charts

    for name in charts.write(folder, charts.growths(contents)):
        print(f"wrote {folder / name}")


def _part(part, sizes):
    from launch.benchmarks import gallery, growth, pictures, training

    kind, _, argument = part.partition(":")
    if kind == "first_update":
        training.first_update(sizes)
    elif kind == "photo_memory":
        print(json.dumps(pictures.read_and_embed(sizes, argument)))
    elif kind == "gallery":
        print(json.dumps(gallery.one_store(argument)))
    else:
        print(json.dumps(growth.one_point(sizes, kind, int(argument))))


if __name__ == "__main__":
    cli.run(main, __doc__)
