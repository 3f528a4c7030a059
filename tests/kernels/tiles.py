"""The AMX kernels on tiles in plain C++ (emulated_tiles.h), which any x86 machine runs.

``KERNEL_TESTS_TILES`` asks for them before the extension is built: ``emulated``, with the vectors
that this machine has, or ``plain``, all of it in C++ for any processor.
"""

import os
import zlib
from pathlib import Path

from linear_vit.kernels import toolchains

EMULATED = Path(__file__).parent / "emulated_tiles.h"
REASON = None if "amx" in toolchains.INSTRUCTION_SETS else "AMX kernels are built on x86 Linux"


def emulate(kind: str) -> None:
    """Build this process's AMX kernels on the emulator."""
    if REASON is not None:
        return
    source, flags = toolchains.INSTRUCTION_SETS["amx"]
    tiles = (
        "-O1",  # vectors of 64 bytes, in pieces, take minutes to optimise
        "-fexpensive-optimizations",  # a * b + c is one FMA, as it is with -O3
        f'-DLINEAR_VIT_TILES="{EMULATED}"',
        f"-DTILES_ARE={zlib.crc32(EMULATED.read_bytes())}",  # a library of this header
    )
    own = () if kind == "plain" or not has_vectors() else flags
    for name, (file, others) in toolchains.INSTRUCTION_SETS.items():
        toolchains.INSTRUCTION_SETS[name] = (file, (*others, "-O1"))  # not what is asked about
    toolchains.INSTRUCTION_SETS["amx"] = (source, (*own, *tiles))


def has_vectors() -> bool:
    """Whether this processor has all but the tiles."""
    info = Path("/proc/cpuinfo")
    words = info.read_text().split() if info.exists() else []
    return {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16"} <= set(words)


if (asked := os.environ.get("KERNEL_TESTS_TILES", "real")) != "real":
    emulate(asked)
