"""Main loops and their steady paths, in machine code made up for it."""

import pytest

from linear_vit.bench.static import sass, steady
from linear_vit.bench.static.sass import Instruction


def listing(body: str) -> list[Instruction]:
    """Instructions of lines as ``cuobjdump`` prints them, with labels for addresses."""
    lines = [line.strip() for line in body.strip().splitlines()]
    addresses, at = {}, 0
    for line in lines:
        if line.endswith(":"):
            addresses[line[:-1]] = at
        else:
            at += 16
    text, at = "\t\tFunction : made_up\n", 0
    for line in lines:
        if not line.endswith(":"):
            for label, address in addresses.items():
                line = line.replace(f"<{label}>", f"{address:#x}")
            text += f"        /*{at:04x}*/    {line} ;   /* 0x00 */\n"
            at += 16
    ((_, code),) = sass.functions(text)
    return code


# A tile: a copy of 512 chunks by 256 threads, as a loop over i = threadIdx.x; wide rows or narrow.
# Then products, four times; then a store, by rows that are there.
TILES = """
    S2R R0, SR_TID.X
tile:
    BAR.SYNC 0x0
    MOV R1, R0
copy:
    @P1 BRA <narrow>
    LDGSTS.E.BYPASS.128 [R20], [R22.64]
    BRA <copied>
narrow:
    LDG.E.U16 R24, [R22.64]
    LDG.E.U16 R25, [R22.64]
    STS [R20], R24
copied:
    VIADD R1, R1, 0x100
    ISETP.GE.AND P0, PT, R1, 0x200, PT
    @!P0 BRA <copy>
    IMAD.MOV.U32 R2, RZ, RZ, RZ
step:
    LDSM.16.M88.4 R4, [R20]
    HMMA.16816.F32.BF16 R8, R4, R6, R8
    VIADD R2, R2, 0x1
    ISETP.NE.AND P0, PT, R2, 0x4, PT
    @P0 BRA <step>
    FSETP.GT.AND P3, PT, R8, RZ, PT
    @P3 BRA <slow>
    MUFU.RCP R9, R8
    BRA <divided>
slow:
    CALL.REL.NOINC <divide>
divided:
    @P2 BRA <stored>
    STG.E.128 [R22.64], R8
stored:
    ISETP.LT.AND P0, PT, R30, R31, PT
    @P0 BRA <tile>
    EXIT
divide:
    FFMA R9, R9, R9, R9
    RET.REL.NODEC R16 <tile>
"""


def test_the_steady_path_of_a_tile_is_the_wide_one_as_often_as_it_is_run() -> None:
    (loop,) = steady.main_loops(listing(TILES))
    counts = loop.path.counts
    assert (loop.head, loop.unknown) == (0x10, ())
    assert (counts["loaded"], counts["stored"]) == (2 * 16, 16)  # a thread's two chunks, and one
    assert counts["tensor_core"] == 4
    assert counts["barriers"] == 1
    # 2 before; 2 x (6 of copy); 1; 4 x (5 of a step); 4 of a division; 2 of a store; 2 at the end.
    assert counts["instructions"] == 2 + 2 * 6 + 1 + 4 * 5 + 4 + 2 + 2
    columns = steady.as_columns(listing(TILES))
    assert set(columns) == set(steady.COLUMNS)
    assert columns["steady"] == counts["instructions"]
    assert columns["steady_load_store"] == 2 + 4 + 1
    assert columns["steady_bytes"] == 48


@pytest.mark.parametrize(
    ("old", "new", "changed"),
    [
        ("0x200", "0x300", {"loaded": 48}),  # three chunks a thread
        ("0x4, PT", "0x8, PT", {"tensor_core": 8}),
        ("@P1 BRA <narrow>", "BRA <narrow>", {"loaded": 8, "narrow": 8}),  # the only way
        ("S2R R0, SR_TID.X", "S2R R0, SR_CTAID.X", {"loaded": 16}),  # run nobody knows how often
    ],
)
def test_the_count_follows_the_code(old: str, new: str, changed: dict[str, int]) -> None:
    assert TILES.count(old) == 1
    (loop,) = steady.main_loops(listing(TILES.replace(old, new)))
    assert {name: loop.path.counts[name] for name in changed} == changed
    assert bool(loop.unknown) == ("CTAID" in new)


# ptxas leaves a loop by a call that nothing returns from. What the second loop is left to stands
# before it, and behind it a function that does return.
TWO_LOOPS = """
    BRA <first>
out:
    EXIT
first:
    LDG.E.128 R4, [R2.64]
    HMMA.16816.F32 R8, R4, R6, R8
    ISETP.LT.AND P0, PT, R30, R31, PT
    @P0 CALL.REL.NOINC <second>
    BRA <first>
second:
    STG.E.128 [R2.64], R8
    HMMA.16816.F32 R8, R4, R6, R8
    HMMA.16816.F32 R8, R4, R6, R8
    ISETP.LT.AND P0, PT, R30, R32, PT
    @P0 BRA <second>
    BRA <out>
function:
    RET.REL.NODEC R16 <first>
"""


def test_a_far_branch_that_is_written_as_a_call_ends_nothing() -> None:
    """The second loop is beyond it, which nothing falls out of into the function."""
    found = steady.main_loops(listing(TWO_LOOPS))
    assert [loop.path.counts["tensor_core"] for loop in found] == [1, 2]
    assert steady.as_columns(listing(TWO_LOOPS))["loops"] == 2


def test_a_barrier_that_is_asked_answers() -> None:
    """What thread 0 knew of the predicate does not hold after: the wait would have no end."""
    code = """
        ISETP.LT.AND P4, PT, RZ, RZ, PT
    tile:
        LDG.E.128 R4, [R2.64]
        SYNCS.PHASECHK.TRANS64.TRYWAIT P4, [UR7], R4
        @!P4 BRA <wait>
    done:
        UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR8], idesc[UR10], P0
        ISETP.LT.AND P0, PT, R30, R31, PT
        @P0 BRA <tile>
        EXIT
    wait:
        SYNCS.PHASECHK.TRANS64.TRYWAIT P4, [UR7], R4
        @!P4 BRA <wait>
        BRA <done>
    """
    (loop,) = steady.main_loops(listing(code))
    assert (loop.path.counts["tensor_core"], loop.path.counts["instructions"]) == (1, 6)


def test_what_waits_in_local_memory_is_told_from_what_a_loop_reads_there() -> None:
    code = "STL [R1], R9\n{}\nLDL R9, [R1]\nEXIT"
    loop = "loop:\n LDG.E.128 R4, [R2.64]\n HMMA.16816.F32 R8, R4, R6, R8\n @P0 BRA <loop>"
    assert steady.as_columns(listing(code.format(loop)))["steady_local"] == 0
    loop = loop.replace("HMMA", "LDL R4, [R1]\n HMMA")
    assert steady.as_columns(listing(code.format(loop)))["steady_local"] == 1


def test_products_that_read_a_mask_are_not_passed_by() -> None:
    code = """
    tile:
        LDG.E.128 R4, [R2.64]
        @P1 BRA <next>
        LDG.E.U16 R10, [R12.64]
        HMMA.16816.F32 R8, R4, R6, R8
    next:
        ISETP.LT.AND P0, PT, R30, R31, PT
        @P0 BRA <tile>
        EXIT
    """
    (loop,) = steady.main_loops(listing(code))
    assert (loop.path.counts["tensor_core"], loop.path.counts["loaded"]) == (1, 18)


def test_a_kernel_without_products_or_traffic_in_a_loop_has_no_main_loop() -> None:
    code = "loop:\n LDG.E.128 R4, [R2.64]\n @P0 BRA <loop>\n HMMA.16816.F32 R8, R4, R6, R8\n EXIT"
    assert steady.main_loops(listing(code)) == []
    assert steady.explain(listing(code)) == "no loop with products and global traffic"
    assert set(steady.as_columns(listing(code)).values()) == {0}


def test_the_path_is_explained_instruction_by_instruction() -> None:
    text = steady.explain(listing(TILES))
    assert text.startswith("loop at 0x10: 1 barriers")
    assert "    2 x  0x0040  LDGSTS.E.BYPASS.128 [R20], [R22.64]" in text
    assert "    4 x  0x00e0  HMMA.16816.F32.BF16 R8, R4, R6, R8" in text
    assert "LDG.E.U16" not in text
    assert "CALL" not in text


VALUES = {
    "IADD3 R1, -R0, 0xff, RZ": 0xFF - 5,
    "IADD3 R1, PT, PT, R0, 0xff, -R2": 5 + 0xFF - 3,
    "VIADD R1, R0, -0x6": 0xFFFFFFFF,
    "IMAD R1, R0, 0x8, R2": 43,
    "IMAD.SHL.U32 R1, R0, 0x8, RZ": 40,
    "SHF.R.U32.HI R1, RZ, 0x1, R0": 2,
    "SHF.R.S32.HI R1, RZ, 0x1f, R3": 0xFFFFFFFF,
    "SHF.L.U32 R1, R0, 0x2, RZ": 20,
    "LEA R1, R0, R2, 0x2": 23,
    "LEA.HI R1, R3, 0x1, RZ, 0x18": 0x1000000,
    "LOP3.LUT R1, R0, 0x4, RZ, 0xc0, !PT": 4,
    "LOP3.LUT R1, R0, R2, RZ, 0x3c, !PT": 6,
    "VIMNMX R1, R0, 0x100, !PT": 0x100,
    "VIMNMX R1, R3, R0, PT": 0xFFFFFFFB,
    "VIMNMX.U32 R1, PT, PT, R3, R0, PT": 5,
    "SEL R1, R0, R2, P0": 5,
    "SEL R1, R0, R2, !P0": 3,
    "HFMA2.MMA R1, -RZ, RZ, 0, 5.9604644775390625e-08": 1,
    "P2R R1, PR, RZ, 0x1": 1,
    "@P0 MOV R1, 0x7": 7,
    "@!P0 MOV R1, 0x7": 9,
    "@P6 MOV R1, 0x7": None,
    "IMAD.WIDE R1, R0, 0x2, R2": None,
    "LDG.E R1, [R2.64]": None,
    "HMMA.16816.F32 R0, R4, R6, R8": None,  # R0 to R3
    "ISETP.GT.AND P0, PT, R1, R0, PT": 9,  # R1 is none of its results
}


@pytest.mark.parametrize("text", VALUES)
def test_what_thread_0_knows_of_a_register(text: str) -> None:
    known = {"R0": 5, "R1": 9, "R2": 3, "R3": 0xFFFFFFFB, "P0": 1}
    (one,) = listing(text)
    sass.execute(one, known)
    assert known.get("R1") == VALUES[text]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("ISETP.GE.AND P1, PT, R3, R0, PT", 0),  # -5 >= 5
        ("ISETP.GE.U32.AND P1, PT, R3, R0, PT", 1),
        ("ISETP.NE.AND P1, PT, R0, 0x5, PT", 0),
        ("ISETP.NE.AND P1, PT, R0, 0x5, P6", None),
        ("LOP3.LUT P1, RZ, R0, 0x3, RZ, 0xc0, !PT", 1),
        ("PLOP3.LUT P1, PT, P0, P1, P2, 0xe0, 0x0", None),
        ("R2P PR, R0, 0x7f", None),
    ],
)
def test_what_thread_0_knows_of_a_predicate(text: str, value: int | None) -> None:
    known = {"R0": 5, "R3": 0xFFFFFFFB, "P0": 1, "P1": 1}
    (one,) = listing(text)
    sass.execute(one, known)
    assert known.get("P1") == value
