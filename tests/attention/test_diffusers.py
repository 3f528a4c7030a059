"""Sana's attention in diffusers by our kernels, against its own; random weights, no network."""

from typing import Any

import pytest
import torch

from linear_vit import attention

pytest.importorskip("diffusers")
from diffusers import SanaTransformer2DModel

ERRORS = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    return SanaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=8,
        sample_size=8,
    ).eval()


def run(model: Any, dtype: torch.dtype) -> torch.Tensor:
    draws = torch.Generator().manual_seed(1)
    image, text = (torch.randn(*s, generator=draws) for s in ((2, 4, 8, 8), (2, 5, 8)))
    with torch.no_grad():
        out = model(
            hidden_states=image.to(dtype),
            encoder_hidden_states=text.to(dtype),
            timestep=torch.tensor([3, 7]),
            return_dict=False,
        )
    return out[0]


@pytest.mark.parametrize("dtype", ERRORS, ids=str)
def test_the_numbers_are_sanas_own(model: Any, dtype: torch.dtype) -> None:
    from diffusers.models.attention_processor import SanaLinearAttnProcessor2_0

    own = model.to(dtype)
    for block in own.transformer_blocks:
        block.attn1.set_processor(SanaLinearAttnProcessor2_0())
    expected = run(own, dtype)
    done = attention.replace(own, "linear", backend="torch")
    assert len(done.names) == 2
    assert "outputs stay what they were" in done.notes[0]
    error = (run(own, dtype).float() - expected.float()).norm() / expected.float().norm()
    assert error < ERRORS[dtype]
    model.float()


def test_it_becomes_nothing_else(model: Any) -> None:
    with pytest.raises(ValueError, match="Sana's self-attention is linear as it is"):
        attention.replace(model, "baseline")
