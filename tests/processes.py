"""Python and pytest in a process of their own, as a user starts them.

Importing PyTorch takes two seconds of every process. So a server imports it once, and the
processes are forks of that. What is about imports, or is read in them, needs a ``fresh`` one.
"""

import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

ROOT = Path(__file__).resolve().parents[1]
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["torch", "pytest"])
_PREFIXES = (sys.prefix, sys.base_prefix)
PLUGINS = ("-p", "no:cacheprovider", "-p", "tests.bench.calm")


def environment(**more: str) -> dict[str, str]:
    """Ours, as a user has it: benchmarks refuse to run in a worker of pytest-xdist, which these
    tests may well be in."""
    ours = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "TRITON_"))}
    return ours | more


def python(
    *arguments: str, cwd: Path = ROOT, fresh: bool = False, timeout: float = 300, **more: str
) -> subprocess.CompletedProcess[str]:
    """What ``python ARGUMENTS`` says and ends with.

    Args:
        arguments: ``"-c", code``, ``"-m", module`` or a program's path, and what these are given.
        fresh: a new interpreter, with nothing imported.
        more: variables of its environment beside ours.

    Raises:
        subprocess.TimeoutExpired: after so many seconds; the process is gone.
    """
    if fresh:
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=cwd,
            env=environment(**more),
            capture_output=True,
            text=True,
            timeout=timeout,
        )
    with tempfile.TemporaryDirectory() as folder:
        said = [Path(folder) / name for name in ("out", "err")]
        process = _SERVER.Process(
            target=_run, args=(arguments, str(cwd), environment(**more), said)
        )
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(arguments, timeout)
        out, err = (path.read_text() for path in said)
        return subprocess.CompletedProcess(arguments, process.exitcode, out, err)


def pytest(*options: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    """``folder``: of modules for ``-p``. What else runs on this machine disturbs nothing (see
    ``calm``)."""
    found = {"PYTHONPATH": str(folder)} if folder else {}
    return python("-m", "pytest", *PLUGINS, *options, **found)


# A model's first compilation takes half a minute on a quiet machine.
_UNTIL_LOST_S = 600


def together(
    count: int, function: Callable[..., Any], *arguments: Any, joined: bool = True
) -> list[Any]:
    """What so many processes return that are one group of torch.distributed (gloo), by rank.

    Args:
        function: of a module, called as ``function(rank, *arguments)``, in one thread.
        joined: without, they only have torchrun's variables, and join by themselves.

    Raises:
        AssertionError: one of them failed; with what it said.
    """
    with tempfile.TemporaryDirectory() as folder:
        store = f"{folder}/store" if joined else _free_port()
        group = [
            _SERVER.Process(target=_member, args=(folder, store, count, rank, function, arguments))
            for rank in range(count)
        ]
        for process in group:
            process.start()
        for process in group:
            process.join(_UNTIL_LOST_S)
        for process in group:
            process.kill()
            process.join()
        found = [Path(folder) / str(rank) for rank in range(count)]
        lost = False, f"it ended without a word, or was not done in {_UNTIL_LOST_S} s"
        kept = [torch.load(p, weights_only=False) if p.exists() else lost for p in found]
        for rank, (right, result) in enumerate(kept):
            assert right, f"process {rank} of {count} failed: {result}"
        return [result for _, result in kept]


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _member(
    folder: str,
    store: str | int,
    count: int,
    rank: int,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    if isinstance(store, str):
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(store, count),
            rank=rank,
            world_size=count,
            timeout=timedelta(seconds=60),
        )
    else:
        told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_PORT": store}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", **{k: f"{v}" for k, v in told.items()}}
    try:
        kept = (True, function(rank, *arguments))
    except BaseException:
        kept = (False, traceback.format_exc())
    torch.save(kept, f"{folder}/{rank}.part")
    os.replace(f"{folder}/{rank}.part", f"{folder}/{rank}")
    if dist.is_initialized():
        dist.destroy_process_group()


def _run(
    arguments: Sequence[str], cwd: str, environment: Mapping[str, str], said: Sequence[Path]
) -> None:
    for number, path in enumerate(said, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    installed = [entry for entry in sys.path if entry.startswith(_PREFIXES)]
    given = [entry for entry in environment.get("PYTHONPATH", "").split(os.pathsep) if entry]
    kind, *rest = arguments
    if kind == "-c":
        sys.path[:] = ["", *given, *installed]
        sys.argv[:] = ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    elif kind == "-m":
        sys.path[:] = [cwd, *given, *installed]
        sys.argv[:] = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.path[:] = [str(Path(kind).parent), *given, *installed]
        sys.argv[:] = list(arguments)
        runpy.run_path(kind, run_name="__main__")
