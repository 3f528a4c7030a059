"""Measures and proves: times kernels and whole models, and checks what they compute."""

import linear_vit
from linear_vit.bench.runner import measure

__all__ = ["measure"]

if __name__ == "bench":  # imported from a checkout's root
    linear_vit.answer_to_short_name("bench")
