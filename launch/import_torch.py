"""Make a chain from PyTorch weights: a file, or a folder of the reference's checkpoints.

  python -m launch.import_torch --weights=a.pt --backbone=resnet18 --out=runs/imported/chain
  python -m launch.import_torch --weights=ckpts --method=hoc --out=runs/imported/chain
  python -m launch.import_torch --weights=vit.safetensors --backbone=vit_s16 \\
      --backbone_arguments=patch=16,image_size=224 --config.data.query.size=224 --out=DIR

A folder gives a version for each of ckpt_0.pt, ckpt_1.pt, ..., a file one pre-trained model, fit for
--config.pretrained of launch.train. State dicts of the reference, of CL2R (--method=fd
--num_classes=100 --backbone=resnet32_cifar), of torchvision and of timm are known by their names.
What the images are (size, normalisation, query and gallery), and the sizes and replacements of the
tasks, is the configuration's.
"""

from absl import flags

from launch import cli

cli.define_config("configs/iamcl2r.py")
flags.DEFINE_string("weights", None, "file (.pt, .safetensors), or folder of ckpt_<task>.pt")
flags.DEFINE_string("backbone", "resnet18", "name of the backbone")
flags.DEFINE_string("backbone_arguments", "", "key=number,... of the backbone")
flags.DEFINE_string("method", "hoc", "method that trained the weights: hoc, sce, fd or er")
flags.DEFINE_integer("num_classes", 1024, "K, the prototypes of the simplex", lower_bound=2)
flags.DEFINE_string("out", None, "folder of the new chain")


def main(_) -> None:
    """Parse, import, say what comes next."""
    args = flags.FLAGS
    weights = cli.require("weights", "a.pt")
    out = cli.require("out", "runs/imported/chain")
    cli.start_jax()
    from pathlib import Path

    from compat_jax.chain import Chain
    from compat_jax.interop import chains

    chain = Chain(out)
    shared = _shared_record(args)
    tasks = args.config.get("tasks")
    if Path(weights).is_dir():
        count = len(chains.checkpoints(weights))
        seen = [tasks.initial + tasks.increment * t for t in range(count)] if tasks else ()
        replace_at = tuple(tasks.replace_at) if tasks else ()
        chains.import_folder(weights, chain, shared, seen, replace_at)
        print(f"{len(chain)} versions in {chain.path}; next:")
        print(f"  python -m launch.evaluate --chain={chain.path}")
        return
    fresh = chains.import_file(weights, chain, shared)
    if fresh:
        print(f"{weights} is a backbone alone: {' and '.join(fresh)} drawn with seed {shared.seed}")
    print(f"1 model in {chain.path}; next:")
    print(f"  python -m launch.train --config.pretrained={chain.path} --config=... --workdir=...")


def _shared_record(args):
    from compat_jax.chain import Record
    from compat_jax.methods import get_method
    from launch import build

    config = args.config
    config.method = get_method(args.method).name
    config.num_prototypes = args.num_classes
    config.backbone.name = args.backbone
    config.backbone.arguments = _numbers(args.backbone_arguments)
    role = next(name for name in ("query", "train") if name in config.data)
    size = config.data[role]["size"]
    return Record(
        method=config.method,
        backbone=args.backbone,
        backbone_arguments=dict(config.backbone.arguments),
        image_shape=(size, size, 3),
        mean=tuple(config.data.mean),
        std=tuple(config.data.std),
        feature_size=args.num_classes - 1,
        num_prototypes=args.num_classes,
        label_order=config.label_order,
        head_classes=None,
        task=None,
        classes_seen=args.num_classes,  # at most; a file does not tell
        parent=None,
        replaced_by=None,
        data_fingerprint="",
        seed=config.seed,
        config=build.plain(config),
    )


def _numbers(text):
    from compat_jax.errors import UserError

    numbers = {}
    for part in filter(None, text.split(",")):
        key, _, value = part.partition("=")
        if not value.isdecimal():
            raise UserError(f"--backbone_arguments needs key=number,..., got {part!r}")
        numbers[key] = int(value)
    return numbers


if __name__ == "__main__":
    cli.run(main, __doc__)
