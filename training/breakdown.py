"""What a training step spends its time on: attention, projections, MLP, augmentation, loader.

Hooks mark where each module's forward and backward begin and end, on the host's clock for a CPU and
with events in the device's stream for CUDA, so the shares are of one and the same timeline.

``step-breakdown.json``::

    schema       "linear-vit-step-breakdown/1"
    environment  as in a run record;  setting: what the models have in common
    rows         one per model: model, title, seconds (of a step, mean), images_per_second,
                 shares {attention, projections, mlp, optimizer, augmentation, loader, other},
                 which add up to 1
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from linear_vit.training.clock import Stopwatch
from linear_vit.training.config import DATASETS, MODELS, Config, build_model
from linear_vit.training.data.datasets import Split
from linear_vit.training.data.loader import Loader
from linear_vit.training.record import environment, write_json
from linear_vit.training.step import make_optimizer, make_scaler, training_step

SCHEMA = "linear-vit-step-breakdown/1"
SHARES = ("attention", "projections", "mlp", "optimizer", "augmentation", "loader", "other")
_WARMUP_STEPS = 3


def write(
    configs: Sequence[Config],
    out: Path,
    device: torch.device,
    *,
    steps: int,
    workers: int | None = None,
) -> Path:
    """Writes step-breakdown.json, measured on random images of the data set's size; its path."""
    rows = []
    for config in configs:
        seconds = _measure(config, device, steps, workers)
        whole = seconds.pop("step")
        seconds["attention"] -= seconds["projections"]
        seconds["loader"] -= seconds["augmentation"]
        seconds["other"] = whole - sum(seconds.values())
        rows.append(
            {
                "model": config.model,
                "title": MODELS[config.model].title,
                "seconds": whole / steps,
                "images_per_second": config.batch_size * steps / whole,
                "shares": {name: seconds[name] / whole for name in SHARES},
            }
        )
    path = out / "step-breakdown.json"
    found = {"schema": SCHEMA, "environment": environment(device), "setting": configs[0].setting}
    write_json(path, {**found, "rows": rows})
    return path


def _measure(
    config: Config, device: torch.device, steps: int, workers: int | None
) -> dict[str, float]:
    info = DATASETS[config.dataset]
    model = build_model(config).to(device).train()
    optimizer = make_optimizer(model, lr=config.lr, weight_decay=config.weight_decay)
    scaler = make_scaler(config.amp, device)
    size = (info.channels, info.image_size, info.image_size)
    count = config.batch_size * (steps + _WARMUP_STEPS)
    draws = torch.Generator().manual_seed(config.seed)
    images = torch.randint(0, 256, (count, *size), dtype=torch.uint8, generator=draws)
    labels = torch.randint(info.classes, (count,), generator=draws)
    loader = Loader(config, Split(images, labels), info, device, workers=workers)
    watch = Stopwatch(device)
    loader.augmenting = lambda: watch.span("augmentation")
    batches = iter(loader)

    def step() -> None:
        with watch.span("step"):
            with watch.span("loader"):
                x, y = next(batches)
            training_step(model, optimizer, x, y, scaler=scaler, **config.of_step)

    _install(watch, model, optimizer)
    for _ in range(_WARMUP_STEPS):
        step()
    watch.clocks.clear()
    for _ in range(steps):
        step()
    return watch.seconds()


def _install(watch: Stopwatch, model: Any, optimizer: torch.optim.Optimizer) -> None:
    for block in model.blocks:
        watch.watch(block.attention, "attention")
        watch.watch(block.mlp, "mlp")
        for module in block.attention.modules():
            if isinstance(module, nn.Linear):
                watch.watch(module, "projections")
    clocks: Any = watch.clocks
    optimizer.register_step_pre_hook(lambda *_: clocks["optimizer"].start())
    optimizer.register_step_post_hook(lambda *_: clocks["optimizer"].stop())
