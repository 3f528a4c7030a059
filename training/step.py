"""One training step, as the training loop runs it and as the benchmarks time it."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.config import DATASETS, build_model, model_settings, resolve


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
    labels: Tensor,
    *,
    amp: str = "off",
    label_smoothing: float = 0.0,
    clip: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Forward, loss, backward, gradient clipping, optimiser.

    images (B, C, H, W) float32, labels (B,) int64. Returns the loss and the number of images
    classified correctly, both detached scalars on the device: reading them is the caller's choice,
    since it waits for the device.
    """
    with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=amp == "bf16"):
        logits = model(images)
    logits = logits.float()
    loss = F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    return loss.detach(), (logits.detach().argmax(dim=1) == labels).sum()


def make_step(
    model_name: str,
    *,
    device: str | torch.device = "cpu",
    amp: str = "off",
    batch_size: int | None = None,
    preset: str = "small",
    dataset: str = "digits",
    backend: str | None = None,
    seed: int = 0,
) -> Callable[[], None]:
    """A full training step of a model on one fixed random batch: call it to run it once.

    Args:
        model_name: a key of ``training.config.MODELS``.
        device: where it runs. The step does not wait for a CUDA device.
        amp: ``off`` (float32) or ``bf16`` autocast.
        batch_size: None takes the preset's.
        preset, dataset: what sizes model and images, as on the command line; no data is read.
        backend: of the kernels; None for the fastest usable one.
    """
    given = {
        **model_settings(model_name),
        "preset": preset,
        "dataset": dataset,
        "amp": amp,
        "backend": backend,
        "seed": seed,
    }
    if batch_size is not None:
        given["batch_size"] = batch_size
    config = resolve(given)
    info = DATASETS[config.dataset]
    model = build_model(config).to(device).train()
    optimizer = make_optimizer(model, lr=config.lr, weight_decay=config.weight_decay)
    generator = torch.Generator().manual_seed(seed)
    shape = (config.batch_size, info.channels, info.image_size, info.image_size)
    images = torch.randn(shape, generator=generator).to(device)
    labels = torch.randint(info.classes, (config.batch_size,), generator=generator).to(device)

    def step() -> None:
        training_step(
            model,
            optimizer,
            images,
            labels,
            amp=config.amp,
            label_smoothing=config.label_smoothing,
            clip=config.clip,
        )

    return step
