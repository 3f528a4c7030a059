"""Several processes that train one model: what ``torchrun`` starts. One process is rank 0 of 1."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist


@contextmanager
def processes(device: torch.device) -> Iterator[None]:
    """Joins the processes that torchrun started, NCCL between GPUs and gloo between CPUs."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    # Rank 0 tests at the end while the others wait.
    dist.init_process_group(backend, timeout=timedelta(hours=1))
    try:
        yield
    finally:
        dist.destroy_process_group()


def local_rank() -> int | None:
    """Which of this machine's processes this is, None where torchrun did not start it."""
    return int(os.environ["LOCAL_RANK"]) if "LOCAL_RANK" in os.environ else None


def rank() -> int:
    return dist.get_rank() if _joined() else 0


def world() -> int:
    return dist.get_world_size() if _joined() else 1


def parallel(model: nn.Module) -> nn.Module:
    """The model, with gradients averaged over the processes where there are several."""
    if not _joined():
        return model
    device = next(model.parameters()).device
    ids = [device.index] if device.type == "cuda" else None
    # The mean of gradients of losses that are each divided by the global batch, times the
    # processes, is the gradient of the whole batch (training.step).
    return nn.parallel.DistributedDataParallel(model, device_ids=ids)


def total(values: Tensor) -> Tensor:
    """The sum of a tensor over all processes."""
    if _joined():
        dist.all_reduce(values)
    return values


def gather(value: Any) -> list[Any]:
    """A picklable value of every process, in the order of ranks."""
    if not _joined():
        return [value]
    values: list[Any] = [None] * world()
    dist.all_gather_object(values, value)
    return values


def wait_for_all() -> None:
    if _joined():
        dist.barrier()


def _joined() -> bool:
    return dist.is_available() and dist.is_initialized()
