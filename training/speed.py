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
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from linear_vit.bench.instruments.clock import Timing
from linear_vit.training.config import MODELS, Config, digest
from linear_vit.training.record import environment, read_records
from linear_vit.training.steps import own_backends

SCHEMA = "linear-vit-step-speed/1"
MODELS_SCHEMA = "linear-vit-model-speed/1"
PYTORCH = "torch"


def summarise(
    configs: Sequence[Config],
    timings: Mapping[tuple[str, str], Timing],
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
        candidates = [name for name in own_backends() if name in cells]
        own = min(candidates, key=lambda name: cells[name]["seconds"], default=None)
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
    configs: Sequence[Config], timings: Mapping[str, Timing], device: torch.device
) -> dict[str, Any]:
    """The content of speed-SETTING.json; timings by model."""
    return {
        "schema": MODELS_SCHEMA,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": environment(device),
        "config": asdict(configs[0]),
        "models": {c.model: rate(c.batch_size, timings[c.model]) for c in configs},
    }


def rate(batch_size: int, timing: Timing) -> dict[str, float]:
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
