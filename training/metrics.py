"""Accuracy on held-out images."""

import torch
from torch import Tensor, nn

from linear_vit.training.config import DatasetInfo
from linear_vit.training.data.augmentation import normalise
from linear_vit.training.step import autocast


@torch.no_grad()  # in inference mode FSDP would keep tensors that no gradient may pass
def predict(
    model: nn.Module, images: Tensor, info: DatasetInfo, *, amp: str = "off", batch_size: int = 256
) -> Tensor:
    """The predicted class (int64) of uint8 images (N, C, H, W), in evaluation mode.

    -1 where the model's output is no number: argmax would call that class 0.
    """
    was_training = model.training
    model.eval()
    predictions = []
    for batch in images.split(batch_size):
        with autocast(images.device, amp):
            logits = model(normalise(batch, info.mean, info.std))
        predictions.append(logits.argmax(dim=1).where(logits.isfinite().all(dim=1), -1))
    model.train(was_training)
    return torch.cat(predictions)


def accuracy(predictions: Tensor, labels: Tensor) -> float:
    """The share of labels predicted, in [0, 1]."""
    return (predictions == labels).double().mean().item()
