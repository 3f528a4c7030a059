"""The pytest plugin behind ``pytest --benchmark-only``: runs the sweep and shows what it found.

:mod:`bench.runner` measures and :mod:`bench.store` keeps; here a case is a test, so that ``-k``,
``--collect-only`` and pytest-benchmark's comparisons work. pytest-benchmark is given the rounds
that were measured: on CUDA a host timer around a call would measure its launch.
"""

import dataclasses
import functools
import signal
import statistics
import sys
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from linear_vit import options
from linear_vit.bench import estimate, guests, runner, store, summary
from linear_vit.bench.instruments import limits, machine, memory
from linear_vit.bench.problems import DTYPES, Case, case_name, operation
from linear_vit.bench.progress import Countdown, clock
from linear_vit.bench.store import (
    FAILED,
    LEFT_OUT,
    MEASURED,
    OUT_OF_MEMORY,
    Result,
    Store,
    StoreError,
)
from linear_vit.bench.sweep import SPECIAL, Asked, Sweep, make_sweep
from linear_vit.options import OptionError
from linear_vit.screen import counted, folded, width

_BUDGET_S = {"quick": 0.25, "full": 2.0, "gpu": 0.25, "cpu": 1.0}
_REHEARSAL_BUDGET_S = 0.01
_COMPILED_S = 0.5  # less is not compiling, but first allocations and the like
_ALL_DISTURBED = (
    "Every case was disturbed, so no time is shown: measure again when the machine is left to "
    "itself. What disturbed each is below; the file has the times, marked."
)


class _Replay:
    """A clock that stands still but for the durations it is told to let pass."""

    def __init__(self) -> None:
        self.now = 0.0

    def advance(self, seconds: Iterator[float]) -> None:
        self.now += next(seconds)


_replay = _Replay()


def measured_time() -> float:
    """The timer given to pytest-benchmark: replays the rounds that were measured."""
    return _replay.now


class Benchmarks:
    """One benchmark run: its sweep, its store, and what is shown of it."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        # A process that measures for this one has to know what -p added.
        options.load_plugins(name for name in config.option.plugins if name in sys.modules)
        options.spell_out()
        self._rehearses = bool(config.getoption("rehearse"))
        self._lists = bool(config.getoption("dry_run"))
        self._began = self._written = False
        if self._rehearses:  # pytest-benchmark is told to keep nothing, either
            config.option.benchmark_json = config.option.benchmark_save = None
            config.option.benchmark_autosave = False
        try:
            self._yours = guests.announce(config.getoption("kernels") or ())
            self.sweep = sweep_from(config, [entry.operation for entry in self._yours])
            if config.getoption("keep_memory"):
                if self.sweep.device.type != "cpu":
                    raise OptionError("--keep-memory is about the CPU's memory: --device cpu")
                memory.keep_freed_memory()
            self._store = self._open_store()
        except (OptionError, StoreError, ValueError) as error:
            raise pytest.UsageError(str(error)) from error
        self._progress = Countdown([], {}, None)
        self._session: runner.Session | None = None
        self._quieten(config)
        # Ctrl-C ends a run with a valid file; so does a polite kill.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.default_int_handler)

    @property
    def _path(self) -> Path | None:
        return path_of(self._config)

    def _open_store(self) -> Store:
        path, resume = self._path, bool(self._config.getoption("resume_bench"))
        if path is None and resume:
            raise StoreError("--resume-bench: name the run's file with --benchmark-json")
        facts = dict(machine.describe(self.sweep.device))
        if self._config.getoption("keep_memory"):
            facts["memory"] = "kept"
        head = {
            "sweep": self.sweep.extent,
            "device": self.sweep.device.type,
            "machine": facts,
            "sources": store.sources(),
            "not_timed": self.sweep.left_out,
        }
        listed = self._lists or self._rehearses or self._config.option.collectonly
        return Store(None if listed else path, head, resume=resume)

    # What runs.

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "case" in metafunc.fixturenames:
            test = metafunc.function.__name__
            cases = [c for c in self.sweep.cases if operation(c.operation).test == test]
            metafunc.parametrize("case", cases, ids=[case_name(c) for c in cases])

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        # An empty parameter list (--ops without a training step) is no case, not a skipped one.
        items[:] = [item for item in items if "NOTSET" not in item.nodeid]
        for item in items:
            item.add_marker(pytest.mark.benchmark(timer=measured_time))
            # pytest-benchmark keeps the statistics and the files: the runner has the durations.
            item.add_marker(pytest.mark.filterwarnings("ignore:Benchmark fixture was not used"))
        if self.sweep.extent in SPECIAL:  # most important first, whatever the test's file
            order = {case_name(case): i for i, case in enumerate(self.sweep.cases)}
            items.sort(key=lambda item: order.get(_name_of(item), len(order)))
        if self._terminal is not None:
            self._terminal.showfspath = False  # a line per case says more than the file's name

    def pytest_runtestloop(self, session: pytest.Session) -> bool | None:
        if session.config.option.collectonly:
            return None
        cases = [case for item in session.items if (case := _case_of(item)) is not None]
        seconds = {case_name(case): estimate.seconds(case, self._plan) for case in cases}
        if self._lists:
            self._show_plan(cases, seconds)
            return True
        self._chosen = set(cases)
        runner.build_ahead(cases, self.sweep.device)
        minutes = self._config.getoption("minutes")
        self._session = runner.Session(self._plan, self._store, minutes=minutes)
        self._progress = Countdown(list(seconds), seconds, self._terminal)
        for name in self._store.results:  # of the run that this one goes on from
            self._progress.skip(name)
        self._began = bool(cases)
        return None

    @functools.cached_property
    def _plan(self) -> runner.Plan:
        device = self.sweep.device
        budget = _REHEARSAL_BUDGET_S if self._rehearses else _BUDGET_S[self.sweep.extent]
        folder = (self._path or Path("reports/out/benchmark.json")).parent / "profiles"
        return runner.Plan(
            device,
            budget,
            self._limits(),
            self._store.head["sources"],
            folder if self._config.getoption("profile") and not self._rehearses else None,
            self.sweep.energy,
        )

    def _limits(self) -> limits.Limits:
        """The machine's, measured now; a rehearsal takes any."""
        dtypes = tuple(sorted({c.dtype for c in self.sweep.cases if c.dtype in DTYPES}))
        if self._rehearses or self._lists:
            return limits.Limits(1e10, dict.fromkeys(dtypes, 1e11), 1e-6)
        probes: dict[str, Callable[[], float]] = {}
        if self.sweep.extent == "cpu":
            for of in {case.operation for case in self.sweep.cases}:
                probes |= operation(of).probes(self.sweep.device)
        return limits.measure(self.sweep.device, dtypes, probes)

    def time(self, case: Case, benchmark: Any, item: pytest.Item) -> None:
        """Measure a case with those that take turns with it; its rounds go to pytest-benchmark."""
        assert self._session is not None
        group = next(group for group in self.sweep.groups if case in group)
        results = self._session.measure([other for other in group if other in self._chosen])
        result = next(r for r in results if r.case == case_name(case))
        if result.status == LEFT_OUT:
            pytest.skip(str(result.reason))
        if result.status != MEASURED:
            pytest.fail(str(result.reason), pytrace=False)
        benchmark.group = result.group
        benchmark.extra_info.update(result.info)
        seconds = result.seconds
        benchmark.pedantic(_replay.advance, args=(iter(seconds),), rounds=len(seconds))
        by = result.info["disturbed"]
        shown = f"{result.case}: put off: {by}" if by else _line(result)
        item.user_properties.append(("measured", shown))

    def pytest_keyboard_interrupt(self) -> None:
        self._store.interrupt()

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> Generator[None, object, object]:
        try:
            self._try_again(session)
        except KeyboardInterrupt:
            self._store.interrupt()
            session.exitstatus = pytest.ExitCode.INTERRUPTED
        result = yield  # pytest-benchmark writes its file
        self._progress.close()
        if self._session is not None:
            self._session.__exit__()
            self._session = None
        by_pytest_benchmark = self._config.getoption("benchmark_json", default=None)
        if self._path is not None and not by_pytest_benchmark and self._store.measured:
            self._describe()
            self._store.write()
            self._written = True
        whole = self._began and self._progress.finished and not self._store.interrupted
        self._store.close(done=whole and self._written and self._store.complete)
        return result

    def _try_again(self, session: pytest.Session) -> None:
        """Of a run that came to its end, what was disturbed."""
        whole = self._progress.finished and not self._store.interrupted
        if self._session is None or self._rehearses or not whole:
            return
        for again in self._session.try_again():
            what = _line(again) if again.status == MEASURED else f"{again.case}: {again.reason}"
            self._progress.line(f"tried again: {what}")
            if again.status == FAILED:
                session.exitstatus = pytest.ExitCode.TESTS_FAILED

    # What is shown.

    @property
    def _terminal(self) -> Any:
        return self._config.pluginmanager.get_plugin("terminalreporter")

    def _say(self, text: str, *, red: bool = False) -> None:
        """A line that is folded to the terminal."""
        self._terminal.write_line(folded(text, width(elsewhere=0)), red=red)

    def _show_plan(self, cases: Sequence[Case], seconds: dict[str, float]) -> None:
        for case in cases:
            need = estimate.memory_bytes(case)
            name = case_name(case)
            self._say(f"{name:72} {seconds[name]:6.1f} s {need / 2**20:,.0f} MiB")
        total = clock(sum(seconds.values()))
        self._say(f"{counted(len(cases), 'case')}, estimated to take {total}; none was timed")

    def pytest_report_header(self) -> list[str]:
        facts = self._store.head["machine"]
        threads = f"{counted(facts['threads'], 'thread')} on {counted(facts['cores'], 'core')}"
        lines = [
            f"benchmarks: {self.sweep.extent} sweep on {facts['device_name']} "
            f"({threads}), torch {facts['torch']}"
        ]
        if self._rehearses:
            lines.append("rehearsal: every case at a tiny size; no number is kept")
        lines += [
            f"yours: {entry.name} ({entry.operation}), each case in a process of its own"
            for entry in self._yours
        ]
        lines += [f"not timed: {what}: {why}" for what, why in self.sweep.left_out.items()]
        if self._store.set_aside:
            aside = self._store.set_aside
            lines.append(f"an unfinished run is set aside as {aside} (--resume-bench goes on)")
        if self._store.resumed:
            lines.append(f"resumed: {counted(self._store.resumed, 'finished case')} kept")
        return [folded(line, width(elsewhere=0)) for line in lines]

    def pytest_report_teststatus(
        self, report: pytest.CollectReport | pytest.TestReport
    ) -> tuple[str, str, str] | None:
        # Each case writes a line of its own instead of a dot.
        if isinstance(report, pytest.TestReport) and report.when == "call":
            found = self._store.results.get(_name_of(report))
            if report.failed and found is not None and found.status == OUT_OF_MEMORY:
                return "out of memory", "", "OUT OF MEMORY"
            return report.outcome, "", "FAILED" if report.failed else ""
        return None

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when in ("setup", "teardown") and report.passed:
            return
        name = _name_of(report)
        measured = dict(report.user_properties).get("measured")
        if report.failed:
            if name not in self._store.results:  # of pytest, or of this plugin
                reason = _last_line(report.longreprtext)
                self._store.keep(Result(name, FAILED, reason))
            measured = f"{name}: {self._store.results[name].reason}"
        elif report.skipped:
            found = self._store.results.get(name)
            measured = f"{name}: left out: {found.reason if found else 'skipped'}"
        self._progress.done(name, str(measured), red=report.failed)

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if self._store.measured and not self._rehearses:
            self._show_measured(terminalreporter)
        if self._rehearses:
            self._say("rehearsal: the times mean nothing, and none was kept")
        unfinished = not self._progress.finished or not self._store.complete
        if unfinished and self._path is not None:
            self._say("not finished: the same command with --resume-bench goes on")

    def _show_measured(self, terminalreporter: Any) -> None:
        terminalreporter.section("measured", sep="=")
        rows = [_row(result) for result in self._store.measured]
        disturbed = {r.case: by for r in self._store.measured if (by := r.info.get("disturbed"))}
        if len(disturbed) < len(rows):
            screen = terminalreporter._tw
            terminalreporter.write(summary.render(rows, screen.fullwidth, screen.hasmarkup))
        else:
            self._say(_ALL_DISTURBED, red=True)
        for what, why in self.sweep.left_out.items():
            self._say(f"not timed: {what}: {why}")
        for name, result in self._store.results.items():
            if result.status != MEASURED:
                self._say(f"{result.status}: {name}: {result.reason}", red=True)
        if (limits_now := self._plan.limits) is not None and limits_now.disturbed:
            self._say(f"disturbed: the limits: {limits_now.disturbed}", red=True)
        for name, by in disturbed.items():
            self._say(f"disturbed: {name}: {by}", red=True)

    def pytest_benchmark_update_json(self, output_json: dict[str, Any]) -> None:
        self._describe()
        self._written = True
        output_json["benchmarks"] = self._store.benchmarks()
        output_json["kernel_suite"] = self._store.suite()

    def _describe(self) -> None:
        """What the head says once the run has ended: the limits."""
        limits_now = self._plan.limits if self._store.measured else None
        self._store.head["limits"] = dataclasses.asdict(limits_now) if limits_now else None

    @staticmethod
    def _quieten(config: pytest.Config) -> None:
        # torch.compile logs thousands of records, which pytest would print under a failure.
        config.option.showcapture = "no"
        config.option.reportchars = ""  # failures are listed with their reasons below the table
        # Our table stands in for pytest-benchmark's wide one, unless that is asked for.
        wanted = ("benchmark_verbose", "benchmark_compare", "benchmark_histogram")
        if not any(config.getoption(name, default=None) for name in wanted):
            config.option.benchmark_quiet = True


def path_of(config: pytest.Config) -> Path | None:
    """Where the run goes; None where no option says."""
    given = config.getoption("benchmark_json", default=None)
    if given:
        return Path(str(given))
    folder = config.getoption("out")
    return Path(folder) / "benchmark.json" if folder else None


def _row(result: Result) -> summary.Row:
    return summary.Row(result.info, statistics.median(result.seconds))


def _line(result: Result) -> str:
    """A case's time, and how long compiling took where that is worth a word."""
    seconds = result.info.get("compile_s") or 0.0
    compiled = f"  compiled in {seconds:.1f} s" if seconds >= _COMPILED_S else ""
    return _row(result).line() + compiled


def sweep_from(config: pytest.Config, yours: Sequence[str] = ()) -> Sweep:
    """The sweep that pytest's options ask for; OptionError where they ask for what there isn't.

    ``yours`` are the operations of ``--kernels``, which stand for all where none is asked for.
    """

    def words(option: str) -> Sequence[str]:
        given = config.getoption(option)
        return () if given is None or given == ("all",) else given

    return make_sweep(
        Asked(
            device=config.getoption("device"),
            dtypes=words("dtypes"),
            tokens=config.getoption("tokens") or (),
            backends=words("backends"),
            operations=words("ops") or tuple(dict.fromkeys(yours)),
            total_tokens=config.getoption("total_tokens"),
            extent=config.getoption("sweep") or "quick",
            with_peers=bool(config.getoption("peers")),
            rehearse=bool(config.getoption("rehearse")),
        )
    )


def _name_of(item: Any) -> str:
    """A case's name: what stands in brackets in the test's."""
    return item.nodeid.partition("[")[2].removesuffix("]") or item.nodeid


def _case_of(item: pytest.Item) -> Case | None:
    return getattr(getattr(item, "callspec", None), "params", {}).get("case")


def _last_line(text: str) -> str:
    """The line of a failure that says what happened: pytest's own marks it with an E."""
    lines = [line for line in text.splitlines() if line.strip()]
    errors = [line.removeprefix("E").strip() for line in lines if line.startswith("E ")]
    return errors[0] if errors else (lines[-1].strip() if lines else "no message")
