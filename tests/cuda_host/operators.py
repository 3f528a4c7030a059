"""The operators of a room's ``cuda.cpp`` on CPU tensors, over the kernels built for the host.

What a GPU's operators do with their tensors before a launch is then what runs. Loading one is for a
process of its own: the operators are PyTorch's from then on.
"""

import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import cpp_extension
from torch.utils._python_dispatch import TorchDispatchMode

from linear_vit.bench.static import launches
from linear_vit.bench.static.cuda import HERE as RECORDER
from linear_vit.kernels import toolchains
from tests.cuda_host import emulator


def link(room: str, folder: Path, flags: Sequence[str]) -> Path:
    """A library of the room's kernels and operators for CPU tensors."""
    for name in ("CUDAGuard.h", "CUDAStream.h"):  # what they would declare is in the prelude
        empty = folder / "c10" / "cuda" / name
        empty.parent.mkdir(parents=True, exist_ok=True)
        empty.touch()
    kernels, target = folder / "kernels.o", folder / f"{room}-operators.so"
    includes = [folder, emulator.HERE, *map(Path, cpp_extension.include_paths())]
    command = [*toolchains.cxx(), "-std=c++20", "-O0", "-fPIC", "-shared"]
    command += [
        *(f"-I{path}" for path in includes),
        "-include",
        str(RECORDER / "launch_recorder.h"),
    ]
    # -Bsymbolic: the emulator's cudaGetDevice, not that of the libcudart that PyTorch has loaded.
    command += [str(launches.path(room) / "cuda.cpp"), str(kernels), "-Wl,-Bsymbolic"]
    command += [f"-L{Path(torch.__file__).parent / 'lib'}", "-lc10", "-ltorch_cpu", "-ltorch"]
    compile_kernels = emulator.compile_command(emulator.sources()[room], kernels, (*flags, "-c"))
    for one in (compile_kernels, [*command, "-o", str(target)]):
        done = subprocess.run(one, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"{room}'s operators do not compile:\n{done.stderr[-4000:]}")
    return target


class EveryAlignment(TorchDispatchMode):
    """Calls every operator of ours again, with each tensor argument moved off a 16-byte boundary.

    Attributes:
        seen: names of the operators, and how many moved arguments each got.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        del types
        expected = func(*args, **(kwargs or {}))
        if func.namespace == "linear_vit":
            name = func._schema.name
            for moved in _moved(args):
                self.seen[name] = self.seen.get(name, 0) + 1
                for a, b in zip(_leaves(func(*moved)), _leaves(expected), strict=True):
                    torch.testing.assert_close(a, b, msg=f"other numbers: {name}")
        return expected


def _moved(args: Any) -> Any:
    """``args`` with one tensor of them, in lists too, moved: every tensor, every alignment."""
    for i, x in enumerate(args):
        if isinstance(x, Tensor) and x.numel():
            # Whatever it was, a storage begins on a boundary of 64 bytes.
            offsets = [2**n for n in range(4) if 2**n * x.element_size() < 16]
            replaced: Any = [emulator.guarded(x, offset) for offset in offsets]
        elif isinstance(x, list | tuple):
            replaced = _moved(x)
        else:
            continue
        for one in replaced:
            yield [*args[:i], one, *args[i + 1 :]]


def _leaves(x: Any) -> list[Tensor]:
    return [x] if isinstance(x, Tensor) else [leaf for one in x for leaf in _leaves(one)]


def exercise(room: str, dtype: torch.dtype, head_dim: int) -> dict[str, int]:
    """All public operations of a room on small problems, under :class:`EveryAlignment`."""
    from linear_vit.bench.problems import FORWARD, FORWARD_BACKWARD, make_problem, operations

    with EveryAlignment() as mode:
        for name in launches.inside(room):
            for shape in operations()[name].check_shapes(head_dim, interpreted=True)[:2]:
                problem = make_problem(name, shape, dtype, torch.device("cpu"))
                calls: list[Callable[[], Any]] = [
                    problem.call("cuda", pass_) for pass_ in (FORWARD, FORWARD_BACKWARD)
                ]
                for call in calls:
                    call()
    return mode.seen
