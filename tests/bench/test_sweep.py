"""What a benchmark run consists of, and what its options refuse."""

from dataclasses import replace

import pytest
import torch

from linear_vit import kernels
from linear_vit.bench.problems import AttentionShape
from linear_vit.bench.sweep import TRAINING_STEP, SweepError, make_sweep, shape_of

CPU_BACKENDS = ("reference", "torch")  # usable wherever PyTorch is


def test_quick_sweep_covers_operation_pass_and_length() -> None:
    sweep = make_sweep(device="cpu", backends=CPU_BACKENDS)
    operations = {case.operation for case in sweep.cases}
    assert operations == {
        "linear_attention",
        "softmax_attention",
        "ripple_pool",
        "ripple_expand",
    }
    lengths = [
        case.tokens
        for case in sweep.cases
        if (case.operation, case.mode, case.backend) == ("linear_attention", "forward", "torch")
    ]
    assert lengths == [2**i for i in range(6, 15)]
    assert len(set(sweep.cases)) == len(sweep.cases)
    assert sweep.training_backends == CPU_BACKENDS


def test_softmax_stops_where_its_cost_does_and_says_so() -> None:
    sweep = make_sweep(device="cpu", backends=["torch"], operations=["softmax_attention"])
    longest = {
        mode: max(case.tokens for case in sweep.cases if case.mode == mode)
        for mode in ("forward", "forward+backward")
    }
    assert longest["forward"] >= longest["forward+backward"] >= 2048
    (reason,) = {text.partition(" (")[2] for text in sweep.left_out.values()}
    assert "--sweep full" in reason
    full = make_sweep(
        device="cpu", backends=["torch"], operations=["softmax_attention"], extent="full"
    )
    assert max(case.tokens for case in full.cases) > longest["forward"]


def test_full_sweep_has_every_operation_and_dtype() -> None:
    sweep = make_sweep(device="cpu", extent="full")
    assert {case.operation for case in sweep.cases} == set(kernels.OPERATIONS)
    assert {case.dtype for case in sweep.cases} == {"float32", "float16", "bfloat16"}
    assert sweep.training_backends


def test_options_narrow_the_sweep() -> None:
    sweep = make_sweep(
        device="cpu",
        dtypes=["bfloat16"],
        seq_lens=[128, 64],
        backends=["torch"],
        operations=["ripple_pool"],
    )
    assert [str(case) for case in sweep.cases] == [
        f"ripple_pool-{mode}-bfloat16-N{tokens}-torch"
        for tokens in (64, 128)
        for mode in ("forward", "forward+backward")
    ]
    assert sweep.training_backends == ()


def test_backends_of_a_case_stand_next_to_each_other() -> None:
    """They share inputs and reference, and see the same state of the machine."""
    cases = make_sweep(device="cpu", backends=CPU_BACKENDS).cases
    for first, second in zip(cases[::2], cases[1::2], strict=True):
        assert [first.backend, second.backend] == list(CPU_BACKENDS)
        assert first == replace(second, backend="reference")


def test_total_tokens_make_batches() -> None:
    lengths = (64, 1000, 4096, 5000)
    sweep = make_sweep(
        device="cpu",
        operations=["linear_attention"],
        backends=["torch"],
        seq_lens=lengths,
        total_tokens=4096,
    )
    sizes = {(case.batch, case.tokens) for case in sweep.cases}
    assert sizes == {(64, 64), (4, 1000), (1, 4096)}
    assert "longer than --total-tokens 4096" in sweep.left_out["linear_attention, N from 5000"]
    shape = shape_of("linear_attention", 64, 64)
    assert shape == AttentionShape(B=64, H=6, Hk=6, N=64, M=64, D=64)
    ids = [str(case) for case in sweep.cases]
    assert "linear_attention-forward-float32-B64-N64-torch" in ids
    assert len(ids) == len(set(ids))
    with pytest.raises(SweepError, match="--total-tokens: a positive number, got 0"):
        make_sweep(device="cpu", total_tokens=0)


def test_unusable_backends_are_left_out_with_their_reason() -> None:
    sweep = make_sweep(device="cpu", operations=["linear_attention"], extent="full")
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
    sweep = make_sweep(device="cpu", operations=["linear_attention"])
    assert "triton" not in {case.backend for case in sweep.cases}
    assert "interpreter" in sweep.left_out["backend triton"]
    with pytest.raises(SweepError, match=r"'triton' can't be timed.*interpreter"):
        make_sweep(device="cpu", operations=["linear_attention"], backends=["triton"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"backends": ["cudnn"]}, ["unknown backend 'cudnn'", "torch (usable)", "cuda ("]),
        ({"operations": ["conv"]}, ["--ops", "'conv'", "linear_attention", TRAINING_STEP]),
        ({"dtypes": ["fp8"]}, ["--dtypes", "'fp8'", "bfloat16"]),
        ({"seq_lens": [64, 0]}, ["--seq-lens", "positive", "0"]),
        ({"device": "tpu9"}, ["--device", "'tpu9'", "cpu or cuda"]),
        ({"device": "meta"}, ["--device", "'meta'", "cpu or cuda"]),
        (
            {"operations": ["softmax_attention"], "seq_lens": [2**20]},
            ["nothing to time", "softmax_attention forward", "FLOP"],
        ),
        ({"operations": [TRAINING_STEP], "seq_lens": [65]}, ["nothing to time"]),
    ],
)
def test_bad_options_say_what_there_is(options: dict, words: list[str]) -> None:
    with pytest.raises(SweepError) as error:
        make_sweep(**{"device": "cpu", **options})
    for word in words:
        assert word in str(error.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without CUDA")
def test_missing_cuda_device_is_an_error_only_when_asked_for() -> None:
    with pytest.raises(SweepError, match="no CUDA device here"):
        make_sweep(device="cuda")
    with pytest.raises(SweepError, match="'cuda' can't be timed for linear_attention on cpu"):
        make_sweep(operations=["linear_attention"], backends=["cuda"])
    assert make_sweep(operations=["linear_attention"], backends=["torch"]).device.type == "cpu"


@pytest.mark.parametrize("tokens", [64, 128, 4096, 35, 7])
def test_ripple_runs_on_a_grid_of_n_tokens(tokens: int) -> None:
    shape = shape_of("ripple_pool", tokens)
    assert shape.rows * shape.cols == tokens
    assert shape.rows <= shape.cols
