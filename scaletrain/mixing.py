"""MixUp and CutMix: each image becomes a mixture of two, its label the same mixture.

Both draw from torch's default generators, which a run seeds by (seed, step, rank) before ``augment``. Nothing waits
for the device. Training loss: ``F.cross_entropy(logits, soft_labels)``.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from scaletrain.errors import InputError


def mixup(images: Tensor, labels: Tensor, n_classes: int, alpha: float = 0.2) -> tuple[Tensor, Tensor]:
    """Add to each image, with a share drawn from Beta(alpha, alpha), another one of the batch.

    ``images`` (B, ...) float, ``labels`` (B,) int64 or (B, n_classes) shares; returns images of the same shape and
    shares (B, n_classes) float32 (Zhang et al., "mixup: Beyond Empirical Risk Minimization", 2018).
    """
    kept, other = _kept_share(alpha), torch.randperm(len(images), device=images.device)
    soft = _shares(labels, n_classes)
    return torch.lerp(images[other], images, kept), torch.lerp(soft[other], soft, kept)


def cutmix(images: Tensor, labels: Tensor, n_classes: int, alpha: float = 1.0) -> tuple[Tensor, Tensor]:
    """Replace a rectangle of each image by that of another one of the batch; its area is the other label's share.

    ``images`` (B, C, H, W) float, ``labels`` as for ``mixup``; the share of the area is drawn from Beta(alpha, alpha)
    before the rectangle is cut off at the border (Yun et al., "CutMix", 2019).
    """
    height, width = images.shape[-2:]
    side = (1 - _kept_share(alpha)) ** 0.5
    rows, columns = (_span(size, side) for size in (height, width))
    other = torch.randperm(len(images), device=images.device)
    mixed = images.clone()
    mixed[..., rows, columns] = images[other][..., rows, columns]
    kept = 1 - (rows.stop - rows.start) * (columns.stop - columns.start) / (height * width)
    soft = _shares(labels, n_classes)
    return mixed, torch.lerp(soft[other], soft, kept)


def _kept_share(alpha: float) -> float:
    """Draw from Beta(alpha, alpha), on the CPU: a number that the host needs costs no wait for the device."""
    if not 0 < alpha < float("inf"):
        raise InputError(f"alpha is {alpha}; it must be a finite number above 0")
    return float(torch.distributions.Beta(alpha, alpha).sample())


def _span(size: int, side: float) -> slice:
    """Return ``side`` (a share) of ``size`` places around a random one, cut off at the border."""
    middle, half = int(torch.randint(size, ())), round(side * size / 2)
    return slice(max(0, middle - half), min(size, middle + half))


def _shares(labels: Tensor, n_classes: int) -> Tensor:
    return labels.float() if labels.ndim > 1 else F.one_hot(labels, n_classes).float()
