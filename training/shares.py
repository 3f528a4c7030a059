"""What attention takes of a model's time: in place by hooks, and as its kernels take alone.

In place, a share holds what stands between the kernels too: reshapes, norms of q and k, and the
hooks' own cost. Alone, the kernels run on inputs of the model's shapes, by turns, and out of the
model's memory traffic. So the two need not agree; where they do, the kernels explain the model.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from linear_vit import attention, kernels
from linear_vit.attention.adapters.core import Pyramid
from linear_vit.bench import runner
from linear_vit.bench.problems import (
    FORWARD,
    FORWARD_BACKWARD,
    AttentionShape,
    Case,
    RippleShape,
    Shape,
    make_problem,
)
from linear_vit.training.clock import Stopwatch
from linear_vit.training.models import ORIGINAL, attention_sizes
from linear_vit.training.steps import DEFAULT

_CALLS, _LONG_S = 3, 0.5  # one of a call that takes longer
_BUDGET_S = 0.2  # of each kernel, at most
_PYTORCH = "torch"


def of_attention(
    model: nn.Module,
    call: Callable[[], object],
    kind: str,
    case: Case,
    device: torch.device,
    median_s: float,
) -> dict[str, Any]:
    """Tokens, and seconds a call spends in attention: measured in place, and of kernels alone.

    Args:
        model: whose attention modules are known to ``attention.attention_modules``.
        call: what is timed: one pass of the model.
        kind: of attention, or ``original``.
        case: whose pass and backend it is.
        device: where it runs.
        median_s: what a call takes.
    """
    modules = list(attention.attention_modules(model).values())
    if not modules:
        return {"attention_s": None, "attention_alone_s": None}
    seen: list[torch.Size] = []
    handle = modules[0].register_forward_pre_hook(
        lambda _, arguments, named: seen.append(_tokens_of(arguments, named).shape),
        with_kwargs=True,
    )
    share = _in_place(modules, call, device, 1 if median_s > _LONG_S else _CALLS)
    handle.remove()
    alone = [
        (_alone(module, kind, seen[0], case, device), count)
        for module, count in _alike(modules).values()
    ]
    known = [(found, count) for found, count in alone if found is not None]
    whole = sum(found[0] * count for found, count in known) if len(known) == len(alone) else None
    return {
        "N": int(seen[0][1]),
        "attention_s": share * median_s,
        "attention_alone_s": whole,
        "attention_alone_disturbed": next((found[1] for found, _ in known if found[1]), None),
    }


def _in_place(
    modules: list[nn.Module], call: Callable[[], object], device: torch.device, calls: int
) -> float:
    """The share of a call in these modules, but for the linear layers in them.

    Of the same calls, hooks and all: what else the machine does meanwhile, it does to both.
    """
    watch = Stopwatch(device)
    for module in modules:
        watch.watch(module, "attention")
        for part in module.modules():
            if isinstance(part, nn.Linear):
                watch.watch(part, "projections")
    for _ in range(calls):
        with watch.span("call"):
            call()
    watch.release()
    spent = watch.seconds()
    return max(0.0, spent["attention"] - spent.get("projections", 0.0)) / spent["call"]


def _alike(modules: list[nn.Module]) -> dict[tuple[int, int], tuple[nn.Module, int]]:
    """A module for each heads and channels, and how many there are of it."""
    found: dict[tuple[int, int], tuple[nn.Module, int]] = {}
    for module in modules:
        sizes = attention_sizes(module)
        first, count = found.get(sizes, (module, 0))
        found[sizes] = first, count + 1
    return found


def _alone(
    module: nn.Module, kind: str, tokens: torch.Size, case: Case, device: torch.device
) -> tuple[float, str | None] | None:
    """Seconds of the kernels that a module calls, on random inputs of its shapes, and what
    disturbed them; None where it is another library's that has none of these operations."""
    known = _kind_of(module) if kind == ORIGINAL else kind
    if known is None:
        return None
    dtype = torch.bfloat16 if case.dtype.startswith("bfloat16") else torch.float32
    mode = FORWARD if case.mode == "inference" else FORWARD_BACKWARD
    calls: dict[str, Callable[[], object]] = {}
    for name, shape in _operations(module, known, tokens):
        backend = case.backend
        if kind == ORIGINAL and type(module) not in _OWN:
            backend = _PYTORCH
        elif backend == DEFAULT:
            backend = kernels.default_backend(name, device, dtype=dtype, head_dim=shape.dim)
        calls[name] = make_problem(name, shape, dtype, device).call(backend, mode)
    timed = runner.measure(calls, device=device, budget_s=_BUDGET_S)
    by = next((timing.disturbed for timing in timed.values() if timing.disturbed), None)
    return sum(timing.median for timing in timed.values()), by


def _operations(module: nn.Module, kind: str, tokens: torch.Size) -> list[tuple[str, Shape]]:
    """The operations of a module for tokens (B, N, C), with their shapes."""
    (batch, count, _), (heads, dim) = tokens, attention_sizes(module)
    pyramid: list[tuple[str, Shape]] = []
    if kind == "ripple":
        before = next((p.prefix_tokens for p in module.modules() if isinstance(p, Pyramid)), 0)
        side = math.isqrt(count - before)
        grid = RippleShape(batch, side, side, dim)
        rows, cols = grid.levels[-1]
        count = before + rows * cols
        pyramid = [("ripple_pool_stages", grid), ("ripple_expand_stages", grid)]
    shared = 1 if kind == "hydra" else heads
    shape = AttentionShape(batch, heads, shared, count, count, dim // heads)
    name = "softmax_attention" if kind == "baseline" else "linear_attention"
    return [(name, shape), *pyramid]


_OWN: dict[type, str] = {
    attention.BaselineAttention: "baseline",
    attention.LinearAttention: "linear",
    attention.RippleAttention: "ripple",
    attention.HydraAttention: "hydra",
}


def _kind_of(module: nn.Module) -> str | None:
    """Of a module as it comes: ours is what it is, others' softmax, but for Sana's own function."""
    return None if hasattr(module, "processor") else _OWN.get(type(module), "baseline")


def _tokens_of(arguments: tuple[Any, ...], named: dict[str, Any]) -> Tensor:
    found = (x for x in (*arguments, *named.values()) if isinstance(x, Tensor) and x.dim() == 3)
    return next(found)
