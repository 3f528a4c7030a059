"""The steady path of a kernel's main loops: what a warp runs for one tile when nothing is special.

A main loop is an innermost one with both products (tensor cores, or FMA where there are none) and
traffic to global memory. Its steady path, from the loop's head to its head again, is the one that a
block's first warp takes in the midst of long sequences whose rows are aligned. Branches that follow
from the thread's index are followed; of the others, the way without calls is taken (of a slow
division), with the most 16-byte traffic, the most products, the least narrow traffic (products that
a mask goes with read it), the most reciprocals and exponentials, and then with the fewest
instructions: full tiles, wide rows, and none of what is done at every fourth tile alone. A nested
loop counts as often as it is run.
"""

import functools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import networkx

from linear_vit.bench.static import sass
from linear_vit.bench.static.sass import Instruction, Known

_MOST_TRIPS = 256
_LOOSE = ("CALL", "BRX", "JMX")  # slow paths and switches: not taken where there is another way


@dataclass
class Block:
    """Instructions without a branch among them, and the blocks that may follow."""

    start: int
    code: list[Instruction]
    taken: int | None = None  # where its last instruction branches to
    falls: int | None = None  # what follows where it does not

    @property
    def branch(self) -> tuple[str, ...]:
        """The predicates that all have to hold for the branch; empty: always taken."""
        last = self.code[-1]
        return tuple(x for x in (last.guard, *last.operands[:-1]) if x)


@dataclass(frozen=True)
class Path:
    """Blocks from a loop's head on, each as often as it is run, and what they amount to."""

    blocks: tuple[tuple[int, int], ...] = ()  # address, times
    counts: Counter[str] = field(default_factory=Counter)

    def then(self, other: "Path", times: int = 1) -> "Path":
        blocks = tuple((start, n * times) for start, n in other.blocks)
        counts = Counter({name: n * times for name, n in other.counts.items()})
        return Path(self.blocks + blocks, self.counts + counts)


@dataclass(frozen=True)
class Loop:
    """A main loop: the address of its head, and its steady path."""

    head: int
    path: Path
    unknown: tuple[int, ...]  # heads of nested loops run nobody knows how often, counted once


def main_loops(code: Sequence[Instruction]) -> list[Loop]:
    """A kernel's main loops, in the order of the code; none where it has none."""
    graph = _Graph(code)
    found = [loop for loops in map(graph.innermost, graph.loops(graph.blocks)) for loop in loops]
    if any(loop.path.counts["tensor_core"] for loop in found):
        found = [loop for loop in found if loop.path.counts["tensor_core"]]
    return sorted(found, key=lambda loop: loop.head)


# Of all main loops together: a tile of each.
COLUMNS = (
    "loops", "steady", "steady_tensor_core", "steady_fma", "steady_load_store", "steady_other",
    "steady_local", "steady_barriers", "steady_bytes", "steady_unknown",
)  # fmt: skip


def as_columns(code: Sequence[Instruction]) -> dict[str, int]:
    """``COLUMNS``: main loops, and a warp's instructions on a tile of each, by pipe.

    Local are accesses to what was spilled, which load_store has, too. Bytes are those of one
    thread's accesses to global memory, and unknown are nested loops whose number of runs is.
    """
    loops = main_loops(code)
    counts = sum((loop.path.counts for loop in loops), Counter[str]())
    return {
        "loops": len(loops),
        "steady": counts["instructions"],
        **{f"steady_{name}": counts[name] for name in (*_PIPES, "other", "local", "barriers")},
        "steady_bytes": counts["loaded"] + counts["stored"],
        "steady_unknown": sum(len(loop.unknown) for loop in loops),
    }


def explain(code: Sequence[Instruction]) -> str:
    """The main loops and their paths, instruction by instruction."""
    graph, lines = _Graph(code), []
    for loop in main_loops(code):
        lines.append(f"loop at {loop.head:#x}: {_said(loop.path.counts)}")
        lines += [f"  the loop at {x:#x} is run who knows how often: once" for x in loop.unknown]
        for start, times in loop.path.blocks:
            lines += [f"  {times:3} x  {one}" for one in graph.blocks[start].code]
    return "\n".join(lines) or "no loop with products and global traffic"


def _said(counts: Counter[str]) -> str:
    return ", ".join(f"{n} {name.replace('_', ' ')}" for name, n in sorted(counts.items()))


# ---- what instructions count as ------------------------------------------------------------------

_PIPES = {
    "tensor_core": ("HMMA", "IMMA", "DMMA", "QMMA", "OMMA", "HGMMA", "QGMMA", "IGMMA", "UTCHMMA"),
    "fma": ("FFMA", "FFMA2", "FMUL", "FMUL2", "FADD", "FADD2", "HFMA2", "HMUL2", "HADD2", "IMAD"),
    "load_store": (
        *("LDG", "LDGSTS", "LD", "LDS", "LDSM", "LDL", "STG", "ST", "STS", "STSM", "STL", "SHFL"),
        *("ATOM", "ATOMG", "ATOMS", "RED", "REDG", "REDAS", "UTMALDG", "UTMASTG", "UBLKCP"),
        *("LDC", "LDTM", "STTM"),
    ),
}
_PIPE_OF = {name: pipe for pipe, names in _PIPES.items() for name in names}
_GLOBAL = {"LDG": "loaded", "LDGSTS": "loaded", "LD": "loaded", "STG": "stored", "ST": "stored"}
_WIDTHS = {"256": 32, "128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}


def _counts(code: Iterable[Instruction]) -> Counter[str]:
    """Instructions by pipe, barriers, and bytes of a thread's accesses to global memory."""
    counts: Counter[str] = Counter()
    for one in code:
        counts["instructions"] += 1
        counts[_PIPE_OF.get(one.base, "other")] += 1
        counts["barriers"] += one.base == "BAR"
        counts["local"] += one.base in ("LDL", "STL")
        counts["products"] += one.base in ("FFMA", "FFMA2")
        counts["special"] += one.base == "MUFU"
        counts["loose"] += one.base in _LOOSE
        if kind := _GLOBAL.get(one.base):
            width = next((_WIDTHS[x] for x in one.name.split(".") if x in _WIDTHS), 4)
            counts[kind] += width
            counts["wide" if width >= 16 else "narrow"] += width
    return counts


# ---- the graph -----------------------------------------------------------------------------------


class _Graph:
    def __init__(self, code: Sequence[Instruction]) -> None:
        self.blocks = _blocks(code)
        for block in self.blocks.values():
            last = block.code[-1]
            if last.base == "CALL" and not self._function(int(last.operands[-1], 0))[1]:
                # A far branch: ptxas writes it as a call that nothing returns from.
                block.taken = int(last.operands[-1], 0)
                block.falls = block.falls if last.guard else None
        self._known = self._propagate(min(self.blocks))
        self._out = {start: self._leave(start) for start in self.blocks}

    # Which way: by what thread 0 knows.

    def _propagate(self, entry: int) -> dict[int, Known]:
        """What is known where each block begins, whichever way it was come to."""
        known: dict[int, Known] = {entry: {}}
        waiting = [entry]
        while waiting:
            start = waiting.pop()
            state = self._run(start, known[start])
            for following in self._ways(start, state):
                before = known.get(following)
                after = dict(state) if before is None else dict(before.items() & state.items())
                if after != before:
                    known[following] = after
                    waiting.append(following)
        return known

    def _run(self, start: int, known: Known) -> Known:
        state = dict(known)
        for one in self.blocks[start].code:
            if one.base == "CALL" and self.blocks[start].taken is None:
                for name in self._function(int(one.operands[-1], 0))[0]:
                    state.pop(name, None)
            else:
                sass.execute(one, state)
        return state

    @functools.cache  # noqa: B019
    def _function(self, entry: int) -> tuple[frozenset[str], bool]:
        """What code that is called at this address may write, and whether it returns."""
        seen, waiting, names, returns = {entry}, [entry], set[str](), False
        while waiting:
            block = self.blocks[waiting.pop()]
            names |= {name for one in block.code for name in sass.written(one)}
            returns |= block.code[-1].base == "RET"
            for following in (block.taken, block.falls):
                if following is not None and following not in seen:
                    seen.add(following)
                    waiting.append(following)
        return frozenset(names), returns

    def _ways(self, start: int, state: Known) -> list[int]:
        """The blocks that may follow, as far as the state after the block tells."""
        block = self.blocks[start]
        if block.taken is None:
            return [block.falls] if block.falls is not None else []
        held = [sass.predicate(text, state) for text in block.branch]
        divergent = block.code[-1].name != "BRA" and not block.branch
        always, never = all(x is True for x in held) and not divergent, False in held
        ways = [None if never else block.taken, None if always else block.falls]
        return [way for way in ways if way is not None]

    def _leave(self, start: int) -> list[int]:
        known = self._known.get(start)
        return [] if known is None else self._ways(start, self._run(start, known))

    # Loops.

    def loops(self, inside: Iterable[int], head: int | None = None) -> list[tuple[int, set[int]]]:
        """The outermost loops within these blocks, leaving out edges to ``head``: head, blocks."""
        inside = set(inside)
        edges = {b: [x for x in self._out[b] if x in inside and x != head] for b in inside}
        found = []
        for component in networkx.strongly_connected_components(networkx.DiGraph(edges)):
            if len(component) > 1 or any(b in edges[b] for b in component):
                entered = [x for b in self.blocks if b not in component for x in self._out[b]]
                heads = [b for b in sorted(component) if b in entered] or sorted(component)
                found.append((heads[0], component))
        return sorted(found)

    def innermost(self, loop: tuple[int, set[int]]) -> list[Loop]:
        """The main loops in this one; itself where no loop in it is one."""
        head, inside = loop
        nested = [x for one in self.loops(inside, head) for x in self.innermost(one)]
        if nested:
            return nested
        unknown: list[int] = []
        path = self.steady(head, inside, unknown)
        counts = path.counts
        products = counts["tensor_core"] or counts["products"]
        traffic = counts["loaded"] + counts["stored"]
        return [Loop(head, path, tuple(unknown))] if products and traffic else []

    def steady(self, head: int, inside: set[int], unknown: list[int]) -> Path:
        """From the head to where the loop closes, or, of a loop that is left elsewhere, its end."""
        of_nested: dict[int, tuple[Path, set[int]]] = {}
        for nested, blocks in self.loops(inside, head):
            trips = self._trips(nested, blocks)
            if trips is None:
                unknown.append(nested)
            once = self.steady(nested, blocks, unknown)
            of_nested[nested] = Path().then(once, 1 if trips is None else trips), blocks
        member = {b: nested for nested, (_, blocks) in of_nested.items() for b in blocks}
        all_counts = [_counts(self.blocks[b].code) for b in inside]
        wide = any(c["wide"] for c in all_counts)
        by_tensor_cores = any(c["tensor_core"] for c in all_counts)

        def worth(path: Path) -> tuple[int, ...]:
            c = path.counts
            narrow = -c["narrow"] if wide else c["narrow"]
            products = c["tensor_core" if by_tensor_cores else "products"]
            return -c["loose"], c["wide"], products, narrow, c["special"], -c["instructions"]

        best: dict[int, Path] = {}

        def until_closed(block: int) -> Path | None:
            if block in best:
                return best[block]
            own, blocks = of_nested.get(block, (None, {block}))
            if own is None:
                own = Path(((block, 1),), _counts(self.blocks[block].code))
            # A loop that is entered beside its head is left the same way.
            leaving = {x for b in blocks for x in self._out[b] if x not in blocks or x == head}
            ways = [Path() if x == head else until_closed(member.get(x, x)) for x in leaving
                    if x == head or x in inside]  # fmt: skip
            there = [own.then(way) for way in ways if way is not None]
            if not there:
                return None
            best[block] = max(there, key=worth)
            return best[block]

        return until_closed(head) or Path()

    def _trips(self, head: int, inside: set[int]) -> int | None:
        """How often thread 0 runs a loop, if its exits follow from what is known before it."""
        state: Known | None = None
        for start in self.blocks:
            if start not in inside and head in self._out[start]:
                out = self._run(start, self._known[start])
                state = out if state is None else dict(state.items() & out.items())
        block, trips = head, 0
        for _ in range(_MOST_TRIPS * len(inside)):
            if state is None:
                return None
            trips += block == head
            state = self._run(block, state)
            ways = self._ways(block, state)
            staying = [x for x in ways if x in inside]
            if not staying:
                return trips
            if len(staying) < len(ways):
                return None
            block = min(staying, key=lambda x: _counts(self.blocks[x].code)["loose"])
        return None


def _blocks(code: Sequence[Instruction]) -> dict[int, Block]:
    """Basic blocks by the address of their first instruction."""
    addresses = [one.address for one in code]
    ends = ("BRA", "EXIT", "RET", "BRX", "JMX", "CALL")
    starts = {addresses[0]}
    for one, following in zip(code, [*addresses[1:], None], strict=True):
        if one.base in ends and following is not None:
            starts.add(following)
        if one.base in ("BRA", "CALL") and one.operands[-1].startswith("0x"):
            starts.add(int(one.operands[-1], 0))
    blocks: dict[int, Block] = {}
    for one in code:
        if one.address in starts:
            current = blocks[one.address] = Block(one.address, [])
        current.code.append(one)
    for block, following in zip(blocks.values(), [*list(blocks)[1:], None], strict=True):
        last = block.code[-1]
        if last.base == "BRA":
            block.taken = int(last.operands[-1], 0)
        never = last.base in ("EXIT", "RET", "BRX", "JMX") and not last.guard
        never = never or (last.name == "BRA" and not block.branch)
        block.falls = None if never else following
    return blocks
