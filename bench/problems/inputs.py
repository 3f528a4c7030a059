"""Random inputs: zero mean, unit variance, the same for the same seed and device."""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from linear_vit import kernels
from linear_vit.bench.problems.case import Operation, Problem

Tensors = dict[str, Tensor]
Run = Callable[[Tensors, str], tuple[Tensor, ...]]


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


class Drawn(Operation):
    """An operation whose inputs are drawn one after another, in the order of its arguments."""

    @abstractmethod
    def drawn(self, normal: Normal, shape: Any) -> tuple[Tensors, Tensors]:
        """The inputs by name, and by the output's name the output gradients."""

    def options(self, shape: Any) -> dict[str, Any]:
        """Arguments of the public function beside the inputs."""
        return {}

    def run(self, shape: Any, **settings: Any) -> Run:
        """What calls the operation of ``kernels`` with the inputs, in their order, and settings."""
        options = {**self.options(shape), **settings}

        def run(tensors: Tensors, backend: str) -> tuple[Tensor, ...]:
            out = getattr(kernels, self.name)(*tensors.values(), backend=backend, **options)
            return out if isinstance(out, tuple) else (out,)

        return run

    def problem(
        self, shape: Any, dtype: torch.dtype, device: torch.device, seed: int = 0
    ) -> Problem:
        inputs, outputs = self.drawn(Normal(dtype, device, seed), shape)
        for x in inputs.values():
            x.requires_grad_()
        cotangents = tuple(outputs.values())
        return Problem(self, shape, dtype, inputs, tuple(outputs), cotangents, self.run(shape))
