"""Weights and the optimiser's state cut over all processes (FSDP2); in files they are whole."""

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from linear_vit.attention import VisionTransformer


def cut(model: VisionTransformer) -> None:
    """Every process keeps a part of every weight, in place.

    A block's are whole while it is at work, and gradients come out averaged and cut.
    """
    # Here and below, as these modules take a while to import.
    from torch.distributed.fsdp import fully_shard

    kind = next(model.parameters()).device.type
    mesh = dist.init_device_mesh(kind, (dist.get_world_size(),))
    for part in (*model.blocks, model):
        fully_shard(part, mesh=mesh)


def whole(state: Any) -> Any:
    """A state dict whose tensors are whole, on the CPU where they were cut.

    Where any is, every process has to call it.
    """
    if isinstance(state, dict):
        return {name: whole(value) for name, value in state.items()}
    if isinstance(state, list):
        return [whole(value) for value in state]
    return state.full_tensor().cpu() if _is_cut(state) else state


def cut_like(there: Any, value: Any) -> Any:
    """A whole tensor cut as one of its shape that is there; the value itself where that is not."""
    if not _is_cut(there) or getattr(value, "shape", None) != there.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    place = there.device_mesh, there.placements
    return distribute_tensor(value.to(there.device), *place, src_data_rank=None)


def cut_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """An optimiser's state dict, each tensor cut as the parameter that it belongs to."""
    parameters: list[Tensor] = [p for group in optimizer.param_groups for p in group["params"]]
    of = {
        number: {name: cut_like(parameters[number], value) for name, value in values.items()}
        for number, values in state["state"].items()
    }
    return {**state, "state": of}


def _is_cut(x: Any) -> bool:
    return hasattr(x, "full_tensor")
