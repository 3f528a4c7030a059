"""How operators may be cut over the devices of a mesh: what DTensor is told of them.

A rule names the axes of an operator's tensors by letters, as einsum does, and then the axes that
may be cut, each alone: ``bhnd,bgmd,bgmd -> bhnd,bgxd,bgx; b gh n``. Axes of one word are cut
together, query heads with the key/value heads they read. A tensor that lacks the axis is whole on
every device. With a ``+`` results that lack it are sums, of which each device has a part.
"""

import functools
import math
import sys
from dataclasses import dataclass
from typing import Any

# Rules of operators that DTensor has not been told yet.
_untold: dict[Any, "Rule"] = {}


@dataclass(frozen=True)
class Rule:
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    axes: tuple[str, ...]
    last: str  # the name of the operator's last argument


def _rule(operator: Any, text: str) -> Rule:
    tensors, axes = text.split(";")
    inputs, outputs = (
        tuple(word.strip() for word in part.split(",")) for part in tensors.split("->")
    )
    return Rule(inputs, outputs, tuple(axes.split()), operator._schema.arguments[-1].name)


def remember(operator: Any, text: str) -> None:
    """``operator``, an overload, may be cut as this rule says."""
    _untold[operator] = _rule(operator, text)


def tell_dtensor() -> None:
    """Not before somebody has one: its module takes a while to import."""
    if not _untold or "torch.distributed.tensor" not in sys.modules:
        return
    from torch.distributed.tensor.experimental import register_sharding

    while _untold:
        operator, known = _untold.popitem()
        register_sharding(operator)(functools.partial(_acceptable, known))


def _acceptable(known: Rule, *arguments: Any) -> list[tuple[list[Any], list[Any]]]:
    """Placements of results and of arguments that go together, on one axis of a mesh."""
    from torch.distributed.tensor import Partial, Replicate, Shard

    given = [argument for argument in arguments if hasattr(argument, "placements")]
    there = _results(known, arguments)
    whole = Replicate()

    def placed(axis: str, summed: bool) -> tuple[list[Any], list[Any]]:
        def cut(letters: str) -> Any:
            place = next((i for i, letter in enumerate(letters) if letter in axis), None)
            return None if place is None else Shard(place)

        results = [
            (cut(letters) or (Partial() if summed else whole)) if is_there else whole
            for letters, is_there in zip(known.outputs, there, strict=True)
        ]
        words = iter(known.inputs)
        placements: list[Any] = []
        for argument in arguments:
            if not hasattr(argument, "placements"):
                placements.append(None)
                if argument is None:  # a tensor that is left out
                    next(words)
                continue
            letters = next(words)
            placements.append((cut(letters) or whole) if _has(argument, letters) else whole)
        return results, placements

    acceptable = [placed("", False)]
    for word in known.axes:
        axis = word.rstrip("+")
        if len(axis) == 1 or _divides(known, given, axis):
            acceptable.append(placed(axis, word.endswith("+")))
    return acceptable


def _results(known: Rule, arguments: tuple[Any, ...]) -> list[bool]:
    """Which results come out: the others are empty, of one axis (see kernels.operators)."""
    many = range(len(known.outputs))
    if known.last == "save_state":
        return [i == 0 or arguments[-1] for i in many]
    if known.last == "wanted":
        return [arguments[-1] >> i & 1 == 1 for i in many]
    return [True for _ in many]


def _has(tensor: Any, letters: str) -> bool:
    return len(tensor.shape) == len(letters)


def _divides(known: Rule, given: list[Any], axis: str) -> bool:
    """Whether groups of heads are not cut apart: every device gets as many of each."""
    devices = math.prod(given[0].mesh.shape)
    sizes = [
        tensor.shape[letters.index(letter)]
        for tensor, letters in zip(given, known.inputs, strict=False)
        for letter in axis
        if letter in letters and _has(tensor, letters)
    ]
    return all(size % devices == 0 for size in sizes)
