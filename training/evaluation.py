"""What ``evaluate`` does with one checkpoint: accuracy, overall and per class, and confusion."""

import glob
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from linear_vit.screen import counted
from linear_vit.training import distributed
from linear_vit.training.checkpoints import check_classes, load_checkpoint, load_weights
from linear_vit.training.config import DATASETS, RECIPES, Config, build_model
from linear_vit.training.data import datasets
from linear_vit.training.data.augmentation import torchvision_v2
from linear_vit.training.errors import UserError, notice
from linear_vit.training.metrics import accuracy, predict
from linear_vit.training.record import check_writable, environment, write_json, write_text, writing

SCHEMA = "linear-vit-evaluation/1"


def check_usable(config: Config, device: torch.device) -> None:
    """UserError, before data is read, for sizes that don't fit or a backend that can't run."""
    if config.warmup_epochs > config.epochs:
        notice(
            f"the warm-up of {config.warmup_epochs:g} epochs is longer than the run of "
            f"{config.epochs}: the learning rate will not reach {config.lr:g} (--warmup_epochs)"
        )
    model = build_model(config).to(device)
    distributed.shard_sequence(model)
    if RECIPES[config.recipe].per_image:
        torchvision_v2()
    if config.backend is not None:
        info = DATASETS[config.dataset]
        try:
            predict(model, torch.zeros(1, info.channels, *model.img_size, device=device), info)
        except ValueError as error:
            raise UserError(str(error)) from error


def matching(patterns: Sequence[str]) -> list[Path]:
    """Files named, or matched by a glob that no shell expanded, each once."""
    found: dict[Path, None] = {}
    for pattern in patterns:
        paths = [pattern] if Path(pattern).exists() else sorted(glob.glob(pattern, recursive=True))
        if not paths and glob.has_magic(pattern):
            raise UserError(f"no checkpoint matches {pattern}; a training run leaves best.pt")
        found |= dict.fromkeys(map(Path, paths or [pattern]))
    return list(found)


def evaluate(
    path: Path, dataset: str | None, data_dir: str, out: Path, device: torch.device
) -> dict[str, Any]:
    """Tests a checkpoint on the test set of the data it was trained on.

    Writes to ``out``, beside the checkpoint's name: ``<stem>-evaluation.json`` (schema, dataset,
    dataset_title, model, accuracy, per_class {class: accuracy}, images, environment, confusion
    [true][predicted]), ``<stem>-confusion.csv`` and, with matplotlib, ``<stem>-confusion.png``.
    Returns what the JSON file holds. Raises UserError where ``dataset`` is another one.
    """
    from sklearn.metrics import confusion_matrix, recall_score

    content = load_checkpoint(path)
    check_writable(out)  # before the test
    config = content["config"]
    if dataset is not None and dataset != config.dataset:
        raise UserError(
            f"{path} was trained on {config.dataset}, whose classes are not those of "
            f"--dataset {dataset}; leave --dataset out"
        )
    data = datasets.load_once(config.dataset, data_dir)
    check_classes(content, data.class_names, path)
    model = build_model(config, data.info.classes).to(device)
    load_weights(model, content, path)
    predicted = predict(model, data.test.images.to(device), data.info, amp=config.amp).cpu()
    if broken := int((predicted < 0).sum()):
        raise UserError(
            f"{path}: the model's output is no number for {broken} of {len(predicted)} test images"
            f"{_not_finite(model)}; train it again, or give a checkpoint from before"
        )
    truth, labels = data.test.labels, range(data.info.classes)
    confusion = confusion_matrix(truth, predicted, labels=labels)
    # The share of a class's images that is recognised: what is called recall elsewhere.
    shares = recall_score(truth, predicted, labels=labels, average=None, zero_division=np.nan)
    per_class = [None if np.isnan(share) else float(share) for share in shares]
    result = {
        "schema": SCHEMA,
        "checkpoint": str(path),
        "dataset": config.dataset,
        "dataset_title": data.info.title,
        "model": config.model,
        "epoch": content.get("epoch"),
        "images": len(truth),
        "accuracy": accuracy(predicted, truth),
        "per_class": dict(zip(data.class_names, per_class, strict=True)),
        "confusion": confusion.tolist(),
        "environment": environment(device),
    }
    write_json(out / f"{path.stem}-evaluation.json", result)
    table = pd.DataFrame(confusion, data.class_names, data.class_names)
    text = table.to_csv(index_label="true \\ predicted")
    write_text(out / f"{path.stem}-confusion.csv", text)
    try:
        _plot(result, data.class_names, out / f"{path.stem}-confusion.png")
    except ImportError as error:
        notice(f"no confusion plot ({error}): pip install matplotlib")
    return result


def _not_finite(model: nn.Module) -> str:
    """Which weights are to blame, for a message."""
    bad = [name for name, weight in model.named_parameters() if not weight.isfinite().all()]
    others = f" and {counted(len(bad) - 1, 'other')}" if len(bad) > 1 else ""
    return f": its weights hold NaN or infinity ({bad[0]}{others})" if bad else ""


def describe(result: dict[str, Any]) -> str:
    """A few lines: the overall accuracy, and each class's (the ten worst of many)."""
    lines = [
        f"{result['checkpoint']}: {result['model']} on {result['dataset_title']}: "
        f"{result['accuracy']:.2%} of {counted(result['images'], 'test image')}"
    ]
    known = [(value, name) for name, value in result["per_class"].items() if value is not None]
    worst = sorted(known)[:10]
    if len(known) > len(worst):
        lines.append(f"the {len(worst)} worst of {len(known)} classes:")
    lines += [f"  {value:7.1%}  {name}" for value, name in worst]
    return "\n".join(lines)


def _plot(result: dict[str, Any], names: list[str], path: Path) -> None:
    from matplotlib.figure import Figure

    confusion = np.array(result["confusion"])
    shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    few = len(names) <= 20
    figure = Figure(figsize=(7, 6) if few else (9, 8), layout="constrained")
    axes = figure.subplots()
    shown = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(shown, label="share of the true class's images")
    if few:  # names and counts are legible
        axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
        axes.set_yticks(range(len(names)), names)
        for (row, col), count in np.ndenumerate(confusion):
            if count:
                colour = "white" if shares[row, col] > 0.5 else "black"
                axes.text(col, row, str(count), ha="center", va="center", color=colour, size=8)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    axes.set_title(f"{result['model']} on {result['dataset_title']}: {result['accuracy']:.1%}")
    with writing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
