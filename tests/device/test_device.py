"""What only a device can show: its kernels' bits, sizes past 2³¹ elements, graphs of other inputs.

Each is walked through on the CPU at small sizes, so that it is known to run where there is a GPU.
"""

import dataclasses

import pytest
import torch

from linear_vit import kernels
from linear_vit.bench.instruments import clock
from linear_vit.bench.problems import (
    DTYPES,
    FORWARD,
    FORWARD_BACKWARD,
    AttentionShape,
    Problem,
    Shape,
    check,
    make_problem,
    operation,
    own_kernels,
    worst,
)
from linear_vit.kernels.accuracy import compare

OWN = [name for name in kernels.BACKENDS if own_kernels(name)]
HEAD_DIMS = (64, 128, 32, 96, 16, 48)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
DEVICES = [
    pytest.param("cuda", marks=[pytest.mark.device, needs_cuda]),
    pytest.param("cpu"),
]
# (heads, tokens): the last head is 2³¹ elements into its tensor where head dims are 64.
HUGE = {"cuda": (33, 1_048_576), "cpu": (2, 64)}


def problem_on(name: str, shape: Shape, dtype: str, device: str, backend: str) -> Problem:
    usable = kernels.backends(name, device, dtype=DTYPES[dtype], head_dim=shape.dim)
    if usable[backend] is not None or not kernels.is_timeable(backend, device):
        pytest.skip(f"{backend}: {usable[backend] or 'interpreted'}")
    return make_problem(name, shape, DTYPES[dtype], torch.device(device))


def repeated(problem: Problem, backend: str) -> None:
    """The same bits twice, in memory that is NaN before it is written."""
    call = problem.call(backend, FORWARD_BACKWARD)
    first = call()
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills torch.empty with NaN
    try:
        second = call()
    finally:
        torch.use_deterministic_algorithms(before)
    for name, a, b in zip(problem.names(FORWARD_BACKWARD), first, second, strict=True):
        assert torch.equal(a, b), f"{name} differs from one run to the next ({problem.shape})"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", OWN)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", kernels.OPERATIONS)
def test_results_are_right_and_repeat(name: str, dtype: str, backend: str, device: str) -> None:
    of = operation(name)
    # Enough tokens for every split, too, where there is a device to fill.
    long = (AttentionShape(1, 2, 1, 3001, 2999, 64), AttentionShape(1, 2, 2, 3001, 3001, 64))
    shapes = [*of.check_shapes(64), *(s for s in long if device == "cuda" and of.shape(64).dim)]
    for shape in shapes:
        if name.endswith("packed") and shape.Hk != shape.H:  # type: ignore[attr-defined]
            continue
        problem = problem_on(name, shape, dtype, device, backend)
        verdicts = check(problem, backend, FORWARD_BACKWARD, problem.expected())
        which, verdict = worst(verdicts)
        assert verdict.passed, f"{which}: {verdict} ({shape})"
        repeated(problem, backend)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS[1:])
@pytest.mark.parametrize("backend", OWN)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", ["linear_attention", "softmax_attention"])
def test_every_head_dim(name: str, dtype: str, backend: str, head_dim: int, device: str) -> None:
    for shape in operation(name).check_shapes(head_dim):
        problem = problem_on(name, shape, dtype, device, backend)
        verdicts = check(problem, backend, FORWARD_BACKWARD, problem.expected())
        which, verdict = worst(verdicts)
        assert verdict.passed, f"{which}: {verdict} ({shape})"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", OWN)
def test_sizes_past_2_to_the_31(backend: str, device: str) -> None:
    """All heads in one call; the last head's results against the reference."""
    heads, tokens = HUGE[device]
    shape = AttentionShape(1, heads, heads, tokens, tokens, 64)
    problem = problem_on("linear_attention", shape, "bfloat16", device, backend)
    results = problem.gradients(backend, problem.cotangents)
    if device == "cuda":
        assert (heads - 1) * tokens * 64 == 2**31  # no int32 reaches the last
    last = [x.detach()[:, -1:].clone() for x in results]
    part = dataclasses.replace(
        problem,
        shape=dataclasses.replace(shape, H=1, Hk=1),
        inputs={n: x.detach()[:, -1:].clone().requires_grad_() for n, x in problem.inputs.items()},
        cotangents=tuple(g[:, -1:].clone() for g in problem.cotangents),
    )
    del results, problem
    expected = part.expected()
    for name, actual in zip(part.names(FORWARD_BACKWARD), last, strict=True):
        rows = expected.rows[name]
        sampled = actual if rows is None else actual.index_select(2, rows)
        verdict = compare(sampled, expected.values[name], gradient=name.startswith("grad"))
        assert verdict.passed, f"{name}: {verdict}"


@pytest.mark.device
@needs_cuda
@pytest.mark.parametrize("backend", [name for name in OWN if name != "cpu"])
@pytest.mark.parametrize("mode", [FORWARD, FORWARD_BACKWARD])
@pytest.mark.parametrize("name", kernels.OPERATIONS)
def test_a_graph_of_other_inputs_gives_what_a_call_gives(
    name: str, mode: str, backend: str
) -> None:
    """Bit for bit."""
    shape = operation(name).check_shapes(64)[0]
    problem = problem_on(name, shape, "bfloat16", "cuda", backend)
    call = problem.call(backend, mode)
    replay, captured = clock.captured(call, torch.device("cuda"))
    other = make_problem(name, shape, torch.bfloat16, torch.device("cuda"), seed=1)
    with torch.no_grad():
        for key, x in problem.inputs.items():
            x.copy_(other.inputs[key])
    replay()
    for key, a, b in zip(problem.names(mode), captured, call(), strict=True):
        assert torch.equal(a, b), f"{key} of a replay is not that of a call"
