"""What the benchmark files ask for."""

import pytest

from linear_vit.bench.plugin import Benchmarks


@pytest.fixture(scope="session")
def suite(request: pytest.FixtureRequest) -> Benchmarks:
    """The running sweep: measures a case and keeps what several cases share."""
    found = request.config.pluginmanager.get_plugin("kernel-benchmarks")
    assert isinstance(found, Benchmarks)
    return found
