"""PyTorch's own flash-attention kernels, counted as ours are: what softmax attention is up against.

They lie in PyTorch's library, compiled for every architecture that it was built for. Of each head
dim and dtype the one is taken that runs where nothing is special: no mask, no dropout, whole tiles.
"""

import json
import os
import re
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from linear_vit.bench.static import machine_code
from linear_vit.bench.static.units import cache_folder, digest
from linear_vit.kernels import toolchains

NAME, FOLDER = "sdpa", "softmax_attention"
_KERNEL = re.compile(
    r"_ZN13pytorch_flash\d+(?P<kernel>flash_fwd_kernel|flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel)"
    r"I23Flash_(?:fwd|bwd)_kernel_traitsI(?P<traits>(?:L[ib]\d+E)+)"
    r"N7cutlass\d+(?P<dtype>half_t|bfloat16_t)E.*EE(?P<flags>(?:Lb[01]E)+)EEv"
)
_DTYPES = {"half_t": "float16", "bfloat16_t": "bfloat16"}
# Dropout, causal, local, ALiBi; whole tiles of tokens, of features; soft cap (, weights returned).
_PLAIN = ("00001100", "0000110")
_USED = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)")
_READERS = ("sdpa", "machine_code", "sass", "steady")


def flash_rows(
    architectures: Iterable[str], dtypes: Sequence[str], head_dims: Sequence[int]
) -> list[dict[str, Any]]:
    """Rows as ``bench.static`` has them; those of an architecture take a minute, and are kept.

    What nobody says is None: what was spilled, and the shared memory that a launch asks for.

    Raises:
        FileNotFoundError: this PyTorch has no CUDA kernels, or there is no cuobjdump.
    """
    found = [row for name in architectures for row in _kept(name)]
    return [row for row in found if row["dtype"] in dtypes and row["head_dim"] in head_dims]


def _kept(architecture: str) -> list[dict[str, Any]]:
    readers = [Path(__file__).with_name(f"{name}.py") for name in _READERS]
    kept = cache_folder() / f"sdpa-{digest(f'{torch.__version__} {architecture}', readers)}.json"
    if not kept.exists():
        cache_folder().mkdir(parents=True, exist_ok=True)
        partial = kept.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(_read(architecture)))
        partial.replace(kept)
    rows: list[dict[str, Any]] = json.loads(kept.read_text())
    return rows


def _read(architecture: str) -> list[dict[str, Any]]:
    library = Path(torch.__file__).parent / "lib" / "libtorch_cuda.so"
    if not library.exists():
        raise FileNotFoundError(f"PyTorch {torch.__version__} is a build without CUDA kernels")
    tool, rows = str(machine_code.find_cuobjdump()), []
    with tempfile.TemporaryDirectory() as folder:
        whole = [tool, "-xelf", architecture.rstrip("af"), str(library)]
        toolchains.run_tool(whole, Path(folder))
        for cubin in sorted(Path(folder).iterdir()):
            if not any(plain(name) for name in _names(cubin)):
                continue
            code = machine_code.disassemble(cubin)
            usage = toolchains.run_tool([tool, "-res-usage", str(cubin)]).stdout
            for name, registers, stack, shared in _USED.findall(usage):
                if about := plain(name):
                    used = machine_code.Usage(int(registers), None, None, int(stack), int(shared))
                    columns = machine_code.as_columns(used, code[name])
                    rows.append({**about, "architecture": architecture, **columns})
    return rows


def plain(name: str) -> dict[str, Any] | None:
    """What a mangled name says of a flash kernel; None of others, and of special cases."""
    match = _KERNEL.match(name)
    if match is None:
        return None
    if re.sub(r"\D", "", match["flags"]) not in _PLAIN:
        return None
    head_dim, queries, keys, warps, *_ = map(int, re.findall(r"L[ib](\d+)E", match["traits"]))
    return {
        "backend": NAME,
        "room": FOLDER,
        "kernel": match["kernel"],
        "head_dim": head_dim,
        "dtype": _DTYPES[match["dtype"]],
        "products": True,
        "configuration": f"{queries} queries, {keys} keys",
        "layout": "aligned",
        "threads": 32 * warps,
        "dynamic_shared": None,
    }


def _names(cubin: Path) -> list[str]:
    return [found.decode() for found in re.findall(rb"_ZN13pytorch_flash\w+", cubin.read_bytes())]
