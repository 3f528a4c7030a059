"""timm's models with their attention swapped, against timm's own; random weights, no network."""

import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from linear_vit import attention
from linear_vit.attention import ATTENTION_TYPES
from linear_vit.kernels import linear_attention

timm = pytest.importorskip("timm")
from timm.models.vision_transformer import VisionTransformer  # noqa: E402

from linear_vit.attention.adapters.timm import attention_layer  # noqa: E402


def model(**options: Any) -> nn.Module:
    """A ViT of two blocks with a class token and two registers."""
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 4, "num_classes": 7, "embed_dim": 48, "depth": 2}
    made = VisionTransformer(**{**sizes, "num_heads": 3, "reg_tokens": 2, **options})
    return made.eval()


def images(side: int = 32) -> Tensor:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("options", [{}, {"qk_norm": True}, {"qkv_bias": False}], ids=str)
def test_baseline_gives_timms_own_outputs_and_gradients(options: dict[str, Any]) -> None:
    own, swapped = model(**options), model(**options)
    done = attention.replace(swapped, "baseline", backend="torch")
    assert len(done.names) == 2
    torch.testing.assert_close(swapped(images()), own(images()), rtol=1e-5, atol=1e-6)
    for one in (own, swapped):
        one(images()).square().sum().backward()
    theirs = dict(own.named_parameters())
    for name, x in swapped.named_parameters():
        torch.testing.assert_close(x.grad, theirs[name].grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["baseline", "linear"])
def test_a_checkpoint_of_the_original_loads(kind: str) -> None:
    swapped = model()
    attention.replace(swapped, kind)
    assert swapped.state_dict().keys() == model().state_dict().keys()
    made = timm.create_model("vit_tiny_patch16_224", pretrained=False, depth=1, img_size=32)
    named = timm.create_model(
        "vit_tiny_patch16_224",
        pretrained=False,
        depth=1,
        img_size=32,
        attn_layer=attention_layer(kind, backend="torch"),
    )
    named.load_state_dict(made.state_dict())
    attention.replace(made, kind, backend="torch")
    torch.testing.assert_close(made.eval()(images()), named.eval()(images()))


def test_linear_is_linear_attention_of_timms_projections() -> None:
    module = model(qk_norm=True).blocks[0].attn
    x = torch.randn(2, 11, 48)
    q, k, v = module.qkv(x).view(2, 11, 3, 3, 16).permute(2, 0, 3, 1, 4)
    q, k = module.q_norm(q), module.k_norm(k)
    out = linear_attention(q, k, v, backend="reference").transpose(1, 2).flatten(2)
    expected = module.proj(out)
    attention.replace(module_of(module), "linear", backend="torch")
    torch.testing.assert_close(module(x), expected, rtol=1e-5, atol=1e-6)


def module_of(module: nn.Module) -> nn.Module:
    return nn.ModuleList([module])


def test_hydra_begins_as_linear_attention_of_shared_heads() -> None:
    module = model().blocks[0].attn
    x = torch.randn(2, 11, 48)
    q, k, v = module.qkv(x).view(2, 11, 3, 3, 16).permute(2, 0, 3, 1, 4)
    shared = (z.mean(dim=1, keepdim=True).contiguous() for z in (k, v))
    out = linear_attention(q, *shared, backend="reference").transpose(1, 2).flatten(2)
    expected = module.proj(out)
    done = attention.replace(module_of(module), "hydra", backend="torch")
    assert "qkv (its queries)" in done.kept
    torch.testing.assert_close(module(x), expected, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        module.gate.weight.normal_()
    assert not torch.allclose(module(x), expected, atol=1e-3)
    with pytest.raises(ValueError, match="build the model anew"):
        attention.replace(module_of(module), "linear")


def test_ripple_pools_the_patch_tokens_alone() -> None:
    """Without stages it is linear attention of all tokens; the class token reaches the result."""
    plain, ripple = model(), model()
    attention.replace(plain, "linear", backend="torch")
    done = attention.replace(ripple, "ripple", ripple_stages=0, backend="torch")
    assert done.notes == ("3 class and register tokens are attended to, and not pooled",)
    torch.testing.assert_close(ripple(images()), plain(images()))

    seen: list[torch.Size] = []
    pooled = model()
    attention.replace(pooled, "ripple", ripple_stages=3, backend="torch")
    core = pooled.blocks[0].attn.core
    core.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].shape))
    pooled(images()).sum().backward()
    assert seen == [(2, 3, 3 + 64 // 8, 16)]
    assert pooled.blocks[0].attn.pyramid.stages[0].pool_weight.grad.abs().sum() > 0


def test_ripple_needs_a_grid() -> None:
    wide = model(img_size=(16, 32))
    attention.replace(wide, "ripple")
    picture = torch.randn(1, 3, 16, 32)
    with pytest.raises(ValueError, match="there are 32 beside 3 class and register tokens, not 5"):
        wide(picture)
    attention.replace(wide, "ripple", grid=(4, 8), backend="torch")
    assert wide(picture).shape == (1, 7)


def test_a_pickled_model_is_still_swapped() -> None:
    swapped = model()
    attention.replace(swapped, "linear", backend="torch")
    again = pickle.loads(pickle.dumps(swapped))
    torch.testing.assert_close(again(images()), swapped(images()))


@pytest.mark.parametrize("kind", ATTENTION_TYPES)
def test_what_it_cannot_do_raises(kind: str) -> None:
    swapped = model(attn_drop_rate=0.1)
    attention.replace(swapped, kind, backend="torch")
    module, x = swapped.blocks[0].attn, torch.randn(1, 3 + 64, 48)
    with pytest.raises(ValueError, match="is_causal"):
        module(x, is_causal=True)
    with pytest.raises(ValueError, match="no key mask"):
        module(x, attn_mask=torch.ones(67, 67).tril().bool())
    swapped.train()
    with pytest.raises(ValueError, match="dropout of attention weights"):
        swapped(images())


def test_a_key_mask_is_obeyed_or_refused() -> None:
    """A masked token changes nothing for the others."""
    own, swapped = model(), model()
    attention.replace(swapped, "baseline", backend="torch")
    x = torch.randn(2, 9, 48)
    mask = torch.ones(2, 1, 1, 9, dtype=torch.bool)
    mask[:, :, :, 6:] = False
    got, expected = (m.blocks[0].attn(x, attn_mask=mask) for m in (swapped, own))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    attention.replace(swapped, "ripple")
    with pytest.raises(ValueError, match="ripple pools a whole grid"):
        swapped.blocks[0].attn(x, attn_mask=mask)
