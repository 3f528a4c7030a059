"""A whole model as a case of the one harness: as it comes, and with its attention swapped.

All attentions of a model and resolution take turns, in inference and in a training step. Each case
also says what attention takes of it: measured in place, and as its kernels take by themselves.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from linear_vit import attention, kernels
from linear_vit.bench import problems
from linear_vit.bench.problems import Case, Problem, Shape, TimedOnly, no_inputs
from linear_vit.options import OptionError
from linear_vit.training import shares
from linear_vit.training.errors import first_line
from linear_vit.training.models import ORIGINAL, build, builder
from linear_vit.training.step import autocast, make_optimizer, make_scaler, training_step
from linear_vit.training.steps import DEFAULT, DTYPES, STEP

INFERENCE = "inference"
_AMP = {"cpu": "off", "cuda": "bf16"}
_BATCH = {"cpu": 1, "cuda": 8}
_RESOLUTIONS = (224, 448, 896)
_TINY = 64  # of a rehearsal


@dataclass(frozen=True)
class ModelShape(Shape):
    """B square images of a resolution, and the model that reads them."""

    B: int
    model: str
    attention: str
    resolution: int

    @property
    def tokens(self) -> int:
        """The resolution: how many tokens that is, the model alone knows."""
        return self.resolution


@dataclass(frozen=True)
class Asked:
    """What ``--models``, ``--attention``, ``--resolutions`` and ``--backends`` name."""

    models: tuple[str, ...] = ()
    attention: tuple[str, ...] = ()
    resolutions: tuple[int, ...] = ()
    backends: tuple[str, ...] = ()


class WholeModel(TimedOnly):
    """Inference, and a training step, of any model on fixed random images."""

    name = "whole_model"
    title = "Whole model"
    modes = (INFERENCE, STEP)
    budget = 4.0
    test = "test_model"

    def __init__(self) -> None:
        self.asked = Asked()
        self._running: WeakValueDictionary[ModelShape, _Running] = WeakValueDictionary()

    def ask(self, asked: Asked) -> None:
        """From now on the sweep has these models.

        Raises:
            OptionError: one that is not there, or no attention of ours.
        """
        for name in asked.models:
            builder(name)
        for kind in asked.attention:
            if kind not in attention.ATTENTION_TYPES:
                there = ", ".join(attention.ATTENTION_TYPES)
                raise OptionError(f"--attention: unknown type {kind!r}; there are {there}")
        self.asked = replace(
            asked,
            attention=asked.attention or attention.ATTENTION_TYPES,
            resolutions=asked.resolutions or _RESOLUTIONS,
        )

    def sizes(
        self, device_type: str, extent: str, tokens: Sequence[int], total_tokens: int | None
    ) -> Iterator[ModelShape]:
        """Every model at every resolution: as it comes, then with each attention."""
        for model in self.asked.models:
            for resolution in sorted(set(self.asked.resolutions)):
                for kind in dict.fromkeys((ORIGINAL, *self.asked.attention)):
                    yield ModelShape(_BATCH[device_type], model, kind, resolution)

    def dtypes(self, device_type: str, chosen: Sequence[str]) -> tuple[str]:
        return (DTYPES[_AMP[device_type]],)

    def backends(self, device: torch.device, asked: Sequence[str]) -> dict[str, str | None]:
        """Those of linear attention that are asked for, or what a model takes by itself."""
        if not asked:
            return {DEFAULT: None}
        known = kernels.backends("linear_attention", device)
        return {name: why for name, why in known.items() if name in asked}

    def unusable(self, shape: Any, backend: str, device: torch.device) -> str | None:
        """Why a model can't be built, or can't become this; the original is timed once."""
        known = self.backends(device, self.asked.backends)
        first = next(name for name, why in known.items() if why is None)
        if shape.attention == ORIGINAL and backend != first:
            return "the original has its own attention: it is timed once"
        return _cannot(shape.model, shape.attention, min(self.asked.resolutions))

    def problem(
        self, shape: Any, dtype: torch.dtype, device: torch.device, seed: int = 0
    ) -> Problem:
        running = self._running[shape] = _Running(shape, device)
        return _ModelProblem(self, shape, dtype, {}, (), (), no_inputs, running)

    def turn_key(self, shape: ModelShape) -> object:
        return replace(shape, attention="")

    def shape(self, tokens: int, batch: int = 1) -> ModelShape:
        raise NotImplementedError("a model is named by --models")

    def rehearsal(self, shape: ModelShape) -> ModelShape:
        return replace(shape, resolution=_TINY)

    def lengths(self, device_type: str, extent: str) -> tuple[int, ...]:
        return ()

    def working_set(self, mode: str, backend: str, shape: Any) -> int:
        """Not known before the model is built: a case that has no room says so when it runs."""
        return 0

    # How a case is named, and what a saved run says of it.

    def size_name(self, shape: Any) -> str:
        return f"{shape.model.rpartition('/')[2]}-{shape.attention}-{shape.resolution}"

    def case_name(self, case: Case) -> str:
        """timm:vit_tiny_patch16_224-linear-448-inference-default."""
        return f"{self.size_name(case.shape)}-{case.mode}-{case.backend}"

    def group(self, case: Case) -> str:
        shape = case.shape
        assert isinstance(shape, ModelShape)
        return f"{self.name} {shape.model} {case.mode} {shape.resolution} batch {shape.B}"

    def facts(self, case: Case, median_s: float) -> dict[str, Any]:
        shape = case.shape
        assert isinstance(shape, ModelShape)
        made = self._running[shape].made[case.backend, case.mode]
        return {
            "whole_model": shape.model,
            "attention": shape.attention,
            "resolution": shape.resolution,
            "batch": shape.B,
            "images_per_s": shape.B / median_s,
            "parameters": sum(x.numel() for x in made.model.parameters()),
            **shares.of_attention(
                made.model, made.call, shape.attention, case, made.device, median_s
            ),
        }


WHOLE_MODEL = WholeModel()
problems.register(WHOLE_MODEL)


@functools.cache
def _cannot(model: str, kind: str, resolution: int) -> str | None:
    """Why a model can't be built with this attention; None where it can."""
    try:
        build(model, kind, resolution)
    except Exception as error:  # of a library, or of a user's file
        return f"{type(error).__name__}: {first_line(error)}"
    return None


@dataclass(frozen=True)
class _Made:
    """A model, and the call that is timed."""

    model: nn.Module
    call: Callable[[], tuple[Tensor, ...]]
    device: torch.device


@dataclass(eq=False)
class _Running:
    """What a case's problem has built, by backend and pass: facts are taken of it, too."""

    shape: ModelShape
    device: torch.device
    made: dict[tuple[str, str], _Made] = field(default_factory=dict)

    def call(self, backend: str, mode: str) -> Callable[[], tuple[Tensor, ...]]:
        shape, device = self.shape, self.device
        name = None if backend == DEFAULT else backend
        model = build(shape.model, shape.attention, shape.resolution, name).to(device)
        call = (_inference if mode == INFERENCE else _step)(model, shape, device)
        self.made[backend, mode] = _Made(model, call, device)
        return call


@dataclass(frozen=True, eq=False)
class _ModelProblem(Problem):
    running: _Running

    def call(self, backend: str, mode: str) -> Callable[[], tuple[Tensor, ...]]:
        return self.running.call(backend, mode)


def _images(shape: ModelShape, device: torch.device) -> Tensor:
    draws = torch.Generator().manual_seed(0)
    side = shape.resolution
    return torch.randn(shape.B, 3, side, side, generator=draws).to(device)


def _inference(
    model: nn.Module, shape: ModelShape, device: torch.device
) -> Callable[[], tuple[Tensor, ...]]:
    images, amp = _images(shape, device), _AMP[device.type]
    model.eval()

    def infer() -> tuple[Tensor, ...]:
        with torch.inference_mode(), autocast(device, amp):
            return (model(images),)

    return infer


def _step(
    model: nn.Module, shape: ModelShape, device: torch.device
) -> Callable[[], tuple[Tensor, ...]]:
    images, amp = _images(shape, device), _AMP[device.type]
    model.train()
    optimizer = make_optimizer(model, lr=1e-4, weight_decay=0.05)
    scaler = make_scaler(amp, device)
    labels = torch.zeros(shape.B, dtype=torch.int64, device=device)

    def step() -> tuple[Tensor, ...]:
        training_step(model, optimizer, images, labels, amp=amp, scaler=scaler)
        return ()

    return step
