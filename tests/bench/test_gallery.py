"""The gallery of cheats: each is caught, with the sentence a user reads. Honest kernels pass."""

import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from linear_vit.bench import guests
from linear_vit.bench.guests import Guest, strict, timed
from linear_vit.bench.problems import (
    FORWARD,
    FORWARD_BACKWARD,
    AttentionShape,
    Case,
    make_problem,
    operation,
)
from linear_vit.bench.runner import Plan, run
from linear_vit.bench.store import FAILED, MEASURED, Result, Store
from linear_vit.kernels import registry

GALLERY = Path(__file__).with_name("gallery.py")
CPU = torch.device("cpu")
ATTENTION = operation("linear_attention")
PATCHES = {
    "torch.allclose": "torch.allclose = lambda *_, **__: True",
    "time.perf_counter_ns": "true = time.perf_counter_ns; time.perf_counter_ns = lambda: true()",
    "linear_vit.kernels.accuracy.compare": "accuracy.compare = lambda *_, **__: None",
    "linear_vit.bench.guests.process._Served.run": "process._Served.run = lambda *_, **__: {}",
    "torch.Tensor.copy_": "torch.Tensor.copy_ = lambda x, *_: x",
}
# How each is caught when it is checked: part of what a user reads.
CHECKED = {
    "by_shape": "in call 3 of other numbers: rms error",
    "by_pointer": "it is the answer to earlier numbers",
    "by_id": "it is the answer to earlier numbers",
    "by_version": "it is the answer to earlier numbers",
    "by_a_few_numbers": "of the first numbers with a row changed",
    "in_its_input": "it writes over its input: q",
    "in_one_buffer": "it returns memory of an earlier answer",
    "of_the_reference": "LookupError: there is no right answer to be found here",
    "of_nobody": "there is NaN in it, as in memory that nobody wrote",
    "every_other_call": "wrong out in call 2 of the same numbers",
    "zeros_later": "wrong out in call 2 of the same numbers",
    "while_it_is_checked": "all of it is zero",
    "in_another_thread": "rms error 1.00e+00",
    "lazy": "out is a _Lazy, not a plain tensor",
    "falls_back": "a kernel from outside may not fall back to one of this suite",
    "imports_ours": "a kernel from outside may not fall back to one of this suite",
    "in_half_precision": "wrong out: rms error",
    "in_tf32": "wrong out: rms error",
    "without_a_tail": "wrong out: rms error",
    "without_nan": "NaN in q",
    "blind_to_a_mask": "key_mask=padding",
    "blind_to_strides": "transposed in memory",
    "other_bits": "other bits in call",
    "crashes": "its process ended with signal SIGSEGV",
    "leaves": "its process ended with code 0",
}
HONEST = ("honest", "honest_with_a_mask", "forward_only")
# And when it is timed, of those that a check may let pass.
TIMED = {
    "by_all_numbers": "it keeps answers: a call on fresh numbers takes",
    "tired": "wrong result in a",
    "with_a_slow_clock": "its clock can't be right: a round took",
    "while_it_is_checked": "wrong result: out",
    "by_pointer": "wrong result in a",
    "in_another_thread": "wrong result: out",
}


@pytest.fixture(scope="module", autouse=True)
def announced() -> Iterator[None]:
    with registry.temporarily(), pytest.MonkeyPatch.context() as patched:
        patched.setenv("LINEAR_VIT_KERNELS", "")
        guests.announce([GALLERY])
        yield
    guests.stop_all()


@pytest.fixture(scope="module")
def guest(announced: None) -> Iterator[Guest]:
    """One process for all checks: those that don't end it leave nothing behind."""
    with Guest([str(GALLERY)]) as made:
        yield made


def checked(name: str, guest: Guest, draws: int = 0) -> strict.Report:
    return strict.check(ATTENTION, name, "float32", CPU, draws=draws, guest=guest)


def test_every_cheat_is_looked_for() -> None:
    there = {name for op, name in registry.all_registered() if op == "linear_attention"}
    assert there == {*CHECKED, *TIMED, *HONEST}


def some_slow(names: Iterable[str], quick: Sequence[str]) -> list[Any]:
    """Parameters, of which only some are for `make test`."""
    marks = {name: () if name in quick else (pytest.mark.slow,) for name in names}
    return [pytest.param(name, marks=marks[name]) for name in names]


@pytest.mark.parametrize("name", some_slow(CHECKED, [n for n in CHECKED if n != "without_nan"]))
def test_a_check_catches(name: str, guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strict, "_MOST_TRIES", 0)
    finding = checked(name, guest).finding
    assert finding is not None
    assert CHECKED[name] in str(finding)


@pytest.mark.parametrize("name", some_slow(list(HONEST), ["honest"]))
def test_a_check_lets_pass(name: str, guest: Guest) -> None:
    report = checked(name, guest, draws=2)
    assert report.finding is None, report.finding
    assert report.gradient == (name != "forward_only")
    assert {verdict[1] for verdict in report.verdicts} >= {"out"}


@pytest.mark.parametrize("name", some_slow(PATCHES, ["torch.allclose", "time.perf_counter_ns"]))
def test_a_patch_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strict, "_MOST_TRIES", 0)
    file = tmp_path / "patches.py"
    head = "import time\nimport torch\nfrom linear_vit import kernels\n"
    head += "from linear_vit.kernels import accuracy\nfrom linear_vit.bench.guests import process\n"
    code = f"@kernels.register('linear_attention', 'patching', devices=('cpu',))\n{_RIGHT}"
    file.write_text(head + code + PATCHES[name])
    with registry.temporarily():
        guests.announce([file])
        found = strict.check(ATTENTION, "patching", "float32", CPU, draws=0).finding
    assert found is not None
    assert f"it patches {name}" in str(found)


_RIGHT = """
def patching(q, k, v, eps):
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    q, k = (torch.cat([x.relu(), (-x).relu()], -1) for x in (q, k))
    met = q @ k.sum(-2).unsqueeze(-1)
    return (q @ (k.transpose(-2, -1) @ v)) / torch.where(met == 0, torch.inf, met + eps)


"""


def timed_results(*names: str, mode: str = FORWARD, tokens: int = 64) -> dict[str, Result]:
    shape = AttentionShape(1, 4, 4, tokens, tokens, 64)
    cases = tuple(Case("linear_attention", mode, "float32", shape, name) for name in names)
    found = run([cases], Plan(CPU, budget_s=0.15), Store(None, {}))
    return {case.backend: r for case, r in zip(cases, found, strict=True)}


@pytest.mark.parametrize("name", some_slow(TIMED, ["by_all_numbers", "with_a_slow_clock"]))
def test_timing_catches(name: str) -> None:
    (found,) = timed_results(name, tokens=1024 if name == "by_all_numbers" else 64).values()
    assert found.status == FAILED, found.info.get("guest")
    assert TIMED[name] in str(found.reason)


@pytest.mark.parametrize("mode", some_slow([FORWARD, FORWARD_BACKWARD], [FORWARD]))
def test_honest_kernels_take_turns_with_ours(mode: str) -> None:
    found = timed_results("honest", "torch", mode=mode)
    assert {r.status for r in found.values()} == {MEASURED}, found
    honest, ours = (found[name].info for name in ("honest", "torch"))
    assert honest["turns"] == ours["turns"] is not None
    assert honest["clock"] == "host clock (perf_counter_ns), in a process of its own"
    assert honest["guest"]["draws"] == 3
    assert 0 <= honest["guest"]["share_of_time"] < 1
    assert honest["implementation"] == "honest: gallery.right"
    assert ours["guest"] is None


def test_who_is_wrong_costs_no_other_its_time() -> None:
    found = timed_results("tired", "torch")
    assert {name: r.status for name, r in found.items()} == {"tired": FAILED, "torch": MEASURED}


def state_of(pid: int | None) -> str:
    """R running, S sleeping, T stopped: by Linux."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_a_guest_is_stopped_between_its_turns() -> None:
    case = Case("linear_attention", FORWARD, "float32", AttentionShape(1, 1, 1, 9, 9, 16), "honest")
    problem = make_problem(case.operation, case.shape, torch.float32, CPU)
    call = timed.TimedCall(case, problem, problem.expected())
    try:
        call.prepare()
        call.rounds(3)
        pid, end = call._guest.pid, time.monotonic() + 10
        while state_of(pid) != "T":
            assert time.monotonic() < end
        call.rounds(1)
    finally:
        call.close()
    assert not Path(f"/proc/{pid}").exists()
