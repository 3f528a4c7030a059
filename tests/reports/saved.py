"""A saved run as the benchmarks write it, with timings made up from known curves."""

import json
from pathlib import Path
from typing import Any

MACHINE = {
    "cpu": "Test CPU <3 GHz>",
    "cores": 2,
    "threads": 2,
    "torch": "2.99",
    "device": "cpu",
    "device_name": "Test CPU <3 GHz>",
    "git": "0123456789ab",
}


OPERATIONS = {
    "linear_attention": "linear attention",
    "softmax_attention": "softmax attention",
    "ripple_pool": "ripple pool",
    "training_step": "training step",
}
BACKENDS = {
    "reference": {"title": "reference", "colour": "#7f7f7f", "own": False},
    "torch": {"title": "PyTorch", "colour": "#0072B2", "own": False},
    "compiled": {"title": "torch.compile", "colour": "#E69F00", "own": False},
    "cpu": {"title": "C++", "colour": "#CC79A7", "own": True},
}


def seconds(operation: str, backend: str, mode: str, tokens: int) -> float:
    """Softmax is quadratic, all else linear; they cross at N = 400 whatever the backend's speed."""
    speed = {"reference": 4.0, "torch": 2.0, "compiled": 1.0, "cpu": 1.0}[backend]
    speed *= 3.0 if "backward" in mode else 1.0
    if operation == "softmax_attention":
        return speed * 1e-9 * tokens**2
    return speed * 4e-7 * tokens


def case(
    operation: str, backend: str, mode: str, tokens: int, dtype: str = "float32"
) -> dict[str, Any]:
    median = seconds(operation, backend, mode, tokens)
    param = f"{operation}-{mode}-{dtype}-N{tokens}-{backend}"
    return {
        "param": param,
        "name": f"test_kernel[{param}]",
        "extra_info": {
            "schema": 2,
            "operation": operation,
            "backend": backend,
            "implementation": f"{backend} of {operation}",
            "pass": mode,
            "dtype": dtype,
            "N": tokens,
            "shape": {"B": 1, "H": 6, "Hk": 6, "N": tokens, "M": tokens, "D": 64},
            "least_bytes": 1536 * tokens,
            "least_flop": 196608 * tokens,
            "gb_per_s": 1536 * tokens / median / 1e9,
            "tflop_per_s": 196608 * tokens / median / 1e12,
            "peak_memory_bytes": 1000 * tokens,
            "peak_memory_how": "made up",
            "error": {"out": {"rms": 1e-7, "max": 1e-6}},
            "device": "cpu",
            "clock": "made up",
            "captured": False,
            "ran": ["aten::bmm", "aten::relu"],
            "telemetry": {"source": "NVML", "clock_mhz": [1900, 1980, 1985], "steal_share": None},
            "cache": "hot",
        },
        "stats": stats(median),
    }


def profile(case: dict[str, Any], ncu: bool = False) -> dict[str, Any]:
    """What --profile writes of a case: its trace's name, its top kernels, and counters."""
    top = [
        {"name": "void state_kernel<64, (bool)1>(float const*)", "calls": 3, "total_us": 90.0},
        {"name": "aten::copy_", "calls": 6, "total_us": 30.0},
    ]
    counted = {"gpu__time_duration.sum": 25_000.0, "dram__bytes_read.sum": 4e6}
    return {
        "trace": f"profiles/{case['param']}.trace.json.gz",
        "top": [{**row, "share": row["total_us"] / 120} for row in top],
        "ncu": {"state_kernel": counted} if ncu else None,
        "ncu_why": "" if ncu else "ncu is not installed",
    }


def step(model: str, images_per_s: float, backend: str = "default") -> dict[str, Any]:
    made = case("linear_attention", "torch", "forward", 64)
    for name in ("shape", "N", "error"):
        del made["extra_info"][name]
    made["name"] = f"test_training_step[{model}-{backend}]"
    made["extra_info"] |= {
        "operation": "training_step",
        "backend": backend,
        "pass": "step",
        "model": model,
        "model_title": model.title(),
        "settings": dict(STEP_SETTING),
        "images_per_s": images_per_s,
    }
    batch = STEP_SETTING["batch_size"]
    made["stats"] = stats(batch / images_per_s)
    return made


def stats(median: float, rounds: int = 9) -> dict[str, Any]:
    return {"median": median, "q1": 0.99 * median, "q3": 1.01 * median, "rounds": rounds}


def slow_down(case: dict[str, Any], factor: float) -> None:
    """The case's median and quartiles, times a factor."""
    stats = case["stats"]
    stats |= {name: factor * stats[name] for name in ("median", "q1", "q3")}


def run(when: str = "2030-01-02T03:04:05+00:00", **changes: Any) -> dict[str, Any]:
    benchmarks = [
        case(operation, backend, mode, 2**i)
        for operation in ("linear_attention", "softmax_attention", "ripple_pool")
        for backend in ("reference", "torch", "compiled")
        for mode in ("forward", "forward+backward")
        for i in range(6, 13)
    ]
    benchmarks += [step("baseline", 100.0), step("ripple", 150.0)]
    suite = {
        "kind": "benchmarks",
        "schema": 2,
        "sweep": "quick",
        "device": "cpu",
        "machine": MACHINE,
        "operations": {name: {"title": title} for name, title in OPERATIONS.items()},
        "backends": BACKENDS,
        "not_timed": {"backend cuda": "no CUDA device here"},
        "failed": {"linear_attention-forward-float32-N64-odd": "wrong result: out"},
        "limits": {
            "copy_bytes_per_s": 2e10,
            "matmul_flop_per_s": {"float32": 2e11},
            "measured": "2030-01-01T22:04:05+00:00",
        },
    }
    return {"datetime": when, "benchmarks": benchmarks, "kernel_suite": suite, **changes}


def check() -> dict[str, Any]:
    common = {"operation": "linear_attention", "dtype": "float32", "device": "cpu"}
    results = [
        {"backend": "torch", "status": "passed", "mode": "native", "worst_rms_error": 2e-7},
        {"backend": "triton", "status": "passed", "mode": "interpreter", "worst_rms_error": 3e-7},
        {"backend": "odd", "status": "failed", "mode": "native", "reason": "wrong grad q"},
        {"backend": "cuda", "status": "unusable", "mode": "native", "reason": "no device"},
    ]
    results = [{**common, "reason": None, "tensors": [], **r} for r in results]
    return {"kind": "check", "schema": 1, "device": "cpu", "machine": MACHINE, "results": results}


def interval(mean: float, half_width: float = 0.4) -> dict[str, Any]:
    values = [mean - half_width, mean, mean + half_width]
    return {"mean": mean, "half_width": half_width, "values": values}


def ratio(median: float) -> dict[str, Any]:
    return {"median": median, "low": 0.9 * median, "high": 1.1 * median, "values": [median]}


LABEL = f"{MACHINE['cpu']}, 2 threads, torch 2.99"
SETTING: dict[str, Any] = {
    "preset": "small",
    "recipe": "light",
    "heads": 2,
    "mlp_dim": 128,
    "lr": 0.005,
    "compile": False,
    "dataset": "digits",
    "dim": 64,
    "depth": 4,
    "epochs": 12,
    "batch_size": 64,
    "patch_size": 1,
    "amp": "off",
    "backend": "torch",
}
STEP_SETTING = {"dim": 64, "depth": 4, "batch_size": 64, "patch_size": 1, "dataset": "digits"}
ENVIRONMENT = {
    "device": "cpu",
    "cpu": MACHINE["cpu"],
    "threads": 2,
    "torch": "2.99",
    "revision": None,
}


def table() -> dict[str, Any]:
    def row(model: str, accuracy: float | None, claim: dict[str, float] | None) -> dict[str, Any]:
        ran = accuracy is not None
        order = {"order": "O(N)", "exponent": 1.02, "low": 0.9, "high": 1.1, "pass": "forward"}
        order |= {"backend": "torch", "dtype": "float32", "machine": LABEL}
        reached = {"target_percent": 95.0, "seconds": 12.5, "reached": 2, "seeds": 3}
        return {
            "model": model,
            "title": model.title(),
            "attention_type": model,
            "local_branch": False,
            "status": "measured" if ran else "not run",
            "seeds": [0, 1, 2] if ran else [],
            "parameters": 123_456 if ran else None,
            "accuracy": interval(accuracy) if accuracy is not None else None,
            "images_per_second": {"median": 2000.0, "values": [2000.0]} if ran else None,
            "speedup": ratio(1.25) if ran else None,
            "claim": claim,
            "gain": interval(1.75) if model == "ripple" and ran else None,
            "time_to_baseline": reached | {"speedup": ratio(1.6)} if ran else None,
            "complexity": order,
            "hours_200_epochs": 0.25 if ran else None,
            "peak_memory": None,
            "verdict": "not run" if claim else "no claim",
            "verdict_reason": "no record of it" if claim else "nothing was stated",
        }

    arithmetic = {"tokens": 64, "dim": 64, "core_share": 0.027, "free_core": 1.03}
    arithmetic |= {"pooled": 1.44, "no_attention": 1.54}
    return {
        "schema": "linear-vit-table/1",
        "created": "2030-01-02T03:04:05+00:00",
        "claims": {"source": "the original", "backbone": "dim 384", "hours_200_epochs": {}},
        "datasets": [
            {
                "dataset": "digits",
                "title": "scikit-learn digits",
                "status": "measured",
                "setting": SETTING,
                "environment": ENVIRONMENT,
                "rows": [row("baseline", 95.5, None), row("ripple", 97.25, None)],
                "arithmetic": arithmetic,
            },
            {
                "dataset": "cifar100",
                "title": "CIFAR-100",
                "status": "not run",
                "setting": None,
                "environment": None,
                "rows": [row("ripple", None, {"accuracy": 85.3, "speedup": 2.1})],
                "arithmetic": arithmetic,
            },
        ],
        "exponents": None,
        "ablations": [],
    }


def ablation() -> dict[str, Any]:
    rows = [
        {
            "value": value,
            "seeds": [0, 1, 2],
            "parameters": 1000 * value,
            "accuracy": interval(90.0 + value),
            "val_accuracy": interval(91.0 + value),
            "images_per_second": {"median": 500.0, "values": [500.0], "how": "by turns"},
            "speedup": {**ratio(1.0 + value / 10), "how": "by turns"},
        }
        for value in (1, 2)
    ]
    return {
        "schema": "linear-vit-ablation/1",
        "setting": "ripple_stages",
        "model": "ripple",
        "dataset": "digits",
        "config": SETTING,
        "environment": ENVIRONMENT,
        "rows": rows,
        "best": 2,
        "claimed_best": 3,
    }


# The own kernels are twice as fast as PyTorch's, the step with them by less.
KERNEL_SPEEDUP = 2.0
STEP_SPEEDUP = 0.02 / 0.018
ATTENTION_SHARE = 0.25


def step_speed() -> dict[str, Any]:
    """A run of training steps alone, with PyTorch and with own kernels."""
    steps = [step("hydra", 64 / 0.02, "torch"), step("hydra", 64 / 0.018, "cpu")]
    made = run("2030-01-02T04:04:05+00:00")
    suite = made["kernel_suite"] | {"sweep": "steps", "failed": {}}
    suite["not_timed"] = {"hydra-cuda": "no device. More words"}
    return made | {"benchmarks": steps, "kernel_suite": suite}


def step_breakdown() -> dict[str, Any]:
    shares = dict.fromkeys(("projections", "mlp", "optimizer", "augmentation", "loader"), 0.1)
    shares |= {"attention": ATTENTION_SHARE, "other": 0.25}
    row = {"model": "hydra", "title": "Hydra", "seconds": 0.02, "images_per_second": 3200.0}
    return {
        "schema": "linear-vit-step-breakdown/1",
        "environment": ENVIRONMENT,
        "setting": SETTING,
        "rows": [row | {"shares": shares}],
    }


def old_cpu() -> dict[str, Any]:
    """As bench.cpu wrote it: a case, a sweep over N, the limits, and a product beside them."""
    timed = {"name": "attention, float32, forward, N = 1024", "tokens": 1024, "against": "compiled"}
    timed |= {"table": "Linear attention, forward, float32", "flop": 10**9, "ratio": 5.0}
    timed |= {"over_matmul": 1.75, "over_softmax": 8.5}
    timed |= {"seconds": {"cpu": 0.002, "compiled": 0.01, "matmul": 0.1, "softmax": 0.017}}
    scaling = [
        {"name": f"scaling, N = {2**i}", "tokens": 2**i, "seconds": {"cpu": 1e-7 * 2**i}}
        for i in range(10, 16)
    ]
    rates = {"fma": 2e11, "load": 1.5e11, "instructions": 4e11, "copy": 1e10}
    rates |= {"fresh": 1e9, "fresh_large": 2e9}
    limits = {"name": "limits", "limits": rates}
    bounds = {"FMA rate": 0.001, "L1 loads": 0.001, "instructions": 0.001125, "memory": 0.0005}
    product = {"name": "roofline", "operation": "linear_attention_state", "tokens": 1024}
    product |= {"seconds": {"cpu": 0.0025}, "flop_done": 2e8}
    product |= {"bounds": bounds | {"fresh pages": 0.0}}
    return {"machine": MACHINE, "rows": [timed, *scaling, limits, product]}


def speed(when: str = "2030-01-02T03:04:05+00:00") -> dict[str, Any]:
    """As train_minimal.py table wrote it: models' steps by turns, without their rounds."""

    def rate(images: float) -> dict[str, float]:
        low, high = 0.98 * images, 1.02 * images
        return {"images_per_second": images, "low": low, "high": high, "seconds": 64 / images,
                "rounds": 40}  # fmt: skip

    config = SETTING | {"attention_type": "hydra", "local_branch": False, "seed": 0}
    models = {"baseline": rate(1000.0), "hydra": rate(1250.0)}
    return {
        "schema": "linear-vit-model-speed/1",
        "created": when,
        "environment": ENVIRONMENT,
        "config": config | {"backend": None},
        "models": models,
    }


def save(path: Path, document: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document))
    return path


def save_all(folder: Path) -> None:
    """One document of every kind, where the commands put them."""
    save(folder / "run.json", run())
    save(folder / "check.json", check())
    save(folder / "cpu" / "cpu.json", old_cpu())
    save(folder / "static.json", static())
    save(folder / "traffic.json", traffic())
    save(folder / "training" / "table.json", table())
    save(folder / "training" / "step-speed.json", step_speed())
    save(folder / "training" / "step-breakdown.json", step_breakdown())
    save(folder / "test-gpu" / "benchmark.json", gpu())
    save(folder / "ablation" / "ablation-ripple_stages.json", ablation())


def traffic() -> dict[str, Any]:
    """As bench.traffic writes it: an input that is read twice, and workspace."""
    row = {
        "operation": "linear_attention",
        "pass": "forward",
        "dtype": "bfloat16",
        "shape": "B1 H2 Hk2 N512 M512 D64",
        "launches": "_state _reduce _apply",
        "tensor": "q",
        "loaded": 262_144,
        "distinct": 131_072,
        "stored": 0,
        "ratio": 2.0,
    }
    workspace = row | {"tensor": "workspace", "loaded": 4096, "stored": 4096, "ratio": 0.0123}
    return {"kind": "traffic", "schema": 1, "rows": [row, workspace]}


def gpu(*shapes: tuple[int, int, int]) -> dict[str, Any]:
    """A run of --sweep gpu: linear attention with Triton and PyTorch, and SDPA.

    Args:
        shapes: batch, heads and head dim of each curve; one sequence of 16 heads of 64 unless it is
            said.
    """
    speed = {("triton", False): 1.0, ("torch", False): 4.0, ("sdpa_flash", True): 0.5}
    if shapes:
        speed["torch", True] = 0.5

    def timed(rival: tuple[str, bool], mode: str, of: tuple[int, ...], captured: bool) -> Any:
        (backend, softmax), (batch, heads, dim, tokens) = rival, of
        made = case("linear_attention", "torch", mode, tokens, "bfloat16")
        info, shape = made["extra_info"], {"B": batch, "H": heads, "Hk": heads, "D": dim}
        seconds = speed[rival] * 4e-9 * tokens * batch * heads * dim / 1024
        # Fewer heads are crossed later.
        seconds *= tokens / 1024 * heads / 16 if softmax else 1
        info |= {"backend": backend, "captured": captured, "device": "cuda", "turns": str(of)}
        info |= {"operation": "softmax_attention" if softmax else "linear_attention"}
        info |= {"implementation": f"tiles of {backend}"}
        info["shape"] = info["shape"] | shape
        size = f"B{batch}-H{heads}-D{dim}-N{tokens}{'-captured' * captured}"
        made["name"] = f"test_kernel[{info['operation']}-{mode}-bfloat16-{size}-{backend}]"
        return made | {"stats": stats(seconds / 2 if captured else seconds)}

    cases = [
        timed(rival, mode, (*shape, tokens), False)
        for shape in shapes or ((1, 16, 64),)
        for tokens in (1024, 4096, 16_384, *((2048, 8192, 32_768) if shapes else ()))
        for mode in ("forward", "backward")
        for rival in speed
    ]
    if not shapes:
        short = (1, 16, 64, 64)
        cases += [timed(("triton", False), "forward", short, how) for how in (False, True)]
    suite = {
        "kind": "benchmarks",
        "schema": 2,
        "sweep": "gpu",
        "device": "cuda",
        "machine": MACHINE | {"device": "cuda", "device_name": "Test GPU"},
        "operations": {name: {"title": title} for name, title in OPERATIONS.items()},
        "backends": {
            "triton": {"title": "Triton", "colour": "#009E73", "own": True},
            "torch": BACKENDS["torch"],
            "sdpa_flash": {"title": "sdpa_flash", "colour": None, "own": False},
        },
        "limits": {"copy_bytes_per_s": 4e12, "matmul_flop_per_s": {"bfloat16": 8e14}},
        "not_timed": dict.fromkeys(("sdpa_math N=1024", "sdpa_math N=4096"), "out of memory"),
        "failed": {},
    }
    when = "2030-01-02T03:04:05+00:00"
    return {"datetime": when, "benchmarks": cases, "kernel_suite": suite}


def static() -> dict[str, Any]:
    """As bench.static writes it: a kernel in two configurations, and one that spills."""

    def row(kernel: str, head_dim: int, dtype: str, registers: int, **changes: Any) -> dict:
        return {
            "backend": "triton",
            "room": "linear_attention",
            "kernel": kernel,
            "head_dim": head_dim,
            "dtype": dtype,
            "architecture": "sm_90a",
            "registers": registers,
            "spill_stores": 0,
            "spill_loads": 0,
            "static_shared": 0,
            "dynamic_shared": 32 * 1024,
            "occupancy": 0.5,
            "tensor_core": 64,
            "wide_loads": 8,
            "wide_stores": 4,
            "steady": 600,
            "steady_barriers": 1,
            "steady_tensor_core": 100,
            "issue_us": 0.6,
            "copy_us": 0.5,
            "copy_share": 0.8333,
            "faults": [],
            **changes,
        }

    spill = {"spill_stores": 12, "spill_loads": 12, "faults": ["spills 24 bytes"]}
    rows = [
        row("state", 64, "bfloat16", 96),
        row("state", 128, "bfloat16", 168),
        row("apply", 128, "float32", 255, tensor_core=0, occupancy=None, copy_share=None, **spill),
    ]
    toolchain = {"torch": "2.14.1", "triton": "3.8.0", "nvcc": "13.0"}
    return {"kind": "static", "schema": 1, "toolchain": toolchain, "rows": rows}
