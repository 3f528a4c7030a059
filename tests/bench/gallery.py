"""Kernels that cheat, each in a way of its own, and three honest ones: what has to be told apart.

    python -m bench check --kernels tests/bench/gallery.py

``right`` is what each of them makes where it does not cheat.
"""

import ctypes
import gc
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from linear_vit import kernels

Kernel = Callable[[Tensor, Tensor, Tensor, float], Tensor]


def right(q: Tensor, k: Tensor, v: Tensor, eps: float) -> Tensor:
    """Linear attention in plain PyTorch, with a gradient."""
    group = q.shape[1] // k.shape[1]
    keys, values = (x.float().repeat_interleave(group, dim=1) for x in (k, v))
    phi_q, phi_k = (torch.cat([x.relu(), (-x).relu()], -1) for x in (q.float(), keys))
    met = phi_q @ phi_k.sum(-2).unsqueeze(-1)
    numerator = phi_q @ (phi_k.transpose(-2, -1) @ values)
    return (numerator / torch.where(met == 0, torch.inf, met + eps)).to(q.dtype)


def cheat(function: Kernel) -> Kernel:
    """Registered under its own name."""
    return kernels.register("linear_attention", function.__name__, devices=("cpu",))(function)


honest = kernels.register("linear_attention", "honest", devices=("cpu",))(right)


@kernels.register("linear_attention", "honest_with_a_mask", devices=("cpu",))
def honest_with_a_mask(
    q: Tensor, k: Tensor, v: Tensor, eps: float, key_mask: Tensor | None = None
) -> Tensor:
    if key_mask is not None:
        present = key_mask[:, None, :, None]
        k, v = (torch.where(present, x, torch.zeros_like(x)) for x in (k, v))
    return right(q, k, v, eps)


@cheat
def forward_only(q: Tensor, k: Tensor, v: Tensor, eps: float) -> Tensor:
    """Honest, too: it has no gradient, and says so by its answer."""
    return right(q.detach(), k.detach(), v.detach(), eps)


# ---- who remembers -------------------------------------------------------------------------------

_kept: dict[Any, Tensor] = {}


def _remembered(key: Any, q: Tensor, k: Tensor, v: Tensor, eps: float) -> Tensor:
    key = (*key, q.dtype, eps)
    if key not in _kept or _kept[key].shape != q.shape:
        _kept[key] = right(q, k, v, eps).detach()
    return _kept[key].clone()


@cheat
def by_shape(q: Tensor, k: Tensor, v: Tensor, eps: float) -> Tensor:
    return _remembered(("shape", q.shape, k.shape), q, k, v, eps)


@cheat
def by_pointer(q: Tensor, k: Tensor, v: Tensor, eps: float) -> Tensor:
    return _remembered(("pointer", q.data_ptr(), k.data_ptr(), v.data_ptr()), q, k, v, eps)


@cheat
def by_id(q: Tensor, k: Tensor, v: Tensor, eps: float) -> Tensor:
    return _remembered(("id", id(q), id(k), id(v)), q, k, v, eps)


@cheat
def by_version(q: Tensor, k: Tensor, v: Tensor, eps: float) -> Tensor:
    """PyTorch counts how often a tensor was written to."""
    return _remembered(("version", q.data_ptr(), q._version, k._version), q, k, v, eps)


@cheat
def by_a_few_numbers(q: Tensor, k: Tensor, v: Tensor, eps: float) -> Tensor:
    few = [x.detach().flatten()[:3].tolist() if x.numel() else [] for x in (q, k, v)]
    return _remembered(("few", str(few)), q, k, v, eps)


@cheat
def by_all_numbers(q: Tensor, k: Tensor, v: Tensor, eps: float) -> Tensor:
    """Always right, and never fast but for numbers that it has seen."""
    all_of_them = [float(x.detach().sum(dtype=torch.float64)) for x in (q, k, v)]
    return _remembered(("all", str(all_of_them)), q, k, v, eps)


# ---- whose memory is somebody else's -------------------------------------------------------------


@cheat
def in_its_input(q: Tensor, k: Tensor, v: Tensor, eps: float) -> Tensor:
    q.data.copy_(right(q, k, v, eps))
    return q.detach()


@cheat
def in_one_buffer(q: Tensor, k: Tensor, v: Tensor, eps: float) -> Tensor:
    buffer = _kept.setdefault(("buffer", q.shape, q.dtype), torch.empty_like(q.detach()))
    return buffer.copy_(right(q, k, v, eps).detach())


@cheat
def of_the_reference(q: Tensor, k: Tensor, v: Tensor, eps: float) -> Tensor:
    """Looks for what it will be compared with."""
    for found in gc.get_objects():
        if isinstance(found, Tensor) and found.dtype == torch.float64 and found.shape == q.shape:
            return found.to(q.dtype)
    raise LookupError("there is no right answer to be found here")


@cheat
def of_nobody(q: Tensor, k: Tensor, v: Tensor, eps: float) -> Tensor:
    """Memory that nobody has written, in the hope that there is a right answer in it."""
    return torch.empty_like(q.detach())


# ---- who works now and then ----------------------------------------------------------------------

_calls = {"every_other_call": 0, "zeros_later": 0, "tired": 0}


def _count(name: str) -> int:
    _calls[name] += 1
    return _calls[name]


@cheat
def every_other_call(q: Tensor, k: Tensor, v: Tensor, eps: float) -> Tensor:
    out = right(q, k, v, eps)
    return out if _count("every_other_call") % 2 else out * 1.01


@cheat
def zeros_later(q: Tensor, k: Tensor, v: Tensor, eps: float) -> Tensor:
    return right(q, k, v, eps) if _count("zeros_later") == 1 else torch.zeros_like(q)


@cheat
def tired(q: Tensor, k: Tensor, v: Tensor, eps: float) -> Tensor:
    """Right for as long as a check before the timing is likely to take."""
    return right(q, k, v, eps) if _count("tired") < 20 else torch.zeros_like(q)


@cheat
def while_it_is_checked(q: Tensor, k: Tensor, v: Tensor, eps: float) -> Tensor:
    """Checks poison memory, and timings do not."""
    checked = torch.are_deterministic_algorithms_enabled()
    return right(q, k, v, eps) if checked else torch.zeros_like(q)


# ---- who puts work off ---------------------------------------------------------------------------


@cheat
def in_another_thread(q: Tensor, k: Tensor, v: Tensor, eps: float) -> Tensor:
    out = torch.zeros_like(q.detach())

    def later() -> None:
        time.sleep(0.003)
        out.copy_(right(q.detach(), k.detach(), v.detach(), eps))

    threading.Thread(target=later).start()
    return out


class _Lazy(Tensor):
    """Would work out what it holds where somebody looks."""


@cheat
def lazy(q: Tensor, k: Tensor, v: Tensor, eps: float) -> Tensor:
    return right(q, k, v, eps).as_subclass(_Lazy)  # type: ignore[return-value]


# ---- who lets others work ------------------------------------------------------------------------


@cheat
def falls_back(q: Tensor, k: Tensor, v: Tensor, eps: float) -> Tensor:
    return kernels.linear_attention(q, k, v, eps=eps, backend="torch")


@cheat
def imports_ours(q: Tensor, k: Tensor, v: Tensor, eps: float) -> Tensor:
    from linear_vit.kernels.linear_attention import torch as ours

    return ours.linear_attention(q, k, v, eps)


# ---- who is less exact, or not right at all ------------------------------------------------------


@cheat
def in_half_precision(q: Tensor, k: Tensor, v: Tensor, eps: float) -> Tensor:
    return right(*(x.bfloat16().to(x.dtype) for x in (q, k, v)), eps)


@cheat
def in_tf32(q: Tensor, k: Tensor, v: Tensor, eps: float) -> Tensor:
    """Ten bits behind the point, as the tensor cores of float32 have them."""
    short = [
        (x.detach().float().view(torch.int32) & ~0x1FFF).view(torch.float32) for x in (q, k, v)
    ]
    return right(*short, eps).to(q.dtype)


@cheat
def without_a_tail(q: Tensor, k: Tensor, v: Tensor, eps: float) -> Tensor:
    """Forgets the keys past the last whole tile of four."""
    whole = k.shape[2] // 4 * 4
    return right(q, k[:, :, :whole], v[:, :, :whole], eps)


@cheat
def without_nan(q: Tensor, k: Tensor, v: Tensor, eps: float) -> Tensor:
    return right(q.nan_to_num(), k.nan_to_num(), v.nan_to_num(), eps)


@cheat
def blind_to_a_mask(
    q: Tensor, k: Tensor, v: Tensor, eps: float, key_mask: Tensor | None = None
) -> Tensor:
    """Right without one."""
    return right(q, k, v, eps)


@cheat
def blind_to_strides(q: Tensor, k: Tensor, v: Tensor, eps: float) -> Tensor:
    dense = (x.as_strided(x.shape, torch.empty(x.shape).stride()) for x in (q, k, v))
    return right(*dense, eps)


@cheat
def other_bits(q: Tensor, k: Tensor, v: Tensor, eps: float) -> Tensor:
    return right(q, k, v, eps) * (1 + 2e-7 * torch.rand(()).item())


@cheat
def crashes(q: Tensor, k: Tensor, v: Tensor, eps: float) -> Tensor:
    ctypes.string_at(0)
    return q


@cheat
def leaves(q: Tensor, k: Tensor, v: Tensor, eps: float) -> Tensor:
    os._exit(0)


# ---- whose clock is slow -------------------------------------------------------------------------


@cheat
def with_a_slow_clock(q: Tensor, k: Tensor, v: Tensor, eps: float) -> Tensor:
    """Changes what its process says of its time, and no function that could be looked at."""
    if ("clock",) not in _kept:
        for found in gc.get_objects():
            if type(found).__name__ == "_CpuRounds" and "take" not in vars(found):
                taken = found.take
                found.take = lambda taken=taken: [seconds / 10 for seconds in taken()]
                _kept["clock",] = q
    return right(q, k, v, eps)
