"""Turns that something disturbs: recorded waits and clocks, replayed; nothing is timed."""

import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from linear_vit import bench, kernels
from linear_vit.bench import runner
from linear_vit.bench.instruments import clock, limits, machine
from linear_vit.bench.instruments.canary import ARITHMETIC, MEMORY, Canary, _Operations
from linear_vit.bench.instruments.host import QUOTA, STOLEN, WAITED, Host, Sample, disturbances
from linear_vit.bench.instruments.limits import Cache, Limits
from linear_vit.bench.instruments.telemetry import Watch
from linear_vit.bench.problems import AttentionShape, Case, case_name
from linear_vit.bench.runner import Plan
from linear_vit.bench.store import FAILED, MEASURED, Result, Store

CPU = torch.device("cpu")
START = Sample(10.0, {1: 5.0, 2: 3.0}, {1: 0.5, 2: 0.1}, stolen=2.0, stopped=1.0)


# ---- what the accounts say -----------------------------------------------------------------------


def after(seconds: float, ran: dict[int, float], waited: dict[int, float], **more: float) -> Sample:
    """``START`` so many seconds later, of which its threads ran and waited for so long."""
    return Sample(
        START.at + seconds,
        {thread: START.ran.get(thread, 0.0) + s for thread, s in ran.items()},
        {thread: START.waited.get(thread, 0.0) + s for thread, s in waited.items()},
        START.stolen + more.get("stolen", 0.0),
        START.stopped + more.get("stopped", 0.0),
    )


@pytest.mark.parametrize(
    ("end", "found"),
    [
        # Beside a process that multiplies matrices: 187 ms in the place of 0.43.
        (after(0.187, {1: 0.09, 2: 0.09}, {1: 0.08, 2: 0.06}), [WAITED]),
        (after(0.0036, {1: 0.0036, 2: 0.0034}, {1: 0.00005, 2: 0.0}), []),
        (after(0.1, {1: 0.1, 3: 0.05}, {1: 0.0, 3: 0.01}), [WAITED]),  # a thread that is new
        (after(0.1, {1: 0.1}, {1: 0.0}), []),  # and one that has ended
        (after(0.1, {1: 0.1}, {1: 0.0}, stolen=0.02), [STOLEN]),
        (after(0.1, {1: 0.1}, {1: 0.0}, stolen=0.01), []),  # one tick
        (after(1.0, {1: 1.0}, {1: 0.0}, stolen=0.03), []),
        (after(0.1, {1: 0.05}, {1: 0.0}, stopped=0.05), [QUOTA]),
    ],
)
def test_the_accounts_tell_a_turn_that_was_disturbed(end: Sample, found: list[str]) -> None:
    assert disturbances(START, end, cores=2) == (found, [])


def test_waits_that_our_own_threads_cause_one_another_are_told_apart() -> None:
    """Four threads on two cores wait half of the time, whoever else there is."""
    threads = (1, 2, 3, 4)
    end = after(1.0, dict.fromkeys(threads, 0.5), dict.fromkeys(threads, 0.5))
    assert disturbances(START, end, cores=2) == ([], ["4 threads of this process on 2 cores"])
    assert disturbances(START, end, cores=4) == ([WAITED], [])
    idle = after(1.0, {1: 0.9, 2: 0.9, 3: 0.01, 4: 0.01}, {1: 0.1, 2: 0.1, 3: 0.0, 4: 0.0})
    assert disturbances(START, idle, cores=2) == ([WAITED], [])


def test_many_threads_wait_no_longer_than_the_slowest() -> None:
    """A few µs for each of 64 threads to wake are no neighbour."""
    threads = range(64)
    end = after(1e-3, dict.fromkeys(threads, 9e-4), dict.fromkeys(threads, 5e-6))
    assert disturbances(START, end, cores=64) == ([], [])
    one = after(1e-3, dict.fromkeys(threads, 9e-4), {**dict.fromkeys(threads, 5e-6), 7: 1e-4})
    assert disturbances(START, one, cores=64) == ([WAITED], [])


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def test_linux_keeps_the_accounts(tmp_path: Path) -> None:
    ours = f"cpu{min(os.sched_getaffinity(0))}"
    write(
        tmp_path,
        {
            "proc/self/task/11/schedstat": "2000000000 5000000 17\n",
            "proc/self/task/12/schedstat": "1000000 0 3\n",
            # Of the cores that are ours; another one's are none of our business.
            "proc/stat": "cpu  1 0 1 9 0 0 0 9999 0 0\ncpu9999 1 0 1 9 0 0 0 9999 0 0\n"
            f"{ours} 1 0 1 9 0 0 0 {3 * os.sysconf('SC_CLK_TCK')} 0 0\n",
            "proc/self/cgroup": "0::/box/inner\n",
            "sys/fs/cgroup/box/cpu.stat": "usage_usec 9\nnr_throttled 2\nthrottled_usec 250000\n",
            "sys/fs/cgroup/box/inner/cpu.stat": "usage_usec 9\n",
        },
    )
    found = Host(tmp_path).sample()
    assert found.ran == {11: pytest.approx(2.0), 12: pytest.approx(1e-3)}
    assert found.waited == {11: pytest.approx(5e-3), 12: 0.0}
    assert (found.stolen, found.stopped) == (3.0, 0.25)
    (tmp_path / "proc/self/task/12/schedstat").unlink()  # it has ended
    assert set(Host(tmp_path).sample().ran) == {11}


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "150000 100000\n"}, 1.5),
        (
            {
                "proc/self/cgroup": "0::/a\n",
                "sys/fs/cgroup/cpu.max": "max 100000\n",
                "sys/fs/cgroup/a/cpu.max": "400000 100000\n",
            },
            4.0,
        ),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
        (
            {
                "proc/self/cgroup": "9:memory:/x\n3:cpu,cpuacct:/a\n",
                "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_quota_us": "50000\n",
                "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_period_us": "100000\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            },
            0.5,
        ),
        ({}, None),
    ],
)
def test_a_quota_counts_as_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], cores: float | None
) -> None:
    write(tmp_path, files)
    assert machine.cpu_quota(tmp_path) == cores
    monkeypatch.setattr(machine, "cpu_quota", lambda: cores)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2})
    assert machine.available_cores() == {1.5: 1, 4.0: 3, None: 3, 0.5: 1}[cores]
    facts = machine.describe(CPU)
    assert (facts["affinity"], facts["cpu_quota"]) == (3, cores)


# ---- the canary ----------------------------------------------------------------------------------


def test_the_canary_tells_what_is_slow() -> None:
    """One slow reading is jitter; it is slow that stays slow while it is looked at again."""
    usual = {ARITHMETIC: 52e-6, MEMORY: 50e-6}
    both, one = {ARITHMETIC: 70e-6, MEMORY: 120e-6}, {ARITHMETIC: 53e-6, MEMORY: 90e-6}
    readings = [{ARITHMETIC: 50e-6 + i % 5 * 1e-6, MEMORY: 48e-6} for i in range(20)]
    readings += [usual, both, usual, *[both] * 4, both, *[one] * 3, *[both] * 3, usual]
    canary = Canary(iter(readings).__next__)
    seen = [[], [], [ARITHMETIC, MEMORY], [MEMORY], []]
    assert [canary.slow() for _ in range(5)] == seen


def test_the_canary_of_this_machine_takes_some_time() -> None:
    read = _Operations().read
    for _ in range(3):
        assert set(read()) == {ARITHMETIC, MEMORY}
    # 50 µs each, or what a busy machine makes of that.
    assert all(5e-6 < seconds < 1 for seconds in read().values())


# ---- turns ---------------------------------------------------------------------------------------


class Recorded:
    """A machine with a neighbour: a clock that calls move, and the waits of what they did."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, neighbour: Iterable[bool]) -> None:
        """``neighbour``: whether it is busy, turn by turn; then it is not."""
        self.now = self.waited = 0.0
        self.cores = 2
        self._busy = itertools.chain(neighbour, itertools.repeat(False))
        self._is_busy = False
        times = SimpleNamespace(
            perf_counter=lambda: self.now, perf_counter_ns=lambda: round(self.now * 1e9)
        )
        monkeypatch.setattr(clock, "time", times)

    def watch(self) -> Watch:
        watch = Watch(host=self)  # type: ignore[arg-type]
        begin = watch.begin

        def begins() -> None:
            self._is_busy = next(self._busy)
            begin()

        watch.begin = begins  # type: ignore[method-assign]
        return watch

    def sample(self) -> Sample:
        return Sample(self.now, {1: self.now}, {1: self.waited})

    def call(self, seconds: float) -> Callable[[], None]:
        def call() -> None:
            self.now += 100 * seconds if self._is_busy else seconds
            self.waited += 50 * seconds if self._is_busy else 0.0

        return call


def test_a_disturbed_turn_is_taken_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The median is that of the quiet machine, of each call that took turns."""
    recorded = Recorded(monkeypatch, [False, True, True, False, True, False])
    watch = recorded.watch()
    calls = {"a": recorded.call(0.43e-3), "b": recorded.call(2e-3)}
    found = clock.measure_interleaved(calls, CPU, budget_s=9, target=0, max_rounds=7, watch=watch)
    assert found["a"].median == pytest.approx(0.43e-3)
    assert found["b"].median == pytest.approx(2e-3)
    assert max(found["a"].seconds) == pytest.approx(0.43e-3)
    for timing in found.values():
        assert (len(timing.seconds), timing.dropped) == (7, 3)
        assert (timing.stop, timing.disturbed) == ("rounds", None)
    assert found["a"].over(found["b"]) == pytest.approx(0.43 / 2)
    summary = watch.summary(3)
    assert (summary["turns"], summary["turns_dropped"]) == (10, 3)
    assert summary["disturbances"] == {WAITED: 3}


def test_a_call_that_stays_disturbed_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = Recorded(monkeypatch, itertools.chain([False] * 3, itertools.repeat(True)))
    found = clock.measure(recorded.call(1e-3), CPU, budget_s=1e9, watch=recorded.watch())
    assert found.stop == "disturbed"
    assert found.disturbed == f"24 of 27 turns disturbed: {WAITED} (24)"
    assert found.seconds[:3] == (pytest.approx(1e-3),) * 3
    assert len(found.seconds) == 27


def test_enough_quiet_turns_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of three turns are disturbed, for good: fewer rounds, and those are right."""
    recorded = Recorded(monkeypatch, itertools.cycle([True, True, False]))
    found = clock.measure(recorded.call(1e-3), CPU, budget_s=1e9, target=-1, watch=recorded.watch())
    assert (found.stop, found.disturbed) == ("disturbed", None)
    assert len(found.seconds) >= 5
    assert max(found.seconds) == pytest.approx(1e-3)


def test_long_calls_are_not_taken_again_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = Recorded(monkeypatch, itertools.repeat(True))
    before = recorded.now
    found = clock.measure(recorded.call(0.01), CPU, budget_s=0.25, watch=recorded.watch())
    assert found.disturbed is not None
    assert len(found.seconds) == 4  # of a second each
    assert recorded.now - before < 6


def test_nothing_is_dropped_on_a_quiet_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = Recorded(monkeypatch, [])
    watch = recorded.watch()
    found = clock.measure(recorded.call(1e-3), CPU, budget_s=9, target=-1, watch=watch)
    assert (watch.turns, watch.dropped, found.dropped) == (200, 0, 0)


def test_what_the_canary_sees_before_or_after_a_turn_disturbs_it() -> None:
    seen = iter([[], [], [MEMORY], [], [], [ARITHMETIC], [ARITHMETIC], []])
    watch = Watch(canary=SimpleNamespace(slow=lambda: next(seen)))  # type: ignore[arg-type]
    found = []
    for _ in range(5):
        watch.begin()
        found.append(watch.end())
    # Before the first; after it; after the second; again before the third, and so on.
    assert found == [False, True, False, True, True]
    assert watch.sentence() == f"3 of 5 turns disturbed: {ARITHMETIC} (2), {MEMORY} (1)"


# ---- a run ---------------------------------------------------------------------------------------


LIMITS = Limits(1e10, {"float32": 1e11}, 1e-6)
PLAN = Plan(CPU, budget_s=0.01, limits=LIMITS, sources="s")
CASES = [
    Case("linear_attention", "forward", "float32", AttentionShape(1, 2, 2, n, n, 16), "torch")
    for n in (16, 32)
]


class Stormy:
    """A watch each of whose turns is disturbed, or none."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, storms: Iterable[bool]) -> None:
        """``storms``: of the measurements, one after another."""
        self._storms: Iterator[bool] = iter(storms)
        monkeypatch.setattr(Watch, "of", self.of)

    def of(self, device: torch.device) -> Watch:
        reasons = [WAITED] if next(self._storms) else []
        return Watch(canary=SimpleNamespace(slow=lambda: reasons))  # type: ignore[arg-type]


def measured(found: list[Result]) -> list[str | None]:
    assert [result.status for result in found] == [MEASURED] * len(found)
    return [result.info["disturbed"] for result in found]


def test_a_disturbed_case_is_put_off_and_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    Stormy(monkeypatch, [True, False, False])
    seen: list[tuple[str, bool]] = []
    store = Store(None, {"sources": "s"})
    found = runner.run(
        [(case,) for case in CASES],
        PLAN,
        store,
        progress=lambda result: seen.append((result.case, bool(result.info["disturbed"]))),
    )
    names = list(map(case_name, CASES))
    assert seen == [(names[0], True), (names[1], False), (names[0], False)]
    assert measured(found) == [None, None]
    assert store.results[names[0]].info["telemetry"]["turns_dropped"] == 0


def test_a_case_that_stays_disturbed_is_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    Stormy(monkeypatch, [True, False, True])
    store = Store(None, {"sources": "s"})
    one, other = measured(runner.run([(case,) for case in CASES], PLAN, store))
    assert other is None
    assert one is not None
    assert one.endswith(f"turns disturbed: {WAITED} ({one.split()[0]})")
    assert store.finished(case_name(CASES[0])) is None  # a resumed run measures it again
    assert store.finished(case_name(CASES[1])) is not None


def result(tokens: int, low: float, high: float, **more: Any) -> Result:
    info = {"operation": "o", "backend": "b", "pass": "forward", "dtype": "d", "captured": False}
    info |= {"N": tokens, "shape": {"B": 1, "N": tokens, "M": tokens}, "total_tokens": None}
    info |= {"median_interval_s": (low, high), "disturbed": None} | more
    return Result(f"{tokens} {low} {more}", MEASURED, seconds=(low, high), info=info)


def test_calls_of_a_users_python_are_measured_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    Stormy(monkeypatch, [True, False, True, True])
    first, second = (bench.measure({"a": lambda: None}, budget_s=0.01)["a"] for _ in range(2))
    assert first.disturbed is None
    assert str(second.disturbed).endswith(f"disturbed: {WAITED} ({second.disturbed.split()[0]})")


def test_who_fails_its_second_try_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    Stormy(monkeypatch, [True, False])
    true, tries = kernels.linear_attention, [0]

    def breaks(q: Any, k: Any, v: Any, *, eps: float = 1e-6, backend: str | None = None) -> Any:
        if tries[0]:
            raise RuntimeError("worn out")
        return true(q, k, v, eps=eps, backend=backend)

    def shown(result: Result) -> None:
        tries[0] += 1

    monkeypatch.setattr(kernels, "linear_attention", breaks)
    (found,) = runner.run([(CASES[0],)], PLAN, Store(None, {"sources": "s"}), progress=shown)
    assert (found.status, found.reason) == (FAILED, "RuntimeError: worn out")


def test_who_is_slower_than_a_longer_one_is_doubted() -> None:
    slow, longer = result(64, 2.1, 2.2), result(256, 1.9, 2.0)
    assert runner.slower_than_longer([slow, longer]) == {slow.case}
    assert runner.slower_than_longer([result(64, 1.9, 2.2), longer]) == set()  # within its interval
    assert runner.slower_than_longer([longer, result(512, 2.1, 2.2)]) == set()
    for apart in (
        {"backend": "c"},
        {"dtype": "e"},
        {"shape": {"B": 2, "N": 64, "M": 64}},
        {"total_tokens": 4096},  # the same work at every length
        {"disturbed": "by something"},  # tried again anyhow
    ):
        assert runner.slower_than_longer([result(64, 2.1, 2.2, **apart), longer]) == set()


def test_who_is_slower_than_a_longer_one_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    Stormy(monkeypatch, [False] * 3)
    doubted: list[set[str]] = [{case_name(CASES[0])}]
    monkeypatch.setattr(runner, "slower_than_longer", lambda results: doubted[0])
    seen: list[str] = []
    store = Store(None, {"sources": "s"})
    groups = [(case,) for case in CASES]
    runner.run(groups, PLAN, store, progress=lambda result: seen.append(result.case))
    assert seen == [case_name(case) for case in (*CASES, CASES[0])]


# ---- limits --------------------------------------------------------------------------------------


def test_data_that_fit_a_cache_are_held_against_its_rate() -> None:
    caches = (Cache("L2", 1000, 4e11), Cache("L3", 10_000, 2e11))
    found = Limits(1e10, {}, 1e-6, caches=caches)
    assert found.least_seconds(1000, 0, "float32") == {"copy in L2 cache": 1000 / 4e11}
    assert found.least_seconds(1001, 0, "float32") == {"copy in L3 cache": 1001 / 2e11}
    assert found.least_seconds(10_001, 0, "float32") == {"copy": 10_001 / 1e10}


def test_caches_are_those_of_our_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2})
    for core in range(4):
        for index, (level, kind, size, shared) in enumerate(
            [
                (1, "Data", "48K", core),
                (1, "Instruction", "32K", core),
                (2, "Unified", "2048K", core),
                (3, "Unified", "32M", core // 2),
            ]
        ):
            folder = f"sys/devices/system/cpu/cpu{core}/cache/index{index}"
            texts = {"level": level, "type": kind, "size": size, "shared_cpu_list": shared}
            write(tmp_path, {f"{folder}/{name}": f"{text}\n" for name, text in texts.items()})
    assert machine.caches(tmp_path) == {"L2": 3 * 2**21, "L3": 2 * 2**25}
    assert machine.caches(tmp_path / "nowhere") == {}


def test_no_share_is_above_1_without_a_word() -> None:
    for rate, beaten in ((1e20, False), (1.0, True)):
        plan = Plan(CPU, budget_s=0.01, limits=Limits(1e30, {"float32": rate}, 1e-6))
        (found,) = runner.run([(CASES[0],)], plan, Store(None, {}))
        assert (found.info["share_of_limit"] > 1) == beaten
        assert (found.info["limit_note"] is not None) == beaten


def test_limits_that_were_disturbed_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    timing = clock.Timing((2.0, 1.0), 1, "made up")
    bad = clock.Timing((4.0, 3.0), 1, "made up", disturbed="a neighbour")
    answers = iter([bad, timing, bad, bad])  # the copy once, the product twice
    monkeypatch.setattr(clock, "measure", lambda *_, **__: next(answers))
    monkeypatch.setattr(machine, "caches", lambda: {})
    found = limits.measure(CPU, ("float32",))
    assert found.copy_bytes_per_s == 2 * 2**28
    assert found.disturbed == "a neighbour"
