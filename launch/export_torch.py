"""Write a version of a chain as a PyTorch state dict, which the reference loads with strict=True.

  python -m launch.export_torch --chain=runs/hoc/chain --version=0 --out=b.pt
  python -m launch.export_torch --chain=runs/hoc/chain --version=-1 --out=b.safetensors

A .safetensors file needs no PyTorch here.
"""

from absl import flags

from launch import cli

flags.DEFINE_string("chain", None, "folder of the chain")
flags.DEFINE_integer("version", -1, "number of the version; negative counts from the end")
flags.DEFINE_string("out", None, "file to write, .pt or .safetensors")


def main(_) -> None:
    """Parse, export, say how to load it."""
    args = flags.FLAGS
    path = cli.require("chain", "runs/hoc/chain")
    out = cli.require("out", "b.pt")
    from compat_jax.chain import Chain
    from compat_jax.interop import chains

    state_dict = chains.export_version(Chain(path), args.version, out)
    print(f"{len(state_dict)} tensors in {out}; in PyTorch:")
    if out.endswith(".safetensors"):
        print(f"  net.load_state_dict(safetensors.torch.load_file({out!r}), strict=True)")
    else:
        print(f"  net.load_state_dict(torch.load({out!r}, weights_only=True), strict=True)")


if __name__ == "__main__":
    cli.run(main, __doc__)
