"""How each case of ``python -m bench.gpu`` is measured.

A contender is a name like ``linear_attention/triton`` (operation and backend) or ``sdpa/flash`` (a
kernel of ``scaled_dot_product_attention``). All contenders of a case take turns on the same inputs.
"""

import dataclasses
import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from linear_vit import kernels
from linear_vit.bench.gpu_runner import Case, NotHere, Result
from linear_vit.bench.instruments import clock, limits, memory
from linear_vit.bench.instruments import energy as energy_of
from linear_vit.bench.problems import (
    FORWARD,
    FORWARD_BACKWARD,
    AttentionShape,
    Problem,
    RippleShape,
    Shape,
    check,
    least_work,
    make_problem,
    worst,
)
from linear_vit.bench.problems import (
    operation as operation_of,
)
from linear_vit.bench.sweep import DTYPES
from linear_vit.kernels.accuracy import compare

BACKWARD = "backward"
MODES = (FORWARD, BACKWARD)
OURS = ("triton", "cuda", "cpu")
SDPA = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
# One call of a quadratic contender may take a tenth of a second; at 300 TFLOP/s it is 3e13 FLOP.
_MOST_QUADRATIC_FLOP = {"cuda": 3e13, "cpu": 1e9}
# SDPA's math kernel stores its N×M matrix, several times over.
_MOST_MATRIX_BYTES = 2**32


class WrongResult(Exception):
    """A result of ours that the accuracy rule refuses, or one that changes from run to run."""


def measure(case: Case) -> Result:
    """Do a case; what comes back goes into its section's file.

    Raises:
        NotHere: this device, PyTorch or backend can't.
        WrongResult: it can, and the result is wrong.
    """
    # torch.compile otherwise forbids a second backward pass through one graph.
    importlib.import_module("torch._functorch.config").donated_buffer = False  # type: ignore[attr-defined]
    p = dict(case.parameters)
    device = torch.device(p.pop("device"))
    return _SECTIONS[case.section](device, **p)


def _check(device: torch.device, operation: str, dtype: str, backend: str, head_dim: int) -> Result:
    """Ours have to be right; of PyTorch's own kernels it is recorded whether they are."""
    errors, off = {}, None
    for shape in _check_shapes(operation, head_dim):
        problem = _problem(operation, shape, dtype, device, backend)
        verdicts = check(problem, backend, FORWARD_BACKWARD, problem.expected())
        errors[str(shape)] = {n: vars(v) for n, v in verdicts.items()}
        name, verdict = worst(verdicts)
        if not verdict.passed:
            off = off or f"{name}: {verdict} ({shape})"
        if backend in OURS:
            if off:
                raise WrongResult(off)
            _check_repeats(problem, backend)
    described = {"operation": operation, "dtype": dtype, "backend": backend}
    return {**described, "off": off, "errors": errors}


def _check_shapes(operation: str, D: int) -> tuple[Shape, ...]:
    """Ragged sizes, grouped heads where they may be, few tokens and enough for every split."""
    if operation.startswith("ripple"):
        return (RippleShape(2, 8, 8, 48, axis=0), RippleShape(1, 7, 5, 33, axis=1))
    if operation.endswith("packed"):
        return (AttentionShape(2, 6, 6, 197, 197, D), AttentionShape(1, 2, 2, 3001, 3001, D))
    return (
        AttentionShape(2, 6, 6, 197, 197, D),
        AttentionShape(1, 4, 1, 77, 130, D),
        AttentionShape(1, 2, 1, 3001, 2999, D),
    )


def _check_repeats(problem: Problem, backend: str) -> None:
    """The same bits twice, in memory that is NaN before it is written."""
    call = problem.call(backend, FORWARD_BACKWARD)
    first = call()
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills torch.empty with NaN
    try:
        second = call()
    finally:
        torch.use_deterministic_algorithms(before)
    names = problem.names(FORWARD_BACKWARD)
    for name, a, b in zip(names, first, second, strict=True):
        if not torch.equal(a, b):
            raise WrongResult(f"{name} differs from one run to the next ({problem.shape})")


def _ceilings(device: torch.device, dtypes: list[str]) -> Result:
    return dataclasses.asdict(limits.measure(device, tuple(dtypes)))


def _huge(device: torch.device, backend: str, heads: int, tokens: int, head_dim: int) -> Result:
    """All heads in one call, past 2^31 elements; the last head's results against the reference."""
    shape = AttentionShape(1, heads, heads, tokens, tokens, head_dim)
    problem = _problem("linear_attention", shape, "bfloat16", device, backend)
    results = problem.gradients(backend, problem.cotangents)
    last = [x.detach()[:, -1:].clone() for x in results]
    elements = results[0].numel()
    part = dataclasses.replace(
        problem,
        shape=dataclasses.replace(shape, H=1, Hk=1),
        inputs={n: x.detach()[:, -1:].clone().requires_grad_() for n, x in problem.inputs.items()},
        cotangents=tuple(g[:, -1:].clone() for g in problem.cotangents),
    )
    del results, problem
    expected = part.expected()
    verdicts = {}
    for name, actual in zip(part.names(FORWARD_BACKWARD), last, strict=True):
        rows = expected.rows[name]
        sampled = actual if rows is None else actual.index_select(2, rows)
        verdicts[name] = compare(sampled, expected.values[name], gradient=name.startswith("grad"))
    name, verdict = worst(verdicts)
    if not verdict.passed:
        raise WrongResult(f"{name}: {verdict} ({shape})")
    errors = {n: vars(v) for n, v in verdicts.items()}
    return {"backend": backend, "elements": elements, "errors": errors}


def _capture(device: torch.device, operation: str, backend: str, head_dim: int) -> Result:
    """A captured call, replayed on other inputs, gives what an eager call gives, bit for bit."""
    shape: Shape
    if operation.startswith("ripple"):
        shape = RippleShape(2, 8, 8, 48)
    else:
        shape = AttentionShape(2, 2, 2, 256, 256, head_dim)
    for mode in (FORWARD, FORWARD_BACKWARD):
        problem = _problem(operation, shape, "bfloat16", device, backend)
        call = problem.call(backend, mode)
        replay, captured = _captured(call, device)
        other = make_problem(operation, shape, torch.bfloat16, device, seed=1)
        with torch.no_grad():
            for name, x in problem.inputs.items():
                x.copy_(other.inputs[name])
        replay()
        for name, a, b in zip(problem.names(mode), captured, call(), strict=True):
            if not torch.equal(a, b):
                raise WrongResult(f"{mode}: {name} of a replay is not that of a call")
    return {"operation": operation, "backend": backend}


def _captured(
    call: Callable[[], tuple[Tensor, ...]], device: torch.device
) -> tuple[Callable[[], None], tuple[Tensor, ...]]:
    """A CUDA graph of the call: what replays it, and the tensors that a replay writes."""
    if device.type != "cuda":
        raise NotHere(f"no CUDA graphs on {device.type}")
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = call()
    return graph.replay, outputs


def _sweep_case(
    device: torch.device,
    what: str,
    shape: dict[str, int],
    dtype: str,
    mode: str,
    contenders: list[str],
    budget_s: float,
    energy: bool,
) -> Result:
    size = AttentionShape(**shape)
    problem = make_problem("linear_attention", size, DTYPES[dtype], device)
    calls, absent = _calls(contenders, problem, mode)
    timings = clock.measure_interleaved(calls, device, budget_s=budget_s)
    times = {}
    for name, timing in timings.items():
        joules, how = None, "not asked for"
        if energy:
            joules, how = energy_of.per_call(calls[name], device, timing.median)
        peak, _ = memory.peak_beyond_outputs(calls[name], device)
        operation = "linear_attention" if name.startswith("linear") else "softmax_attention"
        work = _least(operation, mode, size, DTYPES[dtype].itemsize)
        times[name] = {
            **_times(timing),
            "least_bytes": work[0],
            "least_flop": work[1],
            "bytes_per_s": work[0] / timing.median,
            "flop_per_s": work[1] / timing.median,
            "peak_memory_bytes": peak,
            "joules": joules,
            "joules_how": how,
            "implementation": _implementation(name, problem),
        }
    described = {"what": what, "shape": shape, "dtype": dtype, "mode": mode}
    return {**described, "times": times, "absent": absent}


def _times(timing: clock.Timing) -> Result:
    return {
        "seconds": timing.median,
        "interval_s": timing.interval,
        "relative_iqr": timing.relative_iqr,
        "rounds": len(timing.seconds),
        "stop": timing.stop,
        "clock": timing.clock,
    }


def _least(operation: str, mode: str, shape: AttentionShape, size: int) -> tuple[int, int]:
    """Least bytes and FLOP of a pass; a backward pass alone is both passes less the forward."""
    work = least_work(
        operation_of(operation), FORWARD_BACKWARD if mode == BACKWARD else mode, shape, size
    )
    if mode != BACKWARD:
        return work.bytes, work.flop
    forward = least_work(operation_of(operation), FORWARD, shape, size)
    return work.bytes - forward.bytes, work.flop - forward.flop


def _calls(
    contenders: list[str], problem: Problem, mode: str
) -> tuple[dict[str, Callable[[], tuple[Tensor, ...]]], dict[str, str]]:
    """A closure for each contender that can do this, and why the others can't."""
    calls, absent = {}, {}
    for name in contenders:
        try:
            call = _call(name, problem, mode)
            call()
        except Exception as error:
            absent[name] = _why_absent(error)
            continue
        calls[name] = call
    if not calls:
        raise NotHere("; ".join(f"{name}: {why}" for name, why in absent.items()))
    return calls, absent


def _why_absent(error: Exception) -> str:
    """One line; raises again where the device is lost to this process."""
    if memory.is_out_of_memory(error):
        return "out of memory"
    if "CUDA error" in str(error):
        raise error
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _call(name: str, problem: Problem, mode: str) -> Callable[[], tuple[Tensor, ...]]:
    run = _function(name, problem)
    g = problem.cotangents[0]
    if mode == FORWARD:
        plain = tuple(x.detach() for x in problem.inputs.values())
        return lambda: (run(*plain),)
    leaves = tuple(problem.inputs.values())
    if mode == BACKWARD:
        out = run(*leaves)
        return lambda: torch.autograd.grad(out, leaves, g, retain_graph=True)

    def both() -> tuple[Tensor, ...]:
        out = run(*leaves)
        return (out, *torch.autograd.grad(out, leaves, g))

    return both


def _function(name: str, problem: Problem) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    operation, _, backend = name.partition("/")
    shape = problem.shape
    assert isinstance(shape, AttentionShape)
    device = problem.inputs["q"].device
    if not name.startswith("linear_attention"):
        flop = 4 * shape.B * shape.H * shape.N * shape.M * shape.D
        if flop > _MOST_QUADRATIC_FLOP[device.type]:
            raise NotHere(f"a call of {flop:.0e} FLOP takes too long")
    if operation != "sdpa":
        reason = kernels.backends(operation, device, dtype=problem.dtype, head_dim=shape.D)[backend]
        if reason is not None:
            raise NotHere(reason)
        if not kernels.is_timeable(backend, device):
            raise NotHere("it runs in Triton's interpreter here, which says nothing about time")
        return functools.partial(getattr(kernels, operation), backend=backend)
    matrix = 4 * shape.B * shape.H * shape.N * shape.M
    if backend == "math" and matrix > _MOST_MATRIX_BYTES:
        raise NotHere(f"its N×M matrix takes {matrix / 2**30:.0f} GiB")

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel([SDPA[backend]]):
            return F.scaled_dot_product_attention(q, k, v)

    return sdpa


def _implementation(name: str, problem: Problem) -> str:
    """What runs, with its tiles where it tells."""
    operation, _, backend = name.partition("/")
    if operation == "sdpa":
        return f"scaled_dot_product_attention: {backend}"
    arguments = (x.detach() for x in problem.inputs.values())
    return kernels.implementation(operation, backend, *arguments)


def _training_case(
    device: torch.device,
    model: str,
    backend: str,
    preset: str,
    dataset: str,
    amp: str,
    budget_s: float,
) -> Result:
    from linear_vit.training.config import model_settings, resolve
    from linear_vit.training.step import make_step

    if model == "baseline":
        reason = kernels.backends("softmax_attention_packed", device)[backend]
        if reason is not None:
            raise NotHere(reason)
    settings: dict[str, Any] = {"preset": preset, "dataset": dataset, "amp": amp}
    config = resolve({**settings, **model_settings(model), "backend": backend})
    step = make_step(model, device=device, backend=backend, **settings)
    peak, how = memory.peak_beyond_outputs(lambda: (step(), ())[1], device)
    timing = clock.measure(step, device, budget_s=budget_s)
    joules, joules_how = energy_of.per_call(step, device, timing.median)
    return {
        "model": model,
        "backend": backend,
        "settings": config.setting,
        **_times(timing),
        "images_per_s": config.batch_size / timing.median,
        "peak_memory_bytes": peak,
        "peak_memory_how": how,
        "joules": joules,
        "joules_how": joules_how,
    }


def _graph_case(
    device: torch.device,
    shape: dict[str, int],
    dtype: str,
    mode: str,
    contenders: list[str],
    budget_s: float,
) -> Result:
    if device.type != "cuda":
        raise NotHere(f"no CUDA graphs on {device.type}")
    size = AttentionShape(**shape)
    problem = make_problem("linear_attention", size, DTYPES[dtype], device)
    calls, absent = _calls(contenders, problem, mode)
    replays: dict[str, Callable[[], object]] = {}
    for name, call in calls.items():
        replays[f"{name} called"] = call
        try:
            replays[f"{name} replayed"], _ = _captured(call, device)
        except Exception as error:
            absent[f"{name} replayed"] = _why_absent(error)
    timings = clock.measure_interleaved(replays, device, budget_s=budget_s)
    times = {name: _times(timing) for name, timing in timings.items()}
    described = {"shape": shape, "dtype": dtype, "mode": mode}
    return {**described, "times": times, "absent": absent}


def _problem(
    operation: str, shape: Shape, dtype: str, device: torch.device, backend: str
) -> Problem:
    head_dim = shape.D if isinstance(shape, AttentionShape) else None
    reason = kernels.backends(operation, device, dtype=DTYPES[dtype], head_dim=head_dim)[backend]
    if reason is not None:
        raise NotHere(reason)
    return make_problem(operation, shape, DTYPES[dtype], device)


_SECTIONS: dict[str, Callable[..., Result]] = {
    "check": _check,
    "ceilings": _ceilings,
    "sweep": _sweep_case,
    "huge": _huge,
    "capture": _capture,
    "training": _training_case,
    "graphs": _graph_case,
}
SECTIONS = tuple(_SECTIONS)
