"""Our own attention modules, of any of the four types, to any other."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from linear_vit.attention.adapters.core import Change, Wanted, new_gate, shared_key_value
from linear_vit.attention.baseline import BaselineAttention
from linear_vit.attention.hydra import HydraAttention
from linear_vit.attention.linear import LinearAttention
from linear_vit.attention.ripple import RippleAttention

_TYPES = {
    "baseline": BaselineAttention,
    "linear": LinearAttention,
    "ripple": RippleAttention,
    "hydra": HydraAttention,
}


def modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The attention modules of the model."""
    for name, module in model.named_modules():
        if type(module) in _TYPES.values():
            yield name, module


def prefix_tokens(model: nn.Module) -> int:
    """None: these modules are told their grid, and take no other tokens."""
    return 0


def change(model: nn.Module, found: dict[str, nn.Module], wanted: Wanted) -> Change:
    """Put a module of the type in the place of each, with the weights that fit it."""
    done = Change()
    if "" in found:
        raise ValueError(
            "an attention module by itself has no place to be swapped in: give a model"
        )
    for name, old in found.items():
        new = _made(old, wanted)
        done = _carry(old, new)
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, new)
    return done


def _made(old: Any, wanted: Wanted) -> nn.Module:
    heads = getattr(old, "heads", None) or old.branches
    shared: dict[str, Any] = {"local_branch": old.local is not None, "backend": wanted.backend}
    if wanted.attention_type == "hydra":
        branches = wanted.hydra_branches or heads
        new: nn.Module = HydraAttention(old.dim, hydra_branches=branches, **shared)
    elif wanted.attention_type == "ripple":
        new = RippleAttention(old.dim, heads=heads, ripple_stages=wanted.ripple_stages, **shared)
    else:
        new = _TYPES[wanted.attention_type](old.dim, heads=heads, **shared)
    return new.to(old.projection.weight).train(old.training)


def _carry(old: Any, new: Any) -> Change:
    """Load what fits of one module's weights into another; what became of each."""
    had, takes = old.state_dict(), new.state_dict()
    if isinstance(new, HydraAttention) and not isinstance(old, HydraAttention):
        made = shared_key_value(old.qkv, new.branches).state_dict()
        had |= {f"qkv.{name}": value for name, value in made.items()}
        gate = new_gate(old.qkv, new.branches).state_dict()
        had |= {f"gate.{name}": value for name, value in gate.items()}
    kept = {name: x for name, x in had.items() if name in takes and takes[name].shape == x.shape}
    with torch.no_grad():
        new.load_state_dict(takes | kept)
    ours = {name.partition(".")[0] for name in takes}
    whole = {name for name in ours if all(n in kept for n in takes if n.partition(".")[0] == name)}
    fresh = dict.fromkeys(sorted(ours - whole), "as in a new model")
    if isinstance(new, HydraAttention) and not isinstance(old, HydraAttention):
        whole -= {"qkv", "gate"}
        fresh |= {"qkv (its keys and values)": "the mean of the heads"}
        fresh |= {"gate": "all branches count alike"}
        whole |= {"qkv (its queries)"}
    return Change(tuple(sorted(whole)), tuple(fresh.items()))
