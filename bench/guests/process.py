"""The process in which a kernel from outside runs: it makes calls, and knows no answers.

What is right, which numbers come next and which calls are looked at are known to the parent alone.
Checked or timed, a call is made by the same lines (:meth:`_Served.run`), so that a kernel can't
tell the one from the other. Messages are JSON both ways: what comes from here is never unpickled.
"""

import contextlib
import ctypes
import functools
import gc
import itertools
import json
import os
import random
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from multiprocessing import reduction
from multiprocessing.connection import Connection
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from linear_vit import kernels, options
from linear_vit.bench import problems
from linear_vit.bench.guests import memory
from linear_vit.bench.guests.integrity import Watch
from linear_vit.bench.instruments import clock, proof
from linear_vit.bench.instruments.memory import is_out_of_memory, peak_beyond_outputs
from linear_vit.bench.problems import BACKWARD, NotOffered, Problem
from linear_vit.bench.problems.inputs import Drawn
from linear_vit.kernels import entry_points, probes, registry

OURS_REFUSED = "a kernel from outside may not fall back to one of this suite"
_WAYS: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "as it is": contextlib.nullcontext,
    "under no_grad": torch.no_grad,
    "in inference mode": torch.inference_mode,
}
_drawn = random.SystemRandom()
_DIES_WITH_PARENT = (1, signal.SIGKILL)  # PR_SET_PDEATHSIG


class _Refusing(MetaPathFinder, Loader):
    """Keeps the modules of our backends from being imported."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        package, _, last = name.rpartition(".")
        packages = {row.package for row in kernels.operations().values()}
        full = package if package.startswith("linear_vit.") else f"linear_vit.{package}"
        return ModuleSpec(name, self) if last in kernels.BACKENDS and full in packages else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        raise ImportError(f"{spec.name}: {OURS_REFUSED}")

    def exec_module(self, module: ModuleType) -> None:
        """Never reached."""


def serve(connection: Connection) -> None:
    """Answer messages until the parent has gone."""
    os.setsid()  # so that the parent can stop and end all that it starts
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what an interrupt ends
    ctypes.CDLL(None).prctl(*_DIES_WITH_PARENT, 0, 0, 0)
    served = _Served(connection)
    _answer(connection, {})
    while True:
        try:
            message = json.loads(connection.recv_bytes())
        except EOFError:
            return
        try:
            reply = getattr(served, message.pop("do"))(**message)
        except Exception as error:
            reply = {"error": _in_a_line(error), "memory": is_out_of_memory(error)}
            reply["not_offered"] = isinstance(error, NotOffered)
        _answer(connection, reply)


def _answer(connection: Connection, reply: dict[str, Any]) -> None:
    connection.send_bytes(json.dumps(reply).encode())


def _in_a_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or ["no message"]
    kind = "" if isinstance(error, NotOffered) else f"{type(error).__name__}: "
    return f"{kind}{lines[0][:500]}"


# ---- what is asked -------------------------------------------------------------------------------


class _Served:
    """The process's state: what it has loaded, and the one problem that is open."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._watch: Watch | None = None
        self._answers: list[tuple[Any, ...]] = []
        self._last: Any = None

    def load(self, files: list[str], threads: int, environment: dict[str, str]) -> dict[str, Any]:
        """Import what registers kernels; every one that is registered by now."""
        os.environ.clear()
        os.environ.update(environment)  # this process's is that of the first one's start
        options.load_plugins()
        torch.set_num_threads(threads)
        entry_points.leave_out()
        registry.refuse_built_in(OURS_REFUSED)
        sys.meta_path.insert(0, _Refusing())
        self._watch = Watch()
        for file in files:
            options.load_module(file)
        gc.collect()
        gc.freeze()  # what there is by now takes a tenth of a second to look through
        gc.disable()
        rows = kernels.backend_rows()
        interpreted = "triton" in sys.modules and probes.switched_on(probes.INTERPRETER)
        return {
            "registered": [
                {
                    "operation": op,
                    "name": name,
                    "devices": list(entry.devices),
                    "title": rows[name].title,
                    "colour": rows[name].colour,
                    "interpreted": interpreted,
                    "key_mask": entry.takes_key_mask,
                    "module": entry.function.__module__,
                    "function": getattr(entry.function, "__qualname__", str(entry.function)),
                }
                for (op, name), entry in registry.all_registered().items()
            ]
        }

    def unusable(
        self, operation: str, name: str, device: str, dtype: str | None, head_dim: int | None
    ) -> dict[str, Any]:
        of = getattr(torch, dtype) if dtype else None
        reasons = kernels.backends(operation, device, dtype=of, head_dim=head_dim)
        return {"reason": reasons[name]}

    def ping(self) -> dict[str, Any]:
        """That it is awake."""
        return {}

    def patched(self) -> dict[str, Any]:
        """What has been replaced since before the files were loaded."""
        return {"patched": self._watch.changed() if self._watch else []}

    def open(
        self,
        operation: str,
        backend: str,
        mode: str,
        shape: dict[str, Any],
        dtype: str,
        device: str,
        settings: dict[str, Any],
        inputs: list[str],
        outputs: list[str],
        plan: dict[str, Any],
        way: str,
    ) -> dict[str, Any]:
        """A problem whose tensors lie as the plan says, and what is to be done with it."""
        self._answers.clear()
        gc.collect()  # and never inside a round: the pause would be charged to the call
        descriptor = reduction.recv_handle(self._connection)
        self._arena = memory.made(descriptor, plan["size"])
        os.close(descriptor)
        self._plan, self._device = plan, torch.device(device)
        sizes = [size for _, size in plan["storages"]]
        self._storages = [torch.empty(n, dtype=torch.uint8, device=device) for n in sizes]
        tensors = {
            name: memory.tensor_in(self._storages[lying[0]], lying)
            for name, lying in plan["tensors"].items()
        }
        of = problems.operation(operation)
        sizes_of = type(of.shape(64))(**shape)
        leaves = {name: tensors[name].requires_grad_() for name in inputs}
        cotangents = tuple(tensors[name] for name in tensors if name not in leaves)
        run = of.run(sizes_of, **settings) if isinstance(of, Drawn) else _run_of(of, sizes_of)
        problem = Problem(
            of, sizes_of, getattr(torch, dtype), leaves, tuple(outputs), cotangents, run
        )
        self._make = functools.partial(self._made, problem, backend, mode, way)
        self._again = mode == BACKWARD
        self._rounds: clock.Rounds | None = None
        self.write()
        if not self._again:
            self._make()
        return {}

    def _made(self, problem: Problem, backend: str, mode: str, way: str) -> None:
        """Have ``_call`` make one pass and keep its answer.

        The answer before is let go first, as where nobody keeps any: so the allocator has its
        memory for this one.
        """
        with _WAYS[way]():
            call = problem.call(backend, mode)

        def kept() -> None:
            self._last = None
            self._last = call()

        def within() -> None:
            with _WAYS[way]():
                kept()

        # A context that does nothing costs half a microsecond, which is not the kernel's.
        self._call = kept if way == "as it is" else within
        if self._rounds is not None:
            self._rounds.call = self._call

    def write(self) -> dict[str, Any]:
        """Take the numbers that are in the arena."""
        for (place, size), storage in zip(self._plan["storages"], self._storages, strict=True):
            storage.copy_(self._arena[place : place + size])
        if self._again:  # the forward pass is of these numbers, too
            self._make()
        return {}

    def given(self) -> dict[str, Any]:
        """Put what the inputs hold by now into the arena."""
        for (place, size), storage in zip(self._plan["storages"], self._storages, strict=True):
            self._arena[place : place + size].copy_(storage)
        return {}

    def run(
        self, calls: int, poisoned: bool = False, rounds: bool = False, share: float = 1.0
    ) -> dict[str, Any]:
        """So many calls, of which the last one's answer is kept; seconds a call.

        Whether it is looked at is drawn when the calls are over, and then it is copied at once: so
        nothing can be done for it beforehand, nor by another thread afterwards.

        Args:
            calls: of one round; with ``rounds``, on CUDA, of so many.
            poisoned: PyTorch fills the memory that it hands out with NaN.
            share: of such runs, those whose answer is looked at.
        """
        if self._device.type == "cuda" and not rounds:
            return self._without_rounds(calls, poisoned)
        if self._rounds is None:
            self._rounds = clock.rounds_on(self._device)(self._call, self._device, 1.0, 1)
        self._rounds.ask_for(calls)
        with _poisoned() if poisoned else contextlib.nullcontext():
            self._rounds.start()
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            self._rounds.finish()
        self._answers = [*self._answers[-1:], self._last]
        found = self.answer() if _drawn.random() < share else {}
        return {"seconds": self._rounds.take(), **found}

    def _without_rounds(self, calls: int, poisoned: bool) -> dict[str, Any]:
        """On CUDA before anything is timed: a kernel may compile in its first call."""
        with _poisoned() if poisoned else contextlib.nullcontext():
            for _ in itertools.repeat(None, calls):
                self._call()
        self._answers = [*self._answers[-1:], self._last]
        return {"seconds": [], **self.answer()}

    def answer(self, back: int = 0) -> dict[str, Any]:
        """Copy the last answer into the arena, or the one before, and say what it is made of.

        On CUDA the copy waits for the stream of the call, and for no other.
        """
        results = self._answers[-1 - back]
        kinds = [self._kind_of(x) for x in results]
        for x, place, kind in zip(results, self._plan["results"], kinds, strict=False):
            if [kind["dtype"], kind["shape"]] == list(place[1:]):
                memory.result_in(self._arena, place).copy_(x.detach())
        return {"results": kinds}

    def _kind_of(self, x: Any) -> dict[str, Any]:
        if type(x) is not Tensor:
            return {"type": type(x).__name__, "dtype": None, "shape": None, "device": None}
        dtype = str(x.dtype).removeprefix("torch.")
        return {"type": "Tensor", "dtype": dtype, "shape": list(x.shape), "device": x.device.type}

    def facts(self) -> dict[str, Any]:
        """What one call runs, and the memory it takes beyond its results."""
        operators, on_device = proof.names_of(self._call, self._device)

        def call() -> tuple[Tensor, ...]:
            self._call()
            return self._last

        peak, how = peak_beyond_outputs(call, self._device)
        return {"operators": operators, "kernels": on_device, "peak": peak, "how": how}


def _run_of(of: problems.Operation, shape: Any) -> Any:
    """What an operation that draws its own problems calls."""
    return of.problem(shape, torch.float32, torch.device("cpu")).run


@contextlib.contextmanager
def _poisoned() -> Iterator[None]:
    """What ``torch.empty`` gives, in Python and in C++, is full of NaN.

    This is what ``torch.use_deterministic_algorithms`` does, which imports all of torch.compile.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch._C._set_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch._C._set_deterministic_algorithms(False)
