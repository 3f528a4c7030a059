"""Which cases ``python -m bench.gpu`` goes through, most important first."""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from linear_vit import kernels
from linear_vit.bench.gpu_measure import MODES, OURS, SDPA
from linear_vit.bench.gpu_runner import Case
from linear_vit.bench.problems import FORWARD, FORWARD_BACKWARD, AttentionShape
from linear_vit.bench.sweep import DTYPES


@dataclass(frozen=True)
class Sizes:
    """Shapes of a run: those of the real one, or of a dry run's walk through the same code."""

    head_dim: int
    other_head_dims: tuple[int, ...]  # where only results are checked
    heads: int
    long: tuple[int, ...]  # tokens of the sweep, one sequence of ``heads`` heads
    single: int  # tokens of one head of one sequence
    crossover: tuple[int, ...]  # tokens, with crossover_batch * heads heads
    crossover_batch: int
    vit: tuple[int, ...]  # tokens, with vit_batch * 6 heads
    vit_batch: int
    huge: tuple[int, int]  # heads and tokens: the last head is 2^31 elements into its tensor
    budget_s: float  # of a contender's rounds
    training: tuple[str, str, str]  # preset, data set, amp
    models: tuple[str, ...]


REAL = Sizes(
    head_dim=64,
    other_head_dims=(128, 32, 96, 16, 48),
    heads=16,
    long=(65_536, 16_384, 1_048_576, 262_144, 4096, 1024),
    single=1_048_576,
    crossover=(512, 256, 1024, 2048, 128, 4096, 8192),
    crossover_batch=4,
    vit=(64, 256, 1024),
    vit_batch=128,
    huge=(33, 1_048_576),
    budget_s=0.25,
    training=("full", "cifar100", "bf16"),
    models=("baseline", "ripple", "hydra"),
)
TINY = Sizes(
    head_dim=16,
    other_head_dims=(32,),
    heads=2,
    long=(128, 64),
    single=256,
    crossover=(64, 128),
    crossover_batch=2,
    vit=(16,),
    vit_batch=2,
    huge=(2, 64),
    budget_s=0.01,
    training=("small", "digits", "off"),
    models=("baseline",),
)


def plan(device: str, backends: tuple[str, ...], *, dry_run: bool) -> list[Case]:
    """Every case of a run, most important first.

    Args:
        device: ``cuda``, or ``cpu`` for a dry run.
        backends: of ``kernels``, as far as they are to be measured.
        dry_run: tiny sizes.
    """
    sizes = TINY if dry_run else REAL
    attention = ("linear_attention", "softmax_attention")
    ours = tuple(backend for backend in backends if backend in OURS)
    cases = [
        *_checks(sizes.head_dim, backends, ("bfloat16",), attention),
        Case("ceilings", "copy, matmul, launch", {"dtypes": list(DTYPES)}, seconds=10),
        *_sweep(sizes, backends, "bfloat16"),
        *_checks(sizes.head_dim, backends, DTYPES, kernels.OPERATIONS),
        *_beyond_numbers(sizes, backends),
        *_training(sizes, backends),
        *_graphs(sizes, backends),
        *_sweep(sizes, backends, "float32"),
        *_sweep(sizes, backends, "float16"),
        *(
            case
            for head_dim in sizes.other_head_dims
            for case in _checks(head_dim, ours, ("bfloat16", "float32"), attention)
        ),
    ]
    # A case that two of these lists have stands where the first has it.
    once = {(case.section, case.name): case for case in cases}
    return [
        dataclasses.replace(case, parameters={**case.parameters, "device": device})
        for case in once.values()
    ]


def _builds(*contenders: str) -> str | None:
    return "cuda" if any(name.endswith("cuda") for name in contenders) else None


def _checks(
    head_dim: int, backends: Iterable[str], dtypes: Iterable[str], operations: Iterable[str]
) -> Iterator[Case]:
    """Results and gradients against the float64 reference."""
    for operation, dtype, backend in itertools.product(operations, dtypes, backends):
        about = {"operation": operation, "dtype": dtype, "backend": backend, "head_dim": head_dim}
        name = f"{operation} {dtype} D={head_dim} {backend}"
        if operation.startswith("ripple"):
            name = f"{operation} {dtype} {backend}"
        yield Case("check", name, about, 15, builds=_builds(backend))


def _beyond_numbers(sizes: Sizes, backends: tuple[str, ...]) -> Iterator[Case]:
    """What only a device can show: sizes past 2^31 elements, and CUDA graphs."""
    ours = [b for b in backends if b in OURS]
    for backend in ours:
        heads, tokens = sizes.huge
        parameters = {"backend": backend, "heads": heads, "tokens": tokens}
        yield Case(
            "huge",
            f"linear_attention {heads} heads of {tokens:,} tokens {backend}",
            {**parameters, "head_dim": sizes.head_dim},
            60,
            builds=_builds(backend),
        )
    for operation in kernels.OPERATIONS:
        for backend in ours:
            parameters = {"operation": operation, "backend": backend, "head_dim": sizes.head_dim}
            yield Case("capture", f"{operation} {backend}", parameters, 15, builds=_builds(backend))


def _sweep(sizes: Sizes, backends: tuple[str, ...], dtype: str) -> Iterator[Case]:
    """Forward and backward times over N and batch, of everything that computes attention."""
    D = sizes.head_dim
    linear = [f"linear_attention/{b}" for b in backends]
    rivals = [f"softmax_attention/{b}" for b in backends if b in OURS]
    rivals += [f"sdpa/{name}" for name in SDPA]
    shapes: list[tuple[str, AttentionShape]] = []

    def add(what: str, batch: int, heads: int, tokens: int) -> None:
        shapes.append((what, AttentionShape(batch, heads, heads, tokens, tokens, D)))

    add("long", 1, sizes.heads, sizes.long[0])
    add("single", 1, 1, sizes.single)
    add("vit", sizes.vit_batch, 6, sizes.vit[0])
    for tokens in sizes.crossover[:1] if dtype != "bfloat16" else sizes.crossover:
        add("crossover", sizes.crossover_batch, sizes.heads, tokens)
    for tokens in sizes.long[1:]:
        add("long", 1, sizes.heads, tokens)
    for tokens in sizes.vit[1:]:
        add("vit", sizes.vit_batch, 6, tokens)
    for what, shape in shapes:
        for mode in MODES:
            contenders = linear + rivals
            name = f"{dtype} {mode} {what} B={shape.B} H={shape.H} N={shape.N:,}"
            yield Case(
                "sweep",
                name,
                {
                    "what": what,
                    "shape": dataclasses.asdict(shape),
                    "dtype": dtype,
                    "mode": mode,
                    "contenders": contenders,
                    "budget_s": sizes.budget_s,
                    "energy": dtype == "bfloat16" and shape.N in (sizes.long[0], sizes.single),
                },
                seconds=5 + 1.2 * len(contenders),
                builds=_builds(*contenders),
            )


def _training(sizes: Sizes, backends: tuple[str, ...]) -> Iterator[Case]:
    preset, dataset, amp = sizes.training
    for model in sizes.models:
        for backend in backends:
            parameters: dict[str, Any] = {"model": model, "backend": backend, "preset": preset}
            parameters |= {"dataset": dataset, "amp": amp, "budget_s": 8 * sizes.budget_s}
            yield Case("training", f"{model} {backend}", parameters, 20, builds=_builds(backend))


def _graphs(sizes: Sizes, backends: tuple[str, ...]) -> Iterator[Case]:
    """Replays of a captured call: what launches cost at few tokens."""
    contenders = [f"linear_attention/{b}" for b in backends if b != "compiled"]
    contenders += [f"sdpa/{name}" for name in SDPA if name != "math"]
    for batch in (1, sizes.vit_batch):
        for tokens in sizes.vit:
            for mode in (FORWARD, FORWARD_BACKWARD):
                shape = AttentionShape(batch, 6, 6, tokens, tokens, sizes.head_dim)
                parameters: dict[str, Any] = {"shape": dataclasses.asdict(shape), "mode": mode}
                parameters |= {"dtype": "bfloat16", "contenders": contenders}
                parameters |= {"budget_s": sizes.budget_s}
                name = f"bfloat16 {mode} B={batch} H=6 N={tokens:,}"
                yield Case("graphs", name, parameters, 15, builds=_builds(*contenders))
