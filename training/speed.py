"""Training steps with and without own kernels: what is timed, and the table of it.

``step-speed.json``::

    schema       "linear-vit-step-speed/1"
    environment  as in a run record;  setting: what the models have in common
    rows         one per model: model, title, backends {name: {seconds, relative_iqr,
                 images_per_second} or {reason}}, own (the fastest own backend), speedup (over
                 PyTorch's, turn by turn)

and of the models of a results table among each other, ``speed-SETTING.json`` beside the runs::

    schema       "linear-vit-model-speed/1"
    created      ISO time, UTC;  environment: as in a run record
    config       a run's configuration, of any model and seed
    models       {model: {images_per_second, low, high, seconds, rounds}}: the median over rounds in
                 which all models take turns, its 95 % bootstrap interval, and how many rounds
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import torch

from linear_vit.kernels import BACKENDS
from linear_vit.training.config import MODELS, Config, digest
from linear_vit.training.errors import UserError
from linear_vit.training.record import environment, read_records
from linear_vit.training.step import step_of

SCHEMA = "linear-vit-step-speed/1"
MODELS_SCHEMA = "linear-vit-model-speed/1"
PYTORCH = "torch"
# "reference" is no one's choice, and "compiled" is PyTorch's code again: taken by name.
OWN = tuple(name for name in BACKENDS if name not in ("reference", "torch", "compiled"))


class Timed(Protocol):
    """What a clock says of one step (bench.clock.Timing)."""

    @property
    def median(self) -> float: ...

    @property
    def relative_iqr(self) -> float: ...

    @property
    def interval(self) -> tuple[float, float]: ...

    @property
    def seconds(self) -> Sequence[float]: ...

    def over(self, other: Any) -> float: ...


def prepare(
    config: Config, backends: Sequence[str], device: torch.device
) -> tuple[dict[str, Callable[[], None]], dict[str, str]]:
    """Training steps of a model by backend, run once, and why the others can't be."""
    steps: dict[str, Callable[[], None]] = {}
    reasons: dict[str, str] = {}
    for name in backends:
        if name not in BACKENDS:
            raise UserError(f"unknown backend {name!r}; there are {', '.join(BACKENDS)}")
        if name == "triton" and device.type == "cpu":
            reasons[name] = "interpreted on a CPU, which says nothing of its speed"
            continue
        try:
            step = step_of(replace(config, backend=name), device)
            step()
        except ValueError as error:
            reasons[name] = str(error)
        else:
            steps[name] = step
    return steps, reasons


def summarise(
    configs: Sequence[Config],
    timings: Mapping[tuple[str, str], Timed],
    reasons: Mapping[tuple[str, str], str],
    device: torch.device,
) -> dict[str, Any]:
    """The content of step-speed.json; timings and reasons by (model, backend)."""
    rows = []
    for config in configs:
        cells: dict[str, dict[str, Any]] = {}
        for (model, name), timing in timings.items():
            if model == config.model:
                cells[name] = {
                    "seconds": timing.median,
                    "relative_iqr": timing.relative_iqr,
                    "images_per_second": config.batch_size / timing.median,
                }
        own = min((n for n in cells if n in OWN), key=lambda n: cells[n]["seconds"], default=None)
        both = own is not None and PYTORCH in cells
        speedup = None
        if both and own:
            speedup = timings[config.model, PYTORCH].over(timings[config.model, own])
        cells |= {
            name: {"reason": why} for (model, name), why in reasons.items() if model == config.model
        }
        rows.append(
            {
                "model": config.model,
                "title": MODELS[config.model].title,
                "backends": cells,
                "own": own,
                "speedup": speedup,
            }
        )
    return {
        "schema": SCHEMA,
        "environment": environment(device),
        "setting": configs[0].setting,
        "rows": rows,
    }


def to_markdown(found: dict[str, Any]) -> str:
    """A line per model: PyTorch's time, each own backend's, the speed-up, images/s of the best."""
    setting, machine = found["setting"], found["environment"]
    names = list(dict.fromkeys(name for row in found["rows"] for name in row["backends"]))
    titles = {"torch": "PyTorch", "compiled": "torch.compile", "cuda": "CUDA", "cpu": "C++"}
    columns = [f"{titles.get(name, name.title())} time" for name in names]
    lines = [
        f"Training step of batch {setting['batch_size']}, dim {setting['dim']}, depth "
        f"{setting['depth']}, on {setting['dataset']} images, amp {setting['amp']}; on "
        f"{machine['cpu'] if machine['device'] == 'cpu' else machine['device']}.",
        "",
        "| " + " | ".join(["Model", *columns, "Speed-up", "Images/s, PyTorch", "own"]) + " |",
        "|---" + "|---:" * (len(columns) + 3) + "|",
    ]
    for row in found["rows"]:
        cells = [row["title"]]
        for name in names:
            cell = row["backends"].get(name, {})
            cells.append(f"{1e3 * cell['seconds']:.3g} ms" if "seconds" in cell else "–")
        cells.append(f"{row['speedup']:.2f}×" if row["speedup"] else "–")
        for name in (PYTORCH, row["own"]):
            rate = row["backends"].get(name, {}).get("images_per_second")
            cells.append(f"{rate:,.0f}" if rate else "–")
        lines.append("| " + " | ".join(cells) + " |")
    why: dict[str, list[str]] = {}
    for row in found["rows"]:
        for name, cell in row["backends"].items():
            if "reason" in cell:
                why.setdefault(f"{name}: {cell['reason']}", []).append(row["model"])
    lines += ["", *(f"- {text} ({', '.join(models)})" for text, models in why.items())]
    return "\n".join(lines).rstrip() + "\n"


def models_path(folder: Path, config: Config) -> Path:
    """Where the models' speed at a setting is kept."""
    return folder / f"speed-{digest(config.setting)}.json"


def summarise_models(
    configs: Sequence[Config], timings: Mapping[str, Timed], device: torch.device
) -> dict[str, Any]:
    """The content of speed-SETTING.json; timings by model."""
    return {
        "schema": MODELS_SCHEMA,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": environment(device),
        "config": asdict(configs[0]),
        "models": {c.model: rate(c.batch_size, timings[c.model]) for c in configs},
    }


def rate(batch_size: int, timing: Timed) -> dict[str, float]:
    """Images/s of a step timed by turns with others, and the 95 % interval of its median."""
    low, high = timing.interval
    return {
        "images_per_second": batch_size / timing.median,
        "low": batch_size / high,
        "high": batch_size / low,
        "seconds": timing.median,
        "rounds": len(timing.seconds),
    }


def over(own: Mapping[str, float], base: Mapping[str, float]) -> dict[str, Any]:
    """How much faster one rate is than another timed by turns with it: {median, low, high, how}.

    Half widths of both medians' 95 % intervals add in quadrature, as logarithms.
    """
    ratio = own["images_per_second"] / base["images_per_second"]
    widths = [math.log(found["high"] / found["low"]) / 2 for found in (own, base)]
    half = 0.0 if own is base else math.hypot(*widths)
    return {
        "median": ratio,
        "low": ratio * math.exp(-half),
        "high": ratio * math.exp(half),
        "how": "by turns",
    }


def read_models(folder: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Every speed-SETTING.json in ``folder``, and one line for each that could not be used."""
    fields = {"created", "environment", "config", "models"}
    found, skipped = read_records(folder.glob("speed-*.json"), MODELS_SCHEMA, fields)
    return list(found.values()), skipped
