"""transformers' vision models by our attention, against their own; random weights, no network."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from linear_vit import attention
from linear_vit.kernels import linear_attention

transformers = pytest.importorskip("transformers")

from linear_vit.attention.adapters.transformers import key_mask  # noqa: E402

SIZES = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
VISION = {
    "vit": ("ViTConfig", "ViTModel", {}, 1),
    "dinov2": ("Dinov2Config", "Dinov2Model", {}, 1),
    "registers": (
        "Dinov2WithRegistersConfig",
        "Dinov2WithRegistersModel",
        {"num_register_tokens": 3},
        4,
    ),
    "siglip": ("SiglipVisionConfig", "SiglipVisionModel", {}, 0),
}


def model(name: str) -> Any:
    config, kind, more, _ = VISION[name]
    torch.manual_seed(0)
    made = getattr(transformers, config)(**SIZES, **more)
    made._attn_implementation = "sdpa"
    return getattr(transformers, kind)(made).eval()


def images() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def hidden(one: Any) -> Tensor:
    return one(images()).last_hidden_state


@pytest.mark.parametrize("name", VISION)
def test_baseline_gives_their_own_outputs(name: str) -> None:
    own, swapped = model(name), model(name)
    done = attention.replace(swapped, "baseline", backend="torch")
    assert len(done.names) == 2
    assert swapped.state_dict().keys() == own.state_dict().keys()
    torch.testing.assert_close(hidden(swapped), hidden(own), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", VISION)
def test_linear_is_linear_attention_of_their_projections(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against their own code, with SDPA itself replaced beneath it."""
    own, swapped = model(name), model(name)
    attention.replace(swapped, "linear", backend="torch")
    monkeypatch.setattr(
        nn.functional,
        "scaled_dot_product_attention",
        lambda q, k, v, **_: linear_attention(q, k, v, backend="reference"),
    )
    torch.testing.assert_close(hidden(swapped), hidden(own), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", VISION)
def test_ripple_pools_the_patch_tokens_alone(name: str) -> None:
    swapped = model(name)
    done = attention.replace(swapped, "ripple", ripple_stages=2, backend="torch")
    before = VISION[name][3]
    assert bool(done.notes) == bool(before)
    if before:
        assert done.notes[0].startswith(f"{before} class and register tokens")
    assert done.new == {"pyramid": "as in a new model"}
    seen: list[tuple[int, ...]] = []
    for module in attention.attention_modules(swapped).values():
        module.register_forward_hook(lambda _, given, out: seen.append(out[0].shape))
    hidden(swapped).sum().backward()
    assert [shape[1] for shape in seen] == [before + 16 // 4] * 2
    # And back: the pyramid is gone.
    plain = model(name)
    attention.replace(plain, "linear", backend="torch")
    attention.replace(swapped, "linear", backend="torch")
    torch.testing.assert_close(hidden(swapped), hidden(plain))


def test_by_name_of_the_implementation() -> None:
    config = transformers.ViTConfig(**SIZES)
    named = transformers.AutoModel.from_config(config, attn_implementation="linear_vit_linear")
    swapped = copy.deepcopy(named)
    attention.replace(swapped, "linear")
    torch.testing.assert_close(hidden(named.eval()), hidden(swapped.eval()))
    other = copy.deepcopy(named)
    other.set_attn_implementation("sdpa")
    assert not torch.allclose(hidden(other), hidden(named), atol=1e-3)


def text_model() -> Any:
    config = transformers.SiglipTextConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=8,
    )
    torch.manual_seed(0)
    return transformers.SiglipTextModel(config).eval()


def test_padding_reaches_the_attention_or_is_refused() -> None:
    """Without a mask function of our own it would be attended to, and nobody told."""
    own, swapped = text_model(), text_model()
    attention.replace(swapped, "baseline", backend="torch")
    words = torch.randint(0, 40, (2, 8), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 8, dtype=torch.int64)
    torch.testing.assert_close(
        swapped(words, attention_mask=mask).last_hidden_state,
        own(words, attention_mask=mask).last_hidden_state,
        rtol=1e-5,
        atol=1e-5,
    )
    mask[:, 5:] = 0
    expected = own(words, attention_mask=mask).last_hidden_state
    got = swapped(words, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(got[:, :5], expected[:, :5], rtol=1e-5, atol=1e-5)


def test_the_mask_is_one_of_keys() -> None:
    padded = torch.tensor([[1, 1, 0]])
    assert key_mask(attention_mask=padded, kv_length=3).tolist() == [[True, True, False]]
    assert key_mask(attention_mask=torch.ones(2, 3)) is None
    assert key_mask() is None
    with pytest.raises(ValueError, match="its queries see different keys"):
        key_mask(mask_function=lambda *_: True, attention_mask=padded)


def test_what_it_cannot_do_raises() -> None:
    swapped = transformers.ViTModel(
        transformers.ViTConfig(**SIZES, attention_probs_dropout_prob=0.1)
    )
    attention.replace(swapped, "linear", backend="torch")
    with pytest.raises(ValueError, match="dropout of attention weights"):
        swapped.train()(images())
    with pytest.raises(ValueError, match="hydra is not offered"):
        attention.replace(swapped, "hydra")
    with pytest.raises(ValueError, match="reads no image"):
        attention.replace(text_model(), "ripple")
    sizes = {name: SIZES[name] for name in ("hidden_size", "num_attention_heads")}
    causal = transformers.LlamaConfig(
        **sizes, intermediate_size=32, num_hidden_layers=1, vocab_size=40
    )
    with pytest.raises(ValueError, match=r"layers.0.self_attn is causal"):
        attention.replace(transformers.LlamaModel(causal), "linear")
