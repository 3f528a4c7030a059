"""What a compiled kernel asks of a multiprocessor, read from ptxas's report and the machine code.

Registers, spills and static shared memory are what ``ptxas -v`` prints; instructions are counted in
what ``cuobjdump -sass`` prints. Occupancy, and what a main loop's instructions and bytes take, are
worked out from the limits of the architecture.
"""

import re
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from linear_vit.bench.static import sass, steady
from linear_vit.bench.static.sass import Instruction
from linear_vit.kernels import toolchains

KIB = 1024


# ---- occupancy -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Limits:
    """What a multiprocessor has; shared memory in bytes, ``per_block`` after opting in.

    The last three are of the best-known GPU: what a launcher is told it would find, its boost
    clock, and the bytes a second that a copy moves, those read and those written.
    """

    warps: int
    blocks: int
    shared_memory: int
    shared_memory_per_block: int
    registers: int = 64 * KIB
    registers_per_thread: int = 255
    multiprocessors: int = 0
    clock_hz: float = 0.0
    copy_bytes_per_s: float = 0.0

    @property
    def threads(self) -> int:
        return 32 * self.warps


# CUDA C++ Programming Guide, "Compute Capabilities", table of technical specifications. The GPUs
# whose multiprocessors are counted: A100 (80 GB, SXM), RTX 3090, H200 (SXM), B200; clocks and
# memory bandwidth (2.04, 0.936, 4.8, 8 TB/s) by their data sheets, of which a copy reaches nine
# tenths.
_COPIED = 0.9
LIMITS = {
    "sm_80": Limits(
        *(64, 32, 164 * KIB, 163 * KIB),
        multiprocessors=108,
        clock_hz=1.41e9,
        copy_bytes_per_s=_COPIED * 2.04e12,
    ),
    "sm_86": Limits(
        *(48, 16, 100 * KIB, 99 * KIB),
        multiprocessors=82,
        clock_hz=1.70e9,
        copy_bytes_per_s=_COPIED * 0.936e12,
    ),
    "sm_90a": Limits(
        *(64, 32, 228 * KIB, 227 * KIB),
        multiprocessors=132,
        clock_hz=1.98e9,
        copy_bytes_per_s=_COPIED * 4.8e12,
    ),
    "sm_100a": Limits(
        *(64, 32, 228 * KIB, 227 * KIB),
        multiprocessors=148,
        clock_hz=1.97e9,
        copy_bytes_per_s=_COPIED * 8e12,
    ),
}
# Registers are handed out to a warp 256 at a time, to a multiprocessor's four partitions; shared
# memory in units of 128 bytes, after 1 KiB a block that the system keeps (the same table, and
# cuda_occupancy.h of the CUDA toolkit).
_REGISTER_UNIT, _PARTITIONS, _SHARED_UNIT, _SHARED_RESERVED = 256, 4, 128, KIB


def resident_blocks(architecture: str, threads: int, registers: int, shared_memory: int) -> int:
    """Blocks of a kernel that fit a multiprocessor at once; 0 where not even one does.

    Args:
        architecture: a key of ``LIMITS``.
        threads: of a block.
        registers: of a thread.
        shared_memory: bytes of a block, static and dynamic together.
    """
    limits = LIMITS[architecture]
    warps = -(-threads // 32)
    if threads > KIB or registers > limits.registers_per_thread:
        return 0
    if shared_memory > limits.shared_memory_per_block:
        return 0
    fits = [limits.blocks, limits.warps // warps]
    if registers:
        per_warp = _round_up(32 * registers, _REGISTER_UNIT)
        fits.append(_PARTITIONS * (limits.registers // _PARTITIONS // per_warp) // warps)
    per_block = _round_up(shared_memory + _SHARED_RESERVED, _SHARED_UNIT)
    fits.append(limits.shared_memory // per_block)
    return min(fits)


def occupancy(architecture: str, threads: int, registers: int, shared_memory: int) -> float:
    """Resident warps over the most there can be, in [0, 1]."""
    blocks = resident_blocks(architecture, threads, registers, shared_memory)
    return blocks * -(-threads // 32) / LIMITS[architecture].warps


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


# ---- time ----------------------------------------------------------------------------------------

_ISSUED = 4  # warp instructions that a multiprocessor starts a clock, one a partition


def issue_seconds(architecture: str, warp_instructions: int) -> float:
    """The least time in which a multiprocessor starts so many, of all its warps together."""
    return warp_instructions / _ISSUED / LIMITS[architecture].clock_hz


def copy_seconds(architecture: str, size: int) -> float:
    """The time in which a multiprocessor's share of memory's copy rate moves so many bytes."""
    limits = LIMITS[architecture]
    return size * limits.multiprocessors / limits.copy_bytes_per_s


# ---- ptxas -v ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Usage:
    """What ptxas says of one kernel, sizes in bytes; None of another's, where nobody says it."""

    registers: int
    spill_stores: int | None
    spill_loads: int | None
    stack: int
    static_shared: int


_ENTRY = re.compile(r"Compiling entry function '(\S+)' for")
_FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers(.*)")


def read_ptxas(log: str) -> dict[str, Usage]:
    """``ptxas -v``'s report of one architecture as mangled name -> :class:`Usage`.

    The frame and spills of device functions that were not inlined are added to the kernel that is
    being compiled when they are reported.

    Raises:
        ValueError: a kernel without its line of registers: ptxas says something else than expected.
    """
    found: dict[str, Usage] = {}
    entry: str | None = None
    frame = [0, 0, 0]
    for line in log.splitlines():
        if match := _ENTRY.search(line):
            if entry is not None:
                raise ValueError(f"ptxas reports no registers for {entry}")
            entry, frame = match.group(1), [0, 0, 0]
        elif match := _FRAME.search(line):
            frame = [a + int(b) for a, b in zip(frame, match.groups(), strict=True)]
        elif entry is not None and (match := _USED.search(line)):
            static = re.search(r"(\d+) bytes smem", match.group(2))
            shared = int(static.group(1)) if static else 0
            stack, stores, loads = frame
            found[entry] = Usage(int(match.group(1)), stores, loads, stack, shared)
            entry = None
    if entry is not None:
        raise ValueError(f"ptxas reports no registers for {entry}")
    return found


# ---- machine code --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Instructions:
    """Counts of a kernel's instructions, as they stand in the code (a loop's body counts once).

    ``wide`` accesses to global memory are of 16 bytes a thread or more, bulk copies among them;
    ``narrow`` those of less than 8. (8 are what a tensor core leaves a thread of a float32 row:
    four threads of them fill a sector.) ``tf32`` are those of ``tensor_core`` that round to TF32,
    ``fma`` multiply-adds outside of the tensor cores, ``local`` accesses to the stack, and
    ``float_atomics`` additions whose order the hardware chooses.
    """

    tensor_core: int = 0
    tf32: int = 0
    fma: int = 0
    wide_loads: int = 0
    narrow_loads: int = 0
    wide_stores: int = 0
    narrow_stores: int = 0
    local: int = 0
    float_atomics: int = 0
    total: int = 0


# Ampere's HMMA, Hopper's HGMMA, Blackwell's UTCHMMA and their integer and fp8 kin.
_TENSOR_CORE = re.compile(r"^([HIDQO]MMA|HGMMA|QGMMA|IGMMA|UTC[A-Z]*MMA)\b")
_LOAD = re.compile(r"^(LDG|LDGSTS|LD|UTMALDG|UBLKCP)\b")
_STORE = re.compile(r"^(STG|ST|UTMASTG|UTMAREDG)\b")
_BULK = re.compile(r"^(UTMALDG|UBLKCP|UTMASTG|UTMAREDG)\b")
_WIDE = re.compile(r"\.(128|256)\b")
_HALF_WIDE = re.compile(r"\.64\b")
_FMA = re.compile(r"^(FFMA2?|HFMA2|DFMA)\b")
_LOCAL = re.compile(r"^(LDL|STL)\b")
_FLOAT_ATOMIC = re.compile(r"^(RED|REDG|ATOM|ATOMG|REDAS|UTMAREDG)\b.*\.(F16|F32|F64|BF16)")


def count(mnemonics: Iterable[str]) -> Instructions:
    """Classify instructions such as ``LDG.E.128.CONSTANT``."""
    counts: Counter[str] = Counter()
    for word in mnemonics:
        counts["total"] += 1
        if _TENSOR_CORE.match(word):
            counts["tensor_core"] += 1
            counts["tf32"] += ".TF32" in word
        elif _FLOAT_ATOMIC.match(word):
            counts["float_atomics"] += 1
        elif _LOCAL.match(word):
            counts["local"] += 1
        elif _FMA.match(word):
            counts["fma"] += 1
        elif (load := _LOAD.match(word)) or _STORE.match(word):
            wide = _BULK.match(word) or _WIDE.search(word)
            if not wide and _HALF_WIDE.search(word):
                continue
            counts[f"{'wide' if wide else 'narrow'}_{'loads' if load else 'stores'}"] += 1
    return Instructions(**counts)


def read_sass(listing: str) -> dict[str, list[Instruction]]:
    """``cuobjdump -sass``'s listing of one architecture as mangled name -> instructions."""
    return dict(sass.functions(listing))


def disassemble(binary: Path) -> dict[str, list[Instruction]]:
    """Every kernel's instructions in a cubin, or in an object of one architecture.

    Raises:
        FileNotFoundError: there is no cuobjdump.
        RuntimeError: cuobjdump refuses the file, or finds no kernel in it.
    """
    tool = find_cuobjdump()
    done = toolchains.output_of([str(tool), "-sass", str(binary)])
    kernels = read_sass(done.stdout)
    if done.returncode != 0 or not kernels:
        message = (done.stderr or done.stdout).strip().splitlines() or ["no kernel in it"]
        raise RuntimeError(f"cuobjdump on {binary.name}: {message[-1]}")
    return kernels


def find_cuobjdump() -> Path:
    """Triton's wheel carries cuobjdump with the nvdisasm it calls; else the one on PATH."""
    import importlib.util

    spec = importlib.util.find_spec("triton")
    if spec is not None and spec.origin is not None:
        carried = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        if carried.is_file():
            return carried
    found = shutil.which("cuobjdump")
    if found is None:
        raise FileNotFoundError("no cuobjdump: install triton, or the CUDA toolkit")
    return Path(found)


def as_columns(
    usage: Usage, kernel: Sequence[Instruction], called: Iterable[Instruction] = ()
) -> dict[str, int | None]:
    """What ptxas says, what is in the code, and its main loops, as columns of a table.

    Args:
        usage: of the kernel.
        kernel: its instructions.
        called: those of functions of its own that were not inlined.
    """
    counts = count(one.name for one in (*kernel, *called))
    return {**asdict(usage), **asdict(counts), **steady.as_columns(kernel)}
