"""pytest's options, and the two worlds it is used in: tests, or timings with --benchmark-only."""

from pathlib import Path
from typing import Any

import pytest

_ROOT = Path(__file__).parent
_OPTIONS = (
    "device",
    "dtypes",
    "seq_lens",
    "total_tokens",
    "backends",
    "ops",
    "sweep",
    "peers",
    "dry_run",
    "resume_bench",
    "profile",
    "limits",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("kernels", "kernel benchmarks (with --benchmark-only)")
    group.addoption("--device", metavar="NAME", help="cpu or cuda[:i] (default: cuda if there)")
    group.addoption("--dtypes", metavar="LIST", help="e.g. float32,bfloat16")
    group.addoption("--seq-lens", metavar="LIST", help="token counts N, e.g. 64,1024,16384")
    group.addoption(
        "--total-tokens",
        type=int,
        metavar="COUNT",
        help="as many sequences of each length as make this many tokens (default: one sequence)",
    )
    group.addoption("--backends", metavar="LIST", help="e.g. torch,compiled,triton")
    group.addoption("--ops", metavar="LIST", help="e.g. linear_attention,softmax_attention")
    group.addoption(
        "--sweep",
        choices=("quick", "full"),
        help="quick (default): minutes, also on two cores; full: every dtype, longer sequences",
    )
    group.addoption(
        "--peers",
        action="store_true",
        default=None,
        help="time other libraries' implementations, too: every SDPA kernel, and those of "
        "pip install '.[peers]'",
    )
    group.addoption(
        "--dry-run",
        action="store_true",
        default=None,
        help="list the cases with what time and memory each is estimated to take, and time none",
    )
    group.addoption(
        "--resume-bench",
        action="store_true",
        default=None,
        help="go on with the killed or interrupted run of the same --benchmark-json",
    )
    group.addoption(
        "--limits",
        choices=("kept", "fresh"),
        help="kept (default): the machine's copy and matmul rates as measured within a day; "
        "fresh: measure them anew",
    )
    group.addoption(
        "--profile",
        action="store_true",
        default=None,
        help="also write a trace of each case (Perfetto, chrome://tracing), its top kernels and, "
        "where ncu is installed, its counters",
    )


def pytest_configure(config: pytest.Config) -> None:
    if _benchmark_only(config):
        from linear_vit.bench.plugin import Benchmarks

        config.pluginmanager.register(Benchmarks(config), "kernel-benchmarks")
        return
    given = [name for name in _OPTIONS if config.getoption(name) is not None]
    if given:
        option = given[0].replace("_", "-")
        raise pytest.UsageError(f"--{option} is for benchmarks: add --benchmark-only")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Plain pytest times nothing, and --benchmark-only runs no test."""
    unwanted = _ROOT / ("tests" if _benchmark_only(config) else "bench")
    return True if collection_path.is_relative_to(unwanted) else None


def _benchmark_only(config: pytest.Config) -> Any:
    # Without pytest-benchmark there is no such option, and the tests still run.
    return config.getoption("benchmark_only", default=False)
