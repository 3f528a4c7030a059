"""What is read from ptxas and from machine code, and the occupancy that follows."""

import itertools
import shutil
import subprocess
from pathlib import Path

import pytest

from linear_vit.bench.static import machine_code
from linear_vit.bench.static.machine_code import (
    KIB,
    LIMITS,
    count,
    occupancy,
    read_ptxas,
    read_sass,
    resident_blocks,
)
from linear_vit.kernels import toolchains

LOG = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'first' for 'sm_90a'
ptxas info    : Function properties for first
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Function properties for callee
    8 bytes stack frame, 4 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 128 registers, used 1 barriers, 16 bytes cumulative stack size, 1024 bytes smem
ptxas info    : Compile time = 356.297 ms
ptxas info    : Compiling entry function 'second' for 'sm_90a'
ptxas info    : Function properties for second
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 0 barriers
"""


def test_ptxas_report_is_read_by_kernel() -> None:
    found = read_ptxas(LOG)
    first, second = found["first"], found["second"]
    assert (first.registers, first.static_shared, first.stack) == (128, 1024, 24)
    assert (first.spill_stores, first.spill_loads) == (12, 16)
    assert (second.registers, second.static_shared, second.spill_stores) == (40, 0, 0)


def test_a_report_without_registers_is_an_error() -> None:
    with pytest.raises(ValueError, match="no registers for second"):
        read_ptxas(LOG.rpartition("\n")[0].rpartition("\n")[0])


SASS = """\
\tcode for sm_90a
\t\tFunction : first
        /*0000*/                   LDC R1, c[0x0][0x28] ;            /* 0x00000a00ff017b82 */
                                                                     /* 0x000fe20000000800 */
        /*00c0*/              @!P0 LDG.E.128.CONSTANT R4, [R2.64] ;  /* 0x0000000000408947 */
        /*00d0*/                   LDGSTS.E.BYPASS.128 [R1], [R2] ;  /* 0x0000000000408947 */
        /*00e0*/              @UP1 UTMALDG.2D [UR8], [UR4] ;         /* 0x0000000000408947 */
        /*00f0*/                   LDG.E.U16 R4, [R2.64] ;           /* 0x0000000000408947 */
        /*0100*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0110*/                   HGMMA.64x64x16.F32 R4, R8, R12, R4 ;
        /*0120*/                   UTCHMMA gdesc[UR4], gdesc[UR8], tmem[UR5] ;
        /*0130*/                   HMMA.1688.F32.TF32 R4, R8, R12, R4 ;
        /*0140*/                   STG.E.128 [R2.64], R4 ;
        /*0150*/                   STG.E [R2.64], R4 ;
        /*0158*/                   STG.E.64 [R2.64], R4 ;
        /*0160*/                   STL.64 [R1], R4 ;
        /*0170*/                   FFMA R4, R4, R5, R6 ;
        /*0180*/                   RED.E.ADD.F32.FTZ.RN.STRONG.GPU [R2.64], R4 ;
        /*0190*/                   STS.128 [R2], R4 ;
        /*01a0*/                   LDG.E.ENL2.256 R4, R8, [R2.64] ;
\t\tFunction : second
        /*0000*/                   EXIT ;
"""


def test_instructions_are_counted_by_kind() -> None:
    found = {name: count(one.name for one in code) for name, code in read_sass(SASS).items()}
    first = found["first"]
    assert (first.tensor_core, first.tf32, first.fma) == (4, 1, 1)
    assert (first.wide_loads, first.narrow_loads) == (4, 1)  # 128, LDGSTS, a bulk copy, 256
    assert (first.wide_stores, first.narrow_stores) == (
        1,
        1,
    )  # shared memory and 8 bytes are neither
    assert (first.local, first.float_atomics, first.total) == (1, 1, 17)
    assert found["second"].total == 1


def test_an_integer_atomic_is_none_of_floats() -> None:
    assert count(["RED.E.ADD.STRONG.GPU", "ATOMG.E.ADD.S32"]).float_atomics == 0


# Threads, registers, shared memory, blocks: by hand from the table of compute capabilities.
KNOWN = {
    "registers halve it": ("sm_80", 256, 64, 0, 4),
    "nothing limits": ("sm_86", 256, 40, 0, 6),
    "255 registers leave two warps a partition": ("sm_90a", 128, 255, 0, 2),
    "allocated 256 at a time": ("sm_90a", 256, 65, 0, 3),
    "the most threads": ("sm_90a", 1024, 32, 0, 2),
    "48 warps hold one block of 32": ("sm_86", 1024, 32, 0, 1),
    "16 blocks at most": ("sm_86", 32, 16, 0, 16),
    "a KiB a block is kept": ("sm_90a", 128, 32, 113 * KIB, 2),
    "so that half does not fit twice": ("sm_90a", 128, 32, 114 * KIB, 1),
    "all of it": ("sm_86", 128, 32, 99 * KIB, 1),
    "more than all": ("sm_86", 128, 32, 99 * KIB + 1, 0),
    "too many threads": ("sm_100a", 1056, 32, 0, 0),
}


@pytest.mark.parametrize("case", KNOWN.values(), ids=KNOWN)
def test_resident_blocks(case: tuple[str, int, int, int, int]) -> None:
    architecture, threads, registers, shared, blocks = case
    assert resident_blocks(architecture, threads, registers, shared) == blocks


def test_occupancy_is_that_of_warps() -> None:
    assert occupancy("sm_80", 256, 64, 0) == 0.5
    assert occupancy("sm_86", 256, 40, 0) == 1.0
    assert occupancy("sm_86", 128, 32, 100 * KIB) == 0.0


# NVIDIA's own calculator, a header of the toolkit that needs no GPU.
CALCULATOR = r"""
#include <cstdio>
#include <cuda_occupancy.h>
int main() {
  int major, minor, blocks, warps, shared_sm, shared_block, threads, registers, shared;
  while (scanf("%d%d%d%d%d%d%d%d%d", &major, &minor, &blocks, &warps, &shared_sm, &shared_block,
               &threads, &registers, &shared) == 9) {
    cudaOccDeviceProp device;
    device.computeMajor = major, device.computeMinor = minor;
    device.maxThreadsPerBlock = 1024, device.maxThreadsPerMultiprocessor = 32 * warps;
    device.regsPerBlock = device.regsPerMultiprocessor = 65536, device.warpSize = 32;
    device.sharedMemPerBlock = 49152, device.sharedMemPerMultiprocessor = shared_sm;
    device.numSms = 100, device.sharedMemPerBlockOptin = shared_block;
    device.reservedSharedMemPerBlock = 1024;
    cudaOccFuncAttributes kernel;
    kernel.maxThreadsPerBlock = 1024, kernel.numRegs = registers;
    kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
    kernel.maxDynamicSharedSizeBytes = shared;
    cudaOccDeviceState state;
    cudaOccResult result;
    int error = cudaOccMaxActiveBlocksPerMultiprocessor(&result, &device, &kernel, &state, threads,
                                                        shared);
    printf("%d\n", error ? -error : result.activeBlocksPerMultiprocessor);
  }
}
"""


def test_agrees_with_the_toolkits_calculator(tmp_path: Path) -> None:
    root, compiler = toolchains.cuda_root(), shutil.which("c++")
    if root is None or compiler is None or not (root / "include" / "cuda_occupancy.h").exists():
        pytest.skip("no cuda_occupancy.h, or no C++ compiler")
    (tmp_path / "calculator.cpp").write_text(CALCULATOR)
    program = tmp_path / "calculator"
    command = [compiler, f"-I{root / 'include'}", str(tmp_path / "calculator.cpp")]
    built = subprocess.run([*command, "-o", str(program)], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    sizes = list(
        itertools.product(
            (32, 64, 96, 128, 256, 384, 512, 1024),
            (16, 32, 40, 64, 65, 96, 128, 168, 224, 255),
            (0, 1, 16_000, 48 * KIB, 64_000, 99 * KIB, 113 * KIB, 163 * KIB, 227 * KIB),
        )
    )
    cases = [(a, *size) for a in LIMITS for size in sizes]
    lines = []
    for architecture, *size in cases:
        limits, digits = LIMITS[architecture], architecture.removeprefix("sm_").rstrip("a")
        facts = (digits[:-1], digits[-1], limits.blocks, limits.warps, limits.shared_memory)
        lines.append(" ".join(map(str, (*facts, limits.shared_memory_per_block, *size))))
    answer = subprocess.run([program], input="\n".join(lines), capture_output=True, text=True)
    theirs = [int(line) for line in answer.stdout.split()]
    ours = [resident_blocks(*case) for case in cases]
    differing = [(c, a, b) for c, a, b in zip(cases, ours, theirs, strict=True) if a != b]
    assert not differing, differing[:10]
    assert sum(ours) > 0


def test_times_are_those_of_a_multiprocessor() -> None:
    """64 tokens of q and out at D = 64 in half precision, by hand: 16 KiB of 4.32 TB/s / 132."""
    assert machine_code.copy_seconds("sm_90a", 16 * KIB) == pytest.approx(0.501e-6, rel=1e-3)
    assert machine_code.issue_seconds("sm_90a", 600 * 8) == pytest.approx(0.606e-6, rel=1e-3)


def test_cuobjdump_refuses_what_is_no_binary(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    (tmp_path / "kernel.cubin").write_text("no machine code")
    with pytest.raises(RuntimeError, match=r"cuobjdump on kernel\.cubin"):
        machine_code.disassemble(tmp_path / "kernel.cubin")
