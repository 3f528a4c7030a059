"""One group of cases: each is checked, and those that are right are timed by turns.

It runs in the process that measures (see :mod:`bench.worker`).
"""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from linear_vit import kernels, options
from linear_vit.bench import estimate, guests, peers
from linear_vit.bench.estimate import Plan
from linear_vit.bench.guests.timed import TimedCall
from linear_vit.bench.instruments import (
    clock,
    energy,
    memory,
    profiles,
    proof,
    second_clock,
    telemetry,
)
from linear_vit.bench.instruments.clock import Timing
from linear_vit.bench.problems import (
    BACKWARD,
    DTYPES,
    FORWARD,
    Case,
    Expected,
    Problem,
    WrongResult,
    case_name,
    check,
    expected_of_peer,
    judge,
    make_problem,
    operation,
    own_kernels,
    parse_case,
    worst,
)
from linear_vit.bench.store import FAILED, MEASURED, OUT_OF_MEMORY, SCHEMA, Result
from linear_vit.bench.worker import Started, is_lost
from linear_vit.kernels import registry
from linear_vit.kernels.accuracy import Comparison

_BEATEN = (
    "above the limit: some of its data were in a cache that the limit does not count, or it does "
    "less than the work that is counted"
)


def measure_group(cases: Sequence[Case], plan: Plan, started: Started) -> list[Result]:
    """Check the cases, then time those that are right by turns.

    Args:
        cases: of one group: they may differ in backend, capture and operation.
        plan: how.
        started: told a case's name before it runs for the first time, and None where it is one of
            several that take turns.

    Returns:
        Their results, but for those of cases that have to be tried again: after a case that took
        the device from this process, or where one of several failed while they took turns.
    """
    ready: dict[str, _Ready] = {}
    results: dict[str, Result] = {}
    wanted = {_key(case, plan.device) for case in cases}
    for key in [key for key in _made if key not in wanted]:
        del _made[key]  # its tensors may be large
    for case in cases:
        name = case_name(case)
        started(name)
        try:
            ready[name] = _prepare(case, plan)
        except Exception as error:
            results[name] = _failure(name, error)
        if _ended_badly(results.get(name)):
            return list(results.values())
    if len(ready) > 1:
        started(None)
    try:
        results |= _timed(ready, plan, started)
    finally:
        for one in ready.values():
            if isinstance(one.call, TimedCall):
                one.call.close()
    return [results[name] for name in map(case_name, cases) if name in results]


def _timed(ready: Mapping[str, "_Ready"], plan: Plan, started: Started) -> dict[str, Result]:
    """Results of cases that are right; of none where one of several can't be gone on with."""
    if not ready:
        return {}
    watch = telemetry.Watch.of(plan.device)
    calls = {name: one.call for name, one in ready.items()}
    factor = max(operation(one.case.operation).budget for one in ready.values())
    try:
        timings = clock.measure_interleaved(
            calls, plan.device, budget_s=factor * plan.budget_s, watch=watch
        )
    except Exception as error:
        guilty = [n for n, one in ready.items() if getattr(one.call, "fault", None) is error]
        if len(ready) == 1 or guilty:  # what a guest did wrong once is not tried again
            [name] = guilty or ready
            failed = _failure(name, error)
            _ended_badly(failed)
            return {name: failed}
        if is_lost(str(error)):
            raise  # of this process nothing more is to be had
        return {}  # each is tried again by itself
    results = {}
    for name, one in ready.items():
        started(None)  # a sign of life: a profile takes minutes
        try:
            results[name] = _result(one, timings[name], watch, plan)
        except Exception as error:
            results[name] = _failure(name, error)
        if _ended_badly(results[name]):
            return results
    # Last: what a profile or a backward pass alone has kept is of the first draw.
    for name, wrong in _checked_again(ready, plan.device).items():
        result = results[name]
        again = replace(result, info=result.info | {"checked_again": True})
        results[name] = wrong or (again if result.status == MEASURED else result)
    return results


def _checked_again(ready: Mapping[str, "_Ready"], device: torch.device) -> dict[str, Result | None]:
    """Have what was timed answer again, of another draw in the same memory: None where it is right.

    So a backend that keeps an answer, or that gives another from some call on, has no time. A case
    that there is no memory for is left out.
    """
    found: dict[str, Result | None] = {}
    here = {name: one for name, one in ready.items() if not isinstance(one.call, TimedCall)}
    for problem in {id(one.problem): one.problem for one in here.values()}.values():
        cases = {name: one for name, one in here.items() if one.problem is problem}
        need = max(estimate.memory_bytes(one.case) for one in cases.values())
        if not problem.operation.has_reference:
            continue
        if estimate.does_not_fit(need, memory.available_bytes(device)):
            continue
        try:
            first, other = (_drawn(problem, device, seed=seed) for seed in (0, 1))
            expected = other.expected()
        except (RuntimeError, MemoryError) as error:
            if memory.is_out_of_memory(error):  # the estimate was too low: they are left out, too
                continue
            raise
        problem.take(other, expected.cotangents)
        for name, one in cases.items():
            try:
                _judge_again(one, other, expected)
                found[name] = None
            except Exception as error:
                found[name] = _failure(name, error)
            if _ended_badly(found[name]):
                return found
        problem.take(first, first.cotangents)
    return found


def _drawn(problem: Problem, device: torch.device, *, seed: int) -> Problem:
    return make_problem(problem.operation.name, problem.shape, problem.dtype, device, seed)


def _judge_again(one: "_Ready", other: Problem, expected: Expected) -> None:
    """Raises WrongResult."""
    case, problem = one.case, one.problem
    if peers.other_function(case.backend):
        expected = expected_of_peer(other, case.backend)
    # A graph that was kept is of the forward pass before.
    call = problem.call(case.backend, BACKWARD) if case.mode == BACKWARD else one.call
    name, verdict = worst(judge(problem, case.mode, call(), expected))
    if not verdict.passed:
        raise WrongResult(f"wrong result on other inputs, after it was timed: {name}: {verdict}")


def _ended_badly(result: Result | None) -> bool:
    """Whether the device is lost to this process; memory that a case filled is given back.

    Outside of the handler, whose traceback keeps the case's tensors alive.
    """
    if result is not None and result.status == OUT_OF_MEMORY and torch.cuda.is_available():
        torch.cuda.empty_cache()
    return result is not None and is_lost(result.reason)


@dataclass(frozen=True)
class _Ready:
    """A case that gave the right answer, and what that showed."""

    case: Case
    problem: Problem
    call: Callable[[], Any]
    checked: dict[str, Any]


# The problems of a group and of the one before, with the right answers.
_made: dict[tuple[Case, torch.device], tuple[Problem, Expected | None]] = {}


def _key(case: Case, device: torch.device) -> tuple[Case, torch.device]:
    """What is alike for cases of one problem: both passes are of the same numbers."""
    return replace(case.together, mode=""), device


def _problem_of(case: Case, device: torch.device) -> tuple[Problem, Expected | None]:
    key = _key(case, device)
    if key not in _made:
        dtype = DTYPES.get(case.dtype, torch.float32)
        problem = make_problem(case.operation, case.shape, dtype, device)
        _made[key] = problem, problem.expected() if problem.operation.has_reference else None
    problem, expected = _made[key]
    if peers.other_function(case.backend):
        expected = expected_of_peer(problem, case.backend)
    return problem, expected


def _prepare(case: Case, plan: Plan) -> _Ready:
    """Check a case and look at one call of it.

    Raises:
        WrongResult: its answer is wrong, or another implementation gave it.
        Exception: whatever the call raises.
    """
    problem, expected = _problem_of(case, plan.device)
    if guests.is_guest(case.operation, case.backend):
        assert expected is not None  # an operation whose kernels can be registered has a reference
        return _prepare_guest(case, problem, expected)
    call, compile_s = _first_call(case, problem, plan.device)
    checked: dict[str, Any] = {"compile_s": compile_s, "error": {}, "ran": None}
    if expected is not None:
        verdicts = check(problem, case.backend, case.mode, expected)
        name, verdict = worst(verdicts)
        if not verdict.passed:
            raise WrongResult(f"wrong result: {name}: {verdict}")
        checked["error"] = _errors(verdicts)
        checked["ran"] = _proven(case, *proof.names_of(call, plan.device), plan.device)
    peak, how = None, "not measured of other processes"
    if not isinstance(call, clock.Elsewhere):
        peak, how = memory.peak_beyond_outputs(call, plan.device)
    checked |= {"peak_memory_bytes": peak, "peak_memory_how": how}
    if case.captured:
        call = _captured(call, plan.device, exact=own_kernels(case.backend))
    return _Ready(case, problem, call, checked)


def _prepare_guest(case: Case, problem: Problem, expected: Expected) -> _Ready:
    """The same of a kernel in a process of its own."""
    call = TimedCall(case, problem, expected)
    try:
        found = call.prepare()
        names = (found.pop("operators"), found.pop("kernels"))
        device = next(iter(problem.inputs.values())).device
        found |= {"error": _errors(found.pop("verdicts")), "ran": _proven(case, *names, device)}
    except BaseException:
        call.close()
        raise
    return _Ready(case, problem, call, found)


def _errors(verdicts: Mapping[str, Comparison]) -> dict[str, dict[str, float]]:
    return {
        name: {
            "rms": v.rms_error,
            "rms_tolerance": v.rms_tolerance,
            "max": v.max_error,
            "max_tolerance": v.max_tolerance,
        }
        for name, v in verdicts.items()
    }


def _proven(
    case: Case, operators: tuple[str, ...], on_device: tuple[str, ...], device: torch.device
) -> list[str]:
    """What ran; WrongResult where it is not what was asked for."""
    wanted = claim(case.operation, case.backend)
    if wrong := proof.fallback(wanted, operators, on_device, device.type):
        raise WrongResult(f"another implementation ran: {wrong}")
    return proof.shown(operators, on_device)


def _first_call(
    case: Case, problem: Problem, device: torch.device
) -> tuple[Callable[[], Any], float]:
    """The case's call, and how much longer its first took than its second: compiling, mostly."""
    took = []
    call: Callable[[], Any] | None = None
    for _ in range(2):
        start = time.perf_counter()
        call = call or problem.call(case.backend, case.mode)
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        took.append(time.perf_counter() - start)
    assert call is not None
    return call, max(0.0, took[0] - took[1])


def claim(name: str, backend: str) -> proof.Claim:
    """What has to be seen running where this backend of an operation is asked for."""
    rows, peer = kernels.backend_rows(), peers.PEERS.get(backend)
    # A user's function under a built-in name may be anything.
    row = rows.get(backend) if registry.registered(name, backend) is None else None
    return proof.Claim(
        backend,
        own=row is not None and row.own,
        compiled=row is not None and row.compiles,
        eager=row is not None and row.eager,
        signature=peer.signature if peer is not None else (),
        others=tuple(other.name for other in rows.values() if other.own and other.name != backend),
    )


def _captured(
    call: Callable[[], Any], device: torch.device, *, exact: bool
) -> Callable[[], tuple[torch.Tensor, ...]]:
    """What replays the call from a CUDA graph, and returns what that wrote.

    Raises:
        WrongResult: a replay gives other bits than a call, of kernels that always give the same.
    """
    replay, outputs = clock.captured(call, device)
    replay()
    if exact and not all(torch.equal(a, b) for a, b in zip(outputs, call(), strict=True)):
        raise WrongResult("a replay from a CUDA graph is not what a call gives")

    def replayed() -> tuple[torch.Tensor, ...]:
        replay()
        return outputs

    return replayed


def _result(ready: _Ready, timing: Timing, watch: telemetry.Watch, plan: Plan) -> Result:
    case, problem, name = ready.case, ready.problem, case_name(ready.case)
    of = operation(case.operation)
    elsewhere = isinstance(ready.call, clock.Elsewhere)
    joules, joules_how = None, "not asked for"
    if elsewhere:
        joules_how = "not measured of other processes"
    elif plan.measures_energy(case):
        joules, joules_how = energy.per_call(ready.call, plan.device, timing.median)
    traced = None
    if plan.profiles is not None and not elsewhere:
        child: tuple[str, ...] = ()
        if of.has_reference:  # a training step's name does not say how it is sized
            child = (sys.executable, "-m", "linear_vit.bench.group", name, str(plan.device))
        traced = profiles.write(ready.call, plan.device, plan.profiles, name, child)
    info = {
        "schema": SCHEMA,
        "operation": case.operation,
        "backend": case.backend,
        "pass": case.mode,
        "dtype": case.dtype,
        "N": case.shape.tokens,
        "total_tokens": case.total_tokens,
        "captured": case.captured,
        **ready.checked,
        **_against_limits(case, problem, timing, plan),
        **of.facts(case, timing.median),
        "energy_per_call_j": joules,
        "energy_how": joules_how,
        "second_clock": None
        if elsewhere
        else second_clock.compare(name, ready.call, plan.device, timing.median),
        "profile": traced,
        "guest": ready.call.verdict() if isinstance(ready.call, TimedCall) else None,
        "checked_again": isinstance(ready.call, TimedCall),
        "device": plan.device.type,
        "clock": timing.clock,
        "cache": timing.cache,
        "calls_per_round": timing.calls_per_round,
        "relative_iqr": timing.relative_iqr,
        "host_s": timing.host_seconds,
        "median_interval_s": timing.interval,
        "stop": timing.stop,
        "disturbed": timing.disturbed,
        "turns": timing.turns,
        "telemetry": watch.summary(timing.dropped, gave_up=timing.stop == "disturbed"),
        "sources": plan.sources,
    }
    return Result(name, MEASURED, None, of.test, of.group(case), timing.seconds, info)


def _against_limits(case: Case, problem: Problem, timing: Timing, plan: Plan) -> dict[str, Any]:
    """Least traffic and work, and the share of what the limits allow; empty where unknown."""
    if not problem.operation.has_reference:
        return {}
    work, peer = problem.least_work(case.mode), peers.PEERS.get(case.backend)
    if peer is not None:
        work = replace(work, flop=int(work.flop * peer.flop_share))
    found = {
        "shape": asdict(case.shape),  # type: ignore[call-overload]
        "implementation": _implementation(case, problem),
        "other_function": peer.other_function if peer is not None else None,
        "least_bytes": work.bytes,
        "least_flop": work.flop,
        "gb_per_s": work.bytes / timing.median / 1e9,
        "tflop_per_s": work.flop / timing.median / 1e12,
    }
    if plan.limits is None:
        return found
    needs = operation(case.operation).needs(case.backend, case.mode, case.shape)
    allowed = plan.limits.least_seconds(work.bytes, work.flop, case.dtype)
    limit, least_s = max(allowed.items(), key=lambda item: item[1])
    share = least_s / timing.median
    return found | {
        "limit": limit,
        "share_of_limit": share,
        "limit_note": _BEATEN if share > 1 else None,
        "limits_s": allowed | plan.limits.seconds_of(needs),
    }


def _implementation(case: Case, problem: Problem) -> str:
    """What runs, with its tiles where it tells."""
    if case.backend in peers.PEERS:
        peer = peers.PEERS[case.backend]
        return peer.other_function or peer.emulation or f"peer: {case.backend}"
    forward = case.mode == FORWARD
    arguments = [x.detach() if forward else x for x in problem.inputs.values()]
    return kernels.implementation(case.operation, case.backend, *arguments)


def _failure(name: str, error: Exception) -> Result:
    """The outcome of a case that raised: what it says in one line."""
    lines = str(error).strip().splitlines() or ["no message"]
    if memory.is_out_of_memory(error) or isinstance(error, guests.OutOfMemory):
        return Result(name, OUT_OF_MEMORY, f"out of memory: {lines[0][:400]}")
    said = isinstance(error, WrongResult | guests.Failed)
    kind = "" if said else f"{type(error).__name__}: "
    return Result(name, FAILED, f"{kind}{lines[0][:1000]}")


def call_once(name: str, where: str) -> int:
    """One warm call of a case on CUDA, between the marks that Nsight Compute waits for."""
    options.load_plugins()
    case, device = parse_case(name), torch.device(where)
    problem = make_problem(case.operation, case.shape, DTYPES[case.dtype], device)
    call = problem.call(case.backend, case.mode)
    call()
    torch.cuda.synchronize(device)
    torch.cuda.cudart().cudaProfilerStart()
    call()
    torch.cuda.synchronize(device)
    torch.cuda.cudart().cudaProfilerStop()
    return 0


if __name__ == "__main__":
    sys.exit(call_once(*sys.argv[1:]))
