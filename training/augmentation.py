"""Random crop, flip and normalisation of a batch of uint8 images, on the device they are on.

Every image draws its own parameters. (torchvision's v2 transforms draw one set for a whole batch,
and they would make torchvision a requirement of the embedded data set.)
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def random_crop_flip(
    images: Tensor, *, padding: int, flip: bool, generator: torch.Generator
) -> Tensor:
    """A crop of the image padded by ``padding`` black pixels, flipped left to right half the time.

    images: (B, C, H, W), any dtype; the result has its shape and dtype. The parameters are drawn
    on the CPU, so that one seed means the same augmentation on every device.
    """
    batch, _, height, width = images.shape
    offsets = torch.randint(0, 2 * padding + 1, (2, batch, 1), generator=generator)
    rows = offsets[0] + torch.arange(height)
    cols = offsets[1] + torch.arange(width)
    if flip:
        mirrored = torch.rand(batch, 1, generator=generator) < 0.5
        cols = torch.where(mirrored, cols.flip(1), cols)
    rows, cols = rows.to(images.device), cols.to(images.device)
    padded = F.pad(images, (padding, padding, padding, padding))
    which = torch.arange(batch, device=images.device)[:, None, None]
    # Indices around a slice put the indexed axes first: (B, H, W, C).
    return padded[which, :, rows[:, :, None], cols[:, None, :]].permute(0, 3, 1, 2)


def normalise(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """uint8 images (B, C, H, W) to float32 of about zero mean and unit variance per channel."""
    scale = torch.tensor([1 / (255 * s) for s in std], device=images.device).view(-1, 1, 1)
    shift = torch.tensor([m / s for m, s in zip(mean, std, strict=True)], device=images.device)
    return images.to(torch.float32) * scale - shift.view(-1, 1, 1)
