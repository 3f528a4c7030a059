"""The pytest plugin behind ``pytest --benchmark-only``: runs the sweep and shows what it found.

pytest-benchmark keeps the statistics, the files and the comparisons; the durations it is given are
those of :mod:`bench.clock`, since on CUDA a host timer around the call measures the launch.
"""

import dataclasses
import functools
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import clock, limits, machine, memory, summary
from bench.problems import (
    FORWARD,
    Expected,
    Problem,
    check,
    expected_results,
    least_work,
    make_problem,
    worst,
)
from bench.sweep import DTYPES, TRAINING_STEP, Case, Sweep, SweepError, make_sweep, shape_of

SCHEMA = 1
_BUDGET_S = {"quick": 0.25, "full": 2.0}
# A training step is sized for the device: a model that learns within a minute, or the ViT-S.
_TRAINING: dict[str, dict[str, Any]] = {
    "cpu": {"preset": "small", "dataset": "digits", "amp": "off"},
    "cuda": {"preset": "full", "dataset": "cifar100", "amp": "bf16"},
}


class _Replay:
    """A clock that stands still but for the durations it is told to let pass."""

    def __init__(self) -> None:
        self.now = 0.0

    def advance(self, seconds: Iterator[float]) -> None:
        self.now += next(seconds)


_replay = _Replay()


def measured_time() -> float:
    """The timer given to pytest-benchmark: replays the rounds that bench.clock measured."""
    return _replay.now


class Benchmarks:
    """One benchmark run: its sweep, what its cases share, and its outcome."""

    def __init__(self, config: pytest.Config) -> None:
        # The profiler's library talks on stderr about every session unless told not to.
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        try:
            self.sweep = sweep_from(config)
        except SweepError as error:
            raise pytest.UsageError(str(error)) from error
        self._config = config
        self._started = time.monotonic()
        self._done = 0
        self._rows: list[summary.Row] = []
        self._failures: dict[str, str] = {}
        self._timed_group: Case | None = None
        self._timings: dict[str, clock.Timing] = {}
        self._step_timings: dict[str, clock.Timing] = {}
        self._quieten(config)
        if path := config.getoption("benchmark_json", default=None):
            Path(str(path)).parent.mkdir(parents=True, exist_ok=True)

    # What runs.

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "tokens" in metafunc.fixturenames:
            names = [field.name for field in dataclasses.fields(Case)]
            cases = self.sweep.cases
            values = [dataclasses.astuple(case) for case in cases]
            metafunc.parametrize(names, values, ids=[str(c) for c in cases])
        elif "step_backend" in metafunc.fixturenames:
            from training.config import MODELS

            steps = [(m, b) for b in self.sweep.training_backends for m in MODELS]
            ids = [f"{m}-{b or 'default'}" for m, b in steps]
            metafunc.parametrize("model,step_backend", steps, ids=ids)

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        # An empty parameter list (--ops without a training step) is no case, not a skipped one.
        items[:] = [item for item in items if "NOTSET" not in item.nodeid]
        self._total = len(items)
        terminal = self._config.pluginmanager.get_plugin("terminalreporter")
        if terminal is not None:
            terminal.showfspath = False  # a line per case says more than the file's name

    def time_kernel(self, case: Case, benchmark: Any, item: pytest.Item) -> None:
        """Check one case, then measure its memory and its time for pytest-benchmark."""
        device = self.sweep.device
        with _failures_named():
            problem, expected = self._shared(case.operation, case.dtype, case.tokens, case.batch)
            verdicts = check(problem, case.backend, case.mode, expected)
            name, verdict = worst(verdicts)
            if not verdict.passed:
                pytest.fail(f"wrong result: {name}: {verdict}", pytrace=False)
            call = problem.call(case.backend, case.mode)
            peak, how = memory.peak_beyond_outputs(call, device)
            timing = self._timing(case, problem, item)
            runs = _implementation(problem, case)

        work = least_work(case.operation, case.mode, problem.shape, problem.dtype.itemsize)
        limit, least_s = self._limits().binding(work, case.dtype)
        self._record(
            benchmark,
            item,
            timing,
            group=f"{case.operation} {case.mode} {case.dtype} B={case.batch} N={case.tokens}",
            extra={
                "operation": case.operation,
                "backend": case.backend,
                "implementation": runs,
                "pass": case.mode,
                "dtype": case.dtype,
                "N": case.tokens,
                "total_tokens": self.sweep.total_tokens,
                "shape": dataclasses.asdict(problem.shape),
                "least_bytes": work.bytes,
                "least_flop": work.flop,
                "gb_per_s": work.bytes / timing.median / 1e9,
                "tflop_per_s": work.flop / timing.median / 1e12,
                "limit": limit,
                "share_of_limit": least_s / timing.median,
                "peak_memory_bytes": peak,
                "peak_memory_how": how,
                "error": {
                    n: {
                        "rms": v.rms_error,
                        "rms_tolerance": v.rms_tolerance,
                        "max": v.max_error,
                        "max_tolerance": v.max_tolerance,
                    }
                    for n, v in verdicts.items()
                },
            },
        )

    def _timing(self, case: Case, problem: Problem, item: pytest.Item) -> clock.Timing:
        """The case's rounds. The first case of a shape and pass times all its backends by turns."""
        group = dataclasses.replace(case, backend="")
        if self._timed_group != group:
            self._timed_group, self._timings = group, {}
            calls = {}
            for other in _cases_of(item.session.items):
                if dataclasses.replace(other, backend="") != group:
                    continue
                call = problem.call(other.backend, other.mode)
                try:
                    call()
                except Exception:
                    if other == case:
                        raise
                    continue  # its own test says what is wrong with it
                calls[other.backend] = call
            self._timings = clock.measure_interleaved(
                calls, self.sweep.device, budget_s=_BUDGET_S[self.sweep.extent]
            )
        if case.backend not in self._timings:  # its first call failed, and now it does not
            call = problem.call(case.backend, case.mode)
            return clock.measure(call, self.sweep.device, budget_s=_BUDGET_S[self.sweep.extent])
        return self._timings[case.backend]

    def time_training_step(
        self, model: str, backend: str | None, benchmark: Any, item: pytest.Item
    ) -> None:
        """Time one optimiser step of a model on a random batch; images/s beside the time."""
        from training.config import MODELS, model_settings, resolve

        device = self.sweep.device
        config = resolve({**_TRAINING[device.type], **model_settings(model), "backend": backend})
        with _failures_named():
            step = self._training_step(model, backend)
            peak, how = memory.peak_beyond_outputs(lambda: (step(), ())[1], device)
            timing = self._step_timing(model, backend, item)
        self._record(
            benchmark,
            item,
            timing,
            group=f"{TRAINING_STEP} {config.preset} {config.dataset} batch {config.batch_size}",
            extra={
                "operation": TRAINING_STEP,
                "backend": backend or "default",
                "pass": "step",
                "dtype": "bfloat16 autocast" if config.amp == "bf16" else "float32",
                "model": model,
                "model_title": MODELS[model].title,
                "settings": config.setting,
                "images_per_s": config.batch_size / timing.median,
                "peak_memory_bytes": peak,
                "peak_memory_how": how,
            },
        )

    def _limits(self) -> limits.Limits:
        names = sorted({case.dtype for case in self.sweep.cases})
        return limits.measure(self.sweep.device, tuple(names))

    def _training_step(self, model: str, backend: str | None) -> Callable[[], None]:
        from training.step import make_step

        settings = _TRAINING[self.sweep.device.type]
        return make_step(model, device=self.sweep.device, backend=backend, **settings)

    def _step_timing(self, model: str, backend: str | None, item: pytest.Item) -> clock.Timing:
        """The rounds of a model's step. The first case times all models and backends by turns."""
        case = f"{model}-{backend}"
        if case not in self._step_timings:
            steps = {}
            for one in item.session.items:
                parameters = _parameters(one)
                if "step_backend" not in parameters:
                    continue
                other = (parameters["model"], parameters["step_backend"])
                try:
                    step = self._training_step(*other)
                    step()
                except Exception:
                    if other == (model, backend):
                        raise
                    continue  # its own test says what is wrong with it
                steps[f"{other[0]}-{other[1]}"] = step
            budget = 4 * _BUDGET_S[self.sweep.extent]
            self._step_timings |= clock.measure_interleaved(
                steps, self.sweep.device, budget_s=budget
            )
        return self._step_timings[case]

    def _record(
        self,
        benchmark: Any,
        item: pytest.Item,
        timing: clock.Timing,
        *,
        group: str,
        extra: dict[str, Any],
    ) -> None:
        benchmark.group = group
        benchmark.extra_info.update(
            schema=SCHEMA,
            **extra,
            device=self.sweep.device.type,
            clock=timing.clock,
            calls_per_round=timing.calls_per_round,
            relative_iqr=timing.relative_iqr,
            median_interval_s=timing.interval,
            stop=timing.stop,
            machine=machine.describe(self.sweep.device),
        )
        rounds = iter(timing.seconds)
        benchmark.pedantic(_replay.advance, args=(rounds,), rounds=len(timing.seconds))
        row = summary.Row(benchmark.extra_info, timing.median)
        self._rows.append(row)
        item.user_properties.append(("measured", row.line()))

    # What its cases share: those of one shape run one after another, so one entry is enough.

    @functools.lru_cache(maxsize=1)  # noqa: B019 (the plugin lives as long as the process)
    def _shared(
        self, operation: str, dtype: str, tokens: int, batch: int
    ) -> tuple[Problem, Expected]:
        shape = shape_of(operation, tokens, batch)
        problem = make_problem(operation, shape, DTYPES[dtype], self.sweep.device)
        return problem, expected_results(problem)

    # What is shown.

    def pytest_report_header(self) -> list[str]:
        facts = machine.describe(self.sweep.device)
        lines = [
            f"benchmarks: {self.sweep.extent} sweep on {facts['device_name']} "
            f"({facts['threads']} threads), torch {facts['torch']}"
        ]
        lines += [f"not timed: {what}: {why}" for what, why in self.sweep.left_out.items()]
        return lines

    def pytest_report_teststatus(
        self, report: pytest.CollectReport | pytest.TestReport
    ) -> tuple[str, str, str] | None:
        # Each case writes a line of its own instead of a dot.
        if isinstance(report, pytest.TestReport) and report.when == "call":
            return report.outcome, "", "FAILED" if report.failed else ""
        return None

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "setup" and report.passed:
            return
        if report.when == "teardown" and report.passed:
            return
        terminal = self._config.pluginmanager.get_plugin("terminalreporter")
        case = report.nodeid.partition("[")[2].removesuffix("]") or report.nodeid
        self._done += report.when != "teardown"
        seconds = int(time.monotonic() - self._started)
        progress = f"[{self._done:>{len(str(self._total))}}/{self._total} "
        progress += f"{seconds // 60}:{seconds % 60:02}]"
        measured = dict(report.user_properties).get("measured")
        if report.failed:
            reason = _last_line(report.longreprtext)
            self._failures[case] = reason
            measured = f"{case}: {reason}"
        elif report.skipped:
            measured = f"{case}: skipped"
        if terminal is not None:
            terminal.ensure_newline()
            terminal.write_line(f"{progress} {measured}", red=report.failed)

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if not self._rows:
            return
        terminalreporter.section("measured", sep="=")
        width = terminalreporter._tw.fullwidth
        terminalreporter.write(summary.render(self._rows, width, terminalreporter._tw.hasmarkup))
        for what, why in self.sweep.left_out.items():
            terminalreporter.write_line(f"not timed: {what}: {why}")
        for case, reason in self._failures.items():
            terminalreporter.write_line(f"failed: {case}: {reason}", red=True)

    def pytest_benchmark_update_json(self, output_json: dict[str, Any]) -> None:
        output_json["kernel_suite"] = {
            "kind": "benchmarks",
            "schema": SCHEMA,
            "sweep": self.sweep.extent,
            "device": self.sweep.device.type,
            "machine": machine.describe(self.sweep.device),
            "limits": dataclasses.asdict(self._limits()) if self._rows else None,
            "not_timed": self.sweep.left_out,
            "failed": self._failures,
        }

    @staticmethod
    def _quieten(config: pytest.Config) -> None:
        # torch.compile logs thousands of records, which pytest would print under a failure.
        config.option.showcapture = "no"
        config.option.reportchars = ""  # failures are listed with their reasons below the table
        # Our table stands in for pytest-benchmark's wide one, unless that is asked for.
        wanted = ("benchmark_verbose", "benchmark_compare", "benchmark_histogram")
        if not any(config.getoption(name, default=None) for name in wanted):
            config.option.benchmark_quiet = True


def sweep_from(config: pytest.Config) -> Sweep:
    """The sweep that pytest's options ask for; SweepError where they are malformed."""

    def words(option: str) -> list[str]:
        text = config.getoption(option) or ""
        return [word for word in text.replace(",", " ").split() if word]

    try:
        lengths = [int(word) for word in words("seq_lens")]
    except ValueError as error:
        raise SweepError(f"--seq-lens: whole numbers separated by commas, {error}") from error
    for option in ("dtypes", "seq_lens", "backends", "ops"):
        if config.getoption(option) is not None and not words(option):
            raise SweepError(f"--{option.replace('_', '-')}: the list is empty")
    return make_sweep(
        device=config.getoption("device"),
        dtypes=words("dtypes"),
        seq_lens=lengths,
        backends=words("backends"),
        operations=words("ops"),
        total_tokens=config.getoption("total_tokens"),
        extent=config.getoption("sweep") or "quick",
    )


@contextmanager
def _failures_named() -> Iterator[None]:
    """Tells running out of memory apart from every other failure."""
    try:
        yield
    except Exception as error:
        if not memory.is_out_of_memory(error):
            raise
        message = f"out of memory: {str(error).splitlines()[0]}"
    else:
        return
    # Outside the handler: the traceback would keep the case's tensors alive.
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    pytest.fail(message, pytrace=False)


def _cases_of(items: Iterable[pytest.Item]) -> Iterator[Case]:
    """The kernel cases that run: those of the sweep that no -k has deselected."""
    names = [field.name for field in dataclasses.fields(Case)]
    for item in items:
        parameters = _parameters(item)
        if all(name in parameters for name in names):
            yield Case(*(parameters[name] for name in names))


def _parameters(item: pytest.Item) -> dict[str, Any]:
    return getattr(getattr(item, "callspec", None), "params", {})


def _implementation(problem: Problem, case: Case) -> str:
    import kernels

    tensors: Callable[..., Any] = (lambda x: x.detach()) if case.mode == FORWARD else (lambda x: x)
    arguments = tuple(tensors(x) for x in problem.inputs.values())
    return kernels.implementation(case.operation, case.backend, *arguments)


def _last_line(text: str) -> str:
    """The line of a failure that says what happened: pytest's own marks it with an E."""
    lines = [line for line in text.splitlines() if line.strip()]
    errors = [line.removeprefix("E").strip() for line in lines if line.startswith("E ")]
    return errors[0] if errors else (lines[-1].strip() if lines else "no message")
