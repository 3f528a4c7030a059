"""Every operation on every backend: forward and forward+backward, per dtype and token count."""

import pytest

from linear_vit.bench.plugin import Benchmarks, measured_time
from linear_vit.bench.problems import Case

# The durations come from bench.clock; pytest-benchmark keeps the statistics and the files.
pytestmark = [
    pytest.mark.benchmark(timer=measured_time),
    pytest.mark.filterwarnings("ignore:Benchmark fixture was not used"),
]


def test_kernel(benchmark, suite: Benchmarks, request, case: Case):
    suite.time(case, benchmark, request.node)
