"""``--cluster ADDRESS``: the same run on every kind of device that a Ray cluster has, side by side.

A run shares its node with nothing of the cluster's: it holds all of the node's CPUs and GPUs. The
node runs the same command line in a process of its own, in the same folder, and sends the files
back.
"""

import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from linear_vit import cluster, options
from linear_vit.bench.instruments import machine
from linear_vit.cluster import Node
from linear_vit.screen import counted, say

_WAIT_S = 60.0  # for a node that has nothing else to do
_THREADS = "OMP_NUM_THREADS"  # Ray sets it for its tasks
_NO_REASON = "its process is gone"


def run(config: pytest.Config, address: str, path: Path | None) -> int:
    """Leave ``name.KIND.json`` for every kind of device in the place of ``name.json``.

    Returns:
        The first exit code that is not 0, or 1 where a kind could not be had alone; else 0.

    Raises:
        pytest.UsageError: no file was named, there is no such cluster, or none of its nodes has
            the device.
    """
    if path is None:
        raise pytest.UsageError("--cluster: name the runs' file with --benchmark-json or --out")
    if config.getoption("resume_bench"):
        raise pytest.UsageError("--cluster: a run on a cluster begins anew, no --resume-bench")
    try:
        with cluster.joined(address) as ray:
            kinds = _kinds(ray, config.getoption("device"))
            codes = _on_all(ray, kinds, config, path)
    except options.OptionError as error:
        raise pytest.UsageError(str(error)) from error
    except KeyboardInterrupt:
        say("interrupted")
        return pytest.ExitCode.INTERRUPTED
    return next((code for code in codes if code), 0)


def _kinds(ray: Any, device: str | None) -> dict[str, list[Node]]:
    """The nodes of each kind, by the name of the device that is timed there."""
    nodes, kinds = cluster.nodes(ray), dict[str, list[Node]]()
    names = cluster.ask(ray, _device_name, device, of=nodes)
    for node, name in zip(nodes, names, strict=True):
        if isinstance(name, Exception):
            say(f"node {cluster.name_of(node)} is left out: {name}")
        else:
            kinds.setdefault(name, []).append(node)
    if not kinds:
        raise options.OptionError("--cluster: there is no node to measure on")
    return kinds


def _device_name(device: str | None) -> str:
    return str(machine.describe(options.device(device))["device_name"])


def _on_all(
    ray: Any, kinds: Mapping[str, Sequence[Node]], config: pytest.Config, path: Path
) -> list[int]:
    """Exit codes of the kinds' runs, which go on at the same time."""
    task = ray.remote(max_retries=0)(_measure)
    arguments, folder = list(map(str, config.invocation_params.args)), config.invocation_params.dir
    running, codes = dict[Any, str](), list[int]()
    try:
        for kind, nodes in kinds.items():
            found = alone(ray, nodes, _WAIT_S)
            if found is None:
                names = ", ".join(map(cluster.name_of, nodes))
                say(f"{kind}: not measured: other tasks held {names} for {_WAIT_S:.0f} s")
                codes.append(pytest.ExitCode.TESTS_FAILED)
                continue
            node, held = found
            say(f"{kind}: measuring on {cluster.name_of(node)}, alone")
            slug = re.sub("[^a-z0-9]+", "-", kind.lower()).strip("-")
            name = f"{path.stem}.{slug}{path.suffix}"
            asks = task.options(num_cpus=0, scheduling_strategy=held)
            running[asks.remote(arguments, folder, name, os.environ.get(_THREADS))] = kind
        while running:
            [ref], _ = ray.wait(list(running), num_returns=1)
            codes.append(_ended(ray, ref, running.pop(ref), path.parent))
    except BaseException:
        cluster.stop(ray, running)
        raise
    return codes


def alone(ray: Any, nodes: Sequence[Node], seconds: float) -> tuple[Node, Any] | None:
    """The first of these nodes that nothing else runs on, and how a task goes there, which then
    has it for itself; None where none is free for so many seconds."""
    from ray.util.placement_group import placement_group, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    groups = {}
    for node in nodes:
        whole = {what: node["Resources"].get(what, 0) for what in ("CPU", "GPU")}
        label = {"ray.io/node-id": node["NodeID"]}
        bundle = {what: count for what, count in whole.items() if count}
        group = placement_group([bundle], bundle_label_selector=[label])
        groups[group.ready()] = node, group
    ready, _ = ray.wait(list(groups), num_returns=1, timeout=seconds)
    for ref, (_, group) in groups.items():
        if ref not in ready:
            remove_placement_group(group)
    if not ready:
        return None
    node, group = groups[ready[0]]
    return node, PlacementGroupSchedulingStrategy(group)


def _measure(
    arguments: Sequence[str], folder: Path, name: str, threads: str | None
) -> tuple[int, str, dict[str, bytes]]:
    """The command line on this node: its exit code, what it said, and the files it left."""
    environment = {key: value for key, value in os.environ.items() if key != _THREADS}
    if threads is not None:
        environment[_THREADS] = threads
    with TemporaryDirectory() as out:
        # What is given last counts.
        last = ["--cluster=", f"--benchmark-json={Path(out) / name}"]
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *arguments, *last],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        there = [path for path in sorted(Path(out).rglob("*")) if path.is_file()]
        files = {str(path.relative_to(out)): path.read_bytes() for path in there}
    said = [done.stdout.rstrip()]
    if nice := os.nice(0):
        said.append(f"its niceness was {nice}, Ray's own: RAY_worker_niceness=0 ray start ...")
    return done.returncode, "\n".join(said), files


def _ended(ray: Any, ref: Any, kind: str, folder: Path) -> int:
    """Show what a node said, and write its files; the run's exit code."""
    try:
        code, said, files = ray.get(ref)
    except ray.exceptions.RayError as error:
        say(f"{kind}: not measured: {(str(error).splitlines() or [_NO_REASON])[0]}")
        return pytest.ExitCode.TESTS_FAILED
    say(f"{kind}:\n{said}")
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    written = ", ".join(str(folder / name) for name in files)
    say(
        f"{kind}: {counted(len(files), 'file')} written: {written}" if files else f"{kind}: no file"
    )
    return int(code)
