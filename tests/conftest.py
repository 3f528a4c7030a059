"""What all tests share: the slow ones' shards, how long each takes, and tests that need a GPU."""

import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from tests import shards

if TYPE_CHECKING:
    from tests.clusters import Commands


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("tests", "slow tests in parts")
    group.addoption("--shard", metavar="K/N", help="part K of N of the selected tests, like 2/6")
    group.addoption(
        "--record-seconds",
        metavar="FILE",
        help="append every test's name and seconds (of processors, its processes included) to FILE",
    )


@pytest.hookimpl(trylast=True)  # after -m and -k
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--shard") is None:
        return
    try:
        which, count = shards.parse(config.getoption("--shard"))
    except ValueError as error:
        raise pytest.UsageError(str(error)) from error
    of = shards.assign([item.nodeid for item in items], count, shards.load())
    config.hook.pytest_deselected(items=[i for i in items if of[i.nodeid] != which])
    items[:] = [item for item in items if of[item.nodeid] == which]


@pytest.fixture(autouse=True)
def calm_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """What else runs here disturbs no turn: tests of the measuring bring disturbances of theirs.
    And lines are as wide as they are: pytest-xdist says how wide a terminal is that isn't there."""
    monkeypatch.delenv("COLUMNS", raising=False)
    telemetry = sys.modules.get("linear_vit.bench.instruments.telemetry")
    if telemetry is not None:
        calm = lambda device: telemetry.Watch(telemetry.source_for(device))  # noqa: E731
        monkeypatch.setattr(telemetry.Watch, "of", calm)


@pytest.fixture
def commands() -> Iterator["Commands"]:
    """To start commands that use Ray; none of its processes is to be left by them."""
    pytest.importorskip("ray", reason="Ray is not installed: pip install '.[ray]'")
    from tests.clusters import Commands

    commands = Commands()
    try:
        yield commands
        commands.wait_for_none()
    finally:
        commands.end()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("device") is not None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    file = item.config.getoption("--record-seconds")
    before = _processor_seconds()
    try:
        return (yield)
    finally:
        if file is not None:
            with open(file, "a") as record:  # by several workers: a line is written whole
                record.write(f"{item.nodeid}\t{_processor_seconds() - before:.2f}\n")


def _processor_seconds() -> float:
    """What this process and the finished ones it started used. Others on the machine, which make
    a test wait, make this hardly longer."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system
