"""What attention of one sequence takes on several devices: a model of few constants.

Each of P devices has N / P tokens, and a call waits for its exchanges::

    T(N, P) = t(N / P) + exchanges · latency(P) + sent(P) / rate,     T(N, 1) = t(N)

t is what the kernels take by themselves, a + c·N. The exchange does not grow with N, so that more
devices pay from some N on.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Kernels:
    """t(N) = a + c·N, in seconds."""

    a: float
    c: float

    def __call__(self, tokens: float) -> float:
        return self.a + self.c * tokens


def fitted(lengths: Sequence[int], seconds: Sequence[float]) -> Kernels:
    """By least squares of the relative error, a ≥ 0; two lengths or more."""
    n, t = np.asarray(lengths, float), np.asarray(seconds, float)
    (a, c), *_ = np.linalg.lstsq(np.stack([1 / t, n / t], axis=1), np.ones_like(t), rcond=None)
    return Kernels(float(a), float(c)) if a >= 0 else Kernels(0.0, float(np.mean(t / n)))


def pays_from(kernels: Kernels, exchange_s: float, devices: int) -> float:
    """The N from which on so many devices take less than one: c·N·(1 − 1/P) = exchange."""
    return exchange_s / (kernels.c * (1 - 1 / devices))


def state_bytes(batch: int, heads: int, head_dim: int) -> int:
    """S and z in float32, which linear attention exchanges in each direction."""
    return 4 * batch * heads * (2 * head_dim**2 + 2 * head_dim)


@dataclass(frozen=True)
class Network:
    """GPUs of which ``node`` are joined by NVLink, and the nodes by a network card for each.

    The latency is that by which NCCL chooses among its algorithms (``src/graph/tuning.cc``, tree,
    protocol LL128): a base, and twice a hop along the GPUs of a node and up the tree of nodes.
    Rates are data sheets' (NVLink 4: 450 GB/s a direction; 400 Gbit/s a card), so that an exchange
    is too short here rather than too long. Every byte goes up the tree and down again.
    """

    node: int = 8
    base_s: float = 14.0e-6
    hop_in_node_s: float = 1.25e-6
    hop_between_s: float = 8.5e-6
    in_node_bytes_per_s: float = 450e9
    between_bytes_per_s: float = 50e9

    def all_reduce(self, size: int, devices: int) -> float:
        """Seconds for so many bytes; devices 1, or a power of two."""
        if devices == 1:
            return 0.0
        inside = min(self.node, devices)
        nodes = devices // inside
        hops = (inside - 1) * self.hop_in_node_s + math.log2(nodes) * self.hop_between_s
        rate = self.in_node_bytes_per_s if nodes == 1 else self.between_bytes_per_s
        return self.base_s + 2 * hops + 2 * size / rate


@dataclass(frozen=True)
class Gpus:
    """Kernels at the copy rate of an H200 (nine tenths of its data sheet's 4.8 TB/s), bfloat16."""

    heads: int = 6
    head_dim: int = 64
    bytes_per_s: float = 0.9 * 4.8e12
    network: Network = Network()

    def kernels(self, *, backward: bool) -> Kernels:
        """Least traffic: q, k, v, out; with gradients also q, k, v, dout again, and dq, dk, dv."""
        rows = 11 if backward else 4
        return Kernels(0.0, rows * 2 * self.heads * self.head_dim / self.bytes_per_s)

    def exchange(self, devices: int, *, backward: bool) -> float:
        """Of a state, and with gradients of its gradient."""
        size = state_bytes(1, self.heads, self.head_dim)
        return (2 if backward else 1) * self.network.all_reduce(size, devices)

    def keys_and_values(self, tokens: float, devices: int, *, backward: bool) -> float:
        """Bytes that each device sends to gather k and v, and to sum their gradients."""
        size = 2 * 2 * tokens * self.heads * self.head_dim * (devices - 1) / devices
        return (2 if backward else 1) * size
