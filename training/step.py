"""One training step, as the training loop runs it and as the benchmarks time it."""

import math
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from linear_vit.training import distributed, fsdp


def make_optimizer(model: nn.Module, *, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW (0.9, 0.999); weight decay on the matrices of linear layers alone.

    Norms, biases, positions, and the depthwise filters and scales of the pyramid, are not decayed.
    """
    matrices = {m.weight for m in model.modules() if isinstance(m, nn.Linear)}
    decayed = [p for p in model.parameters() if p in matrices]
    others = [p for p in model.parameters() if p not in matrices]
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.999), fused=True)


def training_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    targets: Tensor,
    *,
    amp: str = "off",
    label_smoothing: float = 0.0,
    clip: float = 1.0,
    accumulate: int = 1,
    batch_size: int | None = None,
    scaler: torch.amp.GradScaler | None = None,
) -> tuple[Tensor, Tensor]:
    """Forward, loss, backward, gradient clipping, optimiser.

    Args:
        model: called on images; under DistributedDataParallel, gradients are exchanged once.
        images: (B, C, H, W) float32, this process's share of the batch; of a short batch that may
            be nothing, and the process then takes part with a gradient of zero.
        targets: (B,) int64 labels, or (B, classes) the weights of mixed labels.
        amp: ``off`` (float32), or autocast to ``bf16`` or ``fp16``.
        clip: the greatest norm of the gradient; 0 for any.
        accumulate: forward and backward in so many parts, for less memory; the same gradient.
        batch_size: of the batch over all processes, what the loss is the mean of; None means B.
        scaler: of the loss, for ``fp16``.

    Returns:
        The share of these images in the mean loss, and how many of them were classified correctly
        (an image of two labels counts by the weight of the predicted one). Both are detached
        scalars on the device: reading them is the caller's choice, since it waits for the device.
        The loss is NaN where the gradient is not finite, unless a scaler skips that step.
    """
    replicas = model if isinstance(model, nn.parallel.DistributedDataParallel) else None
    whole = len(images) if batch_size is None else batch_size
    part = max(1, -(-len(images) // accumulate))
    parts = [(x, y) for x, y in zip(images.split(part), targets.split(part), strict=True) if len(x)]
    there = len(parts)
    # Processes that exchange weights in every pass have to make as many of them.
    nothing = images.new_zeros(1, *images.shape[1:]), targets.new_zeros(1, *targets.shape[1:])
    parts += [nothing] * ((accumulate if distributed.share_a_model() else 1) - there)
    loss, hits = torch.zeros((), device=images.device), torch.zeros((), device=images.device)
    optimizer.zero_grad(set_to_none=True)
    for number, (x, y) in enumerate(parts, 1):
        waits = replicas is not None and number < len(parts)
        with replicas.no_sync() if replicas and waits else nullcontext():
            with autocast(images.device, amp):
                logits = model(x)
            logits = logits.float()
            summed = F.cross_entropy(logits, y, label_smoothing=label_smoothing, reduction="sum")
            share = summed * (1 / whole if number <= there else 0)
            # What averages gradients takes the mean over the processes.
            scaled = share * distributed.data_world()
            (scaled if scaler is None else scaler.scale(scaled)).backward()
        loss += share.detach()
        if number <= there:
            hits += _hits(logits.detach(), y)
    if scaler is not None:
        scaler.unscale_(optimizer)
    norm = fsdp.whole(nn.utils.clip_grad_norm_(model.parameters(), clip or math.inf))
    if scaler is None:
        optimizer.step()
        # Such a gradient has just spoilt the weights, which the loss would tell a step too late.
        loss = torch.where(norm.isfinite(), loss, torch.nan)
    else:
        scaler.step(optimizer)
        scaler.update()
    return loss, hits


def make_scaler(amp: str, device: torch.device) -> torch.amp.GradScaler | None:
    """What keeps fp16 gradients out of the subnormals; nothing else needs it."""
    return torch.amp.GradScaler(device.type) if amp == "fp16" else None


def autocast(device: torch.device, amp: str) -> torch.autocast:
    """The autocast context of ``off``, ``bf16`` or ``fp16``."""
    dtype = torch.float16 if amp == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype=dtype, enabled=amp != "off")


def _hits(logits: Tensor, targets: Tensor) -> Tensor:
    predicted = logits.argmax(dim=1)
    if targets.dim() == 1:
        return (predicted == targets).sum()
    return targets.gather(1, predicted[:, None]).sum()
