"""Machine code as ``cuobjdump -sass`` prints it: its instructions, and what they do with integers.

A block's first thread (threadIdx.x == 0) knows a little of what it works with: its index, and all
that follows from that and from constants. :func:`execute` keeps track of it, so that a loop over
``i = threadIdx.x; i < 512; i += 256`` is known to be run twice. Anything else is unknown.
"""

import operator
import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass

WORD = 0xFFFFFFFF
# Registers, uniform registers and predicates whose value is known.
Known = dict[str, int]


@dataclass(frozen=True)
class Instruction:
    """One line: ``guard`` is ``P0`` or ``!P0`` where there is one, else empty."""

    address: int
    guard: str
    name: str  # with its modifiers: LDG.E.128
    operands: tuple[str, ...]

    @property
    def base(self) -> str:
        return self.name.partition(".")[0]

    def __str__(self) -> str:
        guard = f"@{self.guard} " if self.guard else ""
        return f"{self.address:#06x}  {guard}{self.name} {', '.join(self.operands)}".rstrip()


_LINE = re.compile(
    r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:\{\s*)?(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);"
)


def functions(listing: str) -> Iterator[tuple[str, list[Instruction]]]:
    """Mangled name and instructions of every function in a listing."""
    name, body = "", list[Instruction]()
    for line in listing.splitlines():
        if "Function : " in line:
            if name:
                yield name, body
            name, body = line.partition("Function : ")[2].strip(), []
        elif match := _LINE.match(line):
            address, guard, what, rest = match.groups()
            operands = tuple(x.strip().removesuffix(".reuse") for x in rest.split(",") if x.strip())
            body.append(Instruction(int(address, 16), guard or "", what, operands))
    if name:
        yield name, body


# ---- values --------------------------------------------------------------------------------------


def execute(one: Instruction, known: Known) -> None:
    """What thread 0 knows after an instruction, in place of what it knew before."""
    runs = predicate(one.guard, known)
    if runs is False:
        return
    found = _result(one, known) if runs else {}
    for name in written(one):
        known.pop(name, None)
    known.update(found)


def predicate(text: str, known: Known) -> bool | None:
    """Whether a predicate holds; an empty one does; None where it is unknown."""
    name = text.lstrip("!")
    if name in ("", "PT", "UPT"):
        value: int | None = 1
    else:
        value = known.get(name)
    return None if value is None else bool(value) != text.startswith("!")


def _value(text: str, known: Known) -> int | None:
    name = text.lstrip("-~|").rstrip("|")
    if name in ("RZ", "URZ", "SRZ"):
        value: int | None = 0
    elif re.fullmatch(r"0x[0-9a-f]+|\d+", name):
        value = int(name, 0)
    else:
        value = known.get(name)
    if value is None or "|" in text:
        return None
    if text.startswith("-"):
        value = -value
    return (~value if text.startswith("~") else value) & WORD


def _signed(x: int) -> int:
    return x - (1 << 32) if x >> 31 else x


_COMPARED: dict[str, Callable[[int, int], bool]] = {
    "GE": operator.ge, "GT": operator.gt, "LT": operator.lt, "LE": operator.le,
    "EQ": operator.eq, "NE": operator.ne,
}  # fmt: skip
_PREDICATE = re.compile(r"!?U?P(\d|T)$")


def _lut(a: int, b: int, c: int, table: int) -> int:
    value = 0
    for index in range(8):
        if table >> index & 1:
            parts = (x if index & bit else ~x for x, bit in ((a, 4), (b, 2), (c, 1)))
            term = WORD
            for part in parts:
                term &= part
            value |= term
    return value & WORD


def _result(one: Instruction, known: Known) -> Known:
    """Values of an instruction's destinations, as far as they follow from what is known."""
    base, name, operands = one.base.removeprefix("U"), one.name, one.operands
    if base == "ISETP" and ".EX" not in name:
        return _compared(one, known)
    if base in ("S2R", "S2UR"):
        zero = operands[1] in ("SR_TID.X", "SR_TID.Y", "SR_TID.Z", "SR_LANEID")
        return {operands[0]: 0} if zero else {}
    if base == "HFMA2" and operands[1:3] == ("-RZ", "RZ"):  # a constant, as two float16
        halves = struct.pack("<ee", float(operands[4]), float(operands[3]))
        return {operands[0]: int.from_bytes(halves, "little")}
    if base == "P2R":
        return _packed(operands, known)
    # A predicate between destination and sources is a carry, or tells a result of 0.
    first = next((i for i, x in enumerate(operands) if not _PREDICATE.match(x)), len(operands))
    target, sources = operands[first : first + 1], operands[first + 1 :]
    flags = [x for x in operands[:first] if x not in ("PT", "UPT")]
    if base in ("IADD3", "LEA", "LOP3"):  # what else is there carries, or takes a carry (.X)
        sources = tuple(x for x in sources if not _PREDICATE.match(x))
    while sources and _PREDICATE.match(sources[0]):
        sources = sources[1:]
    values = [_value(x, known) for x in sources]
    result = _arithmetic(base, name, sources, values, known)
    if result is None or not target:
        return {}
    found = {} if target[0] in ("RZ", "URZ") else {target[0]: result & WORD}
    if base == "LOP3" and flags:
        found[flags[0]] = int(result & WORD != 0)
    return found


def _compared(one: Instruction, known: Known) -> Known:
    _, how, *parts = one.name.split(".")
    a, b = (_value(x, known) for x in one.operands[2:4])
    if a is None or b is None or one.operands[4] not in ("PT", "UPT") or how not in _COMPARED:
        return {}
    if "U32" not in parts:
        a, b = _signed(a), _signed(b)
    return {one.operands[0]: int(_COMPARED[how](a, b))}


def _packed(operands: tuple[str, ...], known: Known) -> Known:
    """Of ``P2R R8, PR, RZ, 0x20``: predicates as bits."""
    mask = _value(operands[-1], known)
    if mask is None or operands[2] != "RZ":
        return {}
    bits = [(i, known.get(f"P{i}")) for i in range(7) if mask >> i & 1]
    if any(value is None for _, value in bits):
        return {}
    return {operands[0]: sum(1 << i for i, value in bits if value)}


def _arithmetic(
    base: str, name: str, sources: tuple[str, ...], v: list[int | None], known: Known
) -> int | None:
    if base == "SEL":
        chosen = predicate(sources[2], known)
        return None if chosen is None else v[0 if chosen else 1]
    if base in ("IMNMX", "VIMNMX"):
        least = predicate(sources[2], known)
        if None in v[:2] or least is None:
            return None
        key = (lambda x: x) if "U32" in name else _signed
        return (min if least else max)((x for x in v[:2] if x is not None), key=key)
    values = [x for x in v if x is not None]
    if len(values) < len(v) or ".X" in name:
        return None
    if base in ("MOV", "R2UR", "MOV32I"):
        return values[0]
    if base in ("IADD3", "VIADD", "IADD", "VIADD3") and ".X" not in name:
        return sum(values[:3])
    if base == "IMAD":
        wide = ".WIDE" in name or ".HI" in name
        return None if wide else values[0] * values[1] + values[2]
    if base == "SHF" and ".64" not in name and sources[2 if ".L" in name else 0] == "RZ":
        amount = min(values[1], 32)
        if ".L" in name:
            return values[0] << amount
        return (_signed(values[2]) if ".S32" in name else values[2]) >> amount
    if base == "LEA":
        a, b, *high, amount = values
        if ".HI" not in name:
            return (a << amount) + b
        top = high[0] if high else WORD if a >> 31 else 0  # .SX32: a's sign
        return ((top << 32 | a) << amount >> 32) + b
    if base == "LOP3":
        return _lut(*values[:4])
    return None


# ---- destinations --------------------------------------------------------------------------------

_WRITES_NOTHING = re.compile(
    r"^(ST[GLS]?|STSM|RED\w*|BAR|BRA|BRX|EXIT|RET|BSYNC|BSSY|NOP|DEPBAR|LDGDEPBAR|LDGSTS|MEMBAR|"
    r"WARPSYNC|CALL|ERRBAR|CCTL\w*|UTMA\w+|UBLKCP|FENCE|WARPGROUP|KILL|BPT|ENDCOLLECTIVE)$"
)
_REGISTER = re.compile(r"^(U?R)(\d+)$")


def written(one: Instruction) -> Iterator[str]:
    """Registers and predicates that an instruction writes, or may."""
    if _WRITES_NOTHING.match(one.base):
        return
    if one.base == "R2P":
        yield from (f"P{i}" for i in range(7))
        return
    tests = re.search(r"SETP|PLOP3|FCHK", one.base)  # nothing but predicates
    for index, text in enumerate(one.operands[: 2 if tests else 3]):
        if re.match(r"U?P\d$", text):
            yield text
        elif (match := _REGISTER.match(text)) and not any(
            _REGISTER.match(x) or x in ("RZ", "URZ") for x in one.operands[:index]
        ):
            kind, number = match.groups()
            yield from (f"{kind}{int(number) + i}" for i in range(_registers(one)))
        elif not match and text not in ("PT", "UPT", "RZ", "URZ", "PR"):
            return


def _registers(one: Instruction) -> int:
    """How many registers its destination is."""
    name, base = one.name, one.base
    if base.endswith("GMMA"):
        return 128
    if base.endswith("MMA") or ".128" in name or ".M88.4" in name or ".MT88.4" in name:
        return 4
    wide = ".64" in name or ".WIDE" in name or base in ("CS2R", "DADD", "DMUL", "DFMA")
    return 8 if ".256" in name else 2 if wide or ".M88.2" in name or ".MT88.2" in name else 1
