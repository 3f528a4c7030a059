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
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.rendezvous import rendezvous

from linear_vit import attention, options
from linear_vit.kernels import exchanges
from linear_vit.training.errors import UserError, first_line
from linear_vit.training.fsdp import cut

# Where the processes say something beside their exchanges, while they are joined.
_told: dist.Store | None = None
# (data, sequence), where images are spread over several processes.
_mesh: DeviceMesh | None = None
_fsdp = False


@contextmanager
def processes(
    device: torch.device, sequence_parallel: int = 1, *, fsdp: bool = False
) -> Iterator[None]:
    """Joins the processes that torchrun started, NCCL between GPUs and gloo between CPUs.

    Every ``sequence_parallel`` in a row share their images, each with a band of their rows. With
    ``fsdp`` each has a part of the weights. One that does not answer ends the others, with a
    UserError that names it, after ``patience``.

    Raises:
        UserError: ``sequence_parallel`` does not divide their number; ``fsdp`` and one process.
    """
    global _told, _mesh, _fsdp
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count % sequence_parallel:
        started = f"torchrun started {count}" if local_rank() is not None else "this is one"
        raise UserError(
            f"--sequence_parallel {sequence_parallel} needs so many processes, or a multiple, and "
            f"{started}: torchrun --nproc-per-node {sequence_parallel} train_minimal.py ..."
        )
    if fsdp and count == 1:
        text = "--fsdp needs several processes: torchrun --nproc-per-node 2 train_minimal.py ..."
        raise UserError(text)
    if count == 1:
        yield
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    _told, rank, world = next(rendezvous("env://"))
    dist.init_process_group(
        backend, store=_told, rank=rank, world_size=world, timeout=timedelta(seconds=patience())
    )
    try:
        if sequence_parallel > 1:
            _mesh = _in_two_dimensions(device, sequence_parallel)
        _fsdp = fsdp
        yield
    except RuntimeError as error:
        if (told := unanswered(error)) is None:
            raise
        raise told from error
    finally:
        _mesh, _fsdp = None, False
        dist.destroy_process_group()


def _in_two_dimensions(device: torch.device, sequence_parallel: int) -> DeviceMesh:
    """The mesh (data, sequence). Its groups are made here, since those that a mesh makes have
    PyTorch's own time-out."""
    ranks = torch.arange(world()).view(-1, sequence_parallel)
    groups: list[Any] = []
    for lists in (ranks.T.tolist(), ranks.tolist()):
        timeout = timedelta(seconds=patience())
        groups.append(dist.new_subgroups_by_enumeration(lists, timeout=timeout)[0])
    names = ("data", "sequence")
    return DeviceMesh.from_group(groups, device.type, mesh=ranks, mesh_dim_names=names)


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
    told = error
    if not isinstance(error, exchanges.Unanswered):
        if not exchanges.is_of_an_exchange(error) or not _joined():
            return None
        if not (left := exchanges.missing(None, time.monotonic() + exchanges.GRACE_S)):
            return UserError(f"an exchange between the processes failed: {first_line(error):.200}")
        told = exchanges.unanswered(left, patience())
    return UserError(f"{told}: training stopped, and --resume goes on from the last checkpoint")


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


def sequence_parallel() -> int:
    """How many processes share their images."""
    return _mesh["sequence"].size() if _mesh is not None else 1


def uses_fsdp() -> bool:
    """Whether each process has a part of the weights."""
    return _fsdp


def share_a_model() -> bool:
    """Whether a pass through the model is one of several processes together."""
    return _mesh is not None or _fsdp


def data_rank() -> int:
    """Which share of a batch is this process's."""
    return rank() // sequence_parallel()


def data_world() -> int:
    """How many shares a batch has."""
    return world() // sequence_parallel()


def shard_sequence(model: attention.VisionTransformer) -> None:
    """Spreads the model's tokens over the processes that share their images, in place.

    Raises:
        UserError: its token grid has too few rows for them.
    """
    if _mesh is None:
        return
    try:
        attention.shard_sequence(model, _mesh["sequence"])
    except ValueError as error:
        raise UserError(f"--sequence_parallel {sequence_parallel()}: {error}") from error


def parallel(model: attention.VisionTransformer) -> nn.Module:
    """The model, with gradients averaged over the processes where there are several."""
    if not _joined():
        return model
    if _fsdp:
        cut(model)
        return model
    device = next(model.parameters()).device
    ids = [device.index] if device.type == "cuda" else None
    # The mean of gradients of losses that are each divided by the global batch, times the shares
    # of it, is the gradient of the whole batch (training.step). Processes with bands of the same
    # images have parts of a gradient that is as much larger (attention.sharded).
    return nn.parallel.DistributedDataParallel(model, device_ids=ids)


def total(values: Tensor) -> Tensor:
    """The sum of a tensor over all shares of a batch."""
    if _joined():
        dist.all_reduce(values, group=_mesh["data"].get_group() if _mesh is not None else None)
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
