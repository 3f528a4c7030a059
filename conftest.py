"""pytest's options, and the two worlds it is used in: tests, or timings with --benchmark-only."""

import argparse
from pathlib import Path
from typing import Any

import pytest

from linear_vit import options
from linear_vit.bench.problems import operations
from linear_vit.training import steps as _steps  # noqa: F401 (training steps are cases, too)
from linear_vit.training import whole_models

_ROOT = Path(__file__).parent
_OPTIONS = (
    "device",
    "dtypes",
    "tokens",
    "total_tokens",
    "backends",
    "ops",
    "kernels",
    "sweep",
    "minutes",
    "repeats",
    "out",
    "models",
    "attention",
    "resolutions",
    "peers",
    "keep_memory",
    "dry_run",
    "rehearse",
    "resume_bench",
    "profile",
    "cluster",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("kernels", "benchmarks (with --benchmark-only)")
    options.option(
        group,
        "--sweep",
        choices=("quick", "full", "gpu", "cpu"),
        help="quick (default): minutes; full: every dtype, longer sequences; gpu, cpu: what such a "
        "machine should be asked, most important first",
    )
    options.add(group, "ops", "backends", "dtypes", "device", "minutes", "kernels")
    options.option(group, "--tokens", "--seq-lens", **options.settings("tokens"))
    options.add(group, out="folder of the run, in the place of --benchmark-json")
    options.option(
        group,
        "--total-tokens",
        type=int,
        metavar="COUNT",
        help="as many sequences of each length as make this many tokens (default: one sequence)",
    )
    options.option(
        group,
        "--models",
        type=options.words,
        metavar="A,B",
        help="whole models: timm:NAME, transformers:TYPE, FILE.py:FUNCTION, as they come and with "
        "their attention swapped",
    )
    options.option(
        group,
        "--attention",
        type=options.words,
        metavar="A,B",
        help="what --models' attention becomes: baseline, linear, ripple, hydra (default: all)",
    )
    options.option(
        group,
        "--resolutions",
        type=options.numbers,
        metavar="A,B",
        help="sides of --models' images, in pixels (224,448,896)",
    )
    options.option(
        group,
        "--repeats",
        type=int,
        metavar="COUNT",
        help="measure in so many fresh processes, one saved run each: run.1.json, run.2.json ...",
    )
    options.option(
        group,
        "--cluster",
        metavar="HOST:PORT",
        help="measure once on every kind of device of this Ray cluster (or auto: the one that runs "
        "here), each alone on its node, one saved run each: run.KIND.json",
    )
    flags = {
        "--peers": "time other libraries' implementations, too: every SDPA kernel, and those of "
        "pip install '.[peers]'",
        "--keep-memory": "freed memory stays with the process (glibc): no fresh pages for anyone",
        "--dry-run": "list the cases with what time and memory they may take, and time none",
        "--rehearse": "walk through every case at a tiny size, and keep no number",
        "--resume-bench": "go on with the killed or interrupted run of the same file",
        "--profile": "also write a trace of each case (Perfetto), its top kernels and, where ncu "
        "is installed, its counters",
    }
    # Of before, when limits were kept for a day: they are measured in every run.
    group.addoption("--limits", choices=("kept", "fresh"), help=argparse.SUPPRESS)
    for flag, text in flags.items():
        options.option(group, flag, action="store_true", default=None, help=text)


def pytest_cmdline_main(config: pytest.Config) -> int | None:
    if not _benchmark_only(config):
        return None
    if address := config.getoption("cluster"):
        from linear_vit.bench import cluster, plugin

        return cluster.run(config, address, plugin.path_of(config))
    if config.getoption("repeats") in (None, 1):
        return None
    from linear_vit.bench import plugin, repeats

    return repeats.run(config, config.getoption("repeats"), plugin.path_of(config))


def pytest_configure(config: pytest.Config) -> None:
    if _benchmark_only(config):
        from linear_vit.bench.plugin import Benchmarks

        _ask_for_models(config)
        config.pluginmanager.register(Benchmarks(config), "kernel-benchmarks")
        return
    given = [name for name in _OPTIONS if config.getoption(name) is not None]
    if given:
        option = given[0].replace("_", "-")
        raise pytest.UsageError(f"--{option} is for benchmarks: add --benchmark-only")


def _ask_for_models(config: pytest.Config) -> None:
    """With --models the sweep is of these, and of --ops that are named."""
    names = ("models", "attention", "resolutions", "backends")
    given = {name: config.getoption(name) or () for name in names}
    given |= {name: () for name, asked in given.items() if asked == ("all",)}
    if not given["models"]:
        if given["attention"] or given["resolutions"]:
            raise pytest.UsageError("--attention and --resolutions are of --models: name some")
        return
    try:
        whole_models.WHOLE_MODEL.ask(whole_models.Asked(**given))
    except options.OptionError as error:
        raise pytest.UsageError(str(error)) from error
    ops = config.getoption("ops") or ()
    every = ops == ("all",)
    config.option.ops = tuple(operations()) if every else (*ops, whole_models.WHOLE_MODEL.name)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Plain pytest times nothing, and --benchmark-only runs no test."""
    unwanted = _ROOT / ("tests" if _benchmark_only(config) else "bench")
    return True if collection_path.is_relative_to(unwanted) else None


def _benchmark_only(config: pytest.Config) -> Any:
    # Without pytest-benchmark there is no such option, and the tests still run.
    return config.getoption("benchmark_only", default=False)
