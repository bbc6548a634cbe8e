"""Write a version of a chain as a PyTorch state dict, which the reference loads with strict=True.

  python -m launch.export_torch --chain=runs/hoc/chain --version=0 --out=b.pt
  python -m launch.export_torch --chain=runs/hoc/chain --version=-1 --out=b.safetensors

A .pt file needs PyTorch, a .safetensors file only its library; both come with the extra torch. The
latter also says how its images are made, where timm writes it: size, mean, std, crop share, filter and
resize. The file appears whole or not at all; --out may be in a bucket, gs://bucket/b.pt.
"""

from absl import flags

from launch import _cli as cli

flags.DEFINE_string("chain", None, "folder of the chain")
flags.DEFINE_integer("version", -1, "number of the version; negative counts from the end")
flags.DEFINE_string("out", None, "file to write, .pt or .safetensors")
flags.DEFINE_string("backbone", None, "import path of your own backbone, package.module:Name")


def main(_) -> None:
    """Parse, export, say how to load it."""
    args = flags.FLAGS
    path, out = cli.require("chain", "runs/hoc/chain"), cli.require("out", "b.pt")
    from compat_jax.chain import Chain
    from compat_jax.interop import chains, torch_files

    file = str(torch_files.check_writable(out))
    state_dict = chains.export_version(Chain(path, args.backbone), args.version, file)
    print(f"{len(state_dict)} tensors in {file}; in PyTorch:")
    if torch_files.is_safetensors(file):
        print(f"  net.load_state_dict(safetensors.torch.load_file({file!r}), strict=True)")
    else:
        print(f"  net.load_state_dict(torch.load({file!r}, weights_only=True), strict=True)")


if __name__ == "__main__":
    cli.run(main, __doc__)
