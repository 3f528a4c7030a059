"""Checkpoints: written atomically, loaded as plain tensors and values only."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from training.config import Config
from training.errors import UserError
from training.record import writing

SCHEMA = "linear-vit-checkpoint/1"


def save_checkpoint(path: Path, model: nn.Module, config: Config, **state: Any) -> None:
    """Writes weights, configuration and ``state`` (plain values, tensors) to ``path``.

    A reader, or a run killed in the middle, sees the old file or the new one, never a part.
    """
    content = {
        "schema": SCHEMA,
        "config": dataclasses.asdict(config),
        "model": model.state_dict(),
        **state,
    }
    with writing(path) as temporary:
        torch.save(content, temporary)


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
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{path} is not a readable checkpoint ({reason:.120}); "
            "it may be truncated or of another program: train again, or give another file"
        ) from error
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        found = content.get("schema") if isinstance(content, dict) else type(content).__name__
        raise UserError(
            f"{path} is not a checkpoint of train_minimal.py (schema {found!r}, "
            f"expected {SCHEMA!r})"
        )
    fields = {field.name for field in dataclasses.fields(Config)}
    saved = content.get("config")
    if not isinstance(saved, dict) or set(saved) != fields or "model" not in content:
        raise UserError(f"{path} holds no configuration or weights that this version knows")
    content["config"] = Config(**saved)
    return content


def load_weights(model: nn.Module, content: dict[str, Any], path: Path | str) -> None:
    """Puts a checkpoint's weights into ``model``; UserError where they don't fit."""
    try:
        model.load_state_dict(content["model"])
    except (RuntimeError, KeyError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(
            f"the weights in {os.fspath(path)} do not fit its model: {reason}"
        ) from error
