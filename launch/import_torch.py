"""Make a chain of PyTorch weights: of a file, or of a folder of the reference's checkpoints.

  python -m launch.import_torch --weights=a.pt --backbone=resnet50 --out=runs/imported/chain \\
      --size=224 --mean=0.485,0.456,0.406 --std=0.229,0.224,0.225
  python -m launch.import_torch --weights=ckpts --config=configs/iamcl2r.py --out=runs/imported/chain
  python -m launch.import_torch --weights=dinov2_vits14_pretrain.pth --backbone=dinov2_s14 \\
      --size=224 --mean=0.485,0.456,0.406 --std=0.229,0.224,0.225 --out=runs/imported/chain --append

A folder gives a version for each of ckpt_0.pt, ckpt_1.pt, ..., a file one pre-trained model, fit for
--config.pretrained of launch.train. With --append the model becomes the next version of the chain that
is in --out, whatever its backbone, if K (--num_prototypes) is the chain's: so two imported models stand
in one chain. The projection that a backbone alone lacks is drawn at random: start training from such a
version, do not search with it.

State dicts of the reference, of CL2R (--method=fd --num_prototypes=100 --backbone=resnet32_cifar), of
torchvision, of timm and of DINOv2 are known by their names; configs/weights.md tells where to get which
file.

Size, mean, std, crop share, filter and resize of the images are those of the flags, else of --config,
else of the file, where timm writes them; it is printed which. A model of unknown size, mean or std is
refused, and so is a resize of timm's that is unknown here (border) until --resize is given. A ViT is
made for the size of the images. A configuration also gives query and gallery, sizes and replacements of
the tasks.
Files of torch.save need PyTorch 2.10 or later, .safetensors files their library; both come with the
extra torch. Nothing in a file is run: one that would need it is refused, with the names of what it
would run. Killed at any time, run the same command to resume.
"""

from typing import Any

from absl import flags
from ml_collections import ConfigDict

from compat_jax import methods
from launch import _cli as cli

cli.define_config()
flags.DEFINE_string(
    "weights", None, "file (.pt, .pth, .bin, .safetensors), or folder of ckpt_<task>.pt"
)
flags.DEFINE_bool("ema", False, "take the averaged (EMA) weights of the file")
flags.DEFINE_string("backbone", None, "name of the backbone, or import path of your own; resnet18")
flags.DEFINE_string("backbone_arguments", "", "key=number,... of the backbone")
flags.DEFINE_string("method", None, f"that trained the weights: {', '.join(methods.names())}; hoc")
flags.DEFINE_integer("num_prototypes", None, "K of the simplex; 1024", lower_bound=2)
flags.DEFINE_integer("size", None, "side of the images in pixels", lower_bound=1)
flags.DEFINE_string("mean", None, "of each channel in 0..1, e.g. 0.485,0.456,0.406")
flags.DEFINE_string("std", None, "of each channel in 0..1, e.g. 0.229,0.224,0.225")
flags.DEFINE_float("crop", None, "share of the short side that the centre crop keeps, e.g. 0.875")
flags.DEFINE_enum("filter", None, ["bicubic", "bilinear", "box", "lanczos"], "of the resize")
flags.DEFINE_enum(
    "resize", None, ["crop", "squash"], "keep the aspect and crop the centre, or squash"
)
flags.DEFINE_string("out", None, "folder of the new chain")
flags.DEFINE_bool("append", False, "add the file to the chain in --out, as its next version")


def main(_) -> None:
    """Parse, import, say what comes next."""
    args = flags.FLAGS
    path, out = cli.require("weights", "a.pt"), cli.require("out", "runs/imported/chain")
    cli.start_jax()
    from compat_jax import report
    from compat_jax.chain import Chain
    from compat_jax.errors import UserError
    from compat_jax.files import absolute
    from compat_jax.interop import chains, torch_files

    draft, given = _draft(args), _given_images(args)
    chain, source = Chain(out, draft.backbone), absolute(path)
    if not source.exists():
        raise UserError(f"no weight file at {source}", "weights")
    folder = source.is_dir()
    for name in ("ema", "append"):
        if folder and getattr(args, name):
            raise UserError(
                f"a folder of checkpoints is imported without {name}: give a file", name
            )
    if not args.append:
        report.check_writable(chain.path)
    weights = torch_files.load(chains.checkpoints(path)[0] if folder else path, args.ema)
    run, images, config = _with_images(draft, given, weights)
    for note in weights.notes:
        print(f"note: {note}")
    import_them = _import_folder if folder else _import_file
    import_them(path if folder else weights, chain, run, images=images, config=config)


def _import_folder(path, chain, run, *, images, config):
    """Make a chain of the checkpoints of a folder."""
    from compat_jax import config as configs
    from compat_jax.interop import chains, start

    numbers, tasks = range(len(chains.checkpoints(path))), run.tasks
    has_tasks = config is not None and "tasks" in config
    replaced = configs.own_field(flags.FLAGS.config, "tasks.replace_at") if has_tasks else ()
    seen = [tasks.initial + tasks.increment * n for n in numbers if has_tasks]
    chains.import_folder(
        path,
        chain,
        run,
        image_shape=(images.size, images.size, len(images.mean)),
        course=chains.Course(seen, replaced),
        config=config,
        preparation=start.preparation(images),
    )
    print(f"{len(chain)} versions in {chain.path}; next:")
    print(f"  python -m launch.evaluate --chain={chain.path}")


def _import_file(weights, chain, run, *, images, config):
    """Make a weight file a chain, or the next version of one."""
    from compat_jax.interop import chains, start

    append = flags.FLAGS.append
    made = chains.import_file(
        weights,
        chain,
        run,
        image_shape=(images.size, images.size, len(images.mean)),
        config=config,
        preparation=start.preparation(images),
        append=append,
    )
    for note in made.notes:
        print(f"note: {note}")
    if made.fresh:
        drawn = f"{' and '.join(made.fresh)} drawn with seed {run.seed}"
        print(f"{weights.path} is a backbone alone (a classifier of its own is left out): {drawn}")
    print(f"{f'version {made.number}' if append else '1 model'} in {chain.path}; next:")
    if append and not made.fresh:
        print(f"  python -m launch.evaluate --chain={chain.path}")
    else:
        print(
            f"  python -m launch.train --config.pretrained={chain.path} --config=... --workdir=..."
        )


def _draft(args):
    """The run that the weights are of, before anything is known about their images."""
    from compat_jax import config as configs
    from compat_jax.models import Backbone
    from compat_jax.training import Run

    arguments = _numbers(args.backbone_arguments)
    if args.config is None:
        return Run(
            method=args.method or "hoc",
            backbone=Backbone(args.backbone or "resnet18", arguments),
            num_prototypes=args.num_prototypes or 1024,
        )
    draft = configs.run_of(args.config)
    with args.config.unlocked():
        _override(args, draft, arguments)
    return configs.run_of(args.config)


def _override(args, draft, arguments):
    """Write the flags into the configuration, which the records keep."""
    config, backbone = args.config, draft.given_backbone
    if args.method and args.method != draft.given_method.name:
        config.method = args.method
        config.loss = dict(methods.get(args.method).arguments)
    if args.num_prototypes:
        config.num_prototypes = args.num_prototypes
    if args.backbone:
        config.backbone = {"name": args.backbone, "arguments": arguments}
    elif arguments:
        own = {**backbone.arguments, **arguments}
        config.backbone = {"name": backbone.name, "arguments": own}


def _with_images(draft, given, weights):
    """The run, the settings of its images, and the configuration for the records."""
    import dataclasses

    from compat_jax import config as configs
    from compat_jax.interop import start
    from compat_jax.interop.image_settings import chosen

    config = flags.FLAGS.config
    configured = _configured_images(config, draft)
    images, sentence = chosen(
        ("the flags", given),
        ("the configuration", configured),
        (start.BACKBONE, start.image_size_of(draft.given_backbone)),
        (start.FILE, weights.images),
    )
    images.require()
    print(sentence)
    for difference in images.differences(weights.images):
        print(f"note: {difference}, as {weights.path} says")
    backbone = start.sized(draft.given_backbone, images)
    preprocess = dataclasses.replace(draft.preprocess, mean=images.mean, std=images.std)
    run = dataclasses.replace(draft, preprocess=preprocess, backbone=backbone)
    if config is None:
        return run, images, None
    data = config.get("data", {})
    kept = data.to_dict() if data else {}
    content = {**kept, "mean": images.mean, "std": images.std}
    for role in ("train", "query", "gallery", "photos"):
        if "size" in content.get(role, {}):
            content[role]["size"] = images.size
    with config.unlocked():
        config.data = ConfigDict(content)
        if backbone != draft.given_backbone:
            config.backbone = {"name": backbone.name, "arguments": dict(backbone.arguments)}
    return run, images, configs.plain(config)


def _configured_images(config, draft):
    """The settings of the images that a configuration gives."""
    from compat_jax import config as configs
    from compat_jax.interop.image_settings import ImageSettings

    data: Any = config.get("data", {}) if config is not None else {}
    mean, std = (
        getattr(draft.preprocess, name) if data.get(name) is not None else None
        for name in ("mean", "std")
    )
    roles = ("photos",) if "photos" in data else ("query", "train")
    sources = [configs.source_of(config, role) for role in roles if role in data]
    source = next((source for source in sources if source.get("size")), {})
    known = {name: source.get(name) for name in ("size", "crop", "filter", "resize")}
    return ImageSettings(mean=mean, std=std, **known)


def _given_images(args):
    from compat_jax.data import Preprocess
    from compat_jax.errors import UserError
    from compat_jax.interop.image_settings import ImageSettings

    values = {}
    for name in ("mean", "std"):
        text = getattr(args, name)
        try:
            values[name] = tuple(float(x) for x in text.split(",")) if text is not None else None
        except ValueError as error:
            raise UserError(
                f"{name} needs numbers like 0.5,0.5,0.5, got {text!r:.80}", name
            ) from error
    mean, std = values["mean"], values["std"]
    Preprocess(mean or (0.0,) * len(std or (0,)), std or (1.0,) * len(mean or (0,)))
    return ImageSettings(
        args.size, mean, std, crop=args.crop, filter=args.filter, resize=args.resize
    )


def _numbers(text):
    from compat_jax.errors import UserError

    numbers = {}
    for part in filter(None, text.split(",")):
        key, _, value = part.partition("=")
        if not value.isdecimal() or not value.isascii():
            raise UserError(
                f"backbone_arguments needs key=number,..., got {part!r:.80}", "backbone_arguments"
            )
        numbers[key] = int(value)
    return numbers


if __name__ == "__main__":
    cli.run(main, __doc__)
