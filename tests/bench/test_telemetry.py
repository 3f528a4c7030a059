"""Telemetry from a made-up NVML and a made-up /proc; a clock that throws throttled rounds away."""

import itertools
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from linear_vit.bench.instruments import clock
from linear_vit.bench.instruments.telemetry import OTHERS, Linux, Nvml, Reading, Watch, source_for

CPU = torch.device("cpu")


class NVMLError(Exception):
    pass


def fake_nvml(**answers: Any) -> SimpleNamespace:
    """A module like pynvml. An answer that is an exception is raised."""
    answers.setdefault("processes", NVMLError("nobody used it"))

    def query(name: str) -> Any:
        def ask(handle: str, *_: Any) -> Any:
            assert handle == "a GPU"
            answer = answers[name]
            if isinstance(answer, Exception):
                raise answer
            return answer

        return ask

    return SimpleNamespace(
        NVMLError=NVMLError,
        NVML_CLOCK_SM=1,
        NVML_CLOCK_MEM=2,
        NVML_TEMPERATURE_GPU=0,
        nvmlDeviceGetClockInfo=lambda handle, kind: answers["clocks"][kind],
        nvmlDeviceGetPowerUsage=query("power"),
        nvmlDeviceGetTemperature=query("temperature"),
        nvmlDeviceGetCurrentClocksThrottleReasons=query("reasons"),
        nvmlDeviceGetProcessUtilization=query("processes"),
    )


def test_nvml_values_have_their_units() -> None:
    nvml = fake_nvml(clocks={1: 1980, 2: 3201}, power=612_345, temperature=61, reasons=0)
    reading = Nvml(nvml, "a GPU").read()
    assert reading == Reading(
        {
            "clock_mhz": 1980.0,
            "memory_clock_mhz": 3201.0,
            "power_w": 612.345,
            "temperature_c": 61.0,
        }
    )


@pytest.mark.parametrize(
    ("bits", "throttled", "remarks"),
    [
        (0x1, (), ()),  # idle
        (0x4, (), ("software power cap",)),
        (0x8, ("hardware slowdown",), ()),
        (0x20 | 0x4, ("software thermal slowdown",), ("software power cap",)),
        (0x40, ("hardware thermal slowdown",), ()),
        (0x80, ("hardware power brake",), ()),
    ],
)
def test_only_faults_are_throttling(bits: int, throttled: tuple, remarks: tuple) -> None:
    nvml = fake_nvml(clocks={1: 1, 2: 1}, power=1, temperature=1, reasons=bits)
    reading = Nvml(nvml, "a GPU").read()
    assert (reading.disturbed, reading.remarks) == (throttled, remarks)


def test_what_a_card_lacks_is_left_out() -> None:
    lacking = NVMLError("not supported")
    nvml = fake_nvml(clocks={1: 1, 2: 2}, power=lacking, temperature=50, reasons=lacking)
    reading = Nvml(nvml, "a GPU").read()
    assert set(reading.values) == {"clock_mhz", "memory_clock_mhz", "temperature_c"}
    assert reading.disturbed == ()


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A root folder of a two-core machine that offers everything."""
    files = {
        "proc/stat": "cpu  100 0 50 800 10 0 5 35 0 0\ncpu0 1 2 3\n",
        "proc/loadavg": "1.25 0.50 0.20 2/300 4242\n",
        "sys/class/thermal/thermal_zone0/type": "x86_pkg_temp\n",
        "sys/class/thermal/thermal_zone0/temp": "71500\n",
        "sys/class/thermal/thermal_zone1/type": "iwlwifi_1\n",
        "sys/class/thermal/thermal_zone1/temp": "99000\n",
    }
    for core in os.sched_getaffinity(0):
        folder = f"sys/devices/system/cpu/cpu{core}"
        files[f"{folder}/cpufreq/scaling_cur_freq"] = "2500000\n"
        files[f"{folder}/thermal_throttle/package_throttle_count"] = "7\n"
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_linux_tells_what_it_has(machine: Path) -> None:
    linux = Linux(machine)
    (machine / "proc/stat").write_text("cpu  150 0 60 810 10 0 5 65 0 0\n")
    first = linux.read()
    assert first.values == {
        "clock_mhz": 2500.0,
        "temperature_c": 71.5,
        "load": 1.25,
        "steal_share": 30 / 100,
    }
    assert first.disturbed == ()
    for path in machine.rglob("package_throttle_count"):
        path.write_text("8\n")
    assert linux.read().disturbed == ("CPU package thermal throttling",)
    assert linux.read().disturbed == ()  # counted once


def test_a_machine_that_offers_nothing_is_no_error(tmp_path: Path) -> None:
    assert Linux(tmp_path).read() == Reading({})
    watch = Watch()
    watch.begin()
    watch.look()
    assert not watch.end()
    found = watch.summary(0)
    assert (found["source"], found["samples"], found["turns"]) == (None, 0, 1)


def test_this_machine_has_a_source() -> None:
    source = source_for(CPU)
    assert source is not None
    assert "load" in source.read().values


class Script:
    """A source whose turns throttle as told; then never again."""

    name = "script"

    def __init__(self, *throttled: bool) -> None:
        self._script = itertools.chain(throttled, itertools.repeat(False))
        self._values = itertools.count(1000.0)

    def read(self) -> Reading:
        reasons = ("too hot",) if next(self._script) else ()
        return Reading({"clock_mhz": next(self._values)}, reasons)


def test_throttled_rounds_are_dropped_and_counted() -> None:
    watch = Watch(Script(False, True, True))
    calls = {"a": lambda: None, "b": lambda: None}
    timings = clock.measure_interleaved(
        calls, CPU, budget_s=60, target=0, max_rounds=6, watch=watch
    )
    for timing in timings.values():
        assert (len(timing.seconds), timing.dropped, timing.stop) == (6, 2, "rounds")
    found = watch.summary(2)
    assert found["samples"] == 8
    assert found["clock_mhz"] == [1000.0, 1003.5, 1007.0]
    assert found["throttle_reasons"] == ["too hot"]
    assert (found["throttled_rounds_dropped"], found["gave_up"]) == (2, False)
    assert found["power_w"] is None


def used(*processes: tuple[int, int, int]) -> list[SimpleNamespace]:
    return [SimpleNamespace(timeStamp=t, pid=pid, smUtil=util) for t, pid, util in processes]


def test_another_process_on_the_gpu_is_seen_and_our_own_are_not() -> None:
    mine, parent, other = os.getpid(), os.getppid(), 2**22 + 1
    nvml = fake_nvml(clocks={1: 1, 2: 1}, power=1, temperature=1, reasons=0)
    seen = []

    def answer(handle: str, since: int) -> list[SimpleNamespace]:
        seen.append(since)
        found = answers.pop(0)
        if found is None:
            raise NVMLError("not found")
        return found

    nvml.nvmlDeviceGetProcessUtilization = answer
    answers = [
        used((5, other, 90)),  # before anything was timed
        used((9, mine, 80), (9, parent, 3)),
        used((12, mine, 80), (12, other, 0)),
        used((14, mine, 80), (15, other, 40)),
        None,  # it has not looked since: what it saw stands, for all turns between two looks
        used((16, other, 40)),  # no number of ours: NVML's are of another namespace
    ]
    gpu = Nvml(nvml, "a GPU")
    assert [gpu.read().disturbed for _ in range(5)] == [(), (), (OTHERS,), (OTHERS,), ()]
    assert seen == [0, 5, 9, 12, 15, 15]
