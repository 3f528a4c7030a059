"""Processes of one group of torch.distributed, each of one thread, that do the same together.

They are started once and asked again and again. One that dies or fails ends the group, with its
rank and its own words.
"""

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import connection, util
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

_PATIENCE = timedelta(seconds=120)  # for one another, in an exchange


class RankFailed(RuntimeError):
    """A process of the group raised, or died; the message names its rank."""


class Ranks:
    """So many processes; on CUDA each has a device of its own, the one of its rank."""

    def __init__(self, count: int, device_type: str = "cpu") -> None:
        self.count = count
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch"])
        self._folder = tempfile.TemporaryDirectory(prefix="linear-vit-ranks-")
        self._connections, self._processes = [], []
        for rank in range(count):
            ours, theirs = context.Pipe()
            started = (theirs, self._folder.name, rank, count, device_type)
            process = context.Process(target=_serve, args=started, daemon=True)
            process.start()
            theirs.close()
            self._connections.append(ours)
            self._processes.append(process)
        # atexit is not run in a process of multiprocessing.
        self._last = util.Finalize(self, _end, (self._processes, self._folder), exitpriority=10)

    def ask(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What each returns of ``function(rank, *arguments)``, by rank.

        Args:
            function: of a module, since they import it.

        Raises:
            RankFailed: one raised or died. Then the group has ended.
        """
        for rank, to in enumerate(self._connections):
            try:
                to.send((function, arguments))
            except OSError:
                raise self._failed(rank, self._how_it_died(rank)) from None
        answers: dict[int, Any] = {}
        while len(answers) < self.count:
            waited = {c: r for r, c in enumerate(self._connections) if r not in answers}
            for ready in connection.wait(list(waited)):
                rank = waited[ready]  # type: ignore[index]
                try:
                    right, answers[rank] = self._connections[rank].recv()
                except (EOFError, OSError):
                    raise self._failed(rank, self._how_it_died(rank)) from None
                if not right:
                    raise self._failed(rank, answers[rank])
        return [answers[rank] for rank in range(self.count)]

    @property
    def alive(self) -> bool:
        """Whether it can be asked: until it is closed, or a process fails."""
        return self._last.still_active()

    def close(self) -> None:
        """End them, whatever they do."""
        self._last()

    def _how_it_died(self, rank: int) -> str:
        process = self._processes[rank]
        process.join(5)
        code = process.exitcode
        return f"it died{f' of signal {-code}' if code and code < 0 else ''}"

    def _failed(self, rank: int, why: str) -> RankFailed:
        self.close()
        return RankFailed(f"process {rank} of {self.count}: {why}")


def _end(processes: list[Any], folder: "tempfile.TemporaryDirectory[str]") -> None:
    for process in processes:
        process.kill()
    for process in processes:
        process.join()
    folder.cleanup()


def _serve(asked: Connection, folder: str, rank: int, count: int, device_type: str) -> None:
    """Answer until the parent has gone."""
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if device_type == "cuda":
        torch.cuda.set_device(rank)
    store = dist.FileStore(str(Path(folder) / "store"), count)
    backend = "nccl" if device_type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=_PATIENCE)
    while True:
        try:
            function, arguments = asked.recv()
        except EOFError:
            os._exit(0)  # without a farewell to others, which go as well
        try:
            answer = True, function(rank, *arguments)
        except Exception as error:
            [line, *_] = traceback.format_exception_only(error)[-1:]
            answer = False, line.strip().splitlines()[0][:500]
        asked.send(answer)
