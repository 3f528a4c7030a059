"""Nothing disturbs a turn, and there are few: for tests of what a run does, on any machine.

For processes that tests start: ``-p tests.bench.calm``. In the tests' own a fixture does the same.
"""

import torch

from linear_vit.bench import plugin
from linear_vit.bench.instruments import limits, telemetry
from linear_vit.bench.instruments.telemetry import Watch


def watch(device: torch.device) -> Watch:
    """Telemetry alone."""
    return Watch(telemetry.source_for(device))


Watch.of = watch  # type: ignore[method-assign, assignment]
plugin._BUDGET_S = dict.fromkeys(plugin._BUDGET_S, 0.02)
limits._BUDGET_S = 0.02
limits._MATMUL_SIDE, limits._COPY_BYTES = {"cpu": 256}, {"cpu": 2**22}
