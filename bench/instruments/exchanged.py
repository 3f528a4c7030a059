"""How many bytes a process sends to others of its group of torch.distributed."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch import distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode


def _of_all_reduce(given: list[Tensor], *_: Any) -> float:
    """Each piece passes on to the next process, first to be added up, then as the sum."""
    processes = dist.get_world_size()
    return 2 * (processes - 1) / processes * sum(x.nbytes for x in given)


def _of_all_to_all(
    out: Tensor, x: Tensor, group: Any, received: Any, sent: list[int], *_: Any
) -> float:
    """All but what stays here."""
    parts = sent or [len(x) // dist.get_world_size()] * dist.get_world_size()
    return x.nbytes * (1 - parts[dist.get_rank()] / sum(parts)) if sum(parts) else 0.0


_SENT: dict[str, Callable[..., float]] = {
    "allreduce_": _of_all_reduce,
    "alltoall_base_": _of_all_to_all,
}


class Exchanged(TorchDispatchMode):
    """Counts while it is entered, in the group of all processes.

    Attributes:
        bytes: sent by this process, where an all-reduce goes around a ring (the least there is).
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
            self.bytes += _SENT[name](*args)
            self.exchanges += 1
        return function(*args, **(kwargs or {}))
