"""The runner as a user's Python and the plugin call it, with no pytest between."""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from linear_vit import bench, kernels
from linear_vit.bench import runner
from linear_vit.bench.group import claim
from linear_vit.bench.instruments import memory
from linear_vit.bench.instruments.limits import Limits
from linear_vit.bench.problems import AttentionShape, Case, case_name
from linear_vit.bench.runner import Plan
from linear_vit.bench.store import FAILED, LEFT_OUT, MEASURED, OUT_OF_MEMORY, Result, Store
from linear_vit.kernels import registry

CPU = torch.device("cpu")
LIMITS = Limits(1e10, {"float32": 1e11}, 1e-6)
PLAN = Plan(CPU, budget_s=0.01, limits=LIMITS, sources="s")
SMALL = AttentionShape(1, 2, 2, 32, 32, 16)
CASES = tuple(
    Case("linear_attention", "forward", "float32", SMALL, name) for name in ("torch", "reference")
)


def run(*groups: tuple[Case, ...], **more: Any) -> dict[str, Result]:
    store = more.pop("store", None) or Store(None, {"sources": "s"})
    return {r.case: r for r in runner.run(groups, PLAN, store, **more)}


def breaking(what: Callable[[str | None, int], None]) -> Callable[..., torch.Tensor]:
    true = kernels.linear_attention

    def broken(q: Any, k: Any, v: Any, *, eps: float = 1e-6, backend: str | None = None) -> Any:
        what(backend, q.shape[2])
        return true(q, k, v, eps=eps, backend=backend)

    return broken


def test_cases_of_a_group_take_turns() -> None:
    found = run(CASES)
    assert [r.status for r in found.values()] == [MEASURED, MEASURED]
    infos = [r.info for r in found.values()]
    assert infos[0]["turns"] == infos[1]["turns"] is not None
    assert {info["backend"] for info in infos} == {"torch", "reference"}
    for result in found.values():
        assert len(result.seconds) >= 5
        assert result.info["shape"] == {"B": 1, "H": 2, "Hk": 2, "N": 32, "M": 32, "D": 16}
        assert 0 < result.info["error"]["out"]["rms"] < 1e-6
        assert result.info["limit"] in ("copy", "float32 matmul")
        assert set(result.info["limits_s"]) == {"copy", "float32 matmul"}


def test_cases_of_two_operations_may_take_turns() -> None:
    other = replace(CASES[0], operation="softmax_attention")
    found = run((CASES[0], other))
    assert {r.info["operation"] for r in found.values()} == {
        "linear_attention",
        "softmax_attention",
    }
    assert len({r.info["turns"] for r in found.values()}) == 1


def test_a_backward_pass_is_timed_alone() -> None:
    (found,) = run((replace(CASES[0], mode="backward"),)).values()
    assert found.status == MEASURED
    assert set(found.info["error"]) == {"grad q", "grad k", "grad v"}
    both = run((replace(CASES[0], mode="forward+backward"),)).popitem()[1].info
    forward = run((CASES[0],)).popitem()[1].info
    assert found.info["least_flop"] == both["least_flop"] - forward["least_flop"]


def test_what_a_case_does_costs_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(backend: str | None, tokens: int) -> None:
        if backend == "torch":
            raise ValueError("the reason\nand more")

    monkeypatch.setattr(kernels, "linear_attention", breaking(fails))
    found = run(CASES)
    assert [(r.status, r.reason) for r in found.values()] == [
        (FAILED, "ValueError: the reason"),
        (MEASURED, None),
    ]


def test_running_out_of_memory_is_an_outcome_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def fills(backend: str | None, tokens: int) -> None:
        if backend == "torch":
            raise MemoryError("no memory")

    monkeypatch.setattr(kernels, "linear_attention", breaking(fills))
    assert [r.status for r in run(CASES).values()] == [OUT_OF_MEMORY, MEASURED]


def test_no_graph_is_captured_without_a_gpu() -> None:
    (found,) = run((replace(CASES[0], captured=True),)).values()
    assert (found.status, found.reason) == (FAILED, "ValueError: no CUDA graphs on cpu")


def test_the_time_is_kept_to() -> None:
    found = run(CASES, (replace(CASES[0], dtype="float16"),), minutes=1e-6)
    assert {r.status for r in found.values()} == {LEFT_OUT}
    assert all(str(r.reason).startswith("no time left: 0 s, and it takes") for r in found.values())


def test_what_is_finished_is_not_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(None, {"sources": "s"})
    first = run(CASES, store=store)

    def never(backend: str | None, tokens: int) -> None:
        raise AssertionError("it ran")

    monkeypatch.setattr(kernels, "linear_attention", breaking(never))
    assert run(CASES, store=store) == first


def test_a_process_of_its_own_measures_the_same() -> None:
    shown: list[str] = []
    found = run(CASES[:1], isolate=True, progress=lambda result: shown.append(result.case))
    # That process looks at this machine, which may be disturbed: then the case is tried again.
    assert set(shown) == {case_name(CASES[0])}
    assert found[shown[0]].status == MEASURED
    assert found[shown[0]].info["shape"]["N"] == 32


def test_any_callables_can_be_measured() -> None:
    a = torch.randn(64, 64)
    found = bench.measure({"once": lambda: a @ a, "twice": lambda: a @ a @ a}, budget_s=0.05)
    assert set(found) == {"once", "twice"}
    low, high = found["once"].interval
    assert 0 < low <= found["once"].median <= high
    assert found["twice"].over(found["once"]) > 0


def test_what_has_to_be_built_is_built_before_anything_is_timed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(runner.subprocess, "run", lambda command, **_: commands.append(command))
    cuda = replace(CASES[0], backend="cuda")
    runner.build_ahead([*CASES, replace(cuda, backend="sdpa_flash")], torch.device("cuda"))
    runner.build_ahead([cuda], CPU)
    assert commands == []
    runner.build_ahead([*CASES, cuda], torch.device("cuda"))
    assert [command[1:] for command in commands] == [["-m", "linear_vit.kernels", "build"]]


def test_who_fails_taking_turns_costs_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ninth call of one of two: it is found out when each is timed by itself."""
    calls = {"torch": 0}

    def tires(backend: str | None, tokens: int) -> None:
        if backend == "torch":
            calls["torch"] += 1
            if calls["torch"] > 8:
                raise MemoryError("worn out")

    monkeypatch.setattr(kernels, "linear_attention", breaking(tires))
    found = run(CASES)
    assert [r.status for r in found.values()] == [OUT_OF_MEMORY, MEASURED]


def test_a_case_is_tried_once_a_session(monkeypatch: pytest.MonkeyPatch) -> None:
    tries: list[str | None] = []

    def fails(backend: str | None, tokens: int) -> None:
        tries.append(backend)
        raise ValueError("always")

    monkeypatch.setattr(kernels, "linear_attention", breaking(fails))
    store = Store(None, {"sources": "s"})
    with runner.Session(PLAN, store, isolate=False) as session:
        first = session.measure(CASES[:1])
        assert session.measure(CASES[:1]) == first
    assert tries.count("torch") == 1


def test_a_users_function_under_a_built_in_name_has_nothing_to_prove() -> None:
    assert claim("linear_attention", "compiled").compiled
    with registry.temporarily():
        kernels.register("linear_attention", "compiled", devices=("cpu",), replace=True)(
            lambda q, k, v, eps: q
        )
        assert not claim("linear_attention", "compiled").compiled
        assert claim("softmax_attention", "compiled").compiled


@pytest.mark.parametrize("mode", ["forward", "forward+backward"])
def test_who_keeps_an_answer_has_no_time(mode: str) -> None:
    """It is right when it is checked, and the same ever after."""
    kept: list[torch.Tensor] = []

    def remembering(q: Any, k: Any, v: Any, eps: float) -> torch.Tensor:
        out = kernels.linear_attention(q, k, v, eps=eps, backend="torch")
        kept.append(out.detach())
        return out + (kept[0] - out).detach()  # with the gradients of the right one

    case = replace(CASES[0], backend="remembering", mode=mode)
    with registry.temporarily():
        kernels.register("linear_attention", "remembering", devices=("cpu",))(remembering)
        bad, good = run((case, replace(CASES[0], mode=mode))).values()
    assert bad.status == FAILED
    assert str(bad.reason).startswith("wrong result on other inputs, after it was timed: out")
    assert (good.status, good.info["checked_again"]) == (MEASURED, True)


def test_what_is_timed_is_given_its_inputs_back() -> None:
    """Both passes are of the same numbers, though another draw was in their memory between."""
    for mode in ("forward", "forward+backward"):
        (found,) = run((replace(CASES[0], mode=mode),)).values()
        assert (found.status, found.info["checked_again"]) == (MEASURED, True)


def test_without_memory_nothing_is_checked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda device: 1)
    (found,) = run(CASES[:1]).values()
    assert (found.status, found.info["checked_again"]) == (MEASURED, False)


def test_compiling_is_told_apart_from_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = {"reference": 0}

    def compiles(backend: str | None, tokens: int) -> None:
        if backend == "torch" and not calls.get("torch"):
            calls["torch"] = 1
            time.sleep(0.3)

    monkeypatch.setattr(kernels, "linear_attention", breaking(compiles))
    found = run(CASES)
    slow, other = (result.info["compile_s"] for result in found.values())
    assert 0.2 < slow < 60
    assert other >= 0
    assert found[case_name(CASES[0])].seconds[0] < 0.3
