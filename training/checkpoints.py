"""Checkpoints: all of a run's state, written atomically, loaded as plain tensors and values only.

A file is a dict::

    schema      "linear-vit-checkpoint/2"
    config      every field of training.config.Config
    model       weights
    optimizer, scaler    their state dicts (scaler: None unless amp is fp16)
    step, epoch steps and epochs done: the position of schedule and loader (training.loader)
    classes     names of the classes that were there (not in older ones)
    rng         one {cpu, cuda} of generator states per process: dropout and drop path
    history     {loss, hits, seconds, images}: float64 tensors, one value per step done
    progress    what the run record holds so far: epochs, best_epoch, seconds, ...
"""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from linear_vit.training.config import Config
from linear_vit.training.errors import UserError, first_line
from linear_vit.training.fsdp import cut_like
from linear_vit.training.record import writing

SCHEMA = "linear-vit-checkpoint/2"


def save_checkpoint(path: Path, config: Config, **state: Any) -> None:
    """Writes the configuration and ``state`` (plain values, tensors) to ``path``.

    A reader, or a run killed in the middle, sees the old file or the new one, never a part. Raises
    UserError where that is not possible (a full disk); the old file is still there then.
    """
    content = {
        "schema": SCHEMA,
        "config": dataclasses.asdict(config),
        **state,
    }
    with writing(path) as temporary:
        torch.save(content, temporary)


def load_for_resume(path: Path, config: Config) -> dict[str, Any]:
    """A checkpoint of just this configuration; UserError, naming what differs, for another."""
    content = load_checkpoint(path)
    wanted = dataclasses.asdict(config)
    if differ := differences(dataclasses.asdict(content["config"]), wanted):
        raise UserError(
            f"{path} is of a run with {differ}: give --resume the options of that run, "
            "or start another one with --out"
        )
    missing = {"optimizer", "step", "rng", "history", "progress"} - set(content)
    if missing:
        raise UserError(f"{path} cannot be resumed, it lacks {', '.join(sorted(missing))}")
    return content


def differences(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """What of the wanted settings is otherwise in the saved ones, in words."""
    return ", ".join(
        f"{name} {saved[name]} (asked for: {value})"
        for name, value in wanted.items()
        if saved[name] != value
    )


def rng_state(device: torch.device) -> dict[str, Any]:
    """The states of this process's generators that a model draws from."""
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def set_rng_state(state: dict[str, Any], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """What ``save_checkpoint`` wrote, on the CPU; ``config`` is a Config again.

    Executes nothing from the file (``weights_only=True``). Raises UserError for a missing,
    truncated or foreign file.
    """
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}; a training run leaves best.pt and last.pt")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a different type for nearly every kind of damage
        raise UserError(
            f"{path} is not a readable checkpoint ({first_line(error):.120}); "
            "it may be truncated or of another program: delete it and train again, "
            "or give another file"
        ) from error
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        found = content.get("schema") if isinstance(content, dict) else type(content).__name__
        raise UserError(
            f"{path} is not a checkpoint of this train_minimal.py (schema {found!r}, expected "
            f"{SCHEMA!r}): delete it and train again, or give another file"
        )
    fields = {field.name for field in dataclasses.fields(Config)}
    saved = content.get("config")
    if not isinstance(saved, dict) or set(saved) != fields or "model" not in content:
        raise UserError(f"{path} holds no configuration or weights that this version knows")
    content["config"] = Config(**saved)
    return content


def check_classes(content: dict[str, Any], names: list[str], path: Path) -> None:
    """UserError where a checkpoint is of other classes than these, as of a part of a data set."""
    saved = content.get("classes", names)
    head = content["model"].get("head.bias", names)
    if saved != names or len(head) != len(names):
        raise UserError(
            f"{path} was trained on {len(head)} classes, and the data here have {len(names)} or "
            "others: a part of a data set is another one; give the --data_dir of that run"
        )


def load_weights(model: nn.Module, content: dict[str, Any], path: Path | str) -> None:
    """Puts a checkpoint's weights into ``model``; UserError where they don't fit."""
    there = model.state_dict()
    try:
        model.load_state_dict({k: cut_like(there.get(k), x) for k, x in content["model"].items()})
    except (RuntimeError, KeyError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(
            f"the weights in {os.fspath(path)} do not fit its model: {reason}"
        ) from error
