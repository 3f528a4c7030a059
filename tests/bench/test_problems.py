"""The float64 results that benchmarks are checked with, and the work they are credited with."""

import pytest
import torch

from linear_vit import kernels
from linear_vit.bench import problems
from linear_vit.bench.problems import (
    FORWARD,
    FORWARD_BACKWARD,
    AttentionShape,
    Problem,
    RippleShape,
    attention,
    check,
    least_work,
    make_problem,
    softmax_attention,
    worst,
)
from linear_vit.bench.problems import (
    operation as operation_of,
)

PACKED = ("linear_attention_packed", "softmax_attention_packed")
CPU = torch.device("cpu")
ATTENTION = AttentionShape(B=2, H=4, Hk=2, N=37, M=29, D=16)
SELF_ATTENTION = AttentionShape(B=2, H=3, Hk=3, N=37, M=37, D=16)
RIPPLE = RippleShape(B=2, rows=5, cols=4, C=6, axis=1)


def problem_of(operation: str, dtype: torch.dtype = torch.float32) -> Problem:
    shape: problems.Shape = ATTENTION
    if operation.startswith("ripple"):
        shape = RIPPLE
    elif operation in PACKED:
        shape = SELF_ATTENTION
    return make_problem(operation, shape, dtype, CPU)


def direct(problem: Problem) -> dict[str, torch.Tensor]:
    """The reference in float64 on everything at once, no chunk and no sample."""
    leaves = {n: x.detach().double().requires_grad_() for n, x in problem.inputs.items()}
    outputs = problem.run(leaves, "reference")
    cotangents = [g.double() for g in problem.cotangents]
    gradients = torch.autograd.grad(outputs, tuple(leaves.values()), cotangents)
    names = problem.names(FORWARD_BACKWARD)
    return dict(zip(names, (*outputs, *gradients), strict=True))


@pytest.mark.parametrize("operation", kernels.OPERATIONS)
def test_expected_results_are_the_references(operation: str, monkeypatch) -> None:
    monkeypatch.setattr(attention, "CHUNK", 7)
    problem = problem_of(operation)
    expected = problem.expected()
    for name, value in direct(problem).items():
        assert expected.rows[name] is None
        torch.testing.assert_close(expected.values[name], value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("operation", ["linear_attention", "softmax_attention", *PACKED])
def test_long_sequences_are_compared_on_a_sample(operation: str, monkeypatch) -> None:
    monkeypatch.setattr(attention, "MOST_ROWS", 20)
    monkeypatch.setattr(softmax_attention, "MOST_REFERENCE_FLOP", 1.0)
    monkeypatch.setattr(attention, "SAMPLED_ROWS", 9)
    problem = problem_of(operation)
    expected = problem.expected()
    rows = expected.rows["out"]
    assert rows is not None
    assert len(rows) == 9
    assert {0, ATTENTION.N - 1} <= set(rows.tolist())
    axis = 1 if operation in PACKED else 2
    out = direct(problem)["out"].index_select(axis, rows)
    torch.testing.assert_close(expected.values["out"], out)
    for mode in (FORWARD, FORWARD_BACKWARD):
        assert all(v.passed for v in check(problem, "torch", mode, expected).values())


@pytest.mark.parametrize("operation", kernels.OPERATIONS)
def test_a_wrong_result_is_seen_in_every_tensor(operation: str, monkeypatch) -> None:
    problem = problem_of(operation)
    expected = problem.expected()
    assert all(v.passed for v in check(problem, "torch", FORWARD_BACKWARD, expected).values())
    names = problem.names(FORWARD_BACKWARD)
    right = problem.gradients("torch", problem.cotangents)
    for broken in range(len(names)):
        results = [x.detach().clone() for x in right]
        results[broken].view(-1)[-1] += results[broken].abs().max()
        monkeypatch.setattr(Problem, "gradients", lambda *_, results=results: tuple(results))
        verdicts = check(problem, "torch", FORWARD_BACKWARD, expected)
        assert [n for n, v in verdicts.items() if not v.passed] == [names[broken]]
        assert worst(verdicts)[0] == names[broken]


def test_nan_is_the_worst() -> None:
    problem = problem_of("linear_attention")
    expected = problem.expected()
    with torch.no_grad():
        problem.inputs["q"][0, 0, 0, 0] = float("nan")
    name, verdict = worst(check(problem, "torch", FORWARD, expected))
    assert name == "out"
    assert not verdict.passed


def test_inputs_are_random_and_the_same_for_a_seed() -> None:
    one, same = problem_of("linear_attention"), problem_of("linear_attention")
    for name, x in one.inputs.items():
        assert torch.equal(x, same.inputs[name])
        assert abs(x.std().item() - 1) < 0.1
        assert (x != 0).all()


@pytest.mark.parametrize(
    ("operation", "mode", "elements", "flop"),
    [
        # (2·H·N + 2·Hk·M)·D and 4·D² per query and per key token and head.
        ("linear_attention", FORWARD, (2 * 4 * 37 + 2 * 2 * 29) * 16, 4 * 256 * (4 * 37 + 2 * 29)),
        (
            "linear_attention",
            FORWARD_BACKWARD,
            (5 * 4 * 37 + 6 * 2 * 29) * 16,
            3 * 4 * 256 * (4 * 37 + 2 * 29),
        ),
        ("softmax_attention", FORWARD, (2 * 4 * 37 + 2 * 2 * 29) * 16, 4 * 4 * 37 * 29 * 16),
        (
            "softmax_attention",
            FORWARD_BACKWARD,
            (6 * 4 * 37 + 6 * 2 * 29) * 16,
            14 * 4 * 37 * 29 * 16,
        ),
    ],
)
def test_least_work_of_attention(operation: str, mode: str, elements: int, flop: int) -> None:
    work = least_work(operation_of(operation), mode, ATTENTION, 2)
    assert work.bytes == 2 * 2 * elements
    assert work.flop == 2 * flop


@pytest.mark.parametrize("operation", kernels.OPERATIONS)
def test_least_traffic_is_that_of_the_tensors(operation: str) -> None:
    """Forward: every argument and result once, counted on the tensors themselves."""
    problem = problem_of(operation, torch.bfloat16)
    outputs = problem.call("reference", FORWARD)()
    tensors = (*problem.inputs.values(), *outputs)
    total = sum(x.numel() * x.element_size() for x in tensors)
    assert least_work(operation_of(operation), FORWARD, problem.shape, 2).bytes == total


def test_forward_runs_without_a_graph_and_backward_returns_every_gradient() -> None:
    problem = problem_of("linear_attention")
    (out,) = problem.call("torch", FORWARD)()
    assert not out.requires_grad
    results = problem.call("torch", FORWARD_BACKWARD)()
    assert problem.names(FORWARD_BACKWARD) == ("out", "grad q", "grad k", "grad v")
    shapes = [x.shape for x in (out, *problem.inputs.values())]
    assert [x.shape for x in results] == shapes
    assert problem.inputs["q"].grad is None
