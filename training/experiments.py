"""Many runs: which are missing from a folder of records, and the speed of steps by turns."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from linear_vit.training.config import Config, digest
from linear_vit.training.errors import notice
from linear_vit.training.evaluation import check_usable
from linear_vit.training.record import environment, read_runs, same_machine
from linear_vit.training.steps import compared_backends, step_case, time_steps, were_timed

# What is varied of which model, where none is named.
_MODEL_OF = {"ripple_stages": "ripple", "hydra_branches": "hydra"}


def model_of(setting: str) -> dict[str, Any]:
    """The model that a setting is of alone, as a setting."""
    return {"attention_type": _MODEL_OF[setting]} if setting in _MODEL_OF else {}


def by_seed(seeds: int, settings: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """These settings with every seed, in alternating order.

    All of a seed run next to each other, so that a machine that drifts (heat, neighbours) does so
    for all alike: speed-ups compare within a seed.
    """
    return [
        {**setting, "seed": seed}
        for seed in range(seeds)
        for setting in settings[:: 1 if seed % 2 == 0 else -1]
    ]


def recorded(
    configs: Sequence[Config], folder: Path, device: torch.device
) -> dict[Path, dict[str, Any]]:
    """The finished records below ``folder`` of these configurations on this machine, in order."""
    here, wanted = environment(device), [dataclasses.asdict(config) for config in configs]
    runs, skipped = read_runs(folder)
    for line in skipped:
        notice(line)
    found = {
        path: run
        for path, run in runs.items()
        if run["status"] == "finished"
        and run["config"] in wanted
        and same_machine(run["environment"], here)
    }
    return dict(sorted(found.items(), key=lambda item: wanted.index(item[1]["config"])))


def missing(configs: Sequence[Config], folder: Path, device: torch.device) -> Iterator[Config]:
    """The configurations that no finished record here covers, announced one by one."""
    for config in dict.fromkeys(dataclasses.replace(config, seed=0) for config in configs):
        check_usable(config, device)
    done = [run["config"] for run in recorded(configs, folder, device).values()]
    left = [config for config in configs if dataclasses.asdict(config) not in done]
    if len(left) < len(configs):
        print(f"{len(configs) - len(left)} of {len(configs)} runs are recorded in {folder}")
    for number, config in enumerate(left, 1):
        print(f"run {number} of {len(left)}: {config.dataset} {config.model} seed {config.seed}")
        yield config


def time_models(
    configs: Sequence[Config], folder: Path, device: torch.device, *, seconds: float
) -> None:
    """Training steps of a table's models by turns, in a saved run beside the runs, if missing.

    Runs are minutes apart, so what their own images/s say of two models is also what the machine
    did meanwhile.
    """
    cases = [step_case(config) for config in dict.fromkeys(configs)]
    path = folder / f"steps-{digest(configs[0].setting)}.json"
    if not were_timed(cases, path, device):
        print(f"training steps of {', '.join(config.model for config in configs)}, by turns")
        time_steps(cases, path, device, seconds=seconds)


def time_values(
    setting: str, configs: Sequence[Config], folder: Path, device: torch.device, *, seconds: float
) -> Path:
    """Training steps of an ablation's values by turns; the saved run."""
    cases = {
        value: step_case(config, variant=f"{setting}={value}")
        for config in configs
        for value in [getattr(config, setting)]
    }
    print(f"training steps of {setting} {', '.join(map(str, cases))}, by turns")
    path = folder / f"steps-{setting}.json"
    return time_steps(list(cases.values()), path, device, seconds=seconds)


def time_backends(
    configs: Sequence[Config],
    backends: Sequence[str] | None,
    out: Path,
    device: torch.device,
    *,
    seconds: float,
) -> Path:
    """Training steps of models on backends (PyTorch's and our own), all by turns; the saved run."""
    names = compared_backends() if backends is None else backends
    cases = [step_case(config, name) for config in dict.fromkeys(configs) for name in names]
    return time_steps(cases, out / "step-speed.json", device, seconds=seconds)
