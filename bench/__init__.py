"""Measures and proves: times kernels and whole models, and checks what they compute."""

from linear_vit.bench.runner import measure

__all__ = ["measure"]
