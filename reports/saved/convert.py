"""Runs that older versions saved, made into runs of today's schema without loss.

``to_current`` takes a document of any kind and gives one of schema 2: a pytest-benchmark document
whose machine, titles and colours stand in its head. A file keeps every number it had. What a kind
did not have (rounds, a date) is empty, not made up.
"""

import statistics
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

Content = dict[str, Any]

SCHEMA = 2
# Of old files alone; a new one says it itself: title, colour, whether its kernels are ours.
_BACKENDS: dict[str, tuple[str, str, bool]] = {
    "reference": ("reference", "#7f7f7f", False),
    "torch": ("PyTorch", "#0072B2", False),
    "compiled": ("torch.compile", "#E69F00", False),
    "triton": ("Triton", "#009E73", True),
    "cuda": ("CUDA", "#D55E00", True),
    "cpu": ("C++", "#CC79A7", True),
}
_OPERATIONS = {
    "linear_attention": "linear attention",
    "softmax_attention": "softmax attention",
    "linear_attention_state": "state",
    "linear_attention_apply": "apply",
    "ripple_pool": "ripple pool",
    "ripple_expand": "ripple expand",
    "ripple_pool_stages": "ripple pyramid down",
    "ripple_expand_stages": "ripple pyramid up",
    "linear_attention_packed": "linear attention, packed",
    "softmax_attention_packed": "softmax attention, packed",
    "training_step": "training step",
}
# Shapes that bench.cpu had: 6 heads of 64, tokens of all sequences or grids of a call, channels.
_HEADS, _HEAD_DIM, _ALL_TOKENS, _ALL_CELLS, _CHANNELS = 6, 64, 65_536, 8192, 384
_MATMUL_FLOP = 2 * 2048**3
_STEP = "training_step"
_DEFAULT = "default"  # of a training step: whatever is the fastest


def kind_of(document: Any) -> str | None:
    """What :func:`to_current` can make a run of, in a word; None of any other document."""
    if not isinstance(document, dict):
        return None
    if isinstance(document.get("benchmarks"), list):
        return "benchmarks"
    schema = {"linear-vit-step-speed/1": "steps", "linear-vit-model-speed/1": "models"}
    if found := schema.get(str(document.get("schema"))):
        return found
    of_cpu = document.get("kind", "cpu kernels") == "cpu kernels"
    return "cpu" if of_cpu and document.get("machine") and document.get("rows") else None


def to_current(document: Content) -> Content:
    """The document as a run of schema 2; one of that schema comes back as it is.

    Raises:
        ValueError: it is no run of any kind.
        KeyError, TypeError: it is damaged.
    """
    kind = kind_of(document)
    if kind is None:
        raise ValueError("no benchmark run: it has no list of benchmarks")
    made = {"benchmarks": _benchmarks, "steps": _steps, "models": _models, "cpu": _cpu}
    return made[kind](document)


# ---- pytest-benchmark documents of schema 1 ------------------------------------------------------


def _benchmarks(document: Content) -> Content:
    suite = document.get("kernel_suite")
    suite = dict(suite) if isinstance(suite, dict) else {"kind": "benchmarks"}
    if suite.get("schema") == SCHEMA:
        return document
    infos = [b.get("extra_info") for b in document["benchmarks"] if isinstance(b, dict)]
    old = [info for info in infos if isinstance(info, dict) and info.get("schema") == 1]
    if suite.get("schema", 1) != 1 or not old:
        return document
    machine = suite.get("machine") or next((i["machine"] for i in old if "machine" in i), None)
    head = suite | {"schema": SCHEMA, "machine": machine} | _names(old)
    head.setdefault("sources", None)
    benchmarks = []
    for benchmark in document["benchmarks"]:
        info = benchmark.get("extra_info") if isinstance(benchmark, dict) else None
        if isinstance(info, dict) and any(info is one for one in old):
            new = {"schema": SCHEMA} | {k: v for k, v in info.items() if k != "schema"}
            new.setdefault("captured", False)
            if new.get("machine") == machine:  # else a case of another: said by the case
                del new["machine"]
            benchmark = benchmark | {"extra_info": new}
        benchmarks.append(benchmark)
    return document | {"benchmarks": benchmarks, "kernel_suite": head}


def _names(infos: Iterable[Content]) -> Content:
    """Titles and colours of every operation and backend that occurs."""
    infos = list(infos)
    operations = dict.fromkeys(str(i["operation"]) for i in infos if "operation" in i)
    backends = dict.fromkeys(str(i["backend"]) for i in infos if "backend" in i)
    backends.pop(_DEFAULT, None)
    said = ("title", "colour", "own")
    return {
        "operations": {
            name: {"title": _OPERATIONS.get(name, name.replace("_", " "))} for name in operations
        },
        "backends": {
            name: dict(zip(said, _BACKENDS.get(name, (name, None, False)), strict=True))
            for name in backends
        },
    }


# ---- what the other kinds are made into ----------------------------------------------------------


def _run(machine: Content, benchmarks: list[Content], when: str = "", **head: Any) -> Content:
    device = "cpu" if machine["device"] == "cpu" else "cuda"
    suite = {
        "kind": "benchmarks",
        "schema": SCHEMA,
        "sweep": None,
        "device": device,
        "machine": _facts(machine),
        "sources": None,
        "limits": None,
        **_names(b["extra_info"] for b in benchmarks),
        "not_timed": {},
        "failed": {},
        "out_of_memory": {},
        "interrupted": False,
        "resumed": 0,
        **head,
    }
    return {
        "machine_info": {},
        "commit_info": {"id": machine.get("git") or machine.get("revision")},
        "benchmarks": benchmarks,
        "datetime": when,
        "version": "",
        "kernel_suite": suite,
    }


def _facts(machine: Content) -> Content:
    """A machine's facts; a training run's environment has the GPU's name as its device."""
    if machine["device"] in ("cpu", "cuda"):
        return {"device_name": machine["cpu"]} | machine
    return machine | {"device": "cuda", "device_name": machine["device"]}


def _benchmark(test: str, name: str, group: str, stats: Content, info: Content) -> Content:
    file = "bench_training" if test == "test_training_step" else "bench_kernels"
    return {
        "group": group,
        "name": f"{test}[{name}]",
        "fullname": f"bench/{file}.py::{test}[{name}]",
        "params": None,
        "param": name,
        "options": {},
        "stats": stats,
        "extra_info": {"schema": SCHEMA, **info},
    }


def _stats(median: float, rounds: int = 0, iqr: float = 0.0) -> Content:
    """Of a median whose rounds were not kept, as pytest-benchmark writes them."""
    alike = dict.fromkeys(
        ("min", "max", "mean", "median", "q1", "q3", "ld15iqr", "hd15iqr"), median
    )
    spread = {"stddev": 0.0, "iqr": iqr, "iqr_outliers": 0, "stddev_outliers": 0, "outliers": "0;0"}
    total = {"ops": 1 / median, "total": median * rounds, "iterations": 1}
    return alike | spread | total | {"rounds": rounds, "data": []}


def _kernel(
    operation: str,
    mode: str,
    dtype: str,
    shape: Content,
    backend: str,
    seconds: float,
    *,
    total_tokens: int | None = None,
    stats: Content | None = None,
    **info: Any,
) -> Content:
    """A timed kernel, named as the benchmarks name one."""
    tokens = shape["N"] if "N" in shape else shape["rows"] * shape["cols"]
    batch = shape["B"]
    size = f"B{batch}-N{tokens}" if batch > 1 else f"N{tokens}"
    name = f"{operation}-{mode}-{dtype}-{size}-{backend}"
    group = f"{operation} {mode} {dtype} B={batch} N={tokens}"
    known: Content = {
        "operation": operation,
        "backend": backend,
        "pass": mode,
        "dtype": dtype,
        "N": tokens,
        "shape": shape,
        "total_tokens": total_tokens,
        "captured": False,
        "implementation": None,
        "ran": None,
        "other_function": None,
        "least_bytes": None,
        "least_flop": None,
        "gb_per_s": None,
        "tflop_per_s": None,
        "peak_memory_bytes": None,
        "error": {},
        "device": "cpu",
        "clock": None,
        **info,
    }
    if known["least_bytes"]:
        known["gb_per_s"] = known["least_bytes"] / seconds / 1e9
    if known["least_flop"]:
        known["tflop_per_s"] = known["least_flop"] / seconds / 1e12
    return _benchmark("test_kernel", name, group, stats or _stats(seconds), known)


def _step(
    model: str, title: str, backend: str, setting: Content, stats: Content, **info: Any
) -> Content:
    """A timed training step, named as the benchmarks name one."""
    group = f"{_STEP} {setting['preset']} {setting['dataset']} batch {setting['batch_size']}"
    known = {
        "operation": _STEP,
        "backend": backend,
        "pass": "step",
        "dtype": "float32" if setting["amp"] == "off" else "bfloat16 autocast",
        "model": model,
        "model_title": title,
        "settings": setting,
        "captured": False,
        "peak_memory_bytes": None,
        **info,
    }
    return _benchmark("test_training_step", f"{model}-{backend}", group, stats, known)


def _attention(tokens: int, batch: int) -> Content:
    heads = dict.fromkeys(("H", "Hk"), _HEADS)
    return {"B": batch, **heads, "N": tokens, "M": tokens, "D": _HEAD_DIM}


# ---- bench.cpu: the C++ kernels ------------------------------------------------------------------


def _cpu(document: Content) -> Content:
    machine, rows = document["machine"], document["rows"]
    limits = next((row["limits"] for row in rows if "limits" in row), None)
    cases: list[Content] = []
    for row in rows:
        if "grid" in row:
            cases += _cpu_ripple(row)
        elif "ratio" in row:
            cases += _cpu_attention(row)
        elif "bounds" in row:
            cases.append(_cpu_product(row, limits or {}))
        elif "limits" not in row:
            shape = _attention(row["tokens"], 1)
            of = (*_OF_CPU, "float32", shape, "cpu", row["seconds"]["cpu"])
            cases.append(_kernel(*of, turns="time against N"))
    matmul = [_MATMUL_FLOP / row["seconds"]["matmul"] for row in rows if "over_matmul" in row]
    return _run(
        machine,
        cases,
        sweep="cpu",
        limits=None if limits is None and not matmul else _cpu_limits(limits or {}, matmul),
    )


_OF_CPU = ("linear_attention", "forward")


def _cpu_limits(rates: Mapping[str, float], matmul: list[float]) -> Content:
    """The rates of the file, and the middle one of the matmuls that took turns with its rows."""
    return {
        "copy_bytes_per_s": rates.get("copy"),
        "matmul_flop_per_s": {"float32": statistics.median(matmul)} if matmul else {},
        "launch_s": None,
        "measured": None,
        "probes": {name: rates.get(name) for name in ("fma", "load", "instructions")},
        "fresh_bytes_per_s": rates.get("fresh"),
        "fresh_large_bytes_per_s": rates.get("fresh_large"),
    }


def _cpu_attention(row: Content) -> Iterator[Content]:
    """The backends of a row; ours has what it was as a ratio to the others, turn by turn."""
    _, mode, dtype = row["table"].rsplit(", ", 2)
    seconds, tokens, against = row["seconds"], row["tokens"], row["against"]
    shape = _attention(tokens, max(1, _ALL_TOKENS // tokens))
    total: Content = {"total_tokens": _ALL_TOKENS, "turns": row["name"]}
    work = {"least_flop": row["flop"], **total}
    other = _kernel(_OF_CPU[0], mode, dtype, shape, against, seconds[against], **work)
    ratios = {other["name"]: row["ratio"], "matmul": row["over_matmul"]}
    made = [other]
    if "softmax" in seconds:
        softmax = ("softmax_attention", mode, dtype, shape, "torch", seconds["softmax"])
        made.append(_kernel(*softmax, **total))
        ratios[made[-1]["name"]] = row["over_softmax"]
    extra = {"ratios": ratios, "matmul_s": seconds["matmul"]}
    yield _kernel(_OF_CPU[0], mode, dtype, shape, "cpu", seconds["cpu"], **work, **extra)
    yield from made


def _cpu_ripple(row: Content) -> Iterator[Content]:
    mode, dtype = row["table"].rsplit(", ", 2)[1:]
    side = row["grid"]
    shape = {"B": row["batch"], "rows": side, "cols": side, "C": _CHANNELS, "axis": 0}
    alike = {"least_bytes": row["bytes"], "turns": row["name"], "total_tokens": _ALL_CELLS}
    of = (row["operation"], mode, dtype, shape)
    other = _kernel(*of, "torch", row["seconds"]["torch"], **alike)
    ratios = {other["name"]: row["ratio"]}
    yield _kernel(*of, "cpu", row["seconds"]["cpu"], ratios=ratios, **alike)
    yield other


def _cpu_product(row: Content, limits: Mapping[str, float]) -> Content:
    """Half of the dense work is what the kernels do; the bytes follow from the memory's bound."""
    tokens, bounds = row["tokens"], row["bounds"]
    shape = _attention(tokens, max(1, _ALL_TOKENS // tokens))
    known: Content = {"least_flop": 2 * row["flop_done"], "flop_done": row["flop_done"]}
    if "copy" in limits:
        known["least_bytes"] = round(bounds["memory"] * limits["copy"])
    of: tuple[Any, ...] = (
        row["operation"],
        "forward",
        "float32",
        shape,
        "cpu",
        row["seconds"]["cpu"],
    )
    known |= {"total_tokens": _ALL_TOKENS, "bounds_s": bounds, "turns": "roofline"}
    return _kernel(*of, **known)


# ---- training steps ------------------------------------------------------------------------------


def _steps(document: Content) -> Content:
    """A step with and without own kernels: the fastest own has its ratio to PyTorch's."""
    setting, cases, not_timed = document["setting"], [], {}
    for row in document["rows"]:
        for backend, cell in row["backends"].items():
            name = f"{row['model']}-{backend}"
            if "reason" in cell:
                not_timed[name] = cell["reason"]
                continue
            seconds, iqr = cell["seconds"], cell["relative_iqr"]
            info: Content = {"images_per_s": cell["images_per_second"], "relative_iqr": iqr}
            info["turns"] = "steps"
            if backend == row["own"] and row["speedup"] is not None:
                info["ratios"] = {f"test_training_step[{row['model']}-torch]": row["speedup"]}
            stats = _stats(seconds, iqr=iqr * seconds)
            of = (row["model"], row["title"], backend, setting | {"backend": backend})
            cases.append(_step(*of, stats, **info))
    return _run(document["environment"], cases, sweep="steps", not_timed=not_timed)


def _models(document: Content) -> Content:
    """Steps of a results table's models by turns: rate, interval, and how many rounds."""
    config = document["config"]
    of_model = ("attention_type", "local_branch", "seed")
    setting = {name: value for name, value in config.items() if name not in of_model}
    cases = []
    for model, found in document["models"].items():
        rate, low, high = (found[name] for name in ("images_per_second", "low", "high"))
        batch = setting["batch_size"]
        info: Content = {"median_interval_s": [batch / high, batch / low], "turns": "models"}
        info |= {"images_per_s": rate, "images_per_s_interval": [low, high]}
        seconds, rounds = found.get("seconds", batch / rate), found.get("rounds", 0)
        of = (model, model, setting["backend"] or _DEFAULT, setting)
        cases.append(_step(*of, _stats(seconds, rounds), **info))
    run = _run(document["environment"], cases, document["created"], sweep="models")
    run["kernel_suite"]["config"] = config
    return run
