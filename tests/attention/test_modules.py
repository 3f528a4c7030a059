"""The modules against their formulas, written out with plain tensors, and their limits."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from linear_vit.attention import (
    ATTENTION_TYPES,
    BaselineAttention,
    HydraAttention,
    LinearAttention,
    RippleAttention,
    VisionTransformer,
)
from linear_vit.attention.vit import DropPath
from linear_vit.kernels.ripple.stages import halving_axes

MODULES = {
    "baseline": lambda dim, **options: BaselineAttention(dim, heads=2, **options),
    "ripple": lambda dim, **options: RippleAttention(dim, heads=2, **options),
    "hydra": lambda dim, **options: HydraAttention(dim, hydra_branches=2, **options),
}


def tokens(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def linear_attention_by_matrix(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(N, D), (M, D), (M, D): the normalised N x M matrix of phi(q) phi(k)', times v."""
    feature_q = torch.cat([q.clamp(min=0), (-q).clamp(min=0)], dim=-1)
    feature_k = torch.cat([k.clamp(min=0), (-k).clamp(min=0)], dim=-1)
    scores = feature_q @ feature_k.T
    return scores @ v / (scores.sum(dim=1, keepdim=True) + 1e-6)


def depthwise(x: Tensor, weight: Tensor, grid: tuple[int, int]) -> Tensor:
    """A 3x3 cross-correlation of (N, C) tokens by (C, 3, 3), written as nine shifted sums."""
    rows, cols = grid
    padded = F.pad(x.view(rows, cols, -1), (0, 0, 1, 1, 1, 1))
    total = torch.zeros(rows, cols, x.shape[-1])
    for i in range(3):
        for j in range(3):
            total += padded[i : i + rows, j : j + cols] * weight.view(-1, 3, 3)[:, i, j]
    return total.view(rows * cols, -1)


@pytest.mark.parametrize("local", [False, True])
def test_baseline_is_softmax_attention(local: bool) -> None:
    module = BaselineAttention(32, heads=2, local_branch=local)
    x = tokens(2, 15, 32)
    q, k, v = module.qkv(x).chunk(3, dim=-1)
    heads = []
    for h in range(2):
        part = slice(16 * h, 16 * h + 16)
        scores = q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(16)
        heads.append(scores.softmax(dim=-1) @ v[..., part])
    expected = torch.cat(heads, dim=-1)
    if local:
        expected = expected + torch.stack([depthwise(u, module.local.weight, (3, 5)) for u in v])
    torch.testing.assert_close(module(x, (3, 5)), module.projection(expected))


@pytest.mark.parametrize("local", [False, True])
def test_linear_is_the_baseline_with_another_function(local: bool) -> None:
    module = LinearAttention(32, heads=2, local_branch=local)
    module.load_state_dict(BaselineAttention(32, heads=2, local_branch=local).state_dict())
    x = tokens(2, 15, 32)
    q, k, v = module.qkv(x).chunk(3, dim=-1)
    halves = (slice(0, 16), slice(16, 32))
    expected = torch.stack(
        [
            torch.cat(
                [linear_attention_by_matrix(q[b, :, h], k[b, :, h], v[b, :, h]) for h in halves], 1
            )
            for b in range(2)
        ]
    )
    if local:
        expected = expected + torch.stack([depthwise(u, module.local.weight, (3, 5)) for u in v])
    torch.testing.assert_close(module(x, (3, 5)), module.projection(expected))


@pytest.mark.parametrize("local", [False, True])
def test_hydra_is_a_gated_loop_over_branches(local: bool) -> None:
    module = HydraAttention(48, hydra_branches=3, local_branch=local)
    nn.init.normal_(module.gate.weight)  # far from uniform, so that a wrong fusion shows
    x = tokens(2, 12, 48)
    packed = module.qkv(x)
    q, k, v = packed[..., :48], packed[..., 48:64], packed[..., 64:]
    gate = module.gate(x).softmax(dim=-1)
    expected = torch.empty(2, 12, 48)
    for b in range(2):
        for r in range(3):
            part = slice(16 * r, 16 * r + 16)
            branch = linear_attention_by_matrix(q[b, :, part], k[b], v[b])
            expected[b, :, part] = 3 * gate[b, :, r, None] * branch
        if local:
            expected[b] += depthwise(v[b].repeat(1, 3), module.local.weight, (3, 4))
    torch.testing.assert_close(module(x, (3, 4)), module.projection(expected))


@pytest.mark.parametrize("local", [False, True])
def test_ripple_without_stages_is_linear_attention(local: bool) -> None:
    module = RippleAttention(32, heads=2, ripple_stages=0, local_branch=local)
    x = tokens(1, 12, 32)
    q, k, v = module.qkv(x)[0].chunk(3, dim=-1)
    halves = [slice(0, 16), slice(16, 32)]
    heads = [linear_attention_by_matrix(q[:, h], k[:, h], v[:, h]) for h in halves]
    expected = torch.cat(heads, dim=-1)
    if local:
        expected = expected + depthwise(x[0], module.local.weight, (3, 4))
    torch.testing.assert_close(module(x, (3, 4))[0], module.projection(expected))


def test_ripple_stages_pool_then_expand() -> None:
    """Two stages on an odd grid, pooled by subsampling the stride-1 result, expanded by a loop."""
    module = RippleAttention(16, heads=1, ripple_stages=2)
    bare = RippleAttention(16, heads=1, ripple_stages=0)
    bare.load_state_dict({k: v for k, v in module.state_dict().items() if "stages" not in k})
    for stage in module.stages:
        nn.init.normal_(stage.expand_weight)
    x = tokens(1, 35, 16)
    first, second = module.stages
    fine = x[0]  # 5 x 7
    half = depthwise(fine, first.pool_weight, (5, 7)).view(5, 7, 16)[::2]  # 3 x 7
    top = depthwise(half.reshape(21, 16), second.pool_weight, (3, 7)).view(3, 7, 16)[:, ::2]
    z = bare(top.reshape(1, 12, 16), (3, 4)).view(3, 4, 16)
    up = depthwise(half.reshape(21, 16), second.lateral_weight, (3, 7)).view(3, 7, 16).clone()
    for j in range(7):
        up[:, j] += second.expand_weight[j % 2] * z[:, j // 2]
    expected = depthwise(fine, first.lateral_weight, (5, 7)).view(5, 7, 16).clone()
    for j in range(5):
        expected[j] += first.expand_weight[j % 2] * up[j // 2]
    torch.testing.assert_close(module(x, (5, 7))[0], expected.view(35, 16))


@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("grid", [(1, 9), (7, 5), (4, 4)])
def test_shapes_and_gradients(name: str, local: bool, grid: tuple[int, int]) -> None:
    module = MODULES[name](32, local_branch=local)
    x = tokens(2, grid[0] * grid[1], 32).requires_grad_()
    out = module(x, grid)
    assert out.shape == x.shape
    (out * torch.randn_like(out)).sum().backward()
    for label, parameter in [*module.named_parameters(), ("x", x)]:
        assert parameter.grad is not None, label
        assert torch.isfinite(parameter.grad).all(), label
        assert parameter.grad.abs().sum() > 0, label


@pytest.mark.parametrize("name", MODULES)
def test_a_batch_is_its_images(name: str) -> None:
    module = MODULES[name](32)
    x = tokens(3, 16, 32)
    one_by_one = torch.cat([module(image[None], (4, 4)) for image in x])
    torch.testing.assert_close(module(x, (4, 4)), one_by_one)


def test_ripple_initial_values() -> None:
    torch.manual_seed(0)
    stage = RippleAttention(512, heads=8).stages[0]
    assert stage.pool_weight.mean().item() == pytest.approx(1 / 9, abs=0.003)
    assert stage.pool_weight.std().item() == pytest.approx(0.05, rel=0.05)
    assert torch.equal(stage.expand_weight, torch.ones(2, 512))
    assert stage.lateral_weight.mean().item() == pytest.approx(0, abs=0.006)
    assert stage.lateral_weight.std().item() == pytest.approx(0.1, rel=0.05)


def test_halving_axes() -> None:
    assert halving_axes((8, 8), 3) == [0, 1, 0]
    assert halving_axes((1, 8), 3) == [1, 1, 1]
    assert halving_axes((2, 5), 4) == [0, 1, 1, 1]
    assert halving_axes((1, 1), 0) == []


@pytest.mark.parametrize(
    ("grid", "stages", "most"), [((4, 4), 5, 4), ((1, 1), 1, 0), ((3, 5), 9, 5), ((1, 8), 4, 3)]
)
def test_too_many_stages_name_the_grid_and_the_largest_count(
    grid: tuple[int, int], stages: int, most: int
) -> None:
    module = RippleAttention(16, heads=1, ripple_stages=stages)
    expected = f"{grid[0]}x{grid[1]} can be halved at most {most} times"
    with pytest.raises(ValueError, match=expected):
        module(tokens(1, grid[0] * grid[1], 16), grid)
    halving_axes(grid, most)


@pytest.mark.parametrize("name", MODULES)
def test_wrong_tokens_or_grid(name: str) -> None:
    module = MODULES[name](32)
    with pytest.raises(ValueError, match=r"grid \(3, 5\) for N = 16 tokens"):
        module(tokens(1, 16, 32), (3, 5))
    with pytest.raises(ValueError, match=r"\(B, N, 32\), got \(1, 16, 31\)"):
        module(tokens(1, 16, 31), (4, 4))
    with pytest.raises(ValueError, match=r"got \(16, 32\)"):
        module(tokens(16, 32), (4, 4))


def test_wrong_sizes() -> None:
    with pytest.raises(ValueError, match="dim 100 and heads 3; these divide it: 1, 2, 4, 5"):
        BaselineAttention(100, heads=3)
    with pytest.raises(ValueError, match="heads must be at least 1 and divide dim, got dim 64"):
        RippleAttention(64, heads=0)
    with pytest.raises(ValueError, match="dim 64 and hydra_branches 6"):
        HydraAttention(64, hydra_branches=6)
    with pytest.raises(ValueError, match="ripple_stages must be at least 0, got -1"):
        RippleAttention(64, ripple_stages=-1)
    with pytest.raises(ValueError, match="dim must be at least 1, got 0"):
        BaselineAttention(0)
    assert BaselineAttention(384).heads == 6
    assert BaselineAttention(32).heads == 1


@pytest.mark.parametrize("backend", ["reference", None])
@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("name", MODULES)
def test_no_images_give_no_tokens(name: str, local: bool, backend: str | None) -> None:
    module = MODULES[name](32, local_branch=local, backend=backend)
    x = torch.zeros(0, 32, 32, requires_grad=True)
    out = module(x, (4, 8))
    assert out.shape == (0, 32, 32)
    out.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape
    assert all(p.grad is not None and not p.grad.any() for p in module.parameters())


@pytest.mark.parametrize("backend", ["reference", "torch", None])
@pytest.mark.parametrize("name", MODULES)
def test_tokens_of_a_convolution(name: str, backend: str | None) -> None:
    """``x.flatten(2).transpose(1, 2)`` of its channels-first image, as patch embeddings have it."""
    module = MODULES[name](32, local_branch=True, backend=backend)
    found = []
    for order in (torch.contiguous_format, torch.channels_last):
        image = tokens(2, 32, 4, 8).to(memory_format=order).requires_grad_()
        out = module(image.flatten(2).transpose(1, 2), (4, 8))
        [gradient] = torch.autograd.grad(out.square().sum(), image)
        found.append((out, gradient))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_numpy_integers_are_integers() -> None:
    n = np.int64
    sizes = (n(32), n(4), n(10), n(32), n(1), n(2), n(64))
    for name in ATTENTION_TYPES:
        more = {"ripple_stages": n(2), "hydra_branches": n(2), "local_branch": True}
        model = VisionTransformer(*sizes, name, **more, seed=n(1))
        plain = VisionTransformer(
            32,
            4,
            10,
            32,
            1,
            2,
            64,
            name,
            ripple_stages=2,
            hydra_branches=2,
            local_branch=True,
            seed=1,
        )
        images = tokens(2, 3, 32, 32)
        assert torch.equal(model(images), plain(images))


def test_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="magic"):
        BaselineAttention(32, backend="magic")(tokens(1, 4, 32), (2, 2))


def vit(attention_type: str = "baseline", **changes: object) -> VisionTransformer:
    options: dict = {
        "img_size": 8,
        "patch_size": 2,
        "num_classes": 5,
        "dim": 32,
        "depth": 2,
        "heads": 2,
        "mlp_dim": 48,
        "hydra_branches": 2,
        "seed": 3,
    }
    return VisionTransformer(**{**options, "attention_type": attention_type, **changes})


@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("kind", ATTENTION_TYPES)
def test_vit_learns_everywhere(kind: str, local: bool) -> None:
    model = vit(kind, local_branch=local, img_size=(6, 10), in_channels=1)
    logits = model(tokens(2, 1, 6, 10))
    assert logits.shape == (2, 5)
    F.cross_entropy(logits, torch.tensor([0, 3])).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_models_of_a_seed_share_everything_but_attention() -> None:
    models = {
        (kind, local): dict(vit(kind, local_branch=local).named_parameters())
        for kind in ATTENTION_TYPES
        for local in (False, True)
    }
    reference = models["baseline", False]
    shared = [name for name in reference if ".attention." not in name]
    assert len(shared) == 3 + 4 + 2 * 8
    for parameters in models.values():
        assert [name for name in parameters if ".attention." not in name] == shared
        for name in shared:
            assert torch.equal(parameters[name], reference[name]), name
    other = dict(vit(seed=4).named_parameters())
    assert not torch.equal(other["head.weight"], reference["head.weight"])
    assert not torch.equal(reference["blocks.0.mlp.0.weight"], reference["blocks.1.mlp.0.weight"])


def test_seed_follows_torch_manual_seed() -> None:
    torch.manual_seed(3)
    assert torch.equal(vit(seed=None).head.weight, vit(seed=3).head.weight)


def test_drop_path_drops_whole_samples_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    layer = DropPath(0.25)
    x = torch.rand(4000, 3, 2) + 0.5
    factors = layer(x) / x
    torch.testing.assert_close(factors, factors[:, :1, :1].expand_as(factors))
    dropped = (factors[:, 0, 0] == 0).double().mean().item()
    assert dropped == pytest.approx(0.25, abs=0.03)
    assert factors.max().item() == pytest.approx(1 / 0.75)
    assert torch.equal(layer.eval()(x), x)
    rates = [block.drop_path.rate for block in vit(depth=3, drop_path=0.2).blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2])


def test_patches_keep_their_place() -> None:
    """A pixel changes its own patch's embedding and no other."""
    model = vit(in_channels=3)
    blank = torch.zeros(1, 3, 8, 8)
    dotted = blank.clone()
    dotted[0, 2, 5, 2] = 1  # row 5, column 2: patch (2, 1) of 4 x 4
    changed = (model.patch_embedding(dotted) != model.patch_embedding(blank)).any(dim=-1)
    assert changed[0].nonzero().flatten().tolist() == [2 * 4 + 1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size": 3}, "img_size 8x8 and patch_size 3"),
        ({"attention_type": "cosine"}, "one of baseline, linear, ripple, hydra, got 'cosine'"),
        ({"dim": 33}, "dim 33 and heads 2"),
        ({"attention_type": "hydra", "hydra_branches": 5}, "dim 32 and hydra_branches 5"),
        ({"attention_type": "ripple", "ripple_stages": 5}, "4x4 can be halved at most 4 times"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"drop_path": -0.1}, r"drop_path must be in \[0, 1\), got -0.1"),
        ({"depth": 0}, "depth must be at least 1, got 0"),
        ({"num_classes": -1}, "num_classes must be at least 1"),
    ],
)
def test_vit_refuses(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vit(**changes)


def test_vit_refuses_images_of_another_size() -> None:
    with pytest.raises(ValueError, match=r"\(B, 3, 8, 8\), got \(1, 1, 8, 8\)"):
        vit()(torch.zeros(1, 1, 8, 8))


@pytest.mark.parametrize(
    "compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("kind", ATTENTION_TYPES)
def test_compiles_without_graph_breaks(kind: str, compiler: str) -> None:
    model = vit(kind, local_branch=True, depth=1)
    images = tokens(2, 3, 8, 8)
    compiled = torch.compile(model, fullgraph=True, backend=compiler)
    logits = compiled(images)
    torch.testing.assert_close(logits, model(images), rtol=1e-4, atol=1e-5)
    expected = torch.autograd.grad(model(images).sum(), list(model.parameters()))
    found = torch.autograd.grad(logits.sum(), list(model.parameters()))
    for (name, _), a, b in zip(model.named_parameters(), found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("kind", ATTENTION_TYPES)
def test_autocast_to_bfloat16(kind: str) -> None:
    model = vit(kind, local_branch=True)
    images = tokens(2, 3, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(images)
    logits.float().sum().backward()
    torch.testing.assert_close(logits.float(), model(images), rtol=0.1, atol=0.1)
