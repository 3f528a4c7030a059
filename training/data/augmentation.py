"""What happens to training images: light on the device, or recipes of torchvision image by image.

Every image draws parameters of its own, from a stream named by seed, epoch and the image's index in
the training set, whatever batch or process it is in. (torchvision's v2 transforms draw one set for
a whole batch, so they are given one image at a time; the light recipe needs no torchvision, since
the embedded data set should not.) Mixing draws once per global batch, and mixes neighbours.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from linear_vit.training.config import DatasetInfo, Recipe
from linear_vit.training.data.streams import drawing_from, generator
from linear_vit.training.errors import UserError, first_line

_PADDING = 4  # of the recipes' random crop; the light one takes the data set's


class LightDraws:
    """The light recipe's parameters of one epoch: an offset and a flip for every training image.

    Drawn on the CPU, so that one seed means the same augmentation on every device, and copied to
    ``device`` at once: a copy in every step would make the host wait for the step before.
    """

    def __init__(
        self, seed: int, epoch: int, count: int, info: DatasetInfo, device: torch.device
    ) -> None:
        draws = generator("light", seed, epoch)
        self.padding = info.crop_padding
        offsets = torch.randint(0, 2 * self.padding + 1, (2, count), generator=draws)
        mirrored = (torch.rand(count, generator=draws) < 0.5) & info.flip
        self.offsets, self.mirrored = offsets.to(device), mirrored.to(device)

    def __call__(self, images: Tensor, indices: Tensor) -> Tensor:
        """images (B, C, H, W) with their indices (B,) in the training set, both on the device."""
        return crop_flip(images, self.offsets[:, indices], self.mirrored[indices], self.padding)


def crop_flip(images: Tensor, offsets: Tensor, mirrored: Tensor, padding: int) -> Tensor:
    """Windows of the images padded by ``padding`` black pixels, some flipped left to right.

    images: (B, C, H, W), any dtype; the result has its shape and dtype.
    offsets: (2, B), rows and columns from 0 to 2 * padding; mirrored: (B,) bool.
    """
    batch, _, height, width = images.shape
    rows = offsets[0, :, None] + torch.arange(height, device=images.device)
    cols = offsets[1, :, None] + torch.arange(width, device=images.device)
    cols = torch.where(mirrored[:, None], cols.flip(1), cols)
    padded = F.pad(images, (padding, padding, padding, padding))
    which = torch.arange(batch, device=images.device)[:, None, None]
    # Indices around a slice put the indexed axes first: (B, H, W, C).
    return padded[which, :, rows[:, :, None], cols[:, None, :]].permute(0, 3, 1, 2)


def image_transform(recipe: Recipe, info: DatasetInfo) -> Callable[[Tensor], Tensor]:
    """The recipe for one uint8 image (C, H, W), drawing from the global CPU generator.

    Raises UserError where torchvision does not import.
    """
    v2 = torchvision_v2()
    steps = []
    if info.crop_padding:
        steps.append(v2.RandomCrop(info.image_size, padding=_PADDING))
    if info.flip:
        steps.append(v2.RandomHorizontalFlip())
    if recipe.rotation:
        steps.append(v2.RandomRotation(recipe.rotation, v2.InterpolationMode.BILINEAR))
    if recipe.jitter:
        steps.append(v2.ColorJitter(recipe.jitter, recipe.jitter, recipe.jitter))
    if recipe.rand_augment:
        steps.append(v2.RandAugment(num_ops=2, magnitude=9))
    if recipe.erasing:
        # The mean colour, which normalisation makes zero.
        mean = [round(255 * channel) for channel in info.mean]
        steps.append(v2.RandomErasing(recipe.erasing, value=mean))
    return v2.Compose(steps)


class Mixer:
    """Mixup and CutMix of a batch on its device, one draw per global batch.

    Images 0 and 1 are mixed with each other, 2 and 3, and so on, so that a share of a batch that
    starts at an even position mixes as it does in the whole batch. (torchvision mixes image i with
    image i - 1; given the pairs as two images of many channels, that swaps the halves of a pair.)
    """

    def __init__(self, recipe: Recipe, classes: int, seed: int) -> None:
        v2 = torchvision_v2()
        choices = []
        if recipe.cutmix:
            choices.append(v2.CutMix(alpha=recipe.cutmix, num_classes=None))
        if recipe.mixup:
            choices.append(v2.MixUp(alpha=recipe.mixup, num_classes=None))
        self.transform = v2.RandomChoice(choices)
        self.classes = classes
        self.seed = seed

    def __call__(self, images: Tensor, labels: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """images (B, C, H, W) floating point, labels (B,) -> mixed images, targets (B, classes).

        The last image of an odd batch stays as it is.
        """
        targets = F.one_hot(labels, self.classes).to(images.dtype)
        pairs = len(images) // 2
        if pairs == 0:
            return images, targets
        both = slice(0, 2 * pairs)

        def in_two(x: Tensor) -> Tensor:  # (2 pairs, A, ...) -> (2, pairs * A, ...)
            return x[both].unflatten(0, (pairs, 2)).transpose(0, 1).flatten(1, 2)

        def back(x: Tensor, whole: Tensor) -> Tensor:
            mixed = x.unflatten(1, (pairs, -1)).transpose(0, 1).flatten(0, 1)
            return torch.cat([mixed, whole[2 * pairs :]])

        with drawing_from("mix", self.seed, step):
            mixed = self.transform(in_two(images), in_two(targets))
        return back(mixed[0], images), back(mixed[1], targets)


def normalise(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """uint8 images (B, C, H, W) to float32 of about zero mean and unit variance per channel."""
    scale, shift = _scale_and_shift(mean, std, images.device)
    return images.to(torch.float32) * scale - shift


@functools.lru_cache(maxsize=8)  # a copy to the device in every step would wait for the last one
def _scale_and_shift(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    scale = torch.tensor([1 / (255 * s) for s in std]).view(-1, 1, 1)
    shift = torch.tensor([m / s for m, s in zip(mean, std, strict=True)]).view(-1, 1, 1)
    return scale.to(device), shift.to(device)


def torchvision_v2() -> Any:
    """The module torchvision.transforms.v2, imported when needed; UserError where it can't be."""
    try:
        from torchvision.transforms import v2
    except Exception as error:  # beside a torch of another build it fails in several ways
        raise UserError(
            f"the recipes seed and strong need torchvision, which does not import here "
            f"({first_line(error):.160}); install the torchvision made for this torch, "
            "or give --recipe light"
        ) from error
    return v2
