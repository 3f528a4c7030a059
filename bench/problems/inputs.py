"""Random inputs: zero mean, unit variance, the same for the same seed and device."""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from linear_vit.bench.problems.case import Operation, Problem


class Normal:
    """Draws tensors of one problem, one after another, on its device."""

    def __init__(self, dtype: torch.dtype, device: torch.device, seed: int) -> None:
        self.dtype, self.device = dtype, device
        self._generator = torch.Generator(device).manual_seed(seed)

    def __call__(self, *size: int, dtype: torch.dtype | None = None) -> Tensor:
        drawn = torch.randn(size, generator=self._generator, device=self.device)
        return drawn.to(dtype or self.dtype)

    def around(self, mean: float, std: float, *size: int) -> Tensor:
        """Of this mean and standard deviation, scaled in float32 before it is rounded."""
        return (mean + std * self(*size, dtype=torch.float32)).to(self.dtype)

    def problem(
        self,
        operation: Operation,
        shape: Any,
        inputs: dict[str, Tensor],
        output_names: tuple[str, ...],
        cotangents: tuple[Tensor, ...],
        run: Callable[[dict[str, Tensor], str], tuple[Tensor, ...]],
    ) -> Problem:
        """The problem of these tensors; the inputs ask for gradients."""
        for x in inputs.values():
            x.requires_grad_()
        return Problem(operation, shape, self.dtype, inputs, output_names, cotangents, run)


class Drawn(Operation):
    """An operation whose inputs are drawn one after another."""

    @abstractmethod
    def drawn(self, normal: Normal, shape: Any) -> Problem:
        """The problem of this shape, of what ``normal`` draws."""

    def problem(
        self, shape: Any, dtype: torch.dtype, device: torch.device, seed: int = 0
    ) -> Problem:
        return self.drawn(Normal(dtype, device, seed), shape)
