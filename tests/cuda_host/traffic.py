"""The bytes that linear attention's CUDA kernels load and store, counted while the host runs them.

    python -m tests.cuda_host.traffic [--head-dims 64] [--tokens 256] [--splits 2]

A row a tensor: what all launches of a pass loaded from it and stored to it, beside the least that
SPEC.md names. The workspace is everything else: partial sums, S, z and their gradients.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from tests.cuda_host import emulator
from tests.cuda_host.checks import Case
from tests.cuda_host.linear_attention import LinearAttention


@dataclass(frozen=True)
class Row:
    """Bytes of one tensor in one pass; ``narrow`` of them by accesses of fewer than 16 bytes."""

    operation: str
    pass_name: str
    dtype: str
    tensor: str
    loaded: int
    stored: int
    least: int
    narrow: int

    @property
    def ratio(self) -> float:
        return (self.loaded + self.stored) / self.least if self.least else float("nan")


def measure(libraries: dict[str, Path], case: Case, *, save_state: bool) -> Iterator[Row]:
    """Forward and backward of one case, one row a tensor (and of the workspace, least 0)."""
    emulated = LinearAttention(
        libraries, thread_order=case.order, num_splits=case.num_splits, multiprocessors=1
    )
    q, k, v, dout = case.inputs()
    read = {"q": q, "k": k, "v": v}
    emulated.watch(**read)
    out, S, z = emulated.linear_attention(q, k, v, case.eps, save_state)
    yield from _rows(emulated, case, "forward", read | {"out": out})

    emulated = LinearAttention(
        libraries, thread_order=case.order, num_splits=case.num_splits, multiprocessors=1
    )
    read["dout"] = dout
    emulated.watch(**read)
    dq, dk, dv = emulated.linear_attention_backward(dout, q, k, v, S, z, case.eps)
    yield from _rows(emulated, case, "backward", read | {"dq": dq, "dk": dk, "dv": dv})


def _rows(
    emulated: LinearAttention, case: Case, pass_name: str, tensors: dict[str, torch.Tensor]
) -> Iterator[Row]:
    dtype = str(case.dtype).removeprefix("torch.")
    for name, x in tensors.items():
        counted = emulated.traffic()[name]
        narrow = counted.loaded_narrow + counted.stored_narrow
        least = x.numel() * x.element_size()
        yield Row(
            "linear_attention",
            pass_name,
            dtype,
            name,
            counted.loaded,
            counted.stored,
            least,
            narrow,
        )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.cuda_host.traffic", description=__doc__)
    parser.add_argument("--head-dims", default="64")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument(
        "--splits", type=int, help="by steps, with so many splits (default: 1 launch)"
    )
    options = parser.parse_args()
    head_dims = [int(d) for d in options.head_dims.split(",")]
    flags = (f"-DLINEAR_VIT_HEAD_DIMS={options.head_dims}",)
    columns = ("operation", "pass", "dtype", "tensor", "loaded", "stored", "least", "ratio")
    print(("{:<18}{:<10}{:<10}{:<8}" + "{:>12}" * 4).format(*columns))
    libraries = emulator.build_once("linear_attention", flags)
    for head_dim in head_dims:
        for dtype in emulator.ELEMENT_TYPES:
            case = Case(
                head_dim, dtype, queries=options.tokens, keys=options.tokens,
                num_splits=options.splits,
            )  # fmt: skip
            for row in measure(libraries, case, save_state=options.splits is not None):
                print(
                    f"{row.operation:<18}{row.pass_name:<10}{row.dtype:<10}{row.tensor:<8}"
                    f"{row.loaded:>12}{row.stored:>12}{row.least:>12}{row.ratio:>12.2f}"
                )


if __name__ == "__main__":
    main()
