"""What the rooms' tests on the host share: attention inputs, accuracy, mutations, sanitizers."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from linear_vit.kernels.accuracy import compare
from tests.cuda_host import emulator
from tests.cuda_host.emulator import guarded

HEAD_DIMS = (16, 32, 48, 64, 96, 128)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ORDERS = tuple(emulator.THREAD_ORDERS)

needs_compiler = pytest.mark.skipif(
    emulator.compiler() is None, reason="no C++ compiler (g++, or what CXX names) on this machine"
)


# ---- attention -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """Attention inputs: q (B, H, N, D), k and v (B, Hk, M, D), and how they lie in memory."""

    head_dim: int
    dtype: torch.dtype = torch.float32
    batch: int = 1
    heads: int = 2
    kv_heads: int = 2
    queries: int = 70
    keys: int = 70
    layout: str = "contiguous"
    order: str = "forward"
    num_splits: int | None = 1
    eps: float = 1e-6

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"D{self.head_dim}-{dtype}-B{self.batch}H{self.heads}Hk{self.kv_heads}"
            f"N{self.queries}M{self.keys}-{self.layout}-{self.order}-splits{self.num_splits}"
        )

    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v and the output's gradient."""
        random = torch.Generator().manual_seed(self.head_dim + self.queries)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=random).to(self.dtype)

        q_shape = (self.batch, self.heads, self.queries, self.head_dim)
        k_shape = (self.batch, self.kv_heads, self.keys, self.head_dim)
        offset = 1 if self.layout == "misaligned" else 0
        if self.layout == "packed":  # views into one (B, N, 3, H, D) projection
            qkv = normal(self.batch, self.queries, 3, self.heads, self.head_dim)
            q, k, v = guarded(qkv).permute(2, 0, 3, 1, 4).unbind(0)
            gradient = normal(self.batch, self.queries, self.heads, self.head_dim)
            return q, k, v, guarded(gradient).transpose(1, 2)
        if self.layout == "expanded":  # one head, one gradient row, seen many times
            k, v = (normal(self.batch, 1, *k_shape[2:]).expand(k_shape) for _ in range(2))
            gradient = normal(self.batch, self.heads, 1, self.head_dim).expand(q_shape)
        else:
            k, v, gradient = normal(*k_shape), normal(*k_shape), normal(*q_shape)
        q, k, v, gradient = (guarded(x, offset) for x in (normal(*q_shape), k, v, gradient))
        return q, k, v, gradient


def assert_accurate(name: str, actual: Tensor, expected: Tensor, *, gradient: bool) -> None:
    comparison = compare(actual, expected, gradient=gradient)
    assert comparison.passed, f"{name}: {comparison}"


def double(*tensors: Tensor) -> list[Tensor]:
    return [x.double().requires_grad_() for x in tensors]


def grad(x: Tensor) -> Tensor:
    assert x.grad is not None
    return x.grad


# ---- do the tests fail when they should? ---------------------------------------------------------


class Mutation(NamedTuple):
    """A small break: ``old`` (in the file exactly once) becomes ``new``."""

    name: str
    file: str  # in kernels/
    old: str
    new: str


def first_failure(checks: list[Callable[[], object]]) -> str | None:
    """What the first of the checks to fail says, or None."""
    for check in checks:
        try:
            check()
        except (AssertionError, RuntimeError) as error:
            return str(error) or "an assertion"
    return None


def see_red(
    mutation: Mutation,
    room: str,
    flags: tuple[str, ...],
    folder: Path,
    checks: Callable[[dict[str, Path]], list[Callable[[], object]]],
) -> str:
    """Break a copy of the sources, build the room, and return what the first of its checks to
    fail says; raise if none does.

    ``checks`` makes a room's checks from its libraries; that the unbroken sources pass them is for
    the caller to have seen (a session fixture does it once).
    """
    kernels = folder / "kernels"
    shutil.copytree(emulator.KERNELS, kernels, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    path = kernels / mutation.file
    text = path.read_text()
    assert text.count(mutation.old) == 1, f"not once in {mutation.file}: {mutation.old}"
    path.write_text(text.replace(mutation.old, mutation.new))
    sources = {room: emulator.sources(kernels)[room]}
    libraries = emulator.build(sources, folder, (*flags, "-Wno-unused"))
    failure = first_failure(checks(libraries))
    assert failure is not None, f"nothing noticed: {mutation.name}"
    return failure


# ---- sanitizers ----------------------------------------------------------------------------------


def assert_sanitizers_find_nothing(
    room: str, flags: tuple[str, ...], folder: Path, script: str
) -> None:
    """Build the room under AddressSanitizer and UndefinedBehaviorSanitizer and run ``script``.

    The script finds the room's library in the folder ``sys.argv[1]``, as ``<room>.so``; guards are
    off, so that the sanitizer's own red zones begin where a tensor ends.
    """
    cxx = emulator.compiler()
    assert cxx is not None
    asan = subprocess.run(
        [cxx, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if not Path(asan).is_file():
        pytest.skip("the compiler comes without AddressSanitizer's library")
    sanitize = ("-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    source = {room: emulator.sources()[room]}
    emulator.build(source, folder, (*flags, *sanitize, "-DCUDA_HOST_SANITIZE"))
    environment = os.environ | {
        "LD_PRELOAD": asan,
        "ASAN_OPTIONS": "detect_leaks=0,detect_stack_use_after_return=0",
        "PYTHONPATH": str(emulator.HERE.parent.parent),
    }
    unguarded = "from tests.cuda_host import emulator\nemulator.GUARD = 0\n"
    result = subprocess.run(
        [sys.executable, "-c", unguarded + script + "\nprint('clean')", str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    assert result.stdout.strip() == "clean"
