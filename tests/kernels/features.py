"""Which PyTorch features go through which backend: tried one by one, and written to a page.

python -m tests.kernels.features     # writes docs/features.md, in minutes; Triton is interpreted
"""

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from linear_vit import kernels
from tests import processes

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "features.md"
BACKENDS = ("reference", "torch", "compiled", "cpu", "triton")


def inputs(*, requires_grad: bool = True) -> list[Tensor]:
    """q, k and v: float32, tiny."""
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn((2, 2, 5, 16), generator=generator) for _ in range(3)]
    return [x.requires_grad_(requires_grad) for x in made]


def attend(backend: str) -> Callable[..., Tensor]:
    return lambda q, k, v: kernels.linear_attention(q, k, v, backend=backend)


def agree(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.float(), expected.float(), rtol=1e-3, atol=1e-4)


def gradients(function: Callable[..., Tensor], tensors: list[Tensor]) -> Tensor:
    out = function(*tensors)
    return torch.stack(torch.autograd.grad(out.square().sum(), tensors))


def eager(backend: str) -> None:
    agree(gradients(attend(backend), inputs()), gradients(attend("reference"), inputs()))


def compiled(backend: str, dynamic: bool) -> None:
    torch._dynamo.reset()
    run = torch.compile(attend(backend), fullgraph=True, dynamic=dynamic, backend="aot_eager")
    agree(gradients(run, inputs()), gradients(attend("reference"), inputs()))


class Module(torch.nn.Module):
    def __init__(self, backend: str) -> None:
        super().__init__()
        self.backend = backend

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(self.backend)(q, k, v)


def export(backend: str) -> None:
    tensors = inputs(requires_grad=False)
    program = torch.export.export(Module(backend), tuple(tensors))
    agree(program.module()(*tensors), attend("reference")(*tensors))


_LOAD = """
import sys, torch
run = torch._inductor.aoti_load_package("attention.pt2")
torch.save(run(*torch.load("inputs.pt")), "out.pt")
assert not [name for name in sys.modules if name.startswith("linear_vit")]
"""


def aot_inductor(backend: str) -> None:
    """One file, made here, and run by a process in which this project is not."""
    tensors = inputs(requires_grad=False)
    program = torch.export.export(Module(backend), tuple(tensors))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        package = str(folder / "attention.pt2")
        torch._inductor.aoti_compile_and_package(program, package_path=package)
        torch.save(tensors, folder / "inputs.pt")
        done = processes.python("-c", _LOAD, cwd=folder, fresh=True)
        if done.returncode != 0:
            said = done.stderr.strip().splitlines()[-1]
            raise RuntimeError(said.removeprefix("RuntimeError: "))
        agree(torch.load(folder / "out.pt"), attend("reference")(*tensors))


def func_grad(backend: str) -> None:
    tensors = inputs(requires_grad=False)

    def loss(*x: Tensor) -> Tensor:
        return attend(backend)(*x).square().sum()

    found = torch.func.grad(loss, argnums=(0, 1, 2))(*tensors)
    agree(torch.stack(found), gradients(attend("reference"), inputs()))


def vmap(backend: str) -> None:
    stacked = [torch.stack([x, 2 * x]) for x in inputs(requires_grad=False)]
    found = torch.func.vmap(attend(backend))(*stacked)
    agree(found[1], attend("reference")(*(x[1] for x in stacked)))


def jvp(backend: str) -> None:
    tensors = tuple(inputs(requires_grad=False))
    found = torch.func.jvp(attend(backend), tensors, tensors)
    agree(found[1], torch.func.jvp(attend("reference"), tensors, tensors)[1])


def double_backward(backend: str) -> None:
    def second(name: str) -> Tensor:
        tensors = inputs()
        out = attend(name)(*tensors).square().sum()
        first = torch.autograd.grad(out, tensors, create_graph=True)
        return torch.stack(torch.autograd.grad(first[0].square().sum(), tensors))

    agree(second(backend), second("reference"))


def backward_in_autocast(backend: str) -> None:
    def run(around: contextlib.AbstractContextManager[object]) -> Tensor:
        tensors = inputs()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = attend(backend)(*tensors).float().sum()
        with around:
            return torch.stack(torch.autograd.grad(out, tensors))

    outside, inside = run(contextlib.nullcontext()), run(torch.autocast("cpu", torch.bfloat16))
    assert torch.equal(outside, inside)


def dtensor(backend: str) -> None:
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        tensors = inputs(requires_grad=False)
        out = attend(backend)(*(distribute_tensor(x, mesh, [Shard(0)]) for x in tensors))
        assert isinstance(out, DTensor)
        agree(out.full_tensor(), attend("reference")(*tensors))
    finally:
        dist.destroy_process_group()


def meta(backend: str) -> None:
    out = attend(backend)(*(x.detach().to("meta") for x in inputs()))
    assert out.shape == (2, 2, 5, 16)


def work_counted(backend: str) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        attend(backend)(*inputs())
    assert counter.get_total_flops() > 0, "no operation of it is counted"


FEATURES: dict[str, Callable[[str], None]] = {
    "eager, forward and backward": eager,
    "`torch.compile(fullgraph=True)`": lambda backend: compiled(backend, False),
    "the same with `dynamic=True`": lambda backend: compiled(backend, True),
    "`torch.export`": export,
    "its package by AOTInductor, run without this project": aot_inductor,
    "`torch.func.grad`": func_grad,
    "`torch.func.vmap`": vmap,
    "`torch.func.jvp`": jvp,
    "double backward": double_backward,
    "`backward()` inside autocast": backward_in_autocast,
    "DTensor": dtensor,
    "meta tensors": meta,
    "`FlopCounterMode`": work_counted,
}


def cell(feature: str, backend: str) -> str:
    """ "yes", or the sentence that a user gets."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            FEATURES[feature](backend)
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        sentence = re.split(r"(?<=[a-z)'])\. (?=[A-Z])", lines[0] if lines else "")[0]
        return f"{type(error).__name__}: {sentence.replace('|', '/')}"
    return "yes"


def cells(backend: str) -> dict[str, str]:
    return {feature: cell(feature, backend) for feature in FEATURES}


def written() -> dict[str, dict[str, str]]:
    """The page's cells, backend by backend."""
    table = [line[1:-1].split("|") for line in PAGE.read_text().splitlines() if line[:1] == "|"]
    (_, *backends), _, *rows = [[text.strip() for text in row] for row in table]
    return {name: {row[0]: row[i + 1] for row in rows} for i, name in enumerate(backends)}


def in_own_process(backend: str) -> dict[str, str]:
    """The cells of a backend; interpreted where it has an interpreter, which is chosen first."""
    environment = dict(os.environ)
    interpreter = kernels.backend_rows()[backend].interpreter
    if interpreter is not None:
        environment[interpreter] = "1"
    command = [sys.executable, "-m", "tests.kernels.features", backend]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def page(columns: dict[str, dict[str, str]]) -> str:
    return "\n".join(_lines(columns)) + "\n"


def _lines(columns: dict[str, dict[str, str]]) -> Iterator[str]:
    yield "# PyTorch's features, backend by backend"
    yield ""
    yield "Tried with `kernels.linear_attention` on CPU tensors, Triton interpreted: yes, or what a"
    yield "user gets. What needs a CUDA device (the `cuda` backend, CUDA graphs) is not among them."
    yield "Compiled graphs run eagerly (`aot_eager`). This page is written by"
    yield "`python -m tests.kernels.features`."
    yield ""
    yield "| | " + " | ".join(columns) + " |"
    yield "|---" * (len(columns) + 1) + "|"
    for feature in FEATURES:
        yield f"| {feature} | " + " | ".join(found[feature] for found in columns.values()) + " |"


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(cells(sys.argv[1])))
    else:
        PAGE.write_text(page({backend: in_own_process(backend) for backend in BACKENDS}))
