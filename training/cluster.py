"""The missing runs of a table or an ablation as tasks of a Ray cluster (``--cluster``).

A run is what it is on one machine: it has its folder below ``--runs``, locks it, goes on from its
last checkpoint, and leaves the same record. So that records compare, runs go to machines like the
one that the command is given on, and take as many threads as a run would take there.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import torch

from linear_vit import cluster
from linear_vit.bench.progress import Progress, clock
from linear_vit.cluster import RETRIES, Node
from linear_vit.screen import counted, shown
from linear_vit.training.config import RECIPES, Config
from linear_vit.training.data.datasets import Dataset
from linear_vit.training.data.loader import default_workers
from linear_vit.training.errors import UserError, first_line, notice
from linear_vit.training.record import MACHINE, InUse, environment, same_machine
from linear_vit.training.runs import Runs

_SHOWN = 2  # runs that there is room for beside a bar
_LOOK_S = 1.0  # between two looks at how far the runs are
_FINISHED, _LEFT, _FAILED = "finished", "left", "failed"


def train_all(
    train: str,
    configs: Sequence[Config],
    load: Callable[[str], Dataset],
    runs: Runs,
    device: torch.device,
    *,
    address: str,
    workers: int | None = None,
) -> None:
    """Trains all configurations on the cluster at ``address``, as many at once as it has room for.

    ``train`` is the name of a function, ``module:function``: every process imports it, and calls it
    with runs, workers, configuration, data and device for the record of the run. ``load`` gives
    the data set of a name; it is read here, and sent to each node once.

    Raises UserError where some failed, with each one's reason, after the others have ended.
    """
    if not configs:
        return
    with cluster.joined(address) as ray:
        # Arrays are not copied into a process: all of a node's read the same memory.
        ray.util.register_serializer(
            torch.Tensor, serializer=torch.Tensor.numpy, deserializer=torch.from_numpy
        )
        data = {name: ray.put(load(name)) for name in {config.dataset for config in configs}}
        here = address == cluster.LOCAL  # its one node is this machine
        nodes, only = (cluster.nodes(ray), {}) if here else _alike(ray, device)
        task = ray.remote(max_retries=RETRIES, retry_exceptions=False)(_run)
        threads = torch.get_num_threads()

        def start(config: Config) -> Any:
            asks = _needs(config, device, workers, nodes)
            given = task.options(name=config.run_name, label_selector=only, **asks)
            how = (train, runs.sent(), workers)
            return given.remote(how, config, data[config.dataset], device.type, threads)

        at_once = max(_room(nodes, _needs(config, device, workers, nodes)) for config in configs)
        failed = _follow(ray, start, configs, runs, most=2 * at_once)
    if failed:
        of = f"{len(failed)} of {counted(len(configs), 'run')} failed; the others are recorded"
        raise UserError("\n".join([f"{of}, and the same command tries these again:", *failed]))


def _run(
    how: tuple[str, Runs, int | None],
    config: Config,
    data: Dataset,
    device_type: str,
    threads: int,
) -> tuple[str, str]:
    """One run, in a process of Ray's: how it ended, and what to say of it."""
    torch.set_num_threads(threads)
    train, runs, workers = how
    try:
        record = resolve_name(train)(runs, workers, config, data, torch.device(device_type))
    except InUse:
        return _LEFT, "left to another process, which is training it"
    except UserError as error:
        return _FAILED, shown(first_line(error))
    except Exception as error:  # the run's own, and no failure of the cluster
        return _FAILED, shown(f"{type(error).__name__}: {first_line(error)}")
    accuracy, took = record["test_accuracy"], record["seconds"]
    return _FINISHED, f"test accuracy {accuracy:.1%}, {took:.0f} s"


def _follow(
    ray: Any, start: Callable[[Config], Any], configs: Sequence[Config], runs: Runs, *, most: int
) -> list[str]:
    """Has all trained, with ``most`` given to Ray at once; the reasons of those that failed.

    What a run says of itself is in its record: nothing is sent here but how it ended.
    """
    waiting, running, failed = iter(configs), dict[Any, Config](), list[str]()
    epochs, ended = 0, 0
    progress = Progress("training", sum(config.epochs for config in configs))
    began = time.monotonic()
    try:
        while True:
            while len(running) < most and (config := next(waiting, None)) is not None:
                running[start(config)] = config
            if not running:
                return failed
            for ref in ray.wait(list(running), num_returns=1, timeout=_LOOK_S)[0]:
                config = running.pop(ref)
                how, text = _outcome(ray, ref)
                epochs, ended = epochs + config.epochs, ended + 1
                where = "" if how == _FINISHED else f" in {runs.folder / config.run_name}"
                line = f"{config.title}{where}: {text}"
                if how == _FAILED:
                    failed.append(line)
                after = clock(time.monotonic() - began)
                number = f"[{ended:>{len(str(len(configs)))}}/{len(configs)} {after}]"
                progress.line(f"{number} {line}", red=how == _FAILED)
            runs.look([config.run_name for config in running.values()])
            outs = {config: runs.folder / config.run_name for config in running.values()}
            far = {config: done for config, out in outs.items() if (done := _epochs(out))}
            done = epochs + sum(far.values())
            left = f"{clock(progress.left_s(done))} left" if done else "none has done an epoch"
            of = f"{ended} of {counted(len(configs), 'run')}"
            progress.move(done, "  ".join([of, left, *_under_way(far)]))
    except BaseException:
        cluster.stop(ray, running)  # their records say that they were interrupted
        raise
    finally:
        progress.close()


def _outcome(ray: Any, ref: Any) -> tuple[str, str]:
    try:
        how, text = ray.get(ref)
    except ray.exceptions.RayError as error:  # it died as often as it may
        return _FAILED, f"{type(error).__name__}: {first_line(error)}"
    return how, text


def _under_way(far: Mapping[Config, int]) -> list[str]:
    """How far the first few of the runs are."""
    said = [f"{config.title} epoch {n}/{config.epochs}" for config, n in far.items()]
    more = [f"and {len(said) - _SHOWN} more"] if len(said) > _SHOWN else []
    return said[:_SHOWN] + more


def _epochs(out: Path) -> int:
    """Epochs done of a run that has not ended; 0 where no record says."""
    try:
        record = json.loads((out / "run.json").read_text(encoding="utf-8"))
        return 0 if record["status"] == "finished" else len(record["epochs"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def _alike(ray: Any, device: torch.device) -> tuple[list[Node], dict[str, str]]:
    """The nodes whose runs compare with this machine's, and the labels that tell Ray so."""
    here, nodes = environment(device), cluster.nodes(ray)
    answers = cluster.ask(ray, _environment, device.type, torch.get_num_threads(), of=nodes)
    alike = []
    for node, there in zip(nodes, answers, strict=True):
        if isinstance(there, Exception):
            apart = first_line(there)
        elif same_machine(there, here):
            alike.append(node)
            continue
        else:
            apart = ", ".join(
                f"{name} {there.get(name)} (here: {here.get(name)})"
                for name in MACHINE
                if there.get(name) != here.get(name)
            )
        notice(f"no run goes to node {cluster.name_of(node)}: {apart}")
    if not alike:
        raise UserError(
            "no node of the cluster is like this machine, so that no record would be: give the "
            "command on a machine of the kind that is to train"
        )
    ids = ",".join(node["NodeID"] for node in alike)
    return alike, {"ray.io/node-id": f"in({ids})"} if len(alike) < len(nodes) else {}


def _environment(device_type: str, threads: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    return environment(torch.device(device_type))


def _needs(
    config: Config, device: torch.device, workers: int | None, nodes: Sequence[Node]
) -> dict[str, float]:
    """The CPUs and GPUs that a run asks Ray for: a core for each thread and each process that
    augments, or all of a node that has fewer."""
    cuda, helpers = device.type == "cuda", 0
    if RECIPES[config.recipe].per_image:
        helpers = default_workers(device) if workers is None else workers
    most = max(_has(node, "CPU") for node in nodes)
    cores = (1 if cuda else torch.get_num_threads()) + helpers
    return {"num_cpus": min(cores, most), "num_gpus": 1 if cuda else 0}


def _room(nodes: Sequence[Node], needs: dict[str, float]) -> int:
    """How many tasks with these needs run at once."""
    asks = {"CPU": needs["num_cpus"], "GPU": needs["num_gpus"]}
    rooms = [[_has(node, of) // n for of, n in asks.items() if n] for node in nodes]
    return int(sum(min(room, default=1) for room in rooms))


def _has(node: Node, what: str) -> float:
    return float(node["Resources"].get(what, 0))
