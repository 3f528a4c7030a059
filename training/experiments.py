"""Many runs: which are missing from a folder of records, and the speed of steps by turns."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from linear_vit.bench.problems import Case
from linear_vit.training import results, speed
from linear_vit.training.config import Config
from linear_vit.training.evaluation import check_usable
from linear_vit.training.record import (
    environment,
    finished_runs,
    same_machine,
    write_json,
)
from linear_vit.training.steps import (
    TRAINING_STEP,
    config_of,
    own_backends,
    step_case,
    time_steps,
    why_not,
)

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
    found = {
        path: run
        for path, run in finished_runs(folder).items()
        if run["config"] in wanted and same_machine(run["environment"], here)
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
    """Training steps of a table's models by turns, in a record beside the runs, if it is missing.

    Runs are minutes apart, so what their own images/s say of two models is also what the machine
    did meanwhile.
    """
    configs = list(dict.fromkeys(configs))
    names = [config.model for config in configs]
    wanted = {"config": dataclasses.asdict(configs[0]), "environment": environment(device)}
    for known in speed.read_models(folder)[0]:
        same = results.common(known) == results.common(wanted)
        if same and set(names) <= set(known["models"]):
            return
    print(f"training steps of {', '.join(names)}, by turns")
    cases = [step_case(config) for config in configs]
    timings = time_steps(cases, device, seconds=seconds)
    by_model = dict(zip(names, timings.values(), strict=True))
    measured = speed.summarise_models(configs, by_model, device)
    write_json(speed.models_path(folder, configs[0]), measured)


def time_values(
    setting: str, configs: Sequence[Config], folder: Path, device: torch.device, *, seconds: float
) -> Path:
    """Training steps of an ablation's values by turns; the file of what was measured."""
    configs = list(dict.fromkeys(dataclasses.replace(config, seed=0) for config in configs))
    values = [str(getattr(config, setting)) for config in configs]
    print(f"training steps of {setting} {', '.join(values)}, by turns")
    cases = [
        step_case(config, variant=f"{setting}={value}")
        for config, value in zip(configs, values, strict=True)
    ]
    timings = time_steps(cases, device, seconds=seconds).values()
    rates = {
        value: speed.rate(config.batch_size, timing)
        for value, config, timing in zip(values, configs, timings, strict=True)
    }
    path = folder / f"steps-{setting}.json"
    write_json(path, {"environment": environment(device), "rates": rates})
    return path


def time_backends(
    configs: Sequence[Config],
    backends: Sequence[str] | None,
    out: Path,
    device: torch.device,
    *,
    seconds: float,
) -> Path:
    """Training steps of models on backends (PyTorch's and our own), all by turns; the file."""
    configs = list(dict.fromkeys(configs))
    names = [speed.PYTORCH, *own_backends()] if backends is None else backends
    cases = [step_case(config, name) for config in configs for name in names]
    reasons = {case: why_not(case, device) for case in cases}
    usable = [case for case in cases if reasons[case] is None]
    timings = time_steps(usable, device, seconds=seconds)
    timed = {_key(case): timings[TRAINING_STEP.case_name(case)] for case in usable}
    refused = {_key(case): why for case, why in reasons.items() if why is not None}
    path = out / "step-speed.json"
    write_json(path, speed.summarise(configs, timed, refused, device))
    return path


def _key(case: Case) -> tuple[str, str]:
    return config_of(case).model, case.backend
