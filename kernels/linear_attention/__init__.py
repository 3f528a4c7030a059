"""Linear attention with the feature map φ(x) = [relu(x), relu(-x)].

    S   = Σₘ φ(kₘ) vₘᵀ            z = Σₘ φ(kₘ)
    outₙ = φ(qₙ)ᵀ S / (φ(qₙ)·z + eps)

Non-causal, and linear in the number of tokens: the keys and values are summed once into a state of
2D × D numbers a head, which every query then reads.
"""

# Not `import torch`: this package has a submodule of that name, and loading it rebinds the name.
from torch import Tensor

from linear_vit.kernels.backends import run
from linear_vit.kernels.layout import autocast_inputs
from linear_vit.kernels.validation import (
    check_attention,
    check_grouping,
    check_key_mask,
    check_key_value,
    check_packed,
    check_real,
    check_same,
    check_size,
    check_state_dtype,
    check_tensor,
)


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    key_mask: Tensor | None = None,
    eps: float = 1e-6,
    backend: str | None = None,
) -> Tensor:
    """Non-causal linear attention.

    Args:
        q: queries (B, H, N, D); float32, float16 or bfloat16 (float64 on the reference). The last
            axis is contiguous, every other stride is free and read in place.
        k, v: keys and values (B, Hk, M, D), of q's dtype and device. H is a multiple of Hk; query
            head h reads key/value head ``h // (H // Hk)``.
        key_mask: (B, M) bool, False for keys that are not there, of padding for one: what they and
            their values hold (NaN too) is not seen, and their gradients are exactly 0. None: all
            are there.
        eps: added to the normaliser, at least 0. A row whose normaliser is 0 before that comes out
            0, and has no gradient.
        backend: a name from :func:`kernels.backends`, or None for the fastest usable one.

    Returns:
        (B, H, N, D) in q's dtype and memory order; all zeros where no key is there. The state and
        the normaliser are accumulated in float32. Gradients have their inputs' dtype and memory
        order.

    Raises:
        TypeError, ValueError: a bad argument, named, before anything is launched; or a backend
            that can't run this, with the reason.
    """
    q, k, v = autocast_inputs(q, k, v)
    check_attention(q, k, v)
    check_same(q=q, k=k, v=v)
    check_key_mask(key_mask, k, k.shape[2])
    eps = check_real("eps", eps, minimum=0.0)
    return run("linear_attention", backend, q, k, v, eps, key_mask=key_mask)


def linear_attention_packed(
    qkv: Tensor,
    *,
    key_mask: Tensor | None = None,
    eps: float = 1e-6,
    backend: str | None = None,
) -> Tensor:
    """:func:`linear_attention` of one packed projection, whose gradient comes in one piece.

    Args:
        qkv: (B, N, 3, H, D), the last axis contiguous: ``linear(x).view(B, N, 3, H, D)``.
        key_mask: (B, N) bool, as for :func:`linear_attention`; every query is there.
        eps: added to the normaliser, at least 0.
        backend: a name from :func:`kernels.backends`, or None for the fastest usable one.

    Returns:
        (B, N, H, D) in qkv's dtype and memory order. The kernel backends write the three gradients
        into one tensor of qkv's memory order, so that the projection's backward copies nothing.

    Raises:
        TypeError, ValueError: as :func:`linear_attention`.
    """
    (qkv,) = autocast_inputs(qkv)
    check_packed(qkv)
    check_key_mask(key_mask, qkv, qkv.shape[1])
    eps = check_real("eps", eps, minimum=0.0)
    return run("linear_attention_packed", backend, qkv, eps, key_mask=key_mask)


def linear_attention_state(
    k: Tensor, v: Tensor, *, key_mask: Tensor | None = None, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """The key-value state S = Σₘ φ(kₘ) vₘᵀ and normaliser z = Σₘ φ(kₘ).

    The states of disjoint token ranges add up, so a long sequence can be streamed through, or
    spread over devices.

    Args:
        k, v: keys and values (B, Hk, M, D), as for :func:`linear_attention`.
        key_mask: (B, M) bool, as there.
        backend: a name from :func:`kernels.backends`, or None for the fastest usable one.

    Returns:
        S (B, Hk, 2D, D) and z (B, Hk, 2D), float32 (float64 for float64 inputs).

    Raises:
        TypeError, ValueError: as :func:`linear_attention`.
    """
    k, v = autocast_inputs(k, v)
    check_key_value(k, v)
    check_same(k=k, v=v)
    check_key_mask(key_mask, k, k.shape[2])
    return run("linear_attention_state", backend, k, v, key_mask=key_mask)


def linear_attention_apply(
    q: Tensor, S: Tensor, z: Tensor, *, eps: float = 1e-6, backend: str | None = None
) -> Tensor:
    """Read a key-value state with queries: outₙ = φ(qₙ)ᵀ S / (φ(qₙ)·z + eps).

    Args:
        q: queries (B, H, N, D), as for :func:`linear_attention`.
        S, z: the state (B, Hk, 2D, D) and normaliser (B, Hk, 2D) of
            :func:`linear_attention_state`, or a sum of several: float32 (float64 for float64 q).
            z is at least 0, as sums of φ are: nothing is promised of another.
        eps: added to the normaliser, at least 0.
        backend: a name from :func:`kernels.backends`, or None for the fastest usable one.

    Returns:
        (B, H, N, D) in q's dtype and memory order.

    Raises:
        TypeError, ValueError: as :func:`linear_attention`.
    """
    (q,) = autocast_inputs(q)
    check_tensor("q", q, "(B, H, N, D)")
    check_tensor("S", S, "(B, Hk, 2D, D)")
    check_tensor("z", z, "(B, Hk, 2D)")
    batch, _, _, head_dim = q.shape
    check_size("S", S, 0, batch, "q's batch")
    check_size("S", S, 2, 2 * head_dim, "twice q's head dim")
    check_size("S", S, 3, head_dim, "q's head dim")
    for axis, meaning in enumerate(("S's batch", "S's heads", "S's features")):
        check_size("z", z, axis, S.shape[axis], meaning)
    if S.shape[1] == 0:
        raise ValueError(f"S must have at least one head, got shape {tuple(S.shape)}")
    check_grouping(q, S.shape[1], "S")
    check_state_dtype(q, S, z)
    eps = check_real("eps", eps, minimum=0.0)
    return run("linear_attention_apply", backend, q, S, z, eps)
