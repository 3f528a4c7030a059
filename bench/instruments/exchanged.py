"""How many bytes a process sends to others of its group of torch.distributed."""

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor
from torch import distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

# What a process sends of its argument's bytes where each passes pieces on to the next, of P.
_SENT: dict[str, Callable[[int], float]] = {
    "allreduce_": lambda P: 2 * (P - 1) / P,
    "allgather_": lambda P: P - 1,
    "reduce_scatter_": lambda P: (P - 1) / P,
}


class Exchanged(TorchDispatchMode):
    """Counts while it is entered, in the group of all processes.

    Attributes:
        bytes: sent by this process, where each exchange goes around a ring (the least there is).
        exchanges: how many there were.

    Raises:
        NotImplementedError: in an exchange of a kind that it does not know.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0.0
        self.exchanges = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function.namespace == "c10d":
            name = function.overloadpacket.__name__
            if name not in _SENT:
                raise NotImplementedError(f"the bytes of c10d.{name} are not counted")
            given = args[0 if name == "allreduce_" else 1]
            size = sum(x.numel() * x.element_size() for x in _tensors(given))
            self.bytes += size * _SENT[name](dist.get_world_size())
            self.exchanges += 1
        return function(*args, **(kwargs or {}))


def _tensors(found: Any) -> Iterator[Tensor]:
    if isinstance(found, Tensor):
        yield found
    else:
        for one in found:
            yield from _tensors(one)
