"""How a problem's tensors lie in memory, told from one process to another.

The two share a block of anonymous memory, the arena: every storage of the inputs and output
gradients, and after them a place for each result. The kernel itself never sees it. Its tensors are
ordinary ones, whose bytes are copied from there: so PyTorch's counts of versions say nothing of it.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_ALIGNED = 64


@dataclass(frozen=True)
class Plan:
    """Sizes and places, all of them plain numbers and words.

    Attributes:
        storages: (place in the arena, bytes) of each.
        tensors: by name (storage, dtype, shape, strides, offset in elements).
        results: (place in the arena, dtype, shape) of each.
        size: of the arena, in bytes.
    """

    storages: list[tuple[int, int]]
    tensors: dict[str, tuple[int, str, list[int], list[int], int]]
    results: list[tuple[int, str, list[int]]]
    size: int

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], results: Sequence[Tensor]) -> "Plan":
        """For these tensors, and results that are like those."""
        numbers: dict[int, int] = {}
        storages: list[tuple[int, int]] = []
        lying: dict[str, tuple[int, str, list[int], list[int], int]] = {}
        place = 0
        for name, x in tensors.items():
            storage = x.untyped_storage()
            # Tensors of nothing have no address to tell them apart by.
            key = storage.data_ptr() or -1 - len(storages)
            if key not in numbers:
                numbers[key] = len(storages)
                storages.append((place, storage.nbytes()))
                place = _after(place, storage.nbytes())
            strides, offset = list(x.stride()), int(x.storage_offset())
            lying[name] = (numbers[key], _name(x.dtype), list(x.shape), strides, offset)
        places = []
        for x in results:
            places.append((place, _name(x.dtype), list(x.shape)))
            place = _after(place, x.numel() * x.element_size())
        return cls(storages, lying, places, max(place, _ALIGNED))


def _after(place: int, size: int) -> int:
    return -(-(place + size) // _ALIGNED) * _ALIGNED


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def made(descriptor: int, size: int) -> Tensor:
    """The bytes of an open file of anonymous memory, as a tensor that shares them."""
    path = f"/proc/self/fd/{descriptor}"
    return torch.from_file(path, shared=True, size=size, dtype=torch.uint8)


def new_file(size: int) -> int:
    """A descriptor of new anonymous memory, for the caller to close."""
    descriptor = os.memfd_create("linear_vit_arena")
    os.truncate(descriptor, size)
    return descriptor


def tensor_in(memory: Tensor, lying: Sequence[Any]) -> Tensor:
    """The tensor that lies so in these bytes."""
    _, dtype, shape, strides, offset = lying
    empty = torch.empty(0, dtype=getattr(torch, dtype), device=memory.device)
    return empty.set_(memory.untyped_storage(), offset, tuple(shape), tuple(strides))


def bytes_of(x: Tensor) -> Tensor:
    """All of the storage that a tensor lies in."""
    return torch.empty(0, dtype=torch.uint8, device=x.device).set_(x.detach().untyped_storage())


def result_in(arena: Tensor, place: Sequence[Any]) -> Tensor:
    """Where a result goes, dense."""
    start, dtype, shape = place
    of = getattr(torch, dtype)
    size = of.itemsize * torch.Size(shape).numel()
    return arena[start : start + size].view(of).view(shape)
