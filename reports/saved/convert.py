"""Runs that older versions saved, made into runs of today's schema without loss.

``to_current`` takes a document of any kind and gives one of schema 2: a pytest-benchmark document
whose machine, titles and colours stand in its head. A file keeps every number it had. What a kind
did not have (rounds, a date) is empty, not made up.
"""

import statistics
from collections.abc import Iterable
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
# Of those whose title is another than their name.
_OPERATIONS = {
    "linear_attention_state": "state",
    "linear_attention_apply": "apply",
    "ripple_pool_stages": "ripple pyramid down",
    "ripple_expand_stages": "ripple pyramid up",
    "linear_attention_packed": "linear attention, packed",
    "softmax_attention_packed": "softmax attention, packed",
}
# Shapes that bench.cpu had: 6 heads of 64, tokens of all sequences or grids of a call, channels.
_HEADS, _HEAD_DIM, _ALL_TOKENS, _ALL_CELLS, _CHANNELS = 6, 64, 65_536, 8192, 384
_MATMUL_FLOP = 2 * 2048**3
_LINEAR, _STEP = "linear_attention", "training_step"
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
    """Of old cases; what is no case stays as it is, for the reader to name."""
    suite = document.get("kernel_suite")
    suite = dict(suite) if isinstance(suite, dict) else {"kind": "benchmarks"}
    infos = [b.get("extra_info") for b in document["benchmarks"] if isinstance(b, dict)]
    old = [info for info in infos if isinstance(info, dict) and info.get("schema") == 1]
    if suite.get("schema", 1) != 1 or not old:
        return document
    machine = suite.get("machine") or next((i["machine"] for i in old if "machine" in i), None)
    head = {"sources": None} | suite | {"schema": SCHEMA, "machine": machine} | _names(old)
    benchmarks = []
    for benchmark in document["benchmarks"]:
        info = benchmark.get("extra_info") if isinstance(benchmark, dict) else None
        if isinstance(info, dict) and info.get("schema") == 1:
            new = {"captured": False} | info | {"schema": SCHEMA}
            if new.get("machine") == machine:  # else a case of another: said by the case
                del new["machine"]
            benchmark = benchmark | {"extra_info": new}
        benchmarks.append(benchmark)
    return document | {"benchmarks": benchmarks, "kernel_suite": head}


def _names(infos: Iterable[Content]) -> Content:
    """Titles and colours of every operation and backend that occurs."""
    infos = list(infos)
    found: Content = {"operations": {}, "backends": {}}
    for info in infos:
        if name := info.get("operation"):
            found["operations"][name] = {"title": _OPERATIONS.get(name, name.replace("_", " "))}
        if (name := info.get("backend")) and name != _DEFAULT:
            title, colour, own = _BACKENDS.get(name, (name, None, False))
            found["backends"][name] = {"title": title, "colour": colour, "own": own}
    return found


# ---- what the other kinds are made into ----------------------------------------------------------


def _run(machine: Content, benchmarks: list[Content], when: str = "", **head: Any) -> Content:
    """Of a benchmark's machine, or a training run's environment, whose device may be a GPU."""
    device = "cpu" if machine["device"] == "cpu" else "cuda"
    named = {"device_name": machine["cpu"] if device == "cpu" else machine["device"]}
    suite = {
        "kind": "benchmarks",
        "schema": SCHEMA,
        "device": device,
        "machine": named | machine | {"device": device},
        "sources": None,
        "limits": None,
        **_names(b["extra_info"] for b in benchmarks),
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


def _case(
    test: str, name: str, group: str, seconds: float, info: Content, rounds: int = 0, iqr: float = 0
) -> Content:
    """A case named as the benchmarks name one; its rounds were not kept."""
    alike = ("min", "max", "mean", "median", "q1", "q3", "ld15iqr", "hd15iqr")
    stats = dict.fromkeys(alike, seconds) | {"iqr": iqr, "rounds": rounds, "data": []}
    stats |= {"stddev": 0.0, "iqr_outliers": 0, "stddev_outliers": 0, "outliers": "0;0"}
    stats |= {"ops": 1 / seconds, "total": seconds * rounds, "iterations": 1}
    return {
        "group": group,
        "name": f"test_{test}[{name}]",
        "fullname": f"bench/bench_{_FILES[test]}.py::test_{test}[{name}]",
        "params": None,
        "param": name,
        "options": {},
        "stats": stats,
        "extra_info": {"schema": SCHEMA, "captured": False, **info},
    }


_FILES = {"kernel": "kernels", _STEP: "training"}


# ---- bench.cpu: the C++ kernels ------------------------------------------------------------------


def _cpu(document: Content) -> Content:
    rows = document["rows"]
    rates: Content = next((row["limits"] for row in rows if "limits" in row), {})
    cases: list[Content] = []
    for row in rows:
        if "limits" not in row:
            cases += _cpu_cases(row, rates)
    matmul = [_MATMUL_FLOP / row["seconds"]["matmul"] for row in rows if "over_matmul" in row]
    limits = {
        "copy_bytes_per_s": rates.get("copy"),
        # Of the matmuls that took turns with the rows, the middle one.
        "matmul_flop_per_s": {"float32": statistics.median(matmul)} if matmul else {},
        "launch_s": None,
        "measured": None,
        "probes": {name: rates.get(name) for name in ("fma", "load", "instructions")},
        "fresh_bytes_per_s": rates.get("fresh"),
        "fresh_large_bytes_per_s": rates.get("fresh_large"),
    }
    measured = rates or matmul
    return _run(document["machine"], cases, sweep="cpu", limits=limits if measured else None)


def _cpu_cases(row: Content, rates: Content) -> list[Content]:
    """The backends of a row; ours has what it was as a ratio to the others, turn by turn."""
    seconds = row["seconds"]
    operation, mode, dtype = row.get("operation", _LINEAR), "forward", "float32"
    if "ratio" in row:
        mode, dtype = row["table"].rsplit(", ", 2)[1:]
    info: Content = {"turns": row["name"]}
    others = {row["against"]: (operation, "ratio")} if "against" in row else {}
    if "grid" in row:
        shape = {"B": row["batch"], "rows": row["grid"], "cols": row["grid"]}
        shape |= {"C": _CHANNELS, "axis": 0}
        info |= {"total_tokens": _ALL_CELLS, "least_bytes": row["bytes"]}
        others = {"torch": (operation, "ratio")}
    else:
        tokens = row["tokens"]
        whole = {"total_tokens": _ALL_TOKENS} if "ratio" in row or "bounds" in row else {}
        shape = {"B": max(1, _ALL_TOKENS // tokens) if whole else 1, "H": _HEADS, "Hk": _HEADS}
        shape |= {"N": tokens, "M": tokens, "D": _HEAD_DIM}
        info |= whole
    if "softmax" in seconds:
        others["softmax"] = ("softmax_attention", "over_softmax")
    if "flop" in row:
        info["least_flop"] = row["flop"]
    if "bounds" in row:  # half of the dense work is done; the bytes follow from memory's bound
        info |= {"least_flop": 2 * row["flop_done"], "flop_done": row["flop_done"]}
        info |= {"bounds_s": row["bounds"], "turns": "roofline"}
        if "copy" in rates:
            info["least_bytes"] = round(row["bounds"]["memory"] * rates["copy"])
    elif "ratio" not in row:
        info["turns"] = "time against N"

    def timed(of: str, backend: str, took: float, more: Content) -> Content:
        return _kernel(of, mode, dtype, shape, backend, took, info | more)

    made, ratios = [], {}
    for backend, (of, ratio) in others.items():
        more = {"least_flop": None} if backend == "softmax" else {}
        name = backend.replace("softmax", "torch")
        made.append(timed(of, name, seconds[backend], more))
        ratios[made[-1]["name"]] = row[ratio]
    extra: Content = {"ratios": ratios} if ratios else {}
    if "over_matmul" in row:
        extra = {"ratios": ratios | {"matmul": row["over_matmul"]}, "matmul_s": seconds["matmul"]}
    return [timed(operation, "cpu", seconds["cpu"], extra), *made]


def _kernel(
    operation: str,
    mode: str,
    dtype: str,
    shape: Content,
    backend: str,
    seconds: float,
    info: Content,
) -> Content:
    tokens, batch = shape.get("N") or shape["rows"] * shape["cols"], shape["B"]
    size = f"B{batch}-N{tokens}" if batch > 1 else f"N{tokens}"
    known = {"operation": operation, "backend": backend, "pass": mode, "dtype": dtype, "N": tokens}
    known |= {"shape": shape, "device": "cpu", "error": {}} | info
    for rate, least, unit in (("gb", "least_bytes", 1e9), ("tflop", "least_flop", 1e12)):
        if known.get(least):
            known[f"{rate}_per_s"] = known[least] / seconds / unit
    name = f"{operation}-{mode}-{dtype}-{size}-{backend}"
    return _case("kernel", name, f"{operation} {mode} {dtype} B={batch} N={tokens}", seconds, known)


# ---- training steps ------------------------------------------------------------------------------


def _step(
    model: str, title: str, backend: str, setting: Content, seconds: float, info: Content, **of: Any
) -> Content:
    known = {
        "operation": _STEP,
        "backend": backend,
        "pass": "step",
        "dtype": "float32" if setting["amp"] == "off" else "bfloat16 autocast",
        "model": model,
        "model_title": title,
        "settings": setting,
    }
    group = f"{_STEP} {setting['preset']} {setting['dataset']} batch {setting['batch_size']}"
    return _case(_STEP, f"{model}-{backend}", group, seconds, known | info, **of)


def _steps(document: Content) -> Content:
    """A step with and without own kernels: the fastest own has its ratio to PyTorch's."""
    setting, cases, not_timed = document["setting"], [], {}
    for row in document["rows"]:
        model = row["model"]
        for backend, cell in row["backends"].items():
            if "reason" in cell:
                not_timed[f"{model}-{backend}"] = cell["reason"]
                continue
            seconds, iqr = cell["seconds"], cell["relative_iqr"]
            info = {"images_per_s": cell["images_per_second"], "relative_iqr": iqr}
            info["turns"] = "steps"
            if backend == row["own"] and row["speedup"] is not None:
                info["ratios"] = {f"test_{_STEP}[{model}-torch]": row["speedup"]}
            own = setting | {"backend": backend}
            cases.append(_step(model, row["title"], backend, own, seconds, info, iqr=iqr * seconds))
    return _run(document["environment"], cases, sweep="steps", not_timed=not_timed)


def _models(document: Content) -> Content:
    """Steps of a results table's models by turns: rate, interval, and how many rounds."""
    of_model = ("attention_type", "local_branch", "seed")
    setting = {name: v for name, v in document["config"].items() if name not in of_model}
    batch, backend = setting["batch_size"], setting["backend"] or _DEFAULT
    cases = []
    for model, found in document["models"].items():
        rate, low, high = (found[name] for name in ("images_per_second", "low", "high"))
        info = {"median_interval_s": [batch / high, batch / low], "turns": "models"}
        info |= {"images_per_s": rate, "images_per_s_interval": [low, high]}
        seconds, rounds = found.get("seconds", batch / rate), found.get("rounds", 0)
        cases.append(_step(model, model, backend, setting, seconds, info, rounds=rounds))
    when, config = document["created"], document["config"]
    return _run(document["environment"], cases, when, sweep="models", config=config)
