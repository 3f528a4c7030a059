"""Whole models, as they come and with their attention swapped: inference and a training step."""

from linear_vit.bench.plugin import Benchmarks
from linear_vit.bench.problems import Case


def test_model(benchmark, suite: Benchmarks, request, case: Case):
    suite.time(case, benchmark, request.node)
