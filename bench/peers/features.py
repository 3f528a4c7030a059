"""φ, and a state applied to queries: what the peers' users write around their kernels."""

import torch
from torch import Tensor

_EPS = 1e-6


def phi(x: Tensor) -> Tensor:
    """[relu(x), relu(-x)] along the last axis."""
    return torch.cat([x.relu(), (-x).relu()], -1)


def through_state(features: Tensor, state: Tensor, normaliser: Tensor) -> Tensor:
    """φ(q) (B, H, N, F) on S (B, H, F, D) and z (B, H, F), all in the state's dtype."""
    features = features.to(state.dtype)
    numerator = torch.einsum("bhnf,bhfd->bhnd", features, state)
    return numerator / (torch.einsum("bhnf,bhf->bhn", features, normaliser)[..., None] + _EPS)
