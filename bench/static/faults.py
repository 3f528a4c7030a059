"""What a kernel's row follows to: what fits a multiprocessor, and what is wrong."""

from typing import Any

from linear_vit.bench.static import launches, machine_code
from linear_vit.screen import counted

# A half-precision kernel with more multiply-adds than this, and no tensor core, multiplies matrices
# by hand: what remains beside products (scaling, row sums) is a few per element a thread holds.
_MOST_FMA = 256
_FEW_LOADS, _FEW_STORES = 6, 4
# A spill by what it costs. What waits in local memory while a main loop runs costs a few
# instructions once a block, and a word that is read once a tile one of a thousand: both come and go
# with the compiler's version. More are a tile that is too large.
_MOST_BYTES_BESIDE_LOOPS = 64
_MOST_OF_A_LOOP = 1 / 200
# Without head dims: a filter's nine taps of four channels, nine sums of taps and two of scales.
_FILTER_LOADS, _FILTER_STORES = 36, 11

Row = dict[str, Any]


def finished(row: Row) -> Row:
    """The row with what follows from the rest of it."""
    blocks = occupancy = None
    if row["threads"] is not None and row["dynamic_shared"] is not None:
        shared = row["static_shared"] + row["dynamic_shared"]
        asked = (row["architecture"], row["threads"], row["registers"], shared)
        blocks = machine_code.resident_blocks(*asked)
        occupancy = round(machine_code.occupancy(*asked), 4)
    row = {**row, "blocks_per_multiprocessor": blocks, "occupancy": occupancy, **_times(row)}
    return {**row, "faults": faults(row)}


def _times(row: Row) -> Row:
    """What a tile of every main loop takes: to start its instructions, and to copy its bytes.

    The share is what remains of memory's copy rate where instructions are started without a gap:
    real kernels start two thirds of that. Warp instructions for a KiB moved do not depend on how
    many tokens a tile has, nor on the warps of a block.
    """
    if not row["loops"] or row["threads"] is None:
        return dict.fromkeys(("issue_us", "copy_us", "copy_share", "instructions_per_kib"))
    threads, architecture = row["threads"], row["architecture"]
    instructions = row["steady"] * -(-threads // 32)
    issue = machine_code.issue_seconds(architecture, instructions)
    copy = machine_code.copy_seconds(architecture, row["steady_bytes"] * threads)
    share = round(min(1.0, copy / issue), 4)
    return {
        "issue_us": round(1e6 * issue, 4),
        "copy_us": round(1e6 * copy, 4),
        "copy_share": share,
        "instructions_per_kib": round(instructions / (row["steady_bytes"] * threads / 1024), 1),
    }


def faults(row: Row) -> list[str]:
    """What is wrong with a kernel, in words; empty where nothing is."""
    found = []
    spilled = (row["spill_stores"] or 0) + (row["spill_loads"] or 0)
    if spilled and row["steady_local"] > _MOST_OF_A_LOOP * row["steady"]:
        found.append(f"spills {counted(spilled, 'byte')}, in a main loop")
    elif spilled > (_MOST_BYTES_BESIDE_LOOPS if row["loops"] else 0):
        found.append(f"spills {counted(spilled, 'byte')}")
    if row["occupancy"] == 0:
        found.append("does not fit a multiprocessor")
    if row["float_atomics"]:
        found.append("adds floats in no fixed order")
    if row["dtype"] == "float32" and row["tf32"]:
        found.append("rounds float32 to TF32")
    half = row["dtype"] in ("float16", "bfloat16")
    by_hand = row["fma"] > _MOST_FMA and _has_head_dims(row["room"])
    if half and not row["tensor_core"] and (row["products"] or by_hand):
        found.append(f"{counted(row['fma'], 'multiply-add')} and no tensor core")
    # A few narrow accesses are a row's statistics, or a sum of partials; more are a tile.
    # A CUDA kernel without template arguments knows no element type: it adds up float32 states.
    if half and "aligned" in row["layout"] and row["configuration"]:
        few = (_FEW_LOADS, _FEW_STORES)
        if launches.inside(row["room"]) and not launches.has_head_dims(row["room"]):
            few = (_FILTER_LOADS, _FILTER_STORES)
        if row["narrow_loads"] > few[0] and not row["wide_loads"]:
            found.append(f"{row['narrow_loads']} narrow loads and no 16-byte one")
        if row["narrow_stores"] > few[1] and not row["wide_stores"]:
            found.append(f"{row['narrow_stores']} narrow stores and no 16-byte one")
    return found


def _has_head_dims(folder: str) -> bool:
    """Of a file from outside nobody knows."""
    return bool(launches.inside(folder)) and launches.has_head_dims(folder)
