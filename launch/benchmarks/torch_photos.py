"""PyTorch at real picture sizes, in a separate process; see `reference.clone_speed.Worker`.

The networks are those of torchvision, or of timm where torchvision has none; the loss is that of
d-Simplex-HOC, so that no clone of the reference is needed.
"""

import contextlib
import os
import signal
from collections.abc import Callable
from typing import Any

from launch.reference.clone_speed import as_variant, serve

COMPILE_SECONDS = 150  # that torch.compile may take
_LAM, _MU = 0.1, 10.0
_CLASSES = 25
_TIMM = {
    "vit_ti16": "vit_tiny_patch16_224",
    "vit_s16": "vit_small_patch16_224",
    "vit_b16": "vit_base_patch16_224",
    "vit_l16": "vit_large_patch16_224",
}


def prepare(work: str, **settings: Any) -> Callable[[], Any]:
    """Set up a work and warm it up.

    Args:
      work: "step" of HOC, "features" or "picture", the features of one picture.
      **settings: variant, backbone, image (pixels), num_prototypes, and the arguments of that work.

    Raises:
      TimeoutError: it does not compile in COMPILE_SECONDS.
    """
    import torch

    torch.manual_seed(0)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    compiles = settings["variant"] in ("compile", "best")
    with _limit(COMPILE_SECONDS) if compiles else contextlib.nullcontext():
        repeat = {"step": _step, "features": _features, "picture": _picture}[work](**settings)
        repeat()
    return repeat


@contextlib.contextmanager
def _limit(seconds):
    def stop(*_):
        raise TimeoutError(f"not compiled in {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _embedder(backbone, image, num_prototypes):
    """A backbone and its bias-free projection."""
    import torch
    from torch import nn

    if backbone in ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"):
        import torchvision

        net = torchvision.models.get_model(backbone, weights=None)
        width, net.fc = net.fc.in_features, nn.Identity()
    else:
        import timm

        sized = {"img_size": image} if backbone.startswith("vit") else {}
        net = timm.create_model(_TIMM.get(backbone, backbone), num_classes=0, **sized)
        width = net.num_features
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return nn.Sequential(net, nn.Linear(width, num_prototypes - 1, bias=False)).to(device)


def _step(variant, backbone, image, num_prototypes, *, batch):
    """Prepare a step of HOC on random images, its optimizer included."""
    import torch
    from torch import nn
    from torch.nn import functional

    nets = [_embedder(backbone, image, num_prototypes) for _ in range(2)]
    (net, place, context), (previous, *_) = (as_variant(variant, n) for n in nets)
    previous.eval()
    device = next(nets[0].parameters()).device
    # A head of the simplex's shape; which rows it has does not change the time.
    head = nn.Linear(num_prototypes - 1, num_prototypes, bias=False, device=device)
    head.requires_grad_(False)
    decayed = [p for p in nets[0].parameters() if p.ndim >= 2]
    others = [p for p in nets[0].parameters() if p.ndim < 2]
    groups = [{"params": others, "weight_decay": 0.0}, {"params": decayed, "weight_decay": 5e-4}]
    optimizer = torch.optim.SGD(groups, lr=0.001, momentum=0.9)
    images = place(torch.randn(batch, 3, image, image))
    labels = torch.randint(0, min(_CLASSES, num_prototypes), (batch,), device=device)

    def repeat():
        net.train()
        optimizer.zero_grad()
        with context():
            features = net(images)
            cross_entropy = functional.cross_entropy(head(features), labels)
            with torch.no_grad():
                old = previous(images)
            loss = _LAM * cross_entropy + (1 - _LAM) * _contrast(features, old, labels)
        loss.backward()
        optimizer.step()
        loss.item()

    return repeat


def _contrast(new, old, labels):
    """Equation 4 of the CVPR 2024 paper; see `losses.info_nce`."""
    import torch
    from torch.nn import functional

    new, old = (functional.normalize(features.float()) for features in (new, old))
    similarity = _MU * old @ new.T
    same = labels[:, None] == labels[None, :]
    return (torch.logsumexp(similarity.masked_fill(same, -1e9), 1) - similarity.diagonal()).mean()


def _features(variant, backbone, image, num_prototypes, *, batch, count):
    """Prepare the extraction of normalised features of `count` images in batches."""
    import torch
    from torch.nn import functional

    net, place, context = as_variant(variant, _embedder(backbone, image, num_prototypes).eval())
    images = torch.randn(batch, 3, image, image)

    def repeat():
        with torch.no_grad():
            for _ in range(count // batch):
                with context():
                    features = net(place(images))
                functional.normalize(features.float()).cpu()

    return repeat


def _picture(variant, backbone, image, num_prototypes, *, path):
    """Prepare the features of one decoded picture, its normalisation included."""
    import torch
    from torch.nn import functional

    from compat_jax.data.pictures import Preparation

    net, place, context = as_variant(variant, _embedder(backbone, image, num_prototypes).eval())
    decoded = torch.from_numpy(Preparation(image)(path).copy())
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])

    def repeat():
        with torch.no_grad():
            pixels = ((decoded.float() / 255 - mean) / std).permute(2, 0, 1)[None].contiguous()
            with context():
                features = net(place(pixels))
            return functional.normalize(features.float()).cpu().numpy()

    return repeat


if __name__ == "__main__":
    serve(prepare)
