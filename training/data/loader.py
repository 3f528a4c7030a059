"""The batches of a training run, from any step on: which images, in which process, augmented how.

Order and augmentation follow from the seed, the epoch and an image's index alone, so a run that is
resumed in the middle of an epoch, or shared between processes, sees what any other run of its seed
sees. Light augmentation happens on the device, where the images live as uint8. Recipes of
torchvision run on the CPU: in worker processes, ahead of the training loop, for a CUDA device.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_convert

from linear_vit.bench.instruments import machine
from linear_vit.training import distributed
from linear_vit.training.config import RECIPES, Config, DatasetInfo
from linear_vit.training.data.augmentation import LightDraws, Mixer, image_transform, normalise
from linear_vit.training.data.datasets import Split
from linear_vit.training.data.streams import drawing_from, generator


class Loader:
    """Iterates over (images, targets) of every step from ``start`` to the last of the run.

    images: (b, C, H, W) float32 on the device, normalised, this process's share of the batch;
    targets: (b,) int64 labels, or (b, classes) floating point where the recipe mixes images.
    ``batch_size(step)`` is the size of the global batch.
    """

    def __init__(
        self,
        config: Config,
        split: Split,
        info: DatasetInfo,
        device: torch.device,
        *,
        start: int = 0,
        workers: int | None = None,
    ) -> None:
        self.config, self.info, self.device, self.start = config, info, device, start
        self.recipe = RECIPES[config.recipe]
        self.count = len(split.labels)
        self.steps_per_epoch = -(-self.count // config.batch_size)
        self.steps = config.epochs * self.steps_per_epoch
        self.labels = split.labels.to(device)
        # Torchvision's recipes are made on the CPU, the light one where the images are.
        self.images = split.images.cpu() if self.recipe.per_image else split.images.to(device)
        self.workers = default_workers(device) if workers is None else workers
        self.augmenting: Callable[[], AbstractContextManager[object]] = nullcontext  # a stopwatch
        self.mixer = Mixer(self.recipe, info.classes, config.seed) if self.recipe.mixes else None

    def batch_size(self, step: int) -> int:
        first = step % self.steps_per_epoch * self.config.batch_size
        return min(self.config.batch_size, self.count - first)

    def indices(self, step: int, order: Tensor) -> Tensor:
        """Indices in the training set of this process's images of a step."""
        first = step % self.steps_per_epoch * self.config.batch_size
        batch = order[first : first + self.config.batch_size]
        return batch[share(len(batch), distributed.data_rank(), distributed.data_world())]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        pixels = self._per_image() if self.recipe.per_image else self._light()
        for step, (images, indices) in enumerate(pixels, self.start):
            with self.augmenting():
                images = normalise(images, self.info.mean, self.info.std)
                targets = self.labels[indices]
                if self.mixer is not None:
                    images, targets = self.mixer(images, targets, step)
            yield images, targets

    def _light(self) -> Iterator[tuple[Tensor, Tensor]]:
        for epoch in range(self.start // self.steps_per_epoch, self.config.epochs):
            draws = LightDraws(self.config.seed, epoch, self.count, self.info, self.device)
            order = sample_order(self.config.seed, epoch, self.count).to(self.device)
            first = epoch * self.steps_per_epoch
            for step in range(max(first, self.start), first + self.steps_per_epoch):
                indices = self.indices(step, order)
                images = self.images[indices]
                with self.augmenting():
                    images = draws(images, indices)
                yield images, indices

    def _per_image(self) -> Iterator[tuple[Tensor, Tensor]]:
        cuda = self.device.type == "cuda"
        batches: DataLoader[Any] = DataLoader(
            _AugmentedImages(self),  # type: ignore[arg-type]
            batch_sampler=self._keys(),
            collate_fn=default_convert,  # no more than what was fetched
            num_workers=self.workers,
            prefetch_factor=4 if self.workers else None,
            pin_memory=cuda,
            generator=torch.Generator(),  # else it draws a seed from the stream of dropout
        )
        for images, indices in batches:
            yield (
                images.to(self.device, non_blocking=True),
                indices.to(self.device, non_blocking=True),
            )

    def _keys(self) -> Iterator[list[tuple[int, int]]]:
        """(epoch, index) of this process's images, a list per step."""
        for step in range(self.start, self.steps):
            epoch = step // self.steps_per_epoch
            order = sample_order(self.config.seed, epoch, self.count)
            yield [(epoch, index) for index in self.indices(step, order).tolist()]


class _AugmentedImages:
    """What a DataLoader fetches: images of a list of keys, each augmented from its own stream."""

    def __init__(self, loader: Loader) -> None:
        self.images, self.seed = loader.images, loader.config.seed
        self.augmenting = loader.augmenting if loader.workers == 0 else nullcontext
        self.transform = image_transform(loader.recipe, loader.info)

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        done = self.images.new_empty(len(keys), *self.images.shape[1:])
        with self.augmenting():
            for position, (epoch, index) in enumerate(keys):
                with drawing_from("image", self.seed, epoch, index):
                    done[position] = self.transform(self.images[index])
        return done, torch.tensor([index for _, index in keys], dtype=torch.int64)


@functools.lru_cache(maxsize=2)
def sample_order(seed: int, epoch: int, count: int) -> Tensor:
    """The order of an epoch's images, the same for all models of a seed."""
    return torch.randperm(count, generator=generator("order", seed, epoch))


def share(count: int, part: int, parts: int) -> slice:
    """The positions of a batch of ``count`` that belong to one of ``parts`` processes.

    Consecutive and disjoint; they start at even positions, so that no mixed pair is torn. The
    shares differ by at most two images, and can be empty.
    """
    pairs = -(-count // 2)
    first, last = (2 * (pairs * p // parts) for p in (part, part + 1))
    return slice(min(first, count), min(last, count))


def default_workers(device: torch.device) -> int:
    """None on a CPU, whose cores the model needs; all but one of this process's cores for CUDA."""
    if device.type != "cuda":
        return 0
    return max(1, min(16, machine.available_cores() // distributed.world() - 1))
