"""A training step of each model: forward, loss, backward, clipping, optimiser."""

import pytest

from linear_vit.bench.plugin import Benchmarks, measured_time
from linear_vit.bench.problems import Case

pytestmark = [
    pytest.mark.benchmark(timer=measured_time),
    pytest.mark.filterwarnings("ignore:Benchmark fixture was not used"),
]


def test_training_step(benchmark, suite: Benchmarks, request, case: Case):
    suite.time(case, benchmark, request.node)
