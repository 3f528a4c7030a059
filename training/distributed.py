"""Several processes that train one model: what ``torchrun`` starts. One process is rank 0 of 1."""

import argparse
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.rendezvous import rendezvous

from linear_vit import options
from linear_vit.training.errors import UserError, first_line

_GRACE_S = 10  # between the first process and the last to notice that one does not answer
# What the processes say of themselves beside their exchanges; theirs while they are joined.
_told: dist.Store | None = None


@contextmanager
def processes(device: torch.device) -> Iterator[None]:
    """Joins the processes that torchrun started, NCCL between GPUs and gloo between CPUs.

    One that does not answer ends the others, with a UserError that names it, after ``patience``.
    """
    global _told
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    _told, rank, world = next(rendezvous("env://"))
    dist.init_process_group(
        backend, store=_told, rank=rank, world_size=world, timeout=timedelta(seconds=patience())
    )
    try:
        yield
    except RuntimeError as error:
        if (told := unanswered(error)) is None:
            raise
        raise told from error
    finally:
        dist.destroy_process_group()


def patience() -> float:
    """Seconds to wait for the other processes, of LINEAR_VIT_PATIENCE_S or ten minutes."""
    text = os.environ.get("LINEAR_VIT_PATIENCE_S", "600")
    try:
        return options.positive(text)
    except argparse.ArgumentTypeError as error:
        raise UserError(f"LINEAR_VIT_PATIENCE_S: {error}") from error


def unanswered(error: BaseException) -> UserError | None:
    """Which processes an exchange failed for want of; None for an error of another kind.

    All that still go on come here at about the same time, and say so: the others are the ones.
    """
    lost = isinstance(error, dist.DistError) or "gloo" in str(error)
    if not lost or _told is None or not _joined():
        return None
    _told.set(f"answers/{rank()}", "")
    left, end = set(range(world())), time.monotonic() + _GRACE_S
    while left and time.monotonic() < end:
        left = {other for other in left if not _told.check([f"answers/{other}"])}
        time.sleep(0.1)
    if not left:
        return UserError(f"an exchange between the processes failed: {first_line(error):.200}")
    who = ", ".join(map(str, sorted(left)))
    return UserError(
        f"of {world()} processes, {who} did not answer for {patience():g} s and hang or are gone: "
        "training stopped, and --resume goes on from the last checkpoint"
    )


@contextmanager
def first_before_others() -> Iterator[None]:
    """The first process goes through this before the others: a download may take its time."""
    if _told is not None and rank() > 0:
        _told.wait(["first is through"], timedelta(hours=1))
    yield
    if _told is not None and rank() == 0:
        _told.set("first is through", "")


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


def _joined() -> bool:
    return dist.is_available() and dist.is_initialized()
