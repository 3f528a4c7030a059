"""attention.replace on our own models: what becomes of the modules and of their weights."""

import pytest
import torch
from torch import Tensor, nn

from linear_vit import attention
from linear_vit.attention import ATTENTION_TYPES, VisionTransformer
from linear_vit.attention.adapters.core import key_mask_of, refuse, shared_key_value


def model(attention_type: str, **options: object) -> VisionTransformer:
    sizes = {"img_size": 16, "patch_size": 2, "num_classes": 5, "dim": 32, "depth": 2, "heads": 4}
    made = {**sizes, "mlp_dim": 32, "attention_type": attention_type, "seed": 0, **options}
    return VisionTransformer(**made)  # type: ignore[arg-type]


def images() -> Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("to", ATTENTION_TYPES)
@pytest.mark.parametrize("of", ATTENTION_TYPES)
def test_a_swapped_model_has_the_other_attention(of: str, to: str) -> None:
    swapped = model(of, hydra_branches=4)
    before = swapped.blocks[0].attention.projection.weight.clone()
    done = attention.replace(swapped, to, ripple_stages=2, backend="torch")
    other = model(to, hydra_branches=4, ripple_stages=2, backend="torch")
    assert type(swapped.blocks[1].attention) is type(other.blocks[1].attention)
    assert done.names == ("blocks.0.attention", "blocks.1.attention")
    assert "projection" in done.kept
    assert torch.equal(swapped.blocks[0].attention.projection.weight, before)
    # All that is kept and new of it is what a model of that type has.
    other.load_state_dict(swapped.state_dict())
    torch.testing.assert_close(swapped(images()), other(images()))
    assert str(done).startswith(f"2 attention modules are {to} now\nweights kept: ")


def test_softmax_and_linear_share_all_weights() -> None:
    first = model("baseline")
    outputs = first(images())
    assert attention.replace(first, "linear").new == {}
    assert not torch.allclose(first(images()), outputs, atol=1e-3)
    attention.replace(first, "baseline")
    torch.testing.assert_close(first(images()), outputs)


def test_what_is_new_is_named() -> None:
    done = attention.replace(model("baseline"), "ripple")
    assert (done.kept, done.new) == (("projection", "qkv"), {"stages": "as in a new model"})
    done = attention.replace(model("baseline"), "hydra")
    assert done.new == {
        "qkv (its keys and values)": "the mean of the heads",
        "gate": "all branches count alike",
    }
    done = attention.replace(model("hydra", hydra_branches=2), "linear")
    assert done.new == {"qkv": "as in a new model"}
    assert done.kept == ("projection",)


def test_hydra_shares_the_mean_of_the_heads() -> None:
    packed = nn.Linear(6, 24)
    x = torch.randn(3, 6)
    q, k, v = packed(x).chunk(3, dim=1)
    made = shared_key_value(packed, 2)
    got_q, got_k, got_v = made(x).split([8, 4, 4], dim=1)
    torch.testing.assert_close(got_q, q)
    torch.testing.assert_close(got_k, (k[:, :4] + k[:, 4:]) / 2)
    torch.testing.assert_close(got_v, (v[:, :4] + v[:, 4:]) / 2)


def test_the_local_branch_and_training_mode_stay() -> None:
    swapped = model("baseline", local_branch=True).eval()
    weight = swapped.blocks[0].attention.local.weight.clone()
    attention.replace(swapped, "linear")
    assert torch.equal(swapped.blocks[0].attention.local.weight, weight)
    assert not swapped.blocks[0].attention.training
    swapped.blocks.double()
    attention.replace(swapped, "ripple")
    assert swapped.blocks[0].attention.stages[0].pool_weight.dtype == torch.float64


def test_gradients_reach_every_weight_of_a_swapped_model() -> None:
    for kind in ATTENTION_TYPES:
        swapped = model("baseline")
        attention.replace(swapped, kind, backend="torch")
        swapped(images()).square().sum().backward()
        without = [name for name, x in swapped.named_parameters() if x.grad is None]
        assert not without, kind


def test_unknown_types_and_models_are_refused() -> None:
    with pytest.raises(ValueError, match="one of baseline, linear, ripple, hydra, got 'flash'"):
        attention.replace(model("baseline"), "flash")
    with pytest.raises(ValueError, match="no attention module in Sequential is known; it has Mul"):
        attention.replace(nn.Sequential(nn.MultiheadAttention(8, 2)), "linear")


# ---- what nothing passes in silence --------------------------------------------------------------


def test_causal_attention_and_dropout_of_weights_are_refused() -> None:
    refuse(is_causal=False, dropout=0.1, training=False)
    with pytest.raises(ValueError, match="is_causal"):
        refuse(is_causal=True, dropout=0.0, training=False)
    with pytest.raises(ValueError, match=r"dropout of attention weights \(rate 0.1\)"):
        refuse(is_causal=False, dropout=0.1, training=True)


@pytest.mark.parametrize("shape", [(5,), (1, 5), (2, 1, 1, 5), (2, 3, 4, 5)])
@pytest.mark.parametrize("kind", ["bool", "added", "lowest"])
def test_a_mask_of_keys_is_recognised(shape: tuple[int, ...], kind: str) -> None:
    seen = torch.tensor([True, True, False, True, False]).expand(shape)
    low = {"added": float("-inf"), "lowest": torch.finfo(torch.float32).min}
    mask = seen if kind == "bool" else torch.zeros(shape).masked_fill(~seen, low[kind])
    found = key_mask_of(mask, 2, 5)
    assert found is not None
    assert found.tolist() == [[True, True, False, True, False]] * 2
    assert key_mask_of(None, 2, 5) is None


def test_other_masks_are_refused() -> None:
    with pytest.raises(ValueError, match="some queries or heads see keys that others don't"):
        key_mask_of(torch.ones(5, 5).tril().bool(), 2, 5)
    with pytest.raises(ValueError, match="some queries or heads"):
        key_mask_of(torch.tensor([True, False]).view(1, 2, 1, 1).expand(2, 2, 1, 5), 2, 5)
    with pytest.raises(ValueError, match="it is a bias"):
        key_mask_of(torch.full((5,), 0.5), 2, 5)
