"""A training step as a case of the one harness: which model, sized how, on which backend."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from linear_vit import kernels
from linear_vit.bench import problems, runner, store
from linear_vit.bench.instruments import machine
from linear_vit.bench.instruments.memory import is_out_of_memory
from linear_vit.bench.problems import Case, Problem, Shape, TimedOnly, Wanted, no_inputs
from linear_vit.training.config import (
    DATASETS,
    MODELS,
    Config,
    build_model,
    digest,
    model_settings,
    resolve,
)
from linear_vit.training.errors import UserError, notice
from linear_vit.training.record import same_machine
from linear_vit.training.step import make_optimizer, make_scaler, training_step

STEP = "step"
DEFAULT = "default"  # the backend that a model takes where none is named
# Sized for the device: a model that learns within a minute, or the ViT-S.
SIZES: dict[str, dict[str, Any]] = {
    "cpu": {"preset": "small", "dataset": "digits", "amp": "off"},
    "cuda": {"preset": "full", "dataset": "cifar100", "amp": "bf16"},
}
DTYPES = {"off": "float32", "bf16": "bfloat16 autocast", "fp16": "float16 autocast"}


@dataclass(frozen=True)
class StepShape(Shape):
    """A model and all that sizes its step: B images of N tokens.

    ``variant`` tells steps of one model apart in a run: bf16, ripple_stages=2.
    """

    B: int
    N: int
    config: Config
    variant: str = ""

    @property
    def tokens(self) -> int:
        return self.N


class TrainingStep(TimedOnly):
    """Forward, loss, backward, clipping and optimiser of a model on one fixed random batch."""

    name = "training_step"
    title = "Training step"
    quick = True
    modes = (STEP,)
    budget = 4.0  # of what a kernel's case gets: there are few of them, and they are long
    test = "test_training_step"
    usual_backends = (DEFAULT,)

    def shape(self, tokens: int, batch: int = 1) -> StepShape:
        """Of the CPU's model; its size is that of its data set's images, whatever is asked for."""
        return step_shape(resolve(SIZES["cpu"]))

    def problem(
        self, shape: Any, dtype: torch.dtype, device: torch.device, seed: int = 0
    ) -> Problem:
        return _StepProblem(self, shape, dtype, {}, (), (), no_inputs, device)

    def lengths(self, device_type: str, extent: str) -> tuple[int, ...]:
        return ()

    def sizes(
        self, device_type: str, extent: str, tokens: Sequence[int], total_tokens: int | None
    ) -> Iterator[StepShape]:
        """Every model, sized for the device, where its images are of one of the lengths."""
        for model in MODELS:
            shape = step_shape(resolve({**SIZES[device_type], **model_settings(model)}))
            if not tokens or shape.N in tokens:
                yield shape

    def dtypes(self, device_type: str, chosen: Sequence[str]) -> tuple[str]:
        return (DTYPES[SIZES[device_type]["amp"]],)

    def backends(self, device: torch.device, asked: Sequence[str]) -> dict[str, str | None]:
        """The one that a model takes by itself, and those asked for by name, or all."""
        known = kernels.backends(MODELS[Config().model].operation, device)
        if asked:
            return {name: why for name, why in known.items() if name in asked}
        return {DEFAULT: None, **{name: why for name, why in known.items() if why is None}}

    def unusable(self, shape: Any, backend: str, device: torch.device) -> str | None:
        """Why the backend has no kernel for the model's attention."""
        if backend == DEFAULT:
            return None
        return kernels.backends(MODELS[shape.config.model].operation, device)[backend]

    def turn_key(self, shape: StepShape) -> str:
        """All models of a setting take turns."""
        return digest(shape.config.setting)

    def rehearsal(self, shape: StepShape) -> StepShape:
        tiny = replace(
            shape.config, dim=16, depth=1, heads=1, mlp_dim=16, hydra_branches=1, batch_size=2
        )
        return step_shape(tiny, shape.variant)

    def special(self, sweep: str) -> list[Wanted]:
        """Every model with and without own kernels, after the most important of attention.

        Also under bfloat16 autocast, where processors have a matrix unit that other dtypes lack.
        """
        kind = "cuda" if sweep == "gpu" else "cpu"
        names = (DEFAULT, *compared_backends())
        usual = list(self.sizes(kind, sweep, (), None))
        half = [
            step_shape(replace(shape.config, amp="bf16"), "bf16")
            for shape in usual
            if shape.config.amp != "bf16"
        ]
        return [
            Wanted(200, STEP, DTYPES[shape.config.amp], shape, names) for shape in (*usual, *half)
        ]

    def working_set(self, mode: str, backend: str, shape: Any) -> int:
        """About what a step keeps: some 16 activations of width dim a token and layer."""
        config = shape.config
        return 4 * 16 * shape.B * shape.N * config.dim * config.depth

    def size_name(self, shape: Any) -> str:
        return "-".join(filter(None, (shape.config.model, shape.variant)))

    # What a saved run says of a step in the place of shape, work and error.

    def case_name(self, case: Case) -> str:
        """As in a test's id: ripple-default."""
        return f"{self.size_name(case.shape)}-{case.backend}"

    def group(self, case: Case) -> str:
        """What takes turns: all models and backends of a data set and batch."""
        config = config_of(case)
        return f"{self.name} {config.preset} {config.dataset} batch {config.batch_size}"

    def facts(self, case: Case, median_s: float) -> dict[str, Any]:
        config = config_of(case)
        return {
            "model": config.model,
            "model_title": MODELS[config.model].title,
            "settings": _on(config, case.backend).setting,
            "images_per_s": config.batch_size / median_s,
        }


TRAINING_STEP = TrainingStep()
problems.register(TRAINING_STEP)


@dataclass(frozen=True, eq=False)
class _StepProblem(Problem):
    device: torch.device

    def call(self, backend: str, mode: str) -> Callable[[], tuple[torch.Tensor, ...]]:
        step = step_of(_on(self.shape.config, backend), self.device)
        return lambda: (step(), ())[1]


def step_shape(config: Config, variant: str = "") -> StepShape:
    side = DATASETS[config.dataset].image_size // config.patch_size
    return StepShape(config.batch_size, side * side, config, variant)


def step_case(config: Config, backend: str | None = None, variant: str = "") -> Case:
    """The step of a configuration as a case; ``backend`` comes before the configuration's own."""
    name = backend or config.backend or DEFAULT
    shape = step_shape(replace(config, backend=None, seed=0), variant)
    return Case(TRAINING_STEP.name, STEP, DTYPES[config.amp], shape, name)


def compared_backends() -> list[str]:
    """What a step is timed on where none is named: PyTorch's operators, and our own kernels."""
    rows = [kernels.backend_rows()[name] for name in kernels.BACKENDS]
    return [row.name for row in rows if row.own or (row.eager and not row.oracle)]


def why_not(case: Case, device: torch.device) -> str | None:
    """Why a step can't be timed on its backend here; None where it can be.

    Raises UserError for a backend that there is not.
    """
    name = case.backend
    if name not in (DEFAULT, *kernels.BACKENDS):
        raise UserError(f"unknown backend {name!r}; there are {', '.join(kernels.BACKENDS)}")
    if not kernels.is_timeable(name, device):
        return "interpreted, which says nothing of its speed"
    if reason := TRAINING_STEP.unusable(case.shape, name, device):
        return reason
    try:
        TRAINING_STEP.problem(case.shape, torch.float32, device).call(name, STEP)()
    except ValueError as error:
        return str(error)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    else:
        return None
    return "out of memory"


def time_steps(cases: Sequence[Case], path: Path, device: torch.device, *, seconds: float) -> Path:
    """Times steps by turns, so that a machine that drifts does so for all alike.

    ``path`` is the saved run that it leaves, with why the others were not timed. ``seconds`` are
    spent on each. Raises UserError for a backend that there is not.
    """
    reasons = {problems.case_name(case): why_not(case, device) for case in cases}
    sources = store.sources()
    head = {
        "sweep": "training steps",
        "device": device.type,
        "machine": machine.describe(device),
        "sources": sources,
        "not_timed": {name: why for name, why in reasons.items() if why is not None},
    }
    usable = [case for case in cases if reasons[problems.case_name(case)] is None]
    if not usable:
        why = "; ".join(dict.fromkeys(str(reason) for reason in reasons.values()))
        raise UserError(f"no training step can be timed: {why}")
    kept = store.Store(path, head)
    plan = runner.Plan(device, seconds / TRAINING_STEP.budget, sources=sources)
    for result in runner.run([tuple(usable)], plan, kept, isolate=False):
        if result.status != store.MEASURED:
            notice(f"{result.case} was not timed: {result.reason}")
        elif result.info["disturbed"]:
            notice(f"{result.case} was disturbed: {result.info['disturbed']}")
    kept.write()
    kept.close(done=True)
    return path


def were_timed(cases: Sequence[Case], path: Path, device: torch.device) -> bool:
    """Whether a saved run has all of these steps, timed on this machine."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        there = {saved["param"] for saved in document["benchmarks"]}
        then, now = document["kernel_suite"]["machine"], machine.describe(device)
    except (OSError, ValueError, KeyError):
        return False
    same = same_machine(then, now) and then.get("device_name") == now["device_name"]
    return same and {problems.case_name(case) for case in cases} <= there


def step_of(config: Config, device: torch.device) -> Callable[[], None]:
    """A full training step of a configuration on one fixed random batch: call it to run it once."""
    info = DATASETS[config.dataset]
    model = build_model(config).to(device).train()
    if config.compile:
        model.compile()
    optimizer = make_optimizer(model, lr=config.lr, weight_decay=config.weight_decay)
    scaler = make_scaler(config.amp, device)
    generator = torch.Generator().manual_seed(config.seed)
    shape = (config.batch_size, info.channels, info.image_size, info.image_size)
    images = torch.randn(shape, generator=generator).to(device)
    labels = torch.randint(info.classes, (config.batch_size,), generator=generator).to(device)

    def step() -> None:
        training_step(model, optimizer, images, labels, scaler=scaler, **config.of_step)

    return step


def config_of(case: Case) -> Config:
    """What is trained in a case, the backend apart."""
    shape = case.shape
    if not isinstance(shape, StepShape):
        raise TypeError(f"no training step: {case}")
    return shape.config


def _on(config: Config, backend: str) -> Config:
    return replace(config, backend=None if backend == DEFAULT else backend)
