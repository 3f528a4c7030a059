"""Ray, for what runs on many machines. It is imported where ``--cluster`` is given, and only there.

What Ray does is not done here again: it queues tasks, finds each a node with what it asks for,
notices that a process or a node is gone, and starts its task anew.
"""

import logging
import os
import socket
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from linear_vit.bench.instruments import machine
from linear_vit.options import OptionError

LOCAL = "local"  # the address of a cluster of this machine alone, started for one command
# A task is begun so often again whose process or node dies. Its own errors are never tried again.
RETRIES = 3
# Ray's own settings, for a cluster that is started here.
_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",  # nothing is sent anywhere
    "RAY_task_oom_retries": str(RETRIES),  # of those it ends as memory runs out: else without end
    "RAY_worker_niceness": "0",  # they come after all else otherwise, and are timed so
}
_ANSWER_S = 5.0  # for a head node to take a connection
_STOP_S = 20.0
_ASKED_S = 300.0  # for a node to say what it is: it imports PyTorch first, maybe over a network

Node = Mapping[str, Any]  # a row of ray.nodes()


@contextmanager
def joined(address: str) -> Iterator[Any]:
    """The module ``ray``, joined to a cluster: that of the head node ``host:port``, the one that
    runs here (``auto``), or one that is started for as long as this lasts (``local``).

    Raises:
        OptionError: Ray is not installed, or nothing answers there.
    """
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    try:
        import ray
    except ImportError as error:
        raise OptionError(f"--cluster needs Ray: pip install '.[ray]' ({error})") from error
    given: dict[str, Any] = {"address": address}
    if address == LOCAL:
        given |= {"num_cpus": machine.available_cores(), "include_dashboard": False}
    else:
        _check(address)
    try:
        ray.init(**given, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:  # of another version, say
        hint = " (RAY_AUTH_MODE=token in the environment, if that cluster asks for a token?)"
        text = f"{str(error).splitlines()[0]}{'' if address in (LOCAL, 'auto') else hint}"
        raise OptionError(f"--cluster {address}: {text}") from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _check(address: str) -> None:
    """Raises OptionError at once where nobody answers, which Ray finds out in minutes."""
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or "/" in host:
        raise OptionError(
            f"--cluster: {address!r} is no address; take HOST:PORT of the head node (6379 is the "
            "usual port), auto for the cluster that runs on this machine, or local"
        )
    try:
        socket.create_connection((host, int(port)), timeout=_ANSWER_S).close()
    except (OSError, OverflowError) as error:
        raise OptionError(f"--cluster {address}: nothing answers there ({error})") from error


def nodes(ray: Any) -> list[Node]:
    """The nodes that are there now."""
    return [node for node in ray.nodes() if node["Alive"]]


def name_of(node: Node) -> str:
    return str(node["NodeManagerHostname"])


def on(node: Node) -> dict[str, Any]:
    """Options of a task that is for this node and no other."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    strategy = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    return {"scheduling_strategy": strategy}


def stop(ray: Any, tasks: Collection[Any]) -> None:
    """Interrupts these tasks, as Ctrl-C would, and waits a while for what they do then."""
    for task in tasks:
        ray.cancel(task)
    if tasks:
        ray.wait(list(tasks), num_returns=len(tasks), timeout=_STOP_S)


def ask(ray: Any, question: Callable[..., Any], *arguments: Any, of: Sequence[Node]) -> list[Any]:
    """What each of these nodes answers, in a process of its own: a value, or what it raised."""
    # Asks for nothing, so that it does not wait for others' tasks. And a process that has seen all
    # GPUs is no good for a task that is to see its own.
    task = ray.remote(num_cpus=0, max_calls=1)(question)
    answers = [task.options(**on(node)).remote(*arguments) for node in of]
    return [_answer(ray, answer) for answer in answers]


def _answer(ray: Any, answer: Any) -> Any:
    try:
        return ray.get(answer, timeout=_ASKED_S)
    except ray.exceptions.RayTaskError as error:
        return error.cause
    except ray.exceptions.RayError as error:  # it is gone, or did not answer
        return error
