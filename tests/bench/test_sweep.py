"""What a benchmark run consists of, and what its options refuse."""

import re
from dataclasses import replace
from typing import Any

import pytest
import torch

from linear_vit import kernels
from linear_vit.bench.problems import AttentionShape, Case, case_name, operation, operations
from linear_vit.bench.sweep import SWEEPS, Asked, make_sweep
from linear_vit.options import OptionError
from linear_vit.training.steps import TRAINING_STEP as STEP

TRAINING_STEP = STEP.name

CPU_BACKENDS = ("reference", "torch")  # usable wherever PyTorch is


def test_quick_sweep_covers_operation_pass_and_length() -> None:
    sweep = make_sweep(Asked(device="cpu", backends=CPU_BACKENDS))
    found = {case.operation for case in sweep.cases}
    assert found == {
        "linear_attention",
        "softmax_attention",
        "ripple_pool",
        "ripple_expand",
        TRAINING_STEP,
    }
    lengths = [
        case.shape.tokens
        for case in sweep.cases
        if (case.operation, case.mode, case.backend) == ("linear_attention", "forward", "torch")
    ]
    assert lengths == [2**i for i in range(6, 15)]
    assert len(set(sweep.cases)) == len(sweep.cases)
    steps = [case.backend for case in sweep.cases if case.operation == TRAINING_STEP]
    assert set(steps) == set(CPU_BACKENDS)


def test_softmax_stops_where_its_cost_does_and_says_so() -> None:
    sweep = make_sweep(Asked(device="cpu", backends=["torch"], operations=["softmax_attention"]))
    longest = {
        mode: max(case.shape.tokens for case in sweep.cases if case.mode == mode)
        for mode in ("forward", "forward+backward")
    }
    assert longest["forward"] >= longest["forward+backward"] >= 2048
    (reason,) = {text.partition(" (")[2] for text in sweep.left_out.values()}
    assert "--sweep full" in reason
    full = make_sweep(
        Asked(device="cpu", backends=["torch"], operations=["softmax_attention"], extent="full")
    )
    assert max(case.shape.tokens for case in full.cases) > longest["forward"]


def test_full_sweep_has_every_operation_and_dtype() -> None:
    sweep = make_sweep(Asked(device="cpu", extent="full"))
    others = {TRAINING_STEP, "over_processes"}
    assert {case.operation for case in sweep.cases} == {*kernels.OPERATIONS, *others}
    assert {case.dtype for case in sweep.cases} == {"float32", "float16", "bfloat16"}


def test_options_narrow_the_sweep() -> None:
    sweep = make_sweep(
        Asked(
            device="cpu",
            dtypes=["bfloat16"],
            tokens=[128, 64],
            backends=["torch"],
            operations=["ripple_pool"],
        )
    )
    assert [case_name(case) for case in sweep.cases] == [
        f"ripple_pool-{mode}-bfloat16-N{tokens}-torch"
        for tokens in (64, 128)
        for mode in ("forward", "forward+backward")
    ]


def test_backends_of_a_case_stand_next_to_each_other() -> None:
    """They share inputs and reference, and see the same state of the machine."""
    cases = make_sweep(
        Asked(device="cpu", backends=CPU_BACKENDS, operations=["linear_attention", "ripple_pool"])
    ).cases
    for first, second in zip(cases[::2], cases[1::2], strict=True):
        assert [first.backend, second.backend] == list(CPU_BACKENDS)
        assert first == replace(second, backend="reference")


def test_total_tokens_make_batches() -> None:
    lengths = (64, 1000, 4096, 5000)
    sweep = make_sweep(
        Asked(
            device="cpu",
            operations=["linear_attention"],
            backends=["torch"],
            tokens=lengths,
            total_tokens=4096,
        )
    )
    sizes = {(case.shape.B, case.shape.tokens) for case in sweep.cases}
    assert sizes == {(64, 64), (4, 1000), (1, 4096)}
    assert "longer than --total-tokens 4096" in sweep.left_out["linear_attention, N from 5000"]
    shape = operation("linear_attention").shape(64, 64)
    assert shape == AttentionShape(B=64, H=6, Hk=6, N=64, M=64, D=64)
    ids = [case_name(case) for case in sweep.cases]
    assert "linear_attention-forward-float32-B64-N64-torch" in ids
    assert len(ids) == len(set(ids))
    with pytest.raises(OptionError, match="--total-tokens: a positive number, got 0"):
        make_sweep(Asked(device="cpu", total_tokens=0))


def test_unusable_backends_are_left_out_with_their_reason() -> None:
    sweep = make_sweep(Asked(device="cpu", operations=["linear_attention"], extent="full"))
    timed = {case.backend for case in sweep.cases}
    reasons = kernels.backends("linear_attention", "cpu")
    for name, reason in reasons.items():
        assert (name in timed) == (reason is None and kernels.is_timeable(name, "cpu"))
        if reason is not None:
            assert sweep.left_out[f"backend {name}"] == reason


def test_interpreted_triton_is_never_timed(monkeypatch) -> None:
    usable = dict.fromkeys(kernels.BACKENDS)
    monkeypatch.setattr(kernels, "backends", lambda *_, **__: usable)
    monkeypatch.setattr(kernels, "is_timeable", lambda name, _: name != "triton")
    sweep = make_sweep(Asked(device="cpu", operations=["linear_attention"]))
    assert "triton" not in {case.backend for case in sweep.cases}
    assert "interpreter" in sweep.left_out["backend triton"]
    with pytest.raises(OptionError, match=r"nothing to time: backend triton: .*interpreter"):
        make_sweep(Asked(device="cpu", operations=["linear_attention"], backends=["triton"]))


def test_a_reason_is_said_once(monkeypatch) -> None:
    monkeypatch.setattr(type(STEP), "unusable", lambda *_: "out of order")
    with pytest.raises(OptionError) as error:
        make_sweep(Asked(device="cpu", operations=[TRAINING_STEP], backends=["torch"]))
    assert str(error.value).count("out of order") == 1
    assert re.fullmatch(r"nothing to time: \S+ \(and \d+ more\): out of order", str(error.value))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"backends": ["cudnn"]}, ["unknown backend 'cudnn'", "torch (usable)", "cuda ("]),
        ({"operations": ["conv"]}, ["--ops", "'conv'", "linear_attention", TRAINING_STEP]),
        ({"dtypes": ["fp8"]}, ["--dtypes", "'fp8'", "bfloat16"]),
        ({"tokens": [64, 0]}, ["--tokens", "positive", "0"]),
        ({"extent": "cpu", "total_tokens": 64}, ["--total-tokens", "--sweep cpu has its own"]),
        ({"device": "tpu9"}, ["--device", "'tpu9'", "cpu or cuda"]),
        ({"device": "meta"}, ["--device", "'meta'", "cpu or cuda"]),
        (
            {"operations": ["softmax_attention"], "tokens": [2**20]},
            ["nothing to time", "softmax_attention forward", "FLOP"],
        ),
        ({"operations": [TRAINING_STEP], "tokens": [65]}, ["nothing to time"]),
    ],
)
def test_bad_options_say_what_there_is(options: dict, words: list[str]) -> None:
    with pytest.raises(OptionError) as error:
        make_sweep(Asked(**{"device": "cpu", **options}))
    for word in words:
        assert word in str(error.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without CUDA")
def test_missing_cuda_device_is_an_error_only_when_asked_for() -> None:
    with pytest.raises(OptionError, match="no CUDA device here"):
        make_sweep(Asked(device="cuda"))
    with pytest.raises(OptionError, match=r"nothing to time: backend cuda: .* not on cpu"):
        make_sweep(Asked(operations=["linear_attention"], backends=["cuda"]))
    sweep = make_sweep(Asked(operations=["linear_attention"], backends=["torch"]))
    assert sweep.device.type == "cpu"


def test_a_backend_asked_for_is_timed_where_it_is_and_said_where_it_is_not(monkeypatch) -> None:
    true = kernels.backends

    def lacking(name: str, *where: Any, **more: Any) -> dict[str, str | None]:
        no = {"torch": "no such kernel"} if name == "ripple_pool" else {}
        return {**true(name, *where, **more), **no}

    monkeypatch.setattr(kernels, "backends", lacking)
    ops = ["linear_attention", "ripple_pool"]
    sweep = make_sweep(Asked(device="cpu", operations=ops, backends=["torch"], tokens=[64]))
    assert {case.operation for case in sweep.cases} == {"linear_attention"}
    assert sweep.left_out == {"torch, ripple_pool": "no such kernel"}


@pytest.mark.parametrize("tokens", [64, 128, 4096, 35, 7])
def test_ripple_runs_on_a_grid_of_n_tokens(tokens: int) -> None:
    shape = operation("ripple_pool").shape(tokens)
    assert shape.rows * shape.cols == tokens
    assert shape.rows <= shape.cols


def test_special_sweeps_are_in_order_of_importance() -> None:
    for name in ("cpu", "gpu"):
        sweep = make_sweep(Asked(device="cpu", extent=name))
        assert name in SWEEPS
        ranks: dict[tuple[Any, ...], int] = {}
        for of in operations().values():
            for w in of.special(name):
                key = (of.name, w.mode, w.dtype, w.shape, w.total_tokens)
                ranks[key] = min(w.rank, ranks.get(key, w.rank))
        order = [
            ranks[c.operation, c.mode, c.dtype, c.shape, c.total_tokens]
            for group in sweep.groups
            for c in group[:1]
        ]
        assert order == sorted(order)


def test_attention_of_one_size_takes_turns_in_a_special_sweep() -> None:
    sweep = make_sweep(Asked(device="cpu", extent="cpu", tokens=[256], dtypes=["float32"]))
    first = sweep.groups[0]
    assert {(c.operation, c.backend) for c in first} >= {
        ("softmax_attention", "torch"),
        ("linear_attention", "compiled"),
    }
    assert len({(c.mode, c.dtype, c.shape, c.total_tokens) for c in first}) == 1


def test_sizes_of_what_a_gpu_is_for_are_in_its_sweep() -> None:
    sizes = [w.shape for w in operation("linear_attention").special("gpu")]
    assert any(s.B * s.H * s.N * s.D >= 2**30 for s in sizes)
    assert AttentionShape(128, 6, 6, 64, 64, 64) in sizes


def test_a_rehearsal_walks_every_kind_of_case_at_tiny_sizes() -> None:
    for name in SWEEPS:
        real = make_sweep(Asked(device="cpu", extent=name))
        tiny = make_sweep(Asked(device="cpu", extent=name, rehearse=True))
        kinds = [{(c.operation, c.mode, c.dtype, c.backend) for c in s.cases} for s in (real, tiny)]
        assert kinds[0] <= kinds[1], name  # what is too large here is walked, too
        assert len(tiny.cases) < len(real.cases)
        assert all(c.shape.tokens <= 70 for c in tiny.cases)


def test_names_of_cases_are_told_apart() -> None:
    for name in SWEEPS:
        names = [case_name(case) for case in make_sweep(Asked(device="cpu", extent=name)).cases]
        assert len(set(names)) == len(names)
    long = Case("linear_attention", "forward", "float32", AttentionShape(1, 6, 6, 64, 64, 64), "x")
    assert case_name(replace(long, total_tokens=64)) != case_name(long)


def test_joules_are_measured_of_few_cases_of_a_short_sweep() -> None:
    sweep = make_sweep(Asked(device="cpu", extent="gpu"))
    assert sweep.energy is not None
    assert len(sweep.energy) < len(sweep.cases) / 10
    assert make_sweep(Asked(device="cpu")).energy is None
