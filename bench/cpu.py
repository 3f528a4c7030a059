"""The CPU kernels against their targets, and how far each is from what limits it.

    python -m bench.cpu                          # the tables below, in some minutes
    python -m bench.cpu --only linear_attention --dtypes float32 --tokens 64,1024 --json cpu.json

All backends of a row take turns in one process (medians). Linear attention: 6 heads of 64,
batch · N = 65,536 tokens, against ``compiled``, PyTorch's softmax attention and the machine's own
matmul; ripple: 384 channels, against the depthwise ``conv2d`` path. GFLOP/s are of the dense work,
8·N·D² a head forward and three times that with backward, of which the kernels do half.

The roofline holds three limits, measured here: FMAs on registers, FMAs that each load a vector from
the L1 cache, and the memory's copy rate.
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import torch

import kernels
from bench.clock import measure_interleaved
from bench.machine import describe
from bench.problems import (
    FORWARD,
    FORWARD_BACKWARD,
    AttentionShape,
    RippleShape,
    least_work,
    make_problem,
)

CPU = torch.device("cpu")
TOTAL_TOKENS, HEADS, HEAD_DIM = 65_536, 6, 64
TOKENS = (64, 256, 1024, 4096, 16_384, 65_536)
GRIDS, CHANNELS = (8, 16, 32, 64), 384
# Loads from the L1 cache per FMA, as cpu_simd.cpp's header counts them.
LOADS = {
    "linear_attention_state": 6 / 8,
    "linear_attention_apply": 5 / 4,
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.cpu", description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)), help="N, e.g. 64,1024")
    parser.add_argument("--dtypes", default="float32,bfloat16", help="of linear attention")
    parser.add_argument("--only", choices=("linear_attention", "ripple", "roofline"))
    parser.add_argument("--budget", type=float, default=1.0, help="seconds per timed call")
    parser.add_argument("--against", default="compiled", help="backend to compare with")
    parser.add_argument("--threads", type=int, help="PyTorch threads (default: its own choice)")
    parser.add_argument("--json", type=Path, help="write every median there too")
    options = parser.parse_args(arguments)
    reason = kernels.backends("linear_attention", CPU)["cpu"]
    if reason is not None:
        print(reason, file=sys.stderr)
        return 1
    if options.threads is not None:
        torch.set_num_threads(options.threads)

    machine = describe(CPU)
    print(f"{machine['cpu']}, {machine['threads']} threads, PyTorch {machine['torch']}")
    print(kernels.implementation("linear_attention", "cpu"))
    tokens = [int(n) for n in options.tokens.split(",")]
    rows = []
    if options.only in (None, "linear_attention"):
        for dtype in options.dtypes.split(","):
            for mode in (FORWARD, FORWARD_BACKWARD):
                rows += attention_table(
                    tokens, getattr(torch, dtype), mode, options.against, options.budget
                )
    if options.only in (None, "ripple"):
        rows += ripple_table(options.budget)
    if options.only in (None, "roofline"):
        rows += roofline(options.budget)
    if options.json is not None:
        options.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
    return 0


def medians(calls: Mapping[str, Callable[[], object]], budget: float) -> dict[str, float]:
    timings = measure_interleaved(calls, CPU, budget_s=budget)
    return {name: timing.median for name, timing in timings.items()}


def attention_table(
    tokens: list[int], dtype: torch.dtype, mode: str, against: str, budget: float
) -> list[dict[str, Any]]:
    """One line per N: GFLOP/s of both, their ratio, the matmul's rate, softmax attention's time."""
    name = str(dtype).removeprefix("torch.")
    print(f"\nlinear attention, {mode}, {name}")
    print(f"{'N':>7} {'cpu':>8} {against:>9} {'ratio':>7} {'sgemm':>7} {'ratio':>7} {'softmax':>9}")
    rows: list[dict[str, Any]] = []
    matrix = torch.randn(2048, 2048)
    for n in tokens:
        shape = AttentionShape(max(1, TOTAL_TOKENS // n), HEADS, HEADS, n, n, HEAD_DIM)
        problem = make_problem("linear_attention", shape, dtype, CPU)
        calls: dict[str, Callable[[], object]] = {
            backend: problem.call(backend, mode) for backend in ("cpu", against)
        }
        calls["matmul"] = lambda: matrix @ matrix
        if n <= 1024:  # a quadratic operation: seconds a call beyond
            softmax = make_problem("softmax_attention", shape, dtype, CPU)
            calls["softmax"] = softmax.call("torch", mode)
        times = medians(calls, budget)
        flop = least_work("linear_attention", mode, shape, dtype.itemsize).flop
        rate = {backend: flop / times[backend] / 1e9 for backend in ("cpu", against)}
        matmul = 2 * 2048**3 / times["matmul"] / 1e9
        slower = f"{times['softmax'] / times['cpu']:8.1f}x" if "softmax" in times else f"{'-':>9}"
        ratio = times[against] / times["cpu"]
        print(
            f"{n:7} {rate['cpu']:8.0f} {rate[against]:9.0f} {ratio:6.1f}x {matmul:7.0f} "
            f"{rate['cpu'] / matmul:6.2f}x {slower}"
        )
        rows.append(
            {"operation": "linear_attention", "pass": mode, "dtype": name, "tokens": n}
            | {"seconds": times, "flop": flop, "ratio": ratio, "over_matmul": rate["cpu"] / matmul}
        )
    _summary([row["ratio"] for row in rows], f"over {against}")
    _summary([row["over_matmul"] for row in rows if row["tokens"] >= 1024], "over sgemm, N >= 1024")
    return rows


def ripple_table(budget: float) -> list[dict[str, Any]]:
    print(f"\nripple, {CHANNELS} channels, float32, forward+backward, against torch")
    rows: list[dict[str, Any]] = []
    for operation in ("ripple_pool", "ripple_expand"):
        for side in GRIDS:
            shape = RippleShape(max(1, 8192 // side**2), side, side, CHANNELS)
            problem = make_problem(operation, shape, torch.float32, CPU)
            calls = {b: problem.call(b, FORWARD_BACKWARD) for b in ("cpu", "torch")}
            times = medians(calls, budget)
            work = least_work(operation, FORWARD_BACKWARD, shape, 4)
            ratio = times["torch"] / times["cpu"]
            print(
                f"{operation:14} {side:3}x{side:<3} batch {shape.B:4}: "
                f"{1e3 * times['cpu']:8.2f} ms, {work.bytes / times['cpu'] / 1e9:6.1f} GB/s of the "
                f"least traffic, {ratio:5.1f}x"
            )
            rows.append(
                {"operation": operation, "pass": FORWARD_BACKWARD, "dtype": "float32"}
                | {"grid": side, "batch": shape.B, "seconds": times, "ratio": ratio}
            )
    _summary([row["ratio"] for row in rows], "over torch")
    return rows


def roofline(budget: float) -> list[dict[str, Any]]:
    """Each product of the forward at one long sequence, beside the three limits."""
    probe = torch.ops.linear_vit.cpu_linear_attention_probe
    repeats = 200_000
    flop = probe(False, repeats)
    big = torch.empty(1 << 26)
    other = torch.empty_like(big)
    limits = medians(
        {
            "fma": lambda: probe(False, repeats),
            "load": lambda: probe(True, repeats),
            "copy": lambda: other.copy_(big),
        },
        budget,
    )
    fma, loading = flop / limits["fma"], flop / limits["load"]
    copy = 2 * big.nbytes / limits["copy"]
    print(
        f"\nroofline: {fma / 1e9:.0f} GFLOP/s on registers, {loading / 1e9:.0f} with a load each, "
        f"{copy / 1e9:.1f} GB/s copied"
    )
    rows: list[dict[str, Any]] = [{"fma": fma, "loading": loading, "copy": copy}]
    for operation, loads in LOADS.items():
        for n in (1024, 65_536):
            shape = AttentionShape(TOTAL_TOKENS // n, HEADS, HEADS, n, n, HEAD_DIM)
            problem = make_problem(operation, shape, torch.float32, CPU)
            seconds = medians({"cpu": problem.call("cpu", FORWARD)}, budget)["cpu"]
            work = least_work(operation, FORWARD, shape, 4)
            done = work.flop / 2  # the rows that a sign picks
            bounds = {
                "FMA rate": done / fma,
                "L1 loads": done * loads / loading,
                "memory": work.bytes / copy,
            }
            limit = max(bounds, key=bounds.__getitem__)
            share = bounds[limit] / seconds
            print(
                f"{operation:24} N={n:6}: {done / seconds / 1e9:5.0f} GFLOP/s done, limited by "
                f"{limit}: {share:4.0%} of it"
            )
            rows.append(
                {"operation": operation, "tokens": n, "seconds": seconds, "bounds": bounds}
                | {"limit": limit, "share": share}
            )
    return rows


def _summary(ratios: list[float], what: str) -> None:
    if ratios:
        print(f"geometric mean {geometric_mean(ratios):.2f}x {what}, worst {min(ratios):.2f}x")


if __name__ == "__main__":
    sys.exit(main())
