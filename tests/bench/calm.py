"""Nothing disturbs a turn: for tests of what a run does, on whatever machine they run.

For processes that tests start: ``-p tests.bench.calm``. In the tests' own a fixture does the same.
"""

import torch

from linear_vit.bench.instruments import telemetry
from linear_vit.bench.instruments.telemetry import Watch


def watch(device: torch.device) -> Watch:
    """Telemetry alone."""
    return Watch(telemetry.source_for(device))


Watch.of = watch  # type: ignore[method-assign, assignment]
