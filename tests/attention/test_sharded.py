"""A model over several processes: logits and gradients of one process, band by band."""

import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F

from linear_vit.attention import ATTENTION_TYPES, VisionTransformer, shard_sequence
from linear_vit.kernels import exchanges
from tests import processes

Case = dict[str, Any]
BATCH = 3


def _case(kind: str, grid: tuple[int, int], **options: Any) -> Case:
    return {"attention_type": kind, "img_size": (2 * grid[0], 2 * grid[1]), **options}


def _model(case: Case, dtype: torch.dtype = torch.float64) -> VisionTransformer:
    sizes = {"patch_size": 2, "num_classes": 5, "dim": 16, "depth": 2, "heads": 2, "mlp_dim": 24}
    options = {"in_channels": 1, "seed": 0, "backend": "reference", "hydra_branches": 4}
    return VisionTransformer(**{**sizes, **options, **case}).to(dtype)


def _images(case: Case, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(BATCH, 1, *case["img_size"], generator=generator).to(dtype)


def _step(model: nn.Module, case: Case) -> dict[str, Tensor]:
    """Logits and every parameter's gradient."""
    logits = model(_images(case))
    F.cross_entropy(logits, torch.arange(BATCH)).backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    return {"logits": logits.detach(), **{n: g for n, g in found.items() if g is not None}}


def _sharded(rank: int, cases: Sequence[Case]) -> list[dict[str, Tensor]]:
    """Of each case logits and the mean of the processes' gradients, the same bits twice."""
    answers = []
    for case in cases:
        model = _model(case)
        keys = list(model.state_dict())
        shard_sequence(model)
        assert list(model.state_dict()) == keys
        first, second = (_step(model, case) for _ in range(2))
        assert all(torch.equal(first[name], second[name]) for name in first)
        for name in first.keys() - {"logits"}:
            dist.all_reduce(first[name])
            first[name] /= dist.get_world_size()
        answers.append(first)
    return answers


def _check(count: int, cases: Sequence[Case]) -> None:
    found = processes.together(count, _sharded, cases)
    for number, case in enumerate(cases):
        right = _step(_model(case), case)
        for rank in range(count):
            for name, values in right.items():
                torch.testing.assert_close(
                    found[rank][number][name],
                    values,
                    rtol=1e-9,
                    atol=1e-12,
                    msg=lambda text, at=(case, rank, name): f"{at}: {text}",
                )


def test_two_processes_give_one_processs_result() -> None:
    """Rows 5: a ragged last band, and for two halvings of rows a band of one row beside it."""
    _check(2, [_case(kind, (5, 3), local_branch=True) for kind in ATTENTION_TYPES])


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("kind", ATTENTION_TYPES)
def test_any_grid_over_any_number_of_processes(kind: str, count: int) -> None:
    """Uneven bands, odd grids, one row a process, a column alone."""
    grids = [(4, 4), (7, 5), (count, 3), (13, 1), (6, 2)]
    cases = [_case(kind, grid, local_branch=bool(n % 2)) for n, grid in enumerate(grids)]
    if kind == "ripple":
        grids = [(3 * count, 5), (4 * count, 2), (4 * count - 1, 7), (16, 1), (6, 6)]
        cases = [
            _case(kind, grid, local_branch=local, ripple_stages=stages)
            for grid, stages in zip(grids, (2, 3, 3, 2, 0), strict=True)
            for local in (False, True)
        ]
    _check(count, cases)


@pytest.mark.slow
def test_three_bands_of_rows_over_two_processes() -> None:
    _check(2, [_case("ripple", rows, ripple_stages=3) for rows in ((12, 8), (11, 8), (9, 3))])


def _in_single_precision(rank: int, cases: Sequence[Case]) -> list[Tensor]:
    """Logits and the gradient of the first weights on the way, on the fastest backend."""
    found = []
    for case in cases:
        model = shard_sequence(_model(case, torch.float32))
        logits = model(_images(case, torch.float32))
        logits.square().sum().backward()
        weight = model.patch_embedding.projection.weight.grad
        dist.all_reduce(weight)
        found += [logits.detach(), weight / dist.get_world_size()]
    return found


def test_the_fastest_kernels_take_bands_as_well() -> None:
    cases = [_case(kind, (5, 3), local_branch=True, backend=None) for kind in ("ripple", "hydra")]
    found = processes.together(2, _in_single_precision, cases)
    for number, case in enumerate(cases):
        model = _model({**case, "backend": "reference"})
        logits = model(_images(case, torch.float32).double())
        logits.square().sum().backward()
        right = [logits.detach(), model.patch_embedding.projection.weight.grad]
        for one in found:
            for actual, expected in zip(one[2 * number : 2 * number + 2], right, strict=True):
                torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-5)


def _counted(rank: int, cases: Sequence[Case]) -> list[tuple[list[int], list[int]]]:
    """Of a step of each case, the bytes of every all-reduce and of every exchange of rows."""
    sizes: tuple[list[int], list[int]] = ([], [])
    all_reduce, all_to_all = dist.all_reduce, dist.all_to_all_single

    def reduced(x: Tensor, **options: Any) -> Any:
        sizes[0].append(x.nbytes)
        return all_reduce(x, **options)

    def sent(out: Tensor, x: Tensor, *splits: Any, **options: Any) -> Any:
        sizes[1].append(x.nbytes)
        return all_to_all(out, x, *splits, **options)

    dist.all_reduce, dist.all_to_all_single = reduced, sent
    answers = []
    for case in cases:
        sizes = ([], [])
        shard_sequence(_model(case, torch.float32))(_images(case, torch.float32)).sum().backward()
        answers.append(sizes)
    return answers


def test_what_is_exchanged_does_not_grow_with_the_rows() -> None:
    cases = [
        _case(kind, (rows, 3), backend="torch", ripple_stages=2)
        for kind in ("linear", "ripple")
        for rows in (4, 16)
    ]
    heads, dim = 2, 8
    token = 4 * BATCH * heads * dim
    state = 4 * BATCH * heads * (2 * dim * dim + 2 * dim)
    # Two blocks and the mean over tokens, forward and backward; of two blocks two stages, whose
    # rows have three columns (the second one halves them, but reads them whole).
    sums, rows = [state, state, token, token, state, state], [3 * token] * 8
    for found in processes.together(2, _counted, cases):
        assert found == [(sums, []), (sums, []), (sums, rows), (sums, rows)]


def _drawn(rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """What is dropped: images in the sharded model, in one alone, and features in the former."""
    case = _case("hydra", (4, 4), drop_path=0.5, dropout=0.5)
    alone, sharded = _model(case), shard_sequence(_model(case))
    x, answers = torch.ones(64, 1, 1), []
    for module in (sharded.blocks[1].drop_path, alone.blocks[1].drop_path, sharded.dropout):
        torch.manual_seed(rank)
        answers.append(module(x))
    return answers[0], answers[1], answers[2]


def test_a_group_drops_the_same_images_and_each_process_its_own_features() -> None:
    (images, alone, features), (others_images, _, others_features) = processes.together(2, _drawn)
    assert torch.equal(images, others_images)
    assert torch.equal(images, alone)
    assert not torch.equal(features, others_features)


def _compiled(rank: int) -> list[bool]:
    """Whether logits, with gradients and without, and gradients are those without compilation: as
    one graph, and with the breaks of drop_path."""
    whole = {"fullgraph": True, "backend": "aot_eager"}
    answers = []
    for case, how in (
        (_case("ripple", (7, 3), local_branch=True, backend="torch", depth=1), whole),
        (_case("baseline", (7, 3), backend="torch", depth=1), whole),
        (_case("linear", (7, 3), backend="torch", drop_path=0.3), {}),
    ):
        found = []
        for compiles in (False, True):
            torch.manual_seed(rank)
            model = shard_sequence(_model(case, torch.float32))
            if compiles:
                model.compile(**{"backend": "eager", **how})
            logits = model(_images(case, torch.float32))
            logits.square().sum().backward()
            with torch.inference_mode():
                read = model.eval()(_images(case, torch.float32))
            found.append([logits, read, *[p.grad for p in model.parameters()]])
        answers.append(all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*found, strict=True)))
    return answers


@pytest.mark.slow
def test_a_sharded_model_compiles() -> None:
    assert processes.together(2, _compiled) == [[True] * 3] * 2


# ---- processes that are gone -----------------------------------------------------------------


def _left(rank: int, hangs: bool, kind: str) -> tuple[str, float]:
    """What the others raise, and after how many seconds, where rank 1 leaves after one step."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=5))
    exchanges.GRACE_S = 3
    model, case = _model(_case(kind, (16, 4), ripple_stages=1)), _case(kind, (16, 4))
    shard_sequence(model)
    _step(model, case)
    if rank == 1:
        if not hangs:
            dist.destroy_process_group()
        time.sleep(20)
        return "", 0.0
    begin = time.monotonic()
    with pytest.raises(exchanges.Unanswered) as caught:
        _step(model, case)
    return str(caught.value), time.monotonic() - begin


@pytest.mark.slow
@pytest.mark.parametrize("hangs", [False, True])
@pytest.mark.parametrize("kind", ["linear", "ripple"])
def test_a_process_that_is_gone_is_named(kind: str, hangs: bool) -> None:
    for rank, (said, seconds) in enumerate(processes.together(4, _left, hangs, kind, joined=False)):
        if rank != 1:
            assert said == "of 4 processes, 1 did not answer for 5 s and hang or are gone"
            assert seconds < 15


# ---- what is refused -----------------------------------------------------------------------------


class _Other(nn.Module):
    pass


def _refused(rank: int) -> list[str]:
    said = []
    group = dist.new_group([0])
    mesh = dist.init_device_mesh("cpu", (2, 1), mesh_dim_names=("data", "sequence"))
    sharded, other = (
        shard_sequence(_model(_case("linear", (2, 2)))),
        _model(_case("linear", (2, 2))),
    )
    other.blocks[0].attention = _Other()
    for model, where in (
        (_model(_case("linear", (1, 8))), None),
        (_model(_case("ripple", (4, 4), ripple_stages=3)), mesh["data"]),
        (sharded, None),
        (other, None),
        (nn.Linear(1, 1), None),
        (_model(_case("linear", (2, 2))), mesh),
        (_model(_case("linear", (2, 2))), group),
    ):
        try:
            shard_sequence(model, where)
        except (TypeError, ValueError, RuntimeError) as error:
            said.append(f"{type(error).__name__}: {error}")
        else:
            said.append("")
    return said


def test_what_is_refused() -> None:
    takes = (
        "TypeError: shard_sequence takes a VisionTransformer, once, with attention of "
        "BaselineAttention, LinearAttention, HydraAttention, RippleAttention; got "
    )
    right = [
        "ValueError: a token grid of 1x8, whose rows are halved 0 times, has 1 bands of 1 rows at "
        "most, too few for 2 processes",
        "ValueError: a token grid of 4x4, whose rows are halved 2 times, has 1 bands of 4 rows at "
        "most, too few for 2 processes",
        takes + "_Linear",
        takes + "_Other",
        takes + "Linear",
        "ValueError: the mesh must have one dimension, got 2",
    ]
    first, second = processes.together(2, _refused)
    assert first == [*right, ""]
    assert second == [*right, "RuntimeError: shard_sequence: this process is not of the group"]


def test_without_processes_it_says_what_to_do() -> None:
    with pytest.raises(RuntimeError, match="shard_sequence needs torch"):
        shard_sequence(_model(_case("linear", (2, 2))))
