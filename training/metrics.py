"""Accuracy on held-out images, and the statistics of a handful of seeds."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from linear_vit.training.config import DatasetInfo
from linear_vit.training.data.augmentation import normalise
from linear_vit.training.step import autocast


@torch.inference_mode()
def predict(
    model: nn.Module, images: Tensor, info: DatasetInfo, *, amp: str = "off", batch_size: int = 256
) -> Tensor:
    """The predicted class (int64) of uint8 images (N, C, H, W), in evaluation mode."""
    was_training = model.training
    model.eval()
    predictions = []
    for batch in images.split(batch_size):
        with autocast(images.device, amp):
            logits = model(normalise(batch, info.mean, info.std))
        predictions.append(logits.argmax(dim=1))
    model.train(was_training)
    return torch.cat(predictions)


def accuracy(predictions: Tensor, labels: Tensor) -> float:
    """The share of labels predicted, in [0, 1]."""
    return (predictions == labels).double().mean().item()


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % t-interval; ``half_width`` is None for a single value."""

    mean: float
    half_width: float | None
    values: list[float]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def t_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Mean and half width t * s / sqrt(n) of the two-sided Student interval, n - 1 degrees."""
    n = len(values)
    if n == 0:
        raise ValueError("an interval needs at least one value, got none")
    half_width = None
    if n > 1:
        from scipy import stats

        quantile = float(stats.t.ppf(0.5 + confidence / 2, n - 1))
        half_width = quantile * statistics.stdev(values) / math.sqrt(n)
    return Interval(statistics.fmean(values), half_width, list(values))


def paired_ratios(
    runs: Mapping[int, Any], others: Mapping[int, Any], value: Callable[[Any], float | None]
) -> dict[str, Any] | None:
    """value(run) / value(other) of the same seed: median, low, high, values; None without a pair.

    Pairs where either value is None are left out.
    """
    pairs = [(value(runs[seed]), value(others[seed])) for seed in sorted(runs) if seed in others]
    ratios = [a / b for a, b in pairs if a is not None and b is not None]
    if not ratios:
        return None
    return {
        "median": statistics.median(ratios),
        "low": min(ratios),
        "high": max(ratios),
        "values": ratios,
    }


def ratio_text(ratio: Mapping[str, Any] | None) -> str:
    """A speed-up {median, low, high} in words, with its range where it has one."""
    if ratio is None:
        return "–"
    if ratio["low"] == ratio["high"]:
        return f"{ratio['median']:.2f}×"
    return f"{ratio['median']:.2f}× [{ratio['low']:.2f} – {ratio['high']:.2f}]"


def interval_text(interval: Mapping[str, Any]) -> str:
    """A mean in percent, in words, with the half width of its interval where it has one."""
    if interval["half_width"] is None:
        return f"{interval['mean']:.1f} % (one seed)"
    return f"{interval['mean']:.1f} ± {interval['half_width']:.1f} %"
