"""Settings of the kernel tests."""

from collections.abc import Iterator

import hypothesis
import pytest
import torch

from tests.kernels import tiles as _tiles  # noqa: F401 (before anything is built: see there)

# The same draws everywhere and every time: a red test is red again when it is looked at.
hypothesis.settings.register_profile(
    "kernels",
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=12,
    suppress_health_check=list(hypothesis.HealthCheck),
)
hypothesis.settings.load_profile("kernels")


@pytest.fixture(autouse=True)
def nan_filled_allocations() -> Iterator[None]:
    """Every ``torch.empty`` is filled with NaN: what a kernel leaves unwritten can't look right."""
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fill
