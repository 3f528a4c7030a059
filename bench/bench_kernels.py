"""Every operation on every backend: forward and forward+backward, per dtype and token count."""

from linear_vit.bench.plugin import Benchmarks
from linear_vit.bench.problems import Case


def test_kernel(benchmark, suite: Benchmarks, request, case: Case):
    suite.time(case, benchmark, request.node)
