"""What people put around a call: checkpoints, threads, workers, pickles, shards, strict modes."""

import copy
import pickle
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset

from linear_vit import attention
from tests.kernels.cases import DEVICE, PACKED, Attention, Case, Ripple, op_backend_pairs, results

CASES: dict[str, Case] = {
    **{op: Attention(op, head_dim=16) for op in ("linear_attention", "softmax_attention")},
    **{op: Attention(op, head_dim=16) for op in PACKED},
    **{op: Ripple(op, channels=8) for op in ("ripple_pool", "ripple_expand")},
}
EVERY = op_backend_pairs(*CASES, compiled=False)


def _model(backend: str | None = None, kind: str = "ripple") -> nn.Module:
    return attention.VisionTransformer(
        img_size=8, patch_size=2, num_classes=3, dim=8, depth=1, heads=2, mlp_dim=8,
        attention_type=kind, local_branch=True, backend=backend, seed=0,
    ).to(DEVICE)  # fmt: skip


def _images() -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).to(DEVICE)


@pytest.mark.parametrize(("op", "backend"), EVERY)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(op: str, backend: str, use_reentrant: bool) -> None:
    case = CASES[op]
    inputs = case.inputs()
    out = checkpoint(lambda *x: case.run(backend, list(x)), *inputs, use_reentrant=use_reentrant)
    out.backward(case.gradient())
    found = [out, *(x.grad for x in inputs)]
    for a, b in zip(found, results(case, backend), strict=True):
        assert a is not None
        assert torch.equal(a, b)


@pytest.mark.parametrize(("op", "backend"), EVERY)
def test_threads_and_strict_determinism(op: str, backend: str) -> None:
    """Calls side by side, where PyTorch refuses what is not deterministic, give what one gives."""
    expected = results(CASES[op], backend)
    found: dict[int, list[Tensor]] = {}

    def work(i: int) -> None:
        found[i] = results(CASES[op], backend)

    torch.use_deterministic_algorithms(True)
    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3
    for one in found.values():
        assert all(torch.equal(a, b) for a, b in zip(one, expected, strict=True))


@pytest.mark.parametrize("kind", attention.ATTENTION_TYPES)
@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],
    ids=["copy", "pickle"],
)
def test_models_are_copied_and_pickled(kind: str, copied: Callable[[nn.Module], nn.Module]) -> None:
    model, images = _model(kind=kind), _images()
    assert torch.equal(copied(model)(images), model(images))


class _Embedded(Dataset[Tensor]):
    """Tokens that went through a model in the worker."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Tensor:
        torch.set_num_threads(1)
        with torch.no_grad():
            return _model().cpu()(_images().cpu() * index)


@pytest.mark.slow
def test_workers_of_a_loader() -> None:
    loader = DataLoader(_Embedded(), num_workers=2, multiprocessing_context="spawn")
    for index, batch in enumerate(loader):
        torch.testing.assert_close(batch[0], _Embedded()[index])


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("kind", attention.ATTENTION_TYPES)
def test_fsdp2(kind: str, one_rank: None) -> None:
    from torch.distributed.fsdp import fully_shard

    model, images = _model(kind=kind), _images()
    expected = model(images)
    expected.sum().backward()
    gradients = [p.grad for p in model.parameters()]
    sharded = _model(kind=kind)
    fully_shard(sharded)
    out = sharded(images)
    out.sum().backward()
    torch.testing.assert_close(out, expected)
    for parameter, gradient in zip(sharded.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad.full_tensor(), gradient)  # type: ignore[union-attr]
