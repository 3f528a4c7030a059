"""A process with a kernel from outside in it, as its parent sees it.

The parent draws the numbers, knows what is right, and has a clock of its own. What the process says
is JSON, and is believed as far as it can be held against that: results, which are judged here, and
times, which can't be longer or much shorter than what passed here.
"""

import contextlib
import dataclasses
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from multiprocessing import reduction, util
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from linear_vit.bench.guests import memory
from linear_vit.bench.guests.memory import Plan
from linear_vit.bench.guests.process import serve
from linear_vit.bench.instruments.machine import read
from linear_vit.bench.problems import NotOffered, Problem, WrongResult

# A first call may build an extension.
BEGIN_S, BUILD_S, PATIENCE_S = 180.0, 900.0, 120.0
_alive: set["Guest"] = set()


class Failed(Exception):
    """A kernel raised, or took its process with it; the message is one line."""


class OutOfMemory(Failed):
    """It raised for lack of memory."""


@dataclass(frozen=True)
class Entry:
    """A kernel that a file registers, as its process tells it.

    ``interpreted``: Triton is imported, and would interpret; ``key_mask``: it takes one.
    """

    operation: str
    name: str
    devices: tuple[str, ...]
    title: str
    colour: str
    interpreted: bool
    key_mask: bool
    module: str
    function: str


@dataclass(frozen=True)
class Round:
    """What some calls took: ``seconds`` a call by the process's clock, ``wall`` of all by ours.

    ``answer`` is the last call's, as it was when that returned; None where it was not looked at.
    """

    seconds: list[float]
    wall: float
    answer: tuple[Tensor, ...] | None


@contextlib.contextmanager
def _sensible() -> Iterator[None]:
    """A process that answers something else is no reason for this one to fail."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise Failed("its process answers what makes no sense") from error


class Guest:
    """One process, with the files in it; it begins when it is first asked something."""

    def __init__(self, files: Sequence[str], patience_s: float = PATIENCE_S) -> None:
        """``files``: paths of Python files, or modules' names. An answer may take so long."""
        self.files, self._patience = tuple(files), patience_s
        self._process: Any = None
        self._last: Any = None  # what ends it with this process
        self._connection: Connection | None = None
        self._resting = self._has_run = False
        self._problem: Problem | None = None

    # The process.

    def begin(self) -> list[Entry]:
        """Start it, and have it load the files; what they register.

        Raises:
            Failed: a file does not load, in one line with its own error; or nothing begins.
        """
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", serve.__module__])
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs,))
        self._process.start()
        theirs.close()
        _alive.add(self)
        # atexit is not run in a process of multiprocessing, which waits for its children instead.
        self._last = util.Finalize(None, self.stop, exitpriority=10)
        self._receive(BEGIN_S)
        found = self.ask(
            "load",
            files=list(self.files),
            threads=torch.get_num_threads(),
            environment=dict(os.environ),
        )["registered"]
        return [Entry(**{**one, "devices": tuple(one["devices"])}) for one in found]

    def stop(self) -> None:
        """End the process, and what it has started, whatever they do."""
        process, self._process = self._process, None
        if process is not None and process.pid is not None:
            process.kill()
            for started in _session_of(process.pid):  # a compiler is in a group of its own
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(started, signal.SIGKILL)
            process.join()
        if self._connection is not None:
            self._connection.close()
        self._connection, self._resting, self._has_run = None, False, False
        _alive.discard(self)
        if self._last is not None:
            self._last.cancel()
            self._last = None

    def __enter__(self) -> "Guest":
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def rest(self) -> None:
        """Let it do nothing until it is asked again: no thread that it has left runs on."""
        if self._process is not None and not self._resting:
            os.killpg(self._process.pid, signal.SIGSTOP)
            self._resting = True

    def ran(self) -> float:
        """Seconds that its main thread has been on a core, by Linux; 0 where that does not tell."""
        words = read(Path(f"/proc/{self.pid}/task/{self.pid}/schedstat")).split()
        return int(words[0]) * 1e-9 if words else 0.0

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    def ask(self, do: str, *, handle: int | None = None, **message: Any) -> dict[str, Any]:
        """What it answers. ``handle`` is a descriptor to be passed on.

        Raises:
            NotOffered: the kernel has no such pass.
            Failed: it raised, or its process has ended or says nothing.
        """
        if self._process is None:
            self.begin()
        assert self._connection is not None
        if self._resting:
            os.killpg(self._process.pid, signal.SIGCONT)
            self._resting = False
        try:
            self._connection.send_bytes(json.dumps({"do": do, **message}).encode())
            if handle is not None:
                reduction.send_handle(self._connection, handle, self._process.pid)
        except OSError:
            self._connection.close()
        reply = self._receive(self._patience if self._has_run else BUILD_S)
        if reply.get("not_offered"):
            raise NotOffered(reply["error"])
        if "error" in reply:
            raise (OutOfMemory if reply["memory"] else Failed)(reply["error"])
        return reply

    def _receive(self, patience_s: float) -> dict[str, Any]:
        assert self._connection is not None
        try:
            if not self._connection.poll(patience_s):
                self.stop()
                raise Failed(f"no answer within {patience_s:.0f} s")
            with _sensible():
                return dict(json.loads(self._connection.recv_bytes()))
        except (OSError, EOFError) as error:
            process = self._process
            process.join(5)
            code = process.exitcode
            self.stop()
            if code is None:
                raise Failed("its process closed its ears") from error
            why = f"signal {signal.Signals(-code).name}" if code < 0 else f"code {code}"
            raise Failed(f"its process ended with {why}") from error

    # A problem.

    def open(
        self,
        problem: Problem,
        backend: str,
        mode: str,
        *,
        way: str = "as it is",
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        """Give it a problem whose tensors lie as these do, with their numbers.

        Args:
            problem: its inputs and output gradients.
            mode: the pass that a call makes.
            way: "as it is", "under no_grad" or "in inference mode".
            settings: further arguments of the operation.
        """
        tensors = {**problem.inputs, **{f"d{n}": x for n, x in problem.named_cotangents.items()}}
        gradients = list(problem.inputs.values())
        results = {"forward": [*problem.cotangents], "backward": gradients}
        results["forward+backward"] = [*problem.cotangents, *gradients]
        self._plan = Plan.of(tensors, results[mode])
        descriptor = memory.new_file(self._plan.size)
        try:
            self._arena = memory.made(descriptor, self._plan.size)
            self._put(problem)
            device = next(iter(problem.inputs.values())).device
            self.ask(
                "open",
                handle=descriptor,
                operation=problem.operation.name,
                backend=backend,
                mode=mode,
                shape=asdict(problem.shape),
                dtype=str(problem.dtype).removeprefix("torch."),
                device=str(device),
                settings=dict(settings or {}),
                inputs=list(problem.inputs),
                outputs=list(problem.output_names),
                plan=dataclasses.asdict(self._plan),
                way=way,
            )
        finally:
            os.close(descriptor)
        self._problem, self._mode, self._device = problem, mode, device

    def write(self, problem: Problem) -> None:
        """Put another draw of the problem into the same memory, behind the kernel's back."""
        self._put(problem)
        self.ask("write")

    def _put(self, problem: Problem) -> None:
        self._given = self._bytes(problem)
        for (place, size), content in zip(self._plan.storages, self._given, strict=True):
            self._arena[place : place + size].copy_(content)

    def _bytes(self, problem: Problem) -> list[Tensor]:
        tensors = {**problem.inputs, **{f"d{n}": x for n, x in problem.named_cotangents.items()}}
        of_storage = {
            self._plan.tensors[name][0]: memory.bytes_of(x) for name, x in tensors.items()
        }
        return [of_storage[number] for number in range(len(self._plan.storages))]

    def run(
        self, calls: int = 1, *, poisoned: bool = False, rounds: bool = False, share: float = 1.0
    ) -> Round:
        """Have it make so many calls, of which it keeps the last one's answer.

        ``share`` of such answers are looked at, which is drawn when the calls are over.

        Raises:
            WrongResult: as :meth:`answer`.
        """
        began = time.perf_counter()
        asked: dict[str, Any] = {
            "calls": calls,
            "poisoned": poisoned,
            "rounds": rounds,
            "share": share,
        }
        reply = self.ask("run", **asked)
        wall, self._has_run = time.perf_counter() - began, True
        with _sensible():
            seconds = [float(of_one) for of_one in reply["seconds"]]
            found = self._taken(reply["results"]) if "results" in reply else None
        return Round(seconds, wall, found)

    def answer(self, back: int = 0) -> tuple[Tensor, ...]:
        """The last answer, or the one before that, as it is now.

        Raises:
            WrongResult: it is no plain tensor, or not of the dtype, sizes or device that it has to
                be.
        """
        with _sensible():
            return self._taken(self.ask("answer", back=back)["results"])

    def _taken(self, found: Sequence[Mapping[str, Any]]) -> tuple[Tensor, ...]:
        assert self._problem is not None
        self._look_at(self._problem.names(self._mode), found)
        return tuple(memory.result_in(self._arena, at).clone() for at in self._plan.results)

    def _look_at(self, names: Sequence[str], found: Sequence[Mapping[str, Any]]) -> None:
        """What results are made of, before their numbers count."""
        if len(found) != len(names):
            raise WrongResult(f"it returns {len(found)} tensors, not {len(names)}")
        for name, kind, (_, dtype, shape) in zip(names, found, self._plan.results, strict=True):
            if kind["type"] != "Tensor":
                raise WrongResult(f"{name} is a {kind['type']}, not a plain tensor")
            if kind["device"] != self._device.type:
                raise WrongResult(f"{name} is on {kind['device']}, not on {self._device.type}")
            if kind["dtype"] != dtype:
                raise WrongResult(f"{name} is {kind['dtype']}, not {dtype}")
            if kind["shape"] != shape:
                raise WrongResult(f"{name} has shape {tuple(kind['shape'])}, not {tuple(shape)}")

    def changed(self) -> list[str]:
        """Names of inputs and output gradients that are not what they were given as."""
        assert self._problem is not None
        self.ask("given")
        places = self._plan.storages
        differ = {
            number
            for number, ((place, size), was) in enumerate(zip(places, self._given, strict=True))
            if not torch.equal(self._arena[place : place + size], was.cpu())
        }
        return [name for name, lying in self._plan.tensors.items() if lying[0] in differ]


def _session_of(leader: int) -> Iterator[int]:
    """The processes of a session, by Linux."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                words = (folder / "stat").read_text().rpartition(")")[2].split()
                if int(words[3]) == leader:
                    yield int(folder.name)


def stop_all() -> None:
    """End every process that is still there."""
    for guest in list(_alive):
        guest.stop()
