"""The pytest plugin behind ``pytest --benchmark-only``: runs the sweep and shows what it found.

pytest-benchmark keeps the statistics, the files and the comparisons; the durations it is given are
those of :mod:`bench.clock`, since on CUDA a host timer around the call measures the launch.
"""

import dataclasses
import functools
import os
import signal
import statistics
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from linear_vit.bench import estimate, kept_limits, peers, summary
from linear_vit.bench.instruments import (
    clock,
    energy,
    limits,
    machine,
    memory,
    profiles,
    proof,
    telemetry,
)
from linear_vit.bench.journal import Journal, JournalError
from linear_vit.bench.problems import (
    FORWARD,
    Expected,
    Problem,
    check,
    expected_of_peer,
    least_work,
    make_problem,
    worst,
)
from linear_vit.bench.problems import (
    operation as operation_of,
)
from linear_vit.bench.progress import Progress
from linear_vit.bench.progress import clock as minutes
from linear_vit.bench.sweep import (
    DTYPES,
    TRAINING_STEP,
    Case,
    Sweep,
    SweepError,
    make_sweep,
    memory_of,
    shape_of,
)

SCHEMA = 1
_BUDGET_S = {"quick": 0.25, "full": 2.0}
_OUT_OF_MEMORY = "out of memory: "
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
        self._failures: dict[str, str] = {}
        self._rows: list[summary.Row] = []
        self._timed_group: Case | None = None
        self._timings: dict[str, clock.Timing] = {}
        self._step_timings: dict[str, clock.Timing] = {}
        self._source = telemetry.source_for(self.sweep.device)
        self._watch = self._step_watch = telemetry.Watch(self._source)
        self._progress = Progress([], {}, None)
        self._interrupted = False
        self._quieten(config)
        path = config.getoption("benchmark_json", default=None)
        self._json = Path(str(path)) if path else None
        self._journal = self._open_journal()
        # Ctrl-C ends a run with a valid file; so does a polite kill.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.default_int_handler)

    def _open_journal(self) -> Journal | None:
        resume = bool(self._config.getoption("resume_bench"))
        if self._json is None:
            if resume:
                raise pytest.UsageError("--resume-bench: name the run's file with --benchmark-json")
            return None
        if self._config.getoption("dry_run"):
            return None
        head = {
            "machine": machine.describe(self.sweep.device),
            "sweep": self.sweep.extent,
            "cases": SCHEMA,
        }
        try:
            path = self._json.with_name(self._json.name + ".journal")
            return Journal(path, head, resume=resume)
        except JournalError as error:
            raise pytest.UsageError(str(error)) from error

    # What runs.

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "tokens" in metafunc.fixturenames:
            names = [field.name for field in dataclasses.fields(Case)]
            cases = self.sweep.cases
            values = [dataclasses.astuple(case) for case in cases]
            metafunc.parametrize(names, values, ids=[str(c) for c in cases])
        elif "step_backend" in metafunc.fixturenames:
            from linear_vit.training.config import MODELS

            steps = [(m, b) for b in self.sweep.training_backends for m in MODELS]
            ids = [f"{m}-{b or 'default'}" for m, b in steps]
            metafunc.parametrize("model,step_backend", steps, ids=ids)

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        # An empty parameter list (--ops without a training step) is no case, not a skipped one.
        items[:] = [item for item in items if "NOTSET" not in item.nodeid]
        if self._terminal is not None:
            self._terminal.showfspath = False  # a line per case says more than the file's name

    def pytest_runtestloop(self, session: pytest.Session) -> bool | None:
        if session.config.option.collectonly:
            return None
        cases = {_case_of(item): self._estimate(item) for item in session.items}
        if self._config.getoption("dry_run"):
            self._show_plan(cases)
            return True
        seconds = {name: time_s for name, (time_s, _) in cases.items()}
        self._progress = Progress(list(cases), seconds, self._terminal)
        return None

    @property
    def _terminal(self) -> Any:
        return self._config.pluginmanager.get_plugin("terminalreporter")

    def _estimate(self, item: pytest.Item) -> tuple[float, int | None]:
        """About how many seconds a case takes, and about how many bytes (None: not estimated)."""
        budget = _BUDGET_S[self.sweep.extent]
        case = next(_cases_of([item]), None)
        if case is None:
            return 6 * budget, None
        shape = shape_of(case.operation, case.tokens, case.batch)
        work = least_work(
            operation_of(case.operation), case.mode, shape, DTYPES[case.dtype].itemsize
        )
        measured = self._limits()
        _, least_s = measured.binding(work, case.dtype)
        call_s = estimate.call_seconds(case.backend, least_s)
        rate = measured.matmul_flop_per_s[case.dtype]
        return estimate.case_seconds(case.backend, call_s, work, rate, budget), memory_of(case)

    def _show_plan(self, cases: dict[str, tuple[float, int | None]]) -> None:
        for name, (seconds, need) in cases.items():
            size = "–" if need is None else f"{need / 2**20:,.0f} MiB"
            self._terminal.write_line(f"{name:72} {seconds:6.1f} s {size:>12}")
        total = minutes(sum(seconds for seconds, _ in cases.values()))
        self._terminal.write_line(f"{len(cases)} cases, estimated to take {total}; none was timed")

    def time_kernel(self, case: Case, benchmark: Any, item: pytest.Item) -> None:
        """Check one case, then measure its memory and its time for pytest-benchmark."""
        device = self.sweep.device
        if self._finished_before(str(case), benchmark, item):
            return
        with _failures_named():
            problem, expected = self._shared(case.operation, case.dtype, case.tokens, case.batch)
            if peers.other_function(case.backend):
                expected = expected_of_peer(problem, case.backend)
            verdicts = check(problem, case.backend, case.mode, expected)
            name, verdict = worst(verdicts)
            if not verdict.passed:
                pytest.fail(f"wrong result: {name}: {verdict}", pytrace=False)
            call = problem.call(case.backend, case.mode)
            operators, on_device = proof.names_of(call, device)
            if wrong := proof.fallback(case.backend, operators, on_device, device.type):
                pytest.fail(f"another implementation ran: {wrong}", pytrace=False)
            peak, how = memory.peak_beyond_outputs(call, device)
            timing = self._timing(case, problem, item)
            runs = _implementation(problem, case)
            joules, joules_how = energy.per_call(call, device, timing.median)
            traced = self._profile(call, str(case))

        work = least_work(
            operation_of(case.operation), case.mode, problem.shape, problem.dtype.itemsize
        )
        work = dataclasses.replace(work, flop=int(work.flop * peers.flop_share(case.backend)))
        limit, least_s = self._limits().binding(work, case.dtype)
        self._record(
            benchmark,
            item,
            timing,
            watch=self._watch,
            group=f"{case.operation} {case.mode} {case.dtype} B={case.batch} N={case.tokens}",
            extra={
                "operation": case.operation,
                "backend": case.backend,
                "implementation": runs,
                "other_function": peers.other_function(case.backend),
                "ran": proof.shown(case.backend, operators, on_device),
                "energy_per_call_j": joules,
                "energy_how": joules_how,
                "profile": traced,
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
                if dataclasses.replace(other, backend="") != group or self._settled(str(other)):
                    continue
                call = problem.call(other.backend, other.mode)
                self._note_start(str(other))  # should its first call kill the process
                try:
                    call()
                except Exception:
                    if other == case:
                        raise
                    continue  # its own test says what is wrong with it
                calls[other.backend] = call
            self._note_start(str(case))
            self._watch = telemetry.Watch(self._source)
            self._timings = clock.measure_interleaved(
                calls,
                self.sweep.device,
                budget_s=_BUDGET_S[self.sweep.extent],
                watch=self._watch,
            )
        if case.backend not in self._timings:  # its first call failed, and now it does not
            call = problem.call(case.backend, case.mode)
            return clock.measure(call, self.sweep.device, budget_s=_BUDGET_S[self.sweep.extent])
        return self._timings[case.backend]

    def time_training_step(
        self, model: str, backend: str | None, benchmark: Any, item: pytest.Item
    ) -> None:
        """Time one optimiser step of a model on a random batch; images/s beside the time."""
        from linear_vit.training.config import MODELS, model_settings, resolve

        device = self.sweep.device
        if self._finished_before(f"{model}-{backend or 'default'}", benchmark, item):
            return
        config = resolve({**_TRAINING[device.type], **model_settings(model), "backend": backend})
        with _failures_named():
            step = self._training_step(model, backend)
            peak, how = memory.peak_beyond_outputs(lambda: (step(), ())[1], device)
            timing = self._step_timing(model, backend, item)
        self._record(
            benchmark,
            item,
            timing,
            watch=self._step_watch,
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

    @functools.cached_property
    def _kept_limits(self) -> kept_limits.Kept:
        names = sorted({case.dtype for case in self.sweep.cases})
        fresh = self._config.getoption("limits") == "fresh"
        return kept_limits.limits_of(self.sweep.device, names, fresh=fresh)

    def _limits(self) -> limits.Limits:
        return self._kept_limits.limits

    def _training_step(self, model: str, backend: str | None) -> Callable[[], None]:
        from linear_vit.training.step import make_step

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
            self._step_watch = telemetry.Watch(self._source)
            self._step_timings |= clock.measure_interleaved(
                steps,
                self.sweep.device,
                budget_s=4 * _BUDGET_S[self.sweep.extent],
                watch=self._step_watch,
            )
        return self._step_timings[case]

    def _profile(self, call: Callable[[], object], name: str) -> dict[str, Any] | None:
        if not self._config.getoption("profile"):
            return None
        folder = (self._json or Path("reports/out/benchmark.json")).parent / "profiles"
        return profiles.write(call, self.sweep.device, folder, name)

    def _record(
        self,
        benchmark: Any,
        item: pytest.Item,
        timing: clock.Timing,
        *,
        watch: telemetry.Watch,
        group: str,
        extra: dict[str, Any],
    ) -> None:
        info = {
            "schema": SCHEMA,
            **extra,
            "device": self.sweep.device.type,
            "clock": timing.clock,
            "cache": timing.cache,
            "calls_per_round": timing.calls_per_round,
            "relative_iqr": timing.relative_iqr,
            "median_interval_s": timing.interval,
            "stop": timing.stop,
            "turns": timing.turns,
            "telemetry": watch.summary(timing.dropped),
            "machine": machine.describe(self.sweep.device),
        }
        if self._journal is not None:
            self._journal.finish(_case_of(item), group=group, info=info, seconds=timing.seconds)
        self._give(benchmark, item, group, info, timing.seconds)

    def _give(
        self,
        benchmark: Any,
        item: pytest.Item,
        group: str,
        info: dict[str, Any],
        seconds: Sequence[float],
    ) -> None:
        """Hand a case's rounds to pytest-benchmark, and its row to the table."""
        benchmark.group = group
        benchmark.extra_info.update(info)
        benchmark.pedantic(_replay.advance, args=(iter(seconds),), rounds=len(seconds))
        row = summary.Row(benchmark.extra_info, statistics.median(seconds))
        self._rows.append(row)
        item.user_properties.append(("measured", row.line()))

    # Killed runs.

    def _finished_before(self, name: str, benchmark: Any, item: pytest.Item) -> bool:
        """Whether an earlier, killed run measured the case; then its rounds are what counts."""
        if self._journal is None:
            return False
        if found := self._journal.finished.get(name):
            self._give(benchmark, item, found["group"], found["info"], found["seconds"])
            self._progress.skip(name)
            return True
        if reason := self._journal.killer(name):
            pytest.fail(reason, pytrace=False)
        self._journal.start(name)
        return False

    def _settled(self, name: str) -> bool:
        """Whether the case needs no timing (any more), or cannot have any."""
        if self._journal is None:
            return False
        return name in self._journal.finished or self._journal.killer(name) is not None

    def _note_start(self, name: str) -> None:
        if self._journal is not None:
            self._journal.start(name)

    def pytest_keyboard_interrupt(self) -> None:
        self._interrupted = True
        if self._journal is not None:
            self._journal.interrupt()

    def pytest_sessionfinish(self) -> None:
        # pytest-benchmark has written its file by now.
        self._progress.close()
        if self._journal is not None and self._json is not None:
            done = self._progress.finished and not self._interrupted
            self._journal.close(done=done)

    # What its cases share: those of one shape run one after another, so one entry is enough.

    @functools.lru_cache(maxsize=1)  # noqa: B019 (the plugin lives as long as the process)
    def _shared(
        self, operation: str, dtype: str, tokens: int, batch: int
    ) -> tuple[Problem, Expected]:
        shape = shape_of(operation, tokens, batch)
        problem = make_problem(operation, shape, DTYPES[dtype], self.sweep.device)
        return problem, problem.expected()

    # What is shown.

    def pytest_report_header(self) -> list[str]:
        facts = machine.describe(self.sweep.device)
        lines = [
            f"benchmarks: {self.sweep.extent} sweep on {facts['device_name']} "
            f"({facts['threads']} threads), torch {facts['torch']}"
        ]
        lines += [f"not timed: {what}: {why}" for what, why in self.sweep.left_out.items()]
        if self._journal is not None and self._journal.set_aside:
            aside = self._journal.set_aside
            lines.append(f"an unfinished run is set aside as {aside} (--resume-bench goes on)")
        if self._journal is not None and self._journal.resumed:
            lines.append(f"resumed: {self._journal.resumed} finished cases are kept")
        return lines

    def pytest_report_teststatus(
        self, report: pytest.CollectReport | pytest.TestReport
    ) -> tuple[str, str, str] | None:
        # Each case writes a line of its own instead of a dot.
        if isinstance(report, pytest.TestReport) and report.when == "call":
            if report.failed and _last_line(report.longreprtext).startswith(_OUT_OF_MEMORY):
                return "out of memory", "", "OUT OF MEMORY"
            return report.outcome, "", "FAILED" if report.failed else ""
        return None

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "setup" and report.passed:
            return
        if report.when == "teardown" and report.passed:
            return
        case = report.nodeid.partition("[")[2].removesuffix("]") or report.nodeid
        measured = dict(report.user_properties).get("measured")
        if report.failed:
            reason = _last_line(report.longreprtext)
            self._failures[case] = reason
            measured = f"{case}: {reason}"
            if self._journal is not None:
                self._journal.fail(case, reason)
        elif report.skipped:
            measured = f"{case}: skipped"
        self._progress.done(case, str(measured), red=report.failed)

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if not self._rows:
            return
        terminalreporter.section("measured", sep="=")
        width = terminalreporter._tw.fullwidth
        terminalreporter.write(summary.render(self._rows, width, terminalreporter._tw.hasmarkup))
        for what, why in self.sweep.left_out.items():
            terminalreporter.write_line(f"not timed: {what}: {why}")
        when = self._kept_limits.measured[:16].replace("T", " ")
        terminalreporter.write_line(
            f"limits measured {when} UTC (--limits fresh measures them anew)"
        )
        for remark in self._kept_limits.remarks:
            terminalreporter.write_line(remark)
        for case, reason in self._failures.items():
            terminalreporter.write_line(f"failed: {case}: {reason}", red=True)
        if self._journal is not None and not self._progress.finished:
            terminalreporter.write_line(
                "not finished: the same command with --resume-bench goes on"
            )

    def pytest_benchmark_update_json(self, output_json: dict[str, Any]) -> None:
        no_memory = {c: r for c, r in self._failures.items() if r.startswith(_OUT_OF_MEMORY)}
        output_json["kernel_suite"] = {
            "kind": "benchmarks",
            "schema": SCHEMA,
            "sweep": self.sweep.extent,
            "device": self.sweep.device.type,
            "machine": machine.describe(self.sweep.device),
            "limits": self._kept_limits.record() if self._rows else None,
            "not_timed": self.sweep.left_out,
            "failed": {c: r for c, r in self._failures.items() if c not in no_memory},
            "out_of_memory": no_memory,
            "interrupted": self._interrupted,
            "resumed": self._journal.resumed if self._journal is not None else 0,
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
        with_peers=bool(config.getoption("peers")),
    )


@contextmanager
def _failures_named() -> Iterator[None]:
    """Tells running out of memory apart from every other failure."""
    try:
        yield
    except Exception as error:
        if not memory.is_out_of_memory(error):
            raise
        message = f"{_OUT_OF_MEMORY}{str(error).splitlines()[0]}"
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


def _case_of(item: pytest.Item) -> str:
    """A case's name: what stands in brackets in the test's."""
    return item.nodeid.partition("[")[2].removesuffix("]") or item.nodeid


def _parameters(item: pytest.Item) -> dict[str, Any]:
    return getattr(getattr(item, "callspec", None), "params", {})


def _implementation(problem: Problem, case: Case) -> str:
    from linear_vit import kernels

    if case.backend in peers.NAMES:
        return peers.other_function(case.backend) or f"peer: {case.backend}"
    tensors: Callable[..., Any] = (lambda x: x.detach()) if case.mode == FORWARD else (lambda x: x)
    arguments = tuple(tensors(x) for x in problem.inputs.values())
    return kernels.implementation(case.operation, case.backend, *arguments)


def _last_line(text: str) -> str:
    """The line of a failure that says what happened: pytest's own marks it with an E."""
    lines = [line for line in text.splitlines() if line.strip()]
    errors = [line.removeprefix("E").strip() for line in lines if line.startswith("E ")]
    return errors[0] if errors else (lines[-1].strip() if lines else "no message")
