"""Training steps and whole models: forward, loss, backward, clipping, optimiser; and inference."""

from linear_vit.bench.plugin import Benchmarks
from linear_vit.bench.problems import Case


def test_training_step(benchmark, suite: Benchmarks, request, case: Case):
    suite.time(case, benchmark, request.node)


def test_model(benchmark, suite: Benchmarks, request, case: Case):
    suite.time(case, benchmark, request.node)
